"""AurA (Suau et al. 2024, arXiv 2407.12824): every output of up, gate and down whose largest
activation tells the behaviour from the reference is dampened by how well it does.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sparc3.base.files import Array
from sparc3.circuits.intervention import Arrays, Intervention
from sparc3.circuits.responses import Prompts, fitted, projections
from sparc3.relevance.contrasts import CONTRASTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dampening(behaviour: Array, reference: Array) -> Arrays:
    """1 - 2 (AUROC - 0.5) where AUROC is above 0.5, else 1 (Eq. 4)."""
    below = CONTRASTS["auroc"](reference[:, None], behaviour[:, None])[0]  # 0.5 - AUROC
    scale = np.minimum(1 + 2 * below, 1).astype(np.float32)
    return {"scale": scale, "shift": np.zeros_like(scale)}


def learn(model: "PreTrainedModel", prompts: Prompts) -> Sequence[Intervention]:
    """As published: no parameter."""
    arrays = fitted(model, prompts, projections(model), "max", dampening)
    return [Intervention("transport", arrays)]
