"""Gate: does the behaviour differ enough from its reference to go on?

The reproduction's check before its expensive run: the difference of total relevance, in percent of
the reference's, on the first few prompts of both sets. It sees length and scale, not where in the
model the difference lies: a pass is weak evidence, a failure is worth a look at the prompts.
"""

import logging

import numpy as np

from sparc3.artifacts import OUTPUTS, metrics_path, score_shards
from sparc3.errors import InputError
from sparc3.files import Array, write_csv, write_json
from sparc3.params import Params

log = logging.getLogger(__name__)


def differential_percent(reference: Array, behaviour: Array) -> float:
    """100 * (R_general - R_behaviour) / R_general, in percent.

    `reference` and `behaviour` hold each prompt's total absolute relevance, shape (prompt,); the R
    are their means. Raises InputError if the reference has no relevance at all.
    """
    total = float(np.mean(reference, dtype=np.float64))
    if total == 0:
        raise InputError("gate: the reference prompts have no relevance; check attribute's scores")
    return 100 * (total - float(np.mean(behaviour, dtype=np.float64))) / total


def totals(prompt_set: str, score: str, prompts: int) -> Array:
    """Total absolute relevance of the first `prompts` prompts of a set, shape (prompt,)."""
    sums: list[float] = []
    for _, scores in score_shards(prompt_set, score):
        sums += np.abs(scores[: prompts - len(sums)]).sum((1, 2), dtype=np.float64).tolist()
        if len(sums) >= prompts:
            break
    return np.array(sums)


def run(params: Params, behaviour: str) -> dict[str, float]:
    spec, gate = params.behaviours[behaviour], params.gate
    found = {
        name: totals(name, gate.score, gate.prompts) for name in (spec.reference, spec.prompts)
    }
    percent = differential_percent(found[spec.reference], found[spec.prompts])
    passed = percent >= gate.threshold
    if not passed:
        message = (
            f"gate: {behaviour}: differential {percent:.1f} % is below gate.threshold "
            f"{gate.threshold:g} %"
        )
        if spec.on_fail == "stop":
            raise InputError(
                f"{message}; choose other prompts, or set behaviours.{behaviour}.on_fail: warn"
            )
        log.warning("%s; going on, since behaviours.%s.on_fail is warn", message, behaviour)
    rows = [
        {"prompt_set": name, "prompt": i, "relevance": float(value)}
        for name, values in found.items()
        for i, value in enumerate(values)
    ]
    write_csv(OUTPUTS / "gate" / f"{behaviour}.csv", rows, ("prompt_set", "prompt", "relevance"))
    metrics = {"differential": percent, "passed": float(passed)}
    write_json(metrics_path("gate", behaviour), metrics)
    return metrics
