"""The published numbers beside the measured ones, with a verdict computed from the interval.

`published.json` holds one object per number: id, what, value, unit, where, rounding (how far the
printed value may be from the exact one), and either

- `measure`: where in the measured quantities its counterpart stands; `null`, the value that would
  mean no effect (15 for the gate); `needs`, facts of the setup without which the value cannot be
  compared; or
- `formula` and `inputs`: the number is said to follow from other published ones.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from sparc3.base.artifacts import evaluation_folder, metrics_path
from sparc3.base.files import markdown, read_csv, read_json
from sparc3.base.params import Params
from sparc3.circuits.overlap import enrichment, joined, overlap_p
from sparc3.measure import inference
from sparc3.reporting.tables import first_split, number

PUBLISHED = Path(__file__).with_name("published.json")
REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
NOT_TESTABLE = "not testable on this model"
FORMULAS: dict[str, Callable[..., float]] = {
    "reduction": lambda before, after: 100 * (1 - after / before),
    "change": lambda before, after: 100 * (after / before - 1),
    "share": lambda part, whole: 100 * part / whole,
    "ratio": lambda before, after: before / after,
    "remainder": lambda whole, *parts: whole - sum(parts),
    "total": lambda *parts: sum(parts),
    "product": lambda *factors: prod(factors),
    "enrichment": enrichment,
    "overlap_p": overlap_p,
}


@dataclass(frozen=True)
class Claim:
    """One published number, a row of published.json, and what became of it.

    `value`, `low`, `high` are what this run measured (None where it did not) in the row's unit, or,
    for a formula, the value computed from published inputs. `direction` compares the interval with
    the value that means no effect: "agrees" or "disagrees" if it lies wholly on one side, "open" if
    it holds that value, "" where there is none.
    """

    row: Mapping[str, Any]
    value: float | None
    low: float | None
    high: float | None
    verdict: str
    reason: str
    direction: str = ""


def claims(measured: Mapping[str, Mapping[str, Any]]) -> list[Claim]:
    """A verdict for every published number, in the order of published.json.

    `measured`: name -> key -> a number, or a mapping with "value", "low" and "high" (other keys
    are ignored, so a difference of the metrics files fits), named as published.json's `measure`.
    A number alone has no interval: it can agree with what was published, but not refute it. What is
    absent is not testable, never an error. Under "setup" are the facts that `needs` may name.

    Verdicts: "reproduced" if the interval holds the published value and leaves out no effect;
    "not reproduced" if it does not hold the published value; "not testable on this model" if the
    quantity was not measured, if the model or instrument differs from what it needs, or if the
    interval holds the published value and no effect alike, so that it tells nothing.
    """
    published = read_json(PUBLISHED)
    return [computed(row) if "formula" in row else judged(row, measured) for row in published]


def computed(row: Mapping[str, Any]) -> Claim:
    """A claim that is arithmetic on published numbers."""
    value = float(FORMULAS[row["formula"]](*row["inputs"]))
    # A rounding of exactly half a digit is meant to pass whatever binary fractions make of it.
    if abs(value - row["value"]) <= row["rounding"] + 1e-9 * abs(row["value"]):
        return Claim(row, value, None, None, REPRODUCED, "follows from published inputs")
    reason = "does not follow from published inputs"
    return Claim(row, value, None, None, NOT_REPRODUCED, reason)


def judged(row: Mapping[str, Any], measured: Mapping[str, Mapping[str, Any]]) -> Claim:
    """A claim that a measurement, if there is one, speaks to."""
    name, key = row["measure"]
    published, null, rounding = row["value"], row.get("null"), row["rounding"]
    setup, needed = measured.get("setup", {}), row.get("needs", {})
    lacking = [fact for fact, wanted in needed.items() if setup.get(fact) != wanted]
    needs = "needs " + ", ".join(f"{fact} {needed[fact]}" for fact in lacking)
    leaf = measured.get(name, {}).get(key)
    if leaf is None:
        reason = needs if lacking else f"not measured in this run: {name}, {key}"
        return Claim(row, None, None, None, NOT_TESTABLE, reason)
    exact = not isinstance(leaf, Mapping)
    value, low, high = [leaf] * 3 if exact else (leaf[k] for k in ("value", "low", "high"))
    direction = side(low, high, published, null)
    verdict, reason = REPRODUCED, f"{published:g} lies in [{low:.4g}, {high:.4g}]"
    if lacking:
        have = ", ".join(f"{fact} {setup.get(fact, 'unknown')}" for fact in lacking)
        verdict, reason = NOT_TESTABLE, f"{needs}; this run has {have}"
    elif exact and abs(value - published) > rounding:
        verdict, reason = NOT_TESTABLE, "measured without an interval"
    elif not low - rounding <= published <= high + rounding:
        verdict = NOT_REPRODUCED
        reason = f"{published:g} lies outside [{low:.4g}, {high:.4g}]"
    elif direction == "open":
        verdict = NOT_TESTABLE
        reason = f"too imprecise: [{low:.4g}, {high:.4g}] holds {published:g} and also {null:g}"
    return Claim(row, value, low, high, verdict, reason, direction)


def side(low: float, high: float, published: float, null: float | None) -> str:
    """The direction of a claim, from the measured interval and the value of no effect."""
    if null is None:
        return ""
    if low <= null <= high:
        return "open"
    return "agrees" if (low > null) == (published > null) else "disagrees"


def measured(params: Params, table: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What this run has to say on the published numbers, in the shape that `claims` takes."""
    general = {**params.prompt_sets, **params.test_sets}[params.evaluate.general]
    quantities: dict[str, dict[str, Any]] = {
        "setup": {
            "perplexity_text": general.source.removeprefix("hub/"),
            "overlap_neurons": params.overlap.num_neurons,
        },
        **measured_between(read_json(metrics_path("overlap"))),
    }
    for row in table:
        if row["method"] == params.report.method:
            for name, value in measured_of(params, row).items():
                quantities.setdefault(name, {}).update(value)
    return quantities


def measured_between(overlap: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The part of `measured` that compares behaviours; `overlap`: the stage's metrics."""
    last, layers = overlap["late_layers"], overlap["layers"].values()
    late, total = sum(sum(row[-last:]) for row in layers), sum(sum(row) for row in layers)
    signs = overlap["quadrants"].get(joined(("toxicity", "gender")), {})
    return {
        "region": overlap["regions"],
        "overlap": {names: row["observed"] for names, row in overlap["overlaps"].items()},
        "enrichment": {names: row["enrichment"] for names, row in overlap["overlaps"].items()},
        # What was published is not corrected for noise, so the plain correlation stands beside it;
        # that two correlations differ is tested on the corrected ones.
        "correlation": {n: row["pearson"] for n, row in overlap["correlations"].items()},
        "correlation_difference": overlap.get("corrected", {}).get("differences", {}),
        "quadrant": {n: 100 * count / sum(signs.values()) for n, count in signs.items()},
        "late_share": {"all": 100 * late / total} if total else {},
    }


def measured_of(params: Params, row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """One behaviour's part of `measured`: its cell, and the plain scores before and after."""
    name, differences = row["behaviour"], row["differences"]
    spec, split = params.behaviours[name], first_split(params)
    about = read_json(row["circuit"].with_suffix(".json"))
    perplexity = read_json(metrics_path("evaluate", name))["baseline"]["perplexity"]
    change = differences["ppl_delta"]
    quantities: dict[str, dict[str, Any]] = {
        "setup": {
            "layers": about["layers"],
            "width": about["width"],
            f"neurons_{name}": about["num_neurons"],
        },
        "gap": {name: row["gap"]},
        "ppl_delta": {name: change},
        "perplexity": {
            "before": perplexity,
            name: {k: perplexity * (1 + change[k] / 100) for k in ("value", "low", "high")},
        },
    }
    if "completions" not in spec.instruments:  # what was published are scores of completions
        return quantities
    prefix = "" if split == "test" else f"{split}_"
    for quantity in ("reduction", "improved"):
        if prefix + quantity in differences:
            quantities[quantity] = {name: differences[prefix + quantity]}
    scorer = params.scorers[spec.scorers[0]]
    modern = "modernbert" in (scorer.path or "").lower()
    quantities["setup"][f"scorer_{name}"] = "modernbert" if modern else scorer.kind
    prompts = read_csv(evaluation_folder(name) / "prompts.csv")
    for quantity, circuit in (("baseline", "none"), ("pruned", row["circuit"].stem)):
        rows = [r for r in prompts if (r["circuit"], r["split"]) == (circuit, split)]
        scores = [float(r[f"{spec.scorers[0]}_mean"]) for r in rows if r[f"{spec.scorers[0]}_mean"]]
        if scores:
            estimate = inference.mean_interval(scores, [r["group"] for r in rows])
            quantities[quantity] = {name: estimate._asdict()}
    return quantities


def claims_table(params: Params, table: list[dict[str, Any]]) -> str:
    """Every published number beside what this run measured, and the verdict."""
    rows = []
    for claim in claims(measured(params, table)):
        here, row = number(claim.value), claim.row
        if claim.low != claim.high:
            here += f" [{number(claim.low)}, {number(claim.high)}]"
        verdict = claim.verdict + (f", direction {claim.direction}" if claim.direction else "")
        said = f"{row['value']:g} {row['unit']}"
        rows.append([row["what"], said, here, verdict, claim.reason])
    return markdown(["published", "value", "here", "verdict", "because"], rows)
