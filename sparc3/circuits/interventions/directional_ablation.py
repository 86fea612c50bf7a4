"""Directional ablation (Arditi et al. 2024, arXiv 2406.11717): the direction in which mean hidden
states of behaviour and reference differ is taken out of the residual stream everywhere.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sparc3.base.files import Array
from sparc3.circuits.intervention import Arrays, Intervention
from sparc3.circuits.responses import Prompts, at_depths, blocks, fitted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = ("self_attn", "attn")  # its module's name within a layer, by family


def direction(behaviour: Array, reference: Array) -> Arrays:
    """Unit vector of the difference of means."""
    along = behaviour.mean(0, dtype=np.float64) - reference.mean(0, dtype=np.float64)
    return {"direction": (along / np.linalg.norm(along)).astype(np.float32)}


def stream(model: "PreTrainedModel") -> list[str]:
    """Modules after which the direction is taken out: token embeddings, attention, layers."""
    tokens = model.get_input_embeddings()
    embeddings = next(name for name, module in model.named_modules() if module is tokens)
    ends = tuple(f".{name}" for name in ATTENTION)
    attention = [name for name, _ in model.named_modules() if name.endswith(ends)]
    return [embeddings, *attention, *blocks(model)]


def learn(model: "PreTrainedModel", prompts: Prompts) -> Sequence[Intervention]:
    """One for the direction at the last token of each of several depths."""
    found = fitted(model, prompts, at_depths(model), "last", direction)
    sites = stream(model)
    return [
        Intervention("projection", {f"{site}/direction": along for site in sites})
        for along in found.values()
    ]
