"""Linear-AcT (Rodriguez et al. 2025, arXiv 2410.23054): as Mean-AcT, with the line that carries the
sorted activations of the behaviour to those of the reference, within the range that was seen.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sparc3.base.files import Array
from sparc3.circuits.intervention import Arrays, Intervention
from sparc3.circuits.responses import Prompts, fitted, projections

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TINY = 1e-16  # keeps a coordinate that never varies from dividing 0 by 0


def line(behaviour: Array, reference: Array) -> Arrays:
    """Least squares of the sorted reference on the sorted behaviour, by coordinate (the optimal
    transport of as many points in one dimension); of the larger set the first prompts count.
    """
    count = min(len(behaviour), len(reference))
    x, y = (np.sort(part[:count].astype(np.float64), axis=0) for part in (behaviour, reference))
    dx, dy = x - x.mean(0), y - y.mean(0)
    scale = (dx * dy).sum(0) / ((dx * dx).sum(0) + TINY)
    found = {"scale": scale, "shift": y.mean(0) - scale * x.mean(0)}
    found |= {"low": behaviour.min(0), "high": behaviour.max(0)}
    return {name: array.astype(np.float32) for name, array in found.items()}


def learn(model: "PreTrainedModel", prompts: Prompts) -> Sequence[Intervention]:
    arrays = fitted(model, prompts, projections(model), "mean", line, at_once=False)
    return [Intervention("transport", arrays)]
