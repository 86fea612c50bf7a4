"""Contrastive activation addition (Rimsky et al. 2024, arXiv 2312.06681): the difference of mean
hidden states at the last token, added to one layer's output at every token.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sparc3.base.files import Array
from sparc3.circuits.intervention import Arrays, Intervention
from sparc3.circuits.responses import Prompts, at_depths, fitted

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def difference(behaviour: Array, reference: Array) -> Arrays:
    """Mean of the reference less mean of the behaviour."""
    by = (reference.mean(0, dtype=np.float64) - behaviour.mean(0, dtype=np.float64)).astype("f4")
    return {"scale": np.ones_like(by), "shift": by}


def learn(model: "PreTrainedModel", prompts: Prompts) -> Sequence[Intervention]:
    """One for each of several depths."""
    sites = at_depths(model)
    arrays = fitted(model, prompts, sites, "last", difference)
    return [
        Intervention("transport", {n: a for n, a in arrays.items() if n.rpartition("/")[0] == site})
        for site in sites
    ]
