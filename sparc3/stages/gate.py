"""Gate: does the behaviour differ enough from its reference to go on?

The reproduction's check before its expensive run: the difference of total relevance, in percent of
the reference's, on the first few prompts of both sets. It sees length and scale, not where in the
model the difference lies: a pass is weak evidence, a failure is worth a look at the prompts.
"""

import logging
from typing import NamedTuple

import numpy as np

from sparc3.base.artifacts import OUTPUTS, groups_of, metrics_path, score_shards
from sparc3.base.errors import InputError
from sparc3.base.files import Array, write_csv, write_json
from sparc3.base.params import Params
from sparc3.measure import inference

log = logging.getLogger(__name__)


class Totals(NamedTuple):
    """Total absolute relevance of some prompts, and their grouping keys; shapes (prompt,)."""

    relevance: Array
    groups: list[str]


def differential_percent(reference: Array, behaviour: Array) -> float:
    """100 * (R_general - R_behaviour) / R_general, in percent.

    `reference` and `behaviour` hold each prompt's total absolute relevance, shape (prompt,); the R
    are their means. Raises InputError if the reference has no relevance at all.
    """
    total = float(np.mean(reference, dtype=np.float64))
    if total == 0:
        raise InputError("gate: the reference prompts have no relevance; check attribute's scores")
    return 100 * (total - float(np.mean(behaviour, dtype=np.float64))) / total


def differential_interval(reference: Totals, behaviour: Totals) -> inference.Estimate:
    """`differential_percent` with its interval: groups of both sets resampled, each set apart.

    Raises InputError as `differential_percent`, and for fewer than 6 groups in a set.
    """
    differential_percent(reference.relevance, behaviour.relevance)
    parts = [by_group(totals) for totals in (reference, behaviour)]
    count = len(parts[0])

    def percent(weights: Array) -> Array:
        means = [
            (weights @ part)[:, 0] / (weights @ part)[:, 1]
            for weights, part in zip(np.split(weights, [count], axis=1), parts, strict=True)
        ]
        return 100 * (1 - means[1] / means[0])

    return inference.bootstrap(percent, [len(part) for part in parts])


def by_group(totals: Totals) -> Array:
    """Summed relevance and number of prompts of every group, shape (group, 2)."""
    _, code = np.unique(totals.groups, return_inverse=True)
    return np.stack([np.bincount(code, totals.relevance), np.bincount(code)], axis=1)


def totals(prompt_set: str, score: str, prompts: int) -> Totals:
    """Of the first `prompts` prompts of a set's attribute split."""
    ids: list[str] = []
    sums: list[float] = []
    for shard, scores in score_shards(prompt_set, score):
        more = scores[: prompts - len(sums)]
        ids += shard[: len(more)]
        sums += np.abs(more).sum((1, 2), dtype=np.float64).tolist()
        if len(sums) >= prompts:
            break
    return Totals(np.array(sums), groups_of(prompt_set, ids))


def run(params: Params, behaviour: str) -> dict[str, float]:
    spec, gate = params.behaviours[behaviour], params.gate
    found = {
        name: totals(name, gate.score, gate.prompts) for name in (spec.reference, spec.prompts)
    }
    estimate = differential_interval(found[spec.reference], found[spec.prompts])
    passed = estimate.value >= gate.threshold
    if not passed:
        message = (
            f"gate: {behaviour}: differential {estimate.value:.1f} % is below gate.threshold "
            f"{gate.threshold:g} %"
        )
        if spec.on_fail == "stop":
            raise InputError(
                f"{message}; choose other prompts, or set behaviours.{behaviour}.on_fail: warn"
            )
        log.warning("%s; going on, since behaviours.%s.on_fail is warn", message, behaviour)
    rows = [
        {"prompt_set": name, "prompt": i, "relevance": float(value)}
        for name, measured in found.items()
        for i, value in enumerate(measured.relevance)
    ]
    write_csv(OUTPUTS / "gate" / f"{behaviour}.csv", rows, ("prompt_set", "prompt", "relevance"))
    write_json(
        metrics_path("gate", behaviour),
        {"differential": estimate.as_dict(), "passed": float(passed)},
    )
    return {
        "differential": estimate.value,
        "differential_low": estimate.low,
        "differential_high": estimate.high,
        "passed": float(passed),
    }
