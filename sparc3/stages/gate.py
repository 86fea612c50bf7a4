"""Gate: does the reference's total relevance exceed the behaviour's by enough to go on?

The reproduction's check before its expensive run: the relevance gap, on the first few prompts of
both sets. One-sided: a behaviour of more relevance than its reference fails. It sees length and
scale, not where in the model the difference lies: a pass is weak evidence, a failure is worth a
look at the prompts.
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


def gap_interval(reference: Totals, behaviour: Totals) -> inference.Estimate:
    """100 * (R_reference - R_behaviour) / R_reference, in percent, of means over prompts. Groups
    are resampled, each set apart. InputError: a reference without relevance, or under 6 groups.
    """
    if not reference.relevance.any():
        raise InputError("gate: the reference prompts have no relevance; check attribute's scores")
    parts = [
        inference.cluster_sums(np.column_stack([t.relevance, np.ones(len(t.groups))]), t.groups)
        for t in (reference, behaviour)
    ]

    def percent(weights: Array) -> Array:
        means = [
            (weights @ part)[:, 0] / (weights @ part)[:, 1]
            for weights, part in zip(np.split(weights, [len(parts[0])], 1), parts, strict=True)
        ]
        return 100 * (1 - means[1] / means[0])

    return inference.bootstrap(percent, [len(part) for part in parts])


def totals(prompt_set: str, score: str, prompts: int) -> Totals:
    """Of the first `prompts` prompts of a set's attribute split; InputError: of too few groups."""
    ids: list[str] = []
    sums: list[float] = []
    for shard, scores in score_shards(prompt_set, score):
        more = scores[: prompts - len(sums)]
        ids += shard[: len(more)]
        sums += np.abs(more).sum((1, 2), dtype=np.float64).tolist()
        if len(sums) >= prompts:
            break
    groups = groups_of(prompt_set, ids)
    if len(set(groups)) < inference.MIN_CLUSTERS:
        raise InputError(
            f"gate: the first {len(ids)} prompts of {prompt_set} are of {len(set(groups))} groups, "
            f"too few for an interval, which needs {inference.MIN_CLUSTERS}; raise gate.prompts or "
            f"prompt_sets.{prompt_set}.count"
        )
    return Totals(np.array(sums), groups)


def run(params: Params, behaviour: str) -> dict[str, float]:
    spec, gate = params.behaviours[behaviour], params.gate
    sets = {name: totals(name, gate.score, gate.prompts) for name in (spec.reference, spec.prompts)}
    gap = gap_interval(sets[spec.reference], sets[spec.prompts])
    passed = gap.value >= gate.threshold
    said = f"relevance gap {gap.value:+.1f} % [{gap.low:+.1f}, {gap.high:+.1f}]"
    if passed:
        log.info("gate %s: passed, %s, gate.threshold %g %%", behaviour, said, gate.threshold)
    else:
        message = (
            f"gate {behaviour}: {said}, below gate.threshold {gate.threshold:g} %: the total "
            f"relevance of {spec.reference} does not exceed that of {spec.prompts} by enough"
        )
        if spec.on_fail == "stop":
            raise InputError(
                f"{message}; choose other prompts, or set behaviours.{behaviour}.on_fail: warn"
            )
        log.warning("%s; going on, since behaviours.%s.on_fail is warn", message, behaviour)
    rows = [
        {"prompt_set": name, "prompt": i, "relevance": value}
        for name, given in sets.items()
        for i, value in enumerate(given.relevance.tolist())
    ]
    write_csv(OUTPUTS / "gate" / f"{behaviour}.csv", rows, ("prompt_set", "prompt", "relevance"))
    write_json(metrics_path("gate", behaviour), {"gap": gap._asdict(), "passed": float(passed)})
    return {
        "differential": gap.value,  # the name that MLflow's users know
        "differential_low": gap.low,
        "differential_high": gap.high,
        "passed": float(passed),
    }
