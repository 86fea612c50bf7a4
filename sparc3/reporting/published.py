"""The published numbers beside the measured ones, with a verdict computed from both intervals.

`published.json` holds one object per number: id, what, value, unit, where, rounding (how far the
printed value may be from the exact one), and one of

- `measure`: where in the measured quantities its counterpart stands; `null`, the value that would
  mean no effect (15 for the gate); `needs`, facts of the set-up (dose, scorer, prompts) beyond the
  model, without which the value cannot be compared; `fixed` where a circuit chosen within the
  perplexity budget has the quantity by construction; `error`, the published number's own: a row of
  ERRORS and what was published for it, or why there is none;
- `formula` and `inputs`: the number is said to follow from other published ones;
- `absent`: the number is said to stand in that source, and does not;
- `gate`: a behaviour that the gate says is, or is not, worth pruning.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import exp, hypot, log, prod, sqrt
from pathlib import Path
from typing import Any

from scipy.special import betaincinv, stdtrit

from sparc3.base.artifacts import METRICS, evaluation_folder, metrics_path
from sparc3.base.files import markdown, read_csv, read_json
from sparc3.base.params import Params, hub_of
from sparc3.circuits.overlap import enrichment, joined, overlap_p
from sparc3.measure import inference
from sparc3.reporting import tables
from sparc3.reporting.tables import first_split, number

PUBLISHED = Path(__file__).with_name("published.json")
PAGE = METRICS / "published.md"
CONSISTENT, INCONSISTENT = "consistent", "inconsistent"
REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
DIRECTION = "direction only"
FIXED = "fixed by construction"
NOT_TESTABLE = "not testable on this model"
MODEL = {"repository": "meta-llama/Meta-Llama-3-8B", "layers": 32, "width": 14336}
TAIL = (1 + inference.LEVEL) / 2
FORMULAS: dict[str, Callable[..., float]] = {
    "reduction": lambda before, after: 100 * (1 - after / before),
    "change": lambda before, after: 100 * (after / before - 1),
    "share": lambda part, whole: 100 * part / whole,
    "ratio": lambda before, after: before / after,
    "remainder": lambda whole, *parts: whole - sum(parts),
    "total": lambda *parts: sum(parts),
    "largest": max,
    "product": lambda *factors: prod(factors),
    # Hours of a job on two cards may be meant per card or not: what is nearer to the number said.
    "gpu_hours": lambda said, *hours: min(
        (cards * sum(hours) for cards in (1, 2)), key=lambda total: abs(total - said)
    ),
    "enrichment": enrichment,
    "overlap_p": overlap_p,
}


def mean_error(mean: float, sd: float, n: int) -> tuple[float, float]:
    """Student's interval of a mean of n scores."""
    reach = float(stdtrit(n - 1, TAIL)) * sd / sqrt(n)
    return mean - reach, mean + reach


def reduction_error(
    before: float, sd_before: float, after: float, sd_after: float, n: int
) -> tuple[float, float]:
    """Interval of a reduction in percent, from that of the log ratio of two independent means."""
    reach = float(stdtrit(n - 1, TAIL)) * hypot(sd_before / before, sd_after / after) / sqrt(n)
    middle = log(after / before)
    return 100 * (1 - exp(middle + reach)), 100 * (1 - exp(middle - reach))


def share_error(part: int, whole: int) -> tuple[float, float]:
    """Exact (Clopper-Pearson) interval of a share in percent, 0 < part < whole."""
    low = betaincinv(part, whole - part + 1, 1 - TAIL)
    return 100 * float(low), 100 * float(betaincinv(part + 1, whole - part, TAIL))


ERRORS: dict[str, Callable[..., tuple[float, float]]] = {
    "mean": mean_error,
    "reduction": reduction_error,
    "share": share_error,
}


@dataclass(frozen=True)
class Claim:
    """One published number, a row of published.json, and what became of it.

    `value`, `low`, `high` are what this run measured in the row's unit, or, for a formula, what
    follows from published inputs. `direction`: "agrees" or "disagrees" if the interval lies wholly
    on one side of no effect, "open" if it does not, or in another set-up is none, "" without such a
    value.
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

    `measured`: name -> key -> a number, or a mapping with "value", "low" and "high", named as
    published.json's `measure`. A number alone has no interval: it can agree with what was
    published, but not refute it. Under "setup" are the facts that `needs` may name.

    Verdicts on what was published alone: "consistent", "inconsistent". On the published model, at
    its dose, by its scorer: "reproduced" if the measured and the published interval are compatible,
    else "not reproduced". In another set-up: "direction only". "Fixed by construction" if the run
    was made to have the quantity. "Not testable on this model" if it was not measured, if another
    set-up has no direction to compare, or if the interval is compatible with no effect too.
    """
    return [judge(row, measured) for row in read_json(PUBLISHED)]


def judge(row: Mapping[str, Any], measured: Mapping[str, Mapping[str, Any]]) -> Claim:
    if "absent" in row:
        reason = f"no such number in {row['absent']}"
        return Claim(row, None, None, None, INCONSISTENT, reason)
    if "formula" in row:
        return computed(row)
    return foretold(row, measured) if "gate" in row else judged(row, measured)


def computed(row: Mapping[str, Any]) -> Claim:
    """A claim that is arithmetic on published numbers."""
    value = float(FORMULAS[row["formula"]](*row["inputs"]))
    # A rounding of exactly half a digit is meant to pass whatever binary fractions make of it.
    follows = abs(value - row["value"]) <= row["rounding"] + 1e-9 * abs(row["value"])
    reason = f"{'follows' if follows else 'does not follow'} from published inputs"
    return Claim(row, value, None, None, CONSISTENT if follows else INCONSISTENT, reason)


def foretold(row: Mapping[str, Any], measured: Mapping[str, Mapping[str, Any]]) -> Claim:
    """What the gate says of a behaviour, beside what pruning showed: no effect leaves it open."""
    leaf = measured.get("gate", {}).get(row["gate"])
    if leaf is None:
        reason = f"not measured in this run: gate, {row['gate']}"
        return Claim(row, None, None, None, NOT_TESTABLE, reason)
    passes, works = leaf["value"] >= row["value"], leaf["effect"].startswith("reduced, beyond")
    direction = ("agrees" if passes else "disagrees") if works else "open"
    reason = f"{'passes' if passes else 'fails'} the gate; pruning: {leaf['effect']}"
    value, low, high = (leaf[key] for key in ("value", "low", "high"))
    return Claim(row, value, low, high, DIRECTION, reason, direction)


def published_interval(row: Mapping[str, Any]) -> tuple[float, float]:
    """95 % interval of a published number; the number itself where too little was published."""
    error = row.get("error", "")
    if isinstance(error, str):
        return row["value"], row["value"]
    return ERRORS[error[0]](*error[1:])


def said(row: Mapping[str, Any]) -> str:
    low, high = published_interval(row)
    return f"{row['value']:g}" + (f" [{number(low)}, {number(high)}]" if low < high else "")


def judged(row: Mapping[str, Any], measured: Mapping[str, Mapping[str, Any]]) -> Claim:
    """A claim that a measurement, if there is one, speaks to.

    Two estimates are compatible if the interval of their difference holds 0, to the rounding; that
    interval is composed of theirs (MOVER: Zou and Donner 2008, Statistics in Medicine 27(10)).
    """
    name, key = row["measure"]
    published, null, rounding = row["value"], row.get("null"), row["rounding"]
    setup, needed = measured.get("setup", {}), MODEL | row.get("needs", {})
    lacking = [fact for fact, wanted in needed.items() if setup.get(fact) != wanted]
    needs = "needs " + ", ".join(f"{fact} {needed[fact]}" for fact in lacking)
    leaf = measured.get(name, {}).get(key)
    if leaf is None:
        reason = needs if lacking else f"not measured in this run: {name}, {key}"
        return Claim(row, None, None, None, NOT_TESTABLE, reason)
    exact = not isinstance(leaf, Mapping)
    value, low, high = [leaf] * 3 if exact else (leaf[k] for k in ("value", "low", "high"))
    if row.get("fixed") and setup.get("budget", True) and setup.get(f"own_{key}", True):
        reason = "the circuit's size was chosen to keep to select.budget"
        return Claim(row, value, low, high, FIXED, reason)
    direction = side(low, high, published, null)
    here, below, above = f"[{low:.4g}, {high:.4g}]", *published_interval(row)
    gap = value - published
    apart = max(
        gap - hypot(value - low, above - published), -gap - hypot(high - value, published - below)
    )
    verdict, reason = REPRODUCED, f"{here} is compatible with {said(row)}"
    if lacking:
        have = ", ".join(f"{fact} {setup.get(fact, 'unknown')}" for fact in lacking)
        verdict, reason = DIRECTION if direction else NOT_TESTABLE, f"{needs}; this run has {have}"
        if exact and direction:
            direction, reason = "open", f"{reason}; measured without an interval"
    elif exact and abs(gap) > rounding:
        verdict, reason = NOT_TESTABLE, "measured without an interval"
    elif apart > rounding + 1e-9 * abs(published):
        verdict, reason = NOT_REPRODUCED, f"{here} is not compatible with {said(row)}"
    elif direction not in ("agrees", ""):
        verdict = NOT_TESTABLE
        reason = f"too imprecise: {here} is compatible with {said(row)}, but not beyond {null:g}"
    if isinstance(row.get("error"), str):
        reason += f"; published {row['error']}"
    elif null is not None and below <= null <= above and below < above:
        reason += f"; published, {said(row)} does not exclude {null:g}"
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
    general = {**params.prompt_sets, **params.test_sets}[params.evaluate.general[0]]
    quantities: dict[str, dict[str, Any]] = {
        "setup": {
            "perplexity_text": general.source.removeprefix("hub/"),
            "overlap_neurons": params.overlap.num_neurons,
            "repository": (hub_of(params.model.path) or [None])[0],
            "split": first_split(params),
            "budget": params.select.num_neurons is None,
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
            **{key: about[key] for key in ("layers", "width")},
            f"neurons_{name}": about["num_neurons"],
            f"own_{name}": row["method"] == spec.method,  # which alone chooses its size
        },
        "gap": {name: row["gap"]},
        "gate": {name: {**row["gap"], "effect": tables.verdict(params, row)}},
        "ppl_delta": {name: change},
        "perplexity": {
            "before": perplexity,
            name: {k: perplexity * (1 + change[k] / 100) for k in ("value", "low", "high")},
        },
    }
    prefix = "" if split == "test" else f"{split}_"
    for quantity in ("reduction", "improved"):
        if prefix + quantity in differences:
            quantities[quantity] = {name: differences[prefix + quantity]}
    if "completions" not in spec.instruments:  # published scores are those of completions
        quantities["setup"][f"scorer_{name}"] = " and ".join(spec.instruments)
        return quantities
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


CLAIMS = ["published", "in", "value", "here", "verdict", "because"]


def claim_rows(params: Params, table: list[dict[str, Any]]) -> list[list[str]]:
    """Every published number beside what this run measured, and the verdict: columns of CLAIMS."""
    rows = []
    for claim in claims(measured(params, table)):
        here, row = number(claim.value), claim.row
        if claim.low != claim.high:
            here += f" [{number(claim.low)}, {number(claim.high)}]"
        verdict = [claim.verdict] if claim.verdict != DIRECTION else []
        verdict += [f"direction {claim.direction}"] if claim.direction else []
        value = f"{said(row)} {row['unit']}"
        rows.append([row["what"], row["where"], value, here, ", ".join(verdict), claim.reason])
    return rows


def claim_table(params: Params, table: list[dict[str, Any]]) -> str:
    """All claims as a table, which docs/published.md shows of the full profile."""
    return markdown(CLAIMS, claim_rows(params, table))
