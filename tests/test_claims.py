"""The claims table: published numbers as data, arithmetic among them, verdicts from intervals."""

import json
import subprocess
import sys
from dataclasses import asdict
from math import comb, erfc, exp, log, sqrt
from pathlib import Path

import numpy as np
import pytest
import yaml

from sparc3.circuits import overlap
from sparc3.reporting.published import (
    ERRORS,
    FORMULAS,
    MODEL,
    PUBLISHED,
    Claim,
    claims,
    published_interval,
)
from sparc3.reporting.tables import verdict
from sparc3.stages.checks import load

ROWS = {row["id"]: row for row in json.loads(PUBLISHED.read_text())}
ARITHMETIC = [name for name, row in ROWS.items() if "formula" in row]
MEASURED = [name for name, row in ROWS.items() if "measure" in row]
LLAMA = {
    **MODEL,
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
    "split": "in_sample",
    "budget": False,
}
SMOL = {**LLAMA, "layers": 30, "width": 1536}
OPT = {"repository": "facebook/opt-125m", "layers": 12, "width": 3072}


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
    common = {"id", "what", "value", "unit", "where", "rounding"}
    for name, row in ROWS.items():
        kinds = {"formula", "measure", "absent", "gate"} & set(row)
        assert len(kinds) == 1, name
        more = set(row) - common - kinds
        if "formula" in row:
            assert more == {"inputs"}, name
            assert row["formula"] in FORMULAS, name
        elif "measure" in row:
            assert more <= {"null", "needs", "fixed", "error"}, name
            assert row.get("null") != row["value"], name
            assert isinstance(row.get("error", ""), str) or row["error"][0] in ERRORS, name
        else:
            assert not more, name
    measures = [tuple(ROWS[name]["measure"]) for name in MEASURED]
    assert len(measures) == len(set(measures)), "two rows read the same measurement"
    assert {ROWS[name]["formula"] for name in ARITHMETIC} == set(FORMULAS)


def test_what_a_row_says_of_a_behaviour_needs_its_dose_and_its_scorer() -> None:
    for behaviour, scorer in {
        "toxicity": "detoxify",
        "gender": "modernbert",
        "race": "modernbert",
    }.items():
        dose = {f"neurons_{behaviour}": 100}
        scored = {f"scorer_{behaviour}": scorer, "split": "in_sample"}
        assert ROWS[f"baseline-{behaviour}"]["needs"].items() >= scored.items()
        for word in ("pruned", "reduction", "improved"):
            assert ROWS[f"{word}-{behaviour}"]["needs"].items() >= (dose | scored).items()
        text = {"perplexity_text": "wikitext-2"}
        assert ROWS[f"ppl-delta-{behaviour}"]["needs"].items() >= (dose | text).items()


def test_the_third_version_of_the_paper_is_named_where_it_says_something_else() -> None:
    third = {name for name, row in ROWS.items() if "v3" in row["where"]}
    assert third == {"paper-v3-share", "paper-v3-repetition"}
    for name in third:
        assert "7 May 2026" in ROWS[name]["where"]
        assert "Attribution-Guided Pruning for Insight and Control" in ROWS[name]["where"]
    assert "contrastive relevance" in ROWS["paper-v3-share"]["what"]


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
        "cost-storage": 200,
        "cost-attribution-arithmetic": 12,
        "cost-50-attribution-arithmetic": 50,
        "reduction-toxicity-source": 17.3,
        "paper-v3-share": 0.3,
        "paper-v3-repetition": 0.03,
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


HOURS = 3 * 3.5 + 3 * 54 / 60  # of attribution
NAIVE = {  # every arithmetic row by hand: the value that follows, and whether it is the printed one
    "reduction-toxicity-arithmetic": ((0.3041 - 0.2515) / 0.3041 * 100, True),
    "reduction-gender-arithmetic": ((0.6627 - 0.5691) / 0.6627 * 100, True),
    "reduction-race-arithmetic": ((0.2504 - 0.2220) / 0.2504 * 100, True),
    "ppl-delta-toxicity-arithmetic": ((5.51 - 5.47) / 5.47 * 100, True),
    "region-gender-race-arithmetic": (15 - 5, True),
    "region-toxicity-gender-arithmetic": (11 - 5, True),
    "region-toxicity-race-arithmetic": (6 - 5, True),
    "region-race-arithmetic": (100 - 15 - 6 + 5, True),
    "region-gender-arithmetic": (100 - 15 - 11 + 5, True),
    "region-toxicity-arithmetic": (100 - 11 - 6 + 5, True),
    "enrichment-triple-arithmetic": (5 * 458_752**2 / 100**3, True),
    "p-triple-arithmetic": (1.5e-29, False),
    "correlation-apart-arithmetic": (0.370 - 0.442, True),
    "correlation-largest-arithmetic": (0.602, False),
    "quadrant-both-arithmetic": (16_889 / 458_752 * 100, True),
    "quadrants-arithmetic": (32 * 14_336, True),
    "cost-score-file-arithmetic": (
        32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14_336) * 4e-9,
        True,
    ),
    "cost-attribution-arithmetic": (HOURS, False),
    "cost-phases-arithmetic": (18, False),
    "cost-runtimes-arithmetic": (2 * 14, False),
    "cost-50-attribution-arithmetic": (2 * HOURS, False),
    "cost-50-arithmetic": (22, False),
    "paper-share": (100 / (12 * 3072) * 100, True),
    "paper-v3-share": (100 / (12 * 3072) * 100, True),
    "aura-ratio-arithmetic": (5.80 / 1.90, True),
    "linear-act-ratio-arithmetic": (5.80 / 1.35, True),
}


def test_every_arithmetic_row_has_its_naive_arithmetic() -> None:
    assert set(NAIVE) == set(ARITHMETIC)


@pytest.mark.parametrize("name", ARITHMETIC)
def test_published_arithmetic(name: str) -> None:
    claim = verdicts({})[name]
    value, holds = NAIVE[name]
    assert claim.value == pytest.approx(value, rel=0.02 if name.startswith("p-") else 1e-9)
    assert claim.verdict == ("consistent" if holds else "inconsistent")
    row = ROWS[name]
    assert (abs(value - row["value"]) <= row["rounding"] * (1 + 1e-9)) == holds


def test_what_was_printed_as_p_of_the_triple_is_its_mean() -> None:
    assert overlap.expected((100, 100, 100), 458_752) == pytest.approx(
        published("p-triple-arithmetic"), abs=ROWS["p-triple-arithmetic"]["rounding"]
    )


def test_gpu_hours_fit_neither_as_those_of_a_card_nor_of_both() -> None:
    for name in ("phases", "runtimes", "50-attribution"):
        row = ROWS[f"cost-{name}-arithmetic"]
        total, *hours = row["inputs"]
        assert total == row["value"]
        assert min(abs(n * sum(hours) - total) for n in (1, 2)) > row["rounding"]
    assert FORMULAS["gpu_hours"](28, 4, 6, 4) == 28
    assert FORMULAS["gpu_hours"](14, 4, 6, 4) == 14


def test_no_source_has_the_number_that_was_faithfully_reproduced() -> None:
    claim = verdicts(measured_as(0.0))["reduction-toxicity-source"]
    assert claim.verdict == "inconsistent"
    assert claim.reason.startswith("no such number in paper v1")


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


# What was published has an error too


def test_error_of_a_mean_by_hand() -> None:
    low, high = published_interval(ROWS["baseline-toxicity"])
    assert (low + high) / 2 == pytest.approx(0.3041)
    assert (high - low) / 2 == pytest.approx(1.986 * 0.3928 / sqrt(93), rel=1e-3)  # t at 92


def test_error_of_a_reduction_covers_it_as_often_as_it_says() -> None:
    """Gamma scores with the published means and deviations, the two arms independent."""
    mean, sd, low, high = 0.3041, 0.3928, *published_interval(ROWS["reduction-toxicity"])
    relative = sqrt((0.3928 / 0.3041) ** 2 + (0.3556 / 0.2515) ** 2) / sqrt(93)
    for bound, sign in ((low, 1), (high, -1)):
        ratio = exp(log(0.2515 / 0.3041) + sign * 1.986 * relative)
        assert bound == pytest.approx(100 * (1 - ratio), rel=2e-3)
    assert low < 0 < 17.3 < high
    rng, hits, other, spread = np.random.default_rng(0), 0, 0.2515, 0.3556
    for _ in range(2000):
        before = rng.gamma((mean / sd) ** 2, sd**2 / mean, 93)
        after = rng.gamma((other / spread) ** 2, spread**2 / other, 93)
        bounds = ERRORS["reduction"](
            before.mean(), before.std(ddof=1), after.mean(), after.std(ddof=1), 93
        )
        hits += bounds[0] <= 100 * (1 - other / mean) <= bounds[1]
    assert 0.93 <= hits / 2000 <= 0.97


@pytest.mark.parametrize("behaviour", ["toxicity", "gender", "race"])
def test_error_of_a_share_is_the_binomial_one(behaviour: str) -> None:
    improved = round(published(f"improved-{behaviour}") * 93 / 100)
    low, high = (bound / 100 for bound in published_interval(ROWS[f"improved-{behaviour}"]))

    def chance(p: float, counts: range) -> float:
        return sum(comb(93, k) * p**k * (1 - p) ** (93 - k) for k in counts)

    assert chance(low, range(improved, 94)) == pytest.approx(0.025)
    assert chance(high, range(improved + 1)) == pytest.approx(0.025)
    assert low < 0.5 < high  # as the sign test says


def test_errors_are_computed_from_published_numbers() -> None:
    toxicity = [
        published(f"{arm}{word}-toxicity") for arm in ("baseline", "pruned") for word in ("", "-sd")
    ]
    assert ROWS["reduction-toxicity"]["error"] == ["reduction", *toxicity, 93]
    assert ROWS["baseline-toxicity"]["error"] == ["mean", *toxicity[:2], 93]
    assert ROWS["pruned-toxicity"]["error"] == ["mean", *toxicity[2:], 93]
    for name, row in ROWS.items():
        if name.startswith("correlation") and "measure" in row:
            assert "458,752 neurons" in row["error"]
            assert published_interval(row) == (row["value"], row["value"])


# Verdicts


def test_measured_as_published_everything_is_reproduced() -> None:
    out = verdicts(measured_as(0.0))
    for name in set(MEASURED) - {"paper-v3-repetition"}:
        assert out[name].verdict == "reproduced", out[name]
        assert out[name].direction in ("agrees", ""), out[name]
    opt = verdicts({**measured_as(0.0), "setup": LLAMA | OPT})
    assert opt["paper-v3-repetition"].verdict == "reproduced"
    assert out["paper-v3-repetition"].verdict == "not testable on this model"


def test_measured_otherwise_nothing_is_reproduced() -> None:
    """But for the one number that is too vague, as published, to be contradicted by 10.4 %."""
    rest = set(MEASURED) - {"reduction-toxicity", "paper-v3-repetition"}
    out = verdicts(measured_as(-0.4))
    for name in rest:
        assert out[name].verdict == "not reproduced", out[name]
    assert out["reduction-toxicity"].verdict == "reproduced"
    out = verdicts(measured_as(-2.0))
    for name in {*rest, "reduction-toxicity"}:
        assert out[name].verdict != "reproduced", out[name]


@pytest.mark.parametrize(
    ("low", "high", "verdict", "direction"),
    [
        (10, 20, "reproduced", "agrees"),
        (14.14, 20, "reproduced", "agrees"),  # 14.1 may stand for 14.14
        (14.16, 20, "not reproduced", "agrees"),
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
    claim = verdicts({"setup": LLAMA, "reduction": {"gender": leaf}})["reduction-gender"]
    assert (claim.verdict, claim.direction) == (verdict, direction)
    assert (claim.value, claim.low, claim.high) == (leaf["value"], low, high)


@pytest.mark.parametrize(
    ("low", "high", "verdict", "direction"),
    [
        (2, 9, "reproduced", "agrees"),  # 17.3 [-23, 44] is no narrower claim
        (-9, -3, "not testable on this model", "disagrees"),
        (-3, 9, "not testable on this model", "open"),
        (38, 48, "reproduced", "agrees"),
        (60, 70, "not reproduced", "agrees"),
        (-70, -60, "not reproduced", "disagrees"),
    ],
)
def test_the_published_interval_counts(
    low: float, high: float, verdict: str, direction: str
) -> None:
    leaf = {"value": (low + high) / 2, "low": low, "high": high}
    claim = verdicts({"setup": LLAMA, "reduction": {"toxicity": leaf}})["reduction-toxicity"]
    assert (claim.verdict, claim.direction) == (verdict, direction)
    assert "does not exclude 0" in claim.reason


@pytest.mark.parametrize("fact", sorted(LLAMA.keys() - {"budget"}))
def test_no_row_of_another_set_up_can_be_reproduced(fact: str) -> None:
    """Another model for every row; another dose, scorer or prompts for the rows that need them."""
    for other in (None, "another", 7):
        out = verdicts({**measured_as(0.0), "setup": LLAMA | {fact: other}})
        for name in MEASURED:
            if fact in MODEL or fact in ROWS[name].get("needs", {}):
                word = "direction only" if "null" in ROWS[name] else "not testable on this model"
                assert out[name].verdict == word, out[name]
                assert (out[name].direction == "agrees") == ("null" in ROWS[name])


def test_every_fact_of_the_set_up_is_needed_somewhere() -> None:
    facts = {fact for name in MEASURED for fact in ROWS[name].get("needs", {})}
    assert set(MODEL) | facts == LLAMA.keys() - {"budget"}


def test_the_published_set_up_is_that_of_its_profile() -> None:
    profile = yaml.safe_load(Path("profiles/llama3-8b.yaml").read_text())
    assert profile["model"]["path"].startswith(f"models/{MODEL['repository']}@")
    assert profile["select"]["num_neurons"] == LLAMA["neurons_toxicity"]  # no budget
    assert profile["prepare"]["splits"]["test"] == 0  # in sample


def test_what_is_fixed_by_construction_is_not_reproduced() -> None:
    fixed = {name for name in MEASURED if ROWS[name].get("fixed")}
    of = {name for name in MEASURED if ROWS[name]["measure"][0] in ("ppl_delta", "perplexity")}
    assert fixed == of - {"perplexity-before"}
    for setup in (LLAMA | {"budget": True}, SMOL | {"budget": True}, {}):
        out = verdicts({**measured_as(0.0), "setup": setup})
        for name in fixed:
            assert out[name].verdict == "fixed by construction"
            assert out[name].direction == ""
            assert out[name].value == published(name)
            behaviour = ROWS[name]["measure"][1]  # another method's size is not its own choice
            other = verdicts({**measured_as(0.0), "setup": setup | {f"own_{behaviour}": False}})
            assert other[name].verdict != "fixed by construction"


# The gate


@pytest.mark.parametrize(
    ("gap", "shown", "direction", "words"),
    [
        (
            -11.4,
            True,
            "disagrees",
            "fails the gate; pruning: reduced, beyond 19 random draws (5 in completions)",
        ),
        (
            48.3,
            True,
            "agrees",
            "passes the gate; pruning: reduced, beyond 19 random draws (5 in completions)",
        ),
        (48.3, False, "open", "passes the gate; pruning: not shown; 9 % would have been"),
        (14.9, False, "open", "fails the gate; pruning: not shown; 9 % would have been"),
        (
            15.0,
            True,
            "agrees",
            "passes the gate; pruning: reduced, beyond 19 random draws (5 in completions)",
        ),
    ],
)
def test_the_gate_is_held_against_what_pruning_showed(
    gap: float, shown: bool, direction: str, words: str
) -> None:
    row = {
        "family": "confirmatory",
        "change": {"value": 20.0, "moved": 20, "n": 30},
        "against": {"low": 5.0, "high": 30.0},
        "against_ban": None,
        "among": {
            "nll_shift": {"p": 0.05, "n": 19},
            "reduction": {"value": 20.0, "most": 3.0, "n": 5},
        },
        "differences": {"ppl_worst": {"value": 0.5}},
        **{"behaviour": "toxicity", "sign": 1},
        **{"p": 0.5 - 0.49 * shown, "least": 0.001, "level": 0.05 / 3, "mde": 9.0},
        **{"broken": False, "overshot": False},
    }
    leaf = {"value": gap, "low": gap - 9, "high": gap + 9, "effect": verdict(load(), row)}
    claim = verdicts({"gate": {"toxicity": leaf}})["gate-toxicity"]
    assert (claim.verdict, claim.direction, claim.reason) == ("direction only", direction, words)
    assert (claim.value, claim.low, claim.high) == (gap, gap - 9, gap + 9)


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
    none = verdicts({"setup": SMOL, "enrichment": {"gender.race.toxicity": 0.0}})[
        "enrichment-triple"
    ]
    assert (none.verdict, none.direction) == ("direction only", "open")  # 0 of 0.0005 is no news
    assert none.reason.endswith("; measured without an interval")


def test_another_model_cannot_test_what_needs_the_published_one() -> None:
    found = verdicts({**measured_as(0.0), "setup": SMOL})
    claim = found["overlap-toxicity-gender"]
    assert claim.verdict == "not testable on this model"
    assert claim.reason == "needs layers 32, width 14336; this run has layers 30, width 1536"
    assert claim.value == 11
    for name in ("enrichment-triple", "correlation-gender-race"):  # more than chance, on any model
        assert (found[name].verdict, found[name].direction) == ("direction only", "agrees")


def test_what_is_absent_is_not_testable() -> None:
    for measured in (
        {},
        {"reduction": {}},
        {"reduction": {"toxicity": None}},
        {"reduction": {"religion": {"value": 3.0, "low": 1.0, "high": 4.0}}},
    ):
        for claim in claims(measured):
            if "measure" in claim.row or "gate" in claim.row:
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
