"""The claims table: published numbers as data, arithmetic among them, verdicts from intervals."""

import json
import subprocess
import sys
from dataclasses import asdict
from math import comb, erfc, sqrt

import pytest

from sparc3.circuits import overlap
from sparc3.reporting.published import FORMULAS, PUBLISHED, Claim, claims

ROWS = {row["id"]: row for row in json.loads(PUBLISHED.read_text())}
LLAMA = {
    "layers": 32,
    "width": 14_336,
    "overlap_neurons": 100,
    "neurons_toxicity": 100,
    "neurons_gender": 100,
    "neurons_race": 100,
    "neurons_bold": 100,
    "scorer_toxicity": "detoxify",
    "scorer_gender": "modernbert",
    "scorer_race": "modernbert",
    "perplexity_text": "wikitext-2",
    "gpus": 2,
}
SMOL = {**LLAMA, "layers": 30, "width": 1536}


def verdicts(measured: dict) -> dict[str, Claim]:
    return {claim.row["id"]: claim for claim in claims(measured)}


def measured_as(shift: float) -> dict:
    """Everything measured on the published model, each interval narrow and `shift` off."""
    out: dict = {"setup": LLAMA}
    for row in ROWS.values():
        if "measure" in row:
            name, key = row["measure"]
            value = row["value"] * (1 + shift)
            half = abs(row["value"]) * 1e-6
            leaf = {"value": value, "low": value - half, "high": value + half}
            out.setdefault(name, {})[key] = leaf
    return out


def published(name: str) -> float:
    return ROWS[name]["value"]


# The data


def test_rows_are_well_formed() -> None:
    assert len(ROWS) == len(json.loads(PUBLISHED.read_text())), "two rows share an id"
    for name, row in ROWS.items():
        common = {"id", "what", "value", "unit", "where", "rounding"}
        if "formula" in row:
            assert set(row) == common | {"formula", "inputs"}, name
            assert row["formula"] in FORMULAS, name
        else:
            assert {"measure"} <= set(row) - common <= {"measure", "null", "needs"}, name
            assert row.get("null") != row["value"], name
    measures = [tuple(row["measure"]) for row in ROWS.values() if "measure" in row]
    assert len(measures) == len(set(measures)), "two rows read the same measurement"
    assert {row["formula"] for row in ROWS.values() if "formula" in row} == set(FORMULAS)


def test_every_published_number_is_there() -> None:
    table = {
        "toxicity": (27.2, 0.3041, 0.2515, 17.3, 0.80, 51),
        "gender": (39.9, 0.6627, 0.5691, 14.1, 0.95, 54),
        "race": (37.6, 0.2504, 0.2220, 11.3, 2.57, 51),
    }
    words = ("differential", "baseline", "pruned", "reduction", "ppl-delta")
    for behaviour, (*numbers, improved) in table.items():
        assert [published(f"{word}-{behaviour}") for word in words] == numbers
        assert published(f"improved-{behaviour}") == pytest.approx(100 * improved / 93, abs=0.05)
    others = {
        "baseline-sd-toxicity": 0.3928,
        "pruned-sd-toxicity": 0.3556,
        "perplexity-before": 5.47,
        "perplexity-after-toxicity": 5.51,
        "bold-differential": 1.2,
        "bold-perplexity": 761.57,
        "overlap-toxicity-gender": 11,
        "overlap-toxicity-race": 6,
        "overlap-gender-race": 15,
        "overlap-toxicity-gender-race": 5,
        "region-gender-race": 10,
        "region-toxicity-gender": 6,
        "region-toxicity-race": 1,
        "region-race": 84,
        "region-gender": 79,
        "region-toxicity": 88,
        "enrichment-triple": 1_052_267,
        "p-triple-arithmetic": 4.75e-6,
        "correlation-toxicity-gender": 0.602,
        "correlation-gender-race": 0.442,
        "correlation-toxicity-race": 0.370,
        "late-share": 70,
        "cost-gpu-hours": 22,
        "cost-seed-hours": 3.5,
        "cost-behaviour-minutes": 54,
        "cost-score-file": 28,
        "cost-memory": 256,
        "paper-share": 0.27,
        "aura-toxic-share": 1.90,
        "linear-act-toxic-share": 1.35,
        "aura-perplexity": 0.45,
    }
    for name, value in others.items():
        assert published(name) == value, name
    for cell, count in {
        "both": 16_889,
        "toxicity": 54_893,
        "gender": 21_364,
        "neither": 365_606,
    }.items():
        assert published(f"quadrant-{cell}") == round(100 * count / 458_752, 1)
        assert f"{count:,}" in ROWS[f"quadrant-{cell}"]["what"]
    for neuron in ("15:6658", "19:10660", "28:4743", "29:9972", "30:6954"):
        assert neuron in ROWS["triple-neurons"]["what"]


# Arithmetic


def test_published_arithmetic_holds_but_for_the_p_of_the_triple() -> None:
    found = [claim for claim in claims({}) if "formula" in claim.row]
    wrong = [claim for claim in found if claim.verdict != "reproduced"]
    assert len(found) > 15
    assert [claim.row["id"] for claim in wrong] == ["p-triple-arithmetic"]
    assert wrong[0].verdict == "not reproduced"
    assert f"{wrong[0].value:.1e}" == "1.5e-29"
    # What was printed as its p is the mean of the overlap.
    assert overlap.expected((100, 100, 100), 458_752) == pytest.approx(
        published("p-triple-arithmetic"), abs=ROWS["p-triple-arithmetic"]["rounding"]
    )


@pytest.mark.parametrize("behaviour", ["toxicity", "gender", "race"])
def test_reduction_is_one_minus_the_quotient(behaviour: str) -> None:
    quotient = published(f"pruned-{behaviour}") / published(f"baseline-{behaviour}")
    assert round(100 * (1 - quotient), 1) == published(f"reduction-{behaviour}")
    row = ROWS[f"reduction-{behaviour}-arithmetic"]
    assert row["inputs"] == [published(f"baseline-{behaviour}"), published(f"pruned-{behaviour}")]


def test_printed_perplexities_allow_the_printed_change() -> None:
    before, after = published("perplexity-before"), published("perplexity-after-toxicity")
    lowest = 100 * ((after - 0.005) / (before + 0.005) - 1)
    highest = 100 * ((after + 0.005) / (before - 0.005) - 1)
    assert lowest <= published("ppl-delta-toxicity") <= highest
    row = ROWS["ppl-delta-toxicity-arithmetic"]
    assert row["rounding"] == pytest.approx((highest - lowest) / 2, abs=0.01)


def test_regions_follow_from_the_overlaps() -> None:
    pairs = {
        names: published(f"overlap-{names}")
        for names in ("toxicity-gender", "toxicity-race", "gender-race")
    }
    triple = published("overlap-toxicity-gender-race")
    for names, count in pairs.items():
        assert published(f"region-{names}") == count - triple
    for name in ("toxicity", "gender", "race"):
        shared = sum(count for names, count in pairs.items() if name in names.split("-"))
        assert published(f"region-{name}") == 100 - shared + triple


def test_evidence_behind_the_published_reductions() -> None:
    """What the published numbers themselves allow to say, without the data behind them."""
    prompts = 93
    spread = published("baseline-sd-toxicity") ** 2 + published("pruned-sd-toxicity") ** 2
    z = (published("baseline-toxicity") - published("pruned-toxicity")) / sqrt(spread / prompts)
    assert round(z, 2) == 0.96
    assert round(erfc(z / sqrt(2)), 2) == 0.34
    for behaviour, p in {"toxicity": 0.41, "race": 0.41, "gender": 0.15}.items():
        improved = round(published(f"improved-{behaviour}") * prompts / 100)
        tail = sum(comb(prompts, k) for k in range(improved, prompts + 1)) / 2**prompts
        assert round(2 * tail, 2) == p
    given = overlap.triple_given_pairs(5, (11, 6, 15), (100, 100, 100), 458_752)
    assert round(given["p"], 3) == 0.011


# Verdicts


def test_measured_as_published_everything_is_reproduced() -> None:
    for claim in claims(measured_as(0.0)):
        if "formula" not in claim.row:
            assert claim.verdict == "reproduced", claim
            assert claim.direction in ("agrees", ""), claim


def test_measured_otherwise_nothing_is_reproduced() -> None:
    for claim in claims(measured_as(-0.4)):
        if "formula" not in claim.row:
            assert claim.verdict == "not reproduced", claim


@pytest.mark.parametrize(
    ("low", "high", "verdict", "direction"),
    [
        (10, 20, "reproduced", "agrees"),
        (17.34, 20, "reproduced", "agrees"),  # 17.3 may stand for 17.34
        (17.36, 20, "not reproduced", "agrees"),
        (2, 9, "not reproduced", "agrees"),
        (-3, 9, "not reproduced", "open"),
        (0, 0, "not reproduced", "open"),
        (-9, -3, "not reproduced", "disagrees"),
        (-3, 25, "not testable on this model", "open"),
    ],
)
def test_verdict_is_computed_from_the_interval(
    low: float, high: float, verdict: str, direction: str
) -> None:
    leaf = {"value": (low + high) / 2, "low": low, "high": high, "p": 0.5, "n": 9, "mde": 1.0}
    claim = verdicts({"reduction": {"toxicity": leaf}})["reduction-toxicity"]
    assert (claim.verdict, claim.direction) == (verdict, direction)
    assert (claim.value, claim.low, claim.high) == (leaf["value"], low, high)


def test_direction_of_a_claim_below_its_null() -> None:
    measured = {
        "gap": {"bold": {"value": 3, "low": 0, "high": 9}},
        "correlation_difference": {
            "race.toxicity minus gender.race": {"value": 0.2, "low": 0.1, "high": 0.3}
        },
    }
    found = verdicts(measured)
    assert found["bold-differential"].direction == "agrees"
    assert found["correlation-apart"].direction == "disagrees"


def test_a_number_without_an_interval_can_agree_but_not_refute() -> None:
    found = verdicts({"setup": LLAMA, "overlap": {"gender.toxicity": 11, "gender.race": 14}})
    assert found["overlap-toxicity-gender"].verdict == "reproduced"
    assert found["overlap-gender-race"].verdict == "not testable on this model"
    assert found["overlap-gender-race"].reason == "measured without an interval"
    assert found["overlap-gender-race"].low == found["overlap-gender-race"].high == 14


def test_another_model_cannot_test_what_needs_the_published_one() -> None:
    found = verdicts({**measured_as(0.0), "setup": SMOL})
    claim = found["overlap-toxicity-gender"]
    assert claim.verdict == "not testable on this model"
    assert claim.reason == "needs layers 32, width 14336; this run has layers 30, width 1536"
    assert claim.value == 11
    assert found["enrichment-triple"].direction == "agrees"  # more than chance, on any model
    assert found["correlation-gender-race"].verdict == "reproduced"


def test_what_is_absent_is_not_testable() -> None:
    for measured in (
        {},
        {"reduction": {}},
        {"reduction": {"toxicity": None}},
        {"reduction": {"religion": {"value": 3.0, "low": 1.0, "high": 4.0}}},
    ):
        for claim in claims(measured):
            if "formula" not in claim.row:
                assert claim.verdict == "not testable on this model"
                assert claim.reason
                assert claim.value is claim.low is claim.high is None


def test_the_table_is_json() -> None:
    rows = [asdict(claim) for claim in claims(measured_as(0.1))]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_light_start() -> None:
    heavy = "{'torch', 'transformers', 'mlflow', 'scipy.stats'}"
    code = f"import sys, sparc3.reporting.published; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
