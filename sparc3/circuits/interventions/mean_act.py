"""Mean-AcT (Rodriguez et al. 2025, arXiv 2410.23054): outputs of up, gate and down are shifted by
the difference of mean activations, module by module, each fitted after those before it act.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sparc3.base.files import Array
from sparc3.circuits.intervention import Arrays, Intervention
from sparc3.circuits.responses import Prompts, fitted, projections

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPREAD = 1e-4  # coordinates that vary less over the prompts of either set stay (as in ml-act)


def shift(behaviour: Array, reference: Array) -> Arrays:
    """Mean of the reference less mean of the behaviour, by coordinate."""
    moved = reference.mean(0, dtype=np.float64) - behaviour.mean(0, dtype=np.float64)
    varies = np.minimum(behaviour.std(0, ddof=1), reference.std(0, ddof=1)) > SPREAD
    by = np.where(varies, moved, 0).astype(np.float32)
    return {"scale": np.ones_like(by), "shift": by}


def learn(model: "PreTrainedModel", prompts: Prompts) -> Sequence[Intervention]:
    arrays = fitted(model, prompts, projections(model), "mean", shift, at_once=False)
    return [Intervention("transport", arrays)]
