"""Set difference of important weights (Wei et al. 2024, arXiv 2402.05162): single weights that are
among the most important for the behaviour, and not for the reference, are set to zero.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sparc3.base.files import Array
from sparc3.circuits.intervention import Intervention
from sparc3.circuits.responses import Prompts, projections

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SHARES = (0.0001, 0.001, 0.01)  # of every matrix, that count as important


def importance(
    model: "PreTrainedModel", texts: Sequence[Sequence[int]], sites: Sequence[str]
) -> "list[Tensor]":
    """SNIP: mean over texts of |weight * gradient of the text's NLL|, of each module's weight."""
    import torch

    weights = [model.get_submodule(site).get_parameter("weight") for site in sites]
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for text in texts:
            ids = torch.tensor([list(text)], device=model.device)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            gradients = torch.autograd.grad(loss, weights)
            for total, weight, gradient in zip(sums, weights, gradients, strict=True):
                total += (weight.detach() * gradient).abs() / len(texts)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return sums


def difference(behaviour: "Tensor", reference: "Tensor", share: float) -> Array:
    """Flat places that are among the share of largest values of the first, not of the second."""
    count = int(share * behaviour.numel())
    first, second = (
        set(values.flatten().topk(count).indices.tolist()) for values in (behaviour, reference)
    )
    return np.array(sorted(first - second), dtype=np.int32)


def learn(model: "PreTrainedModel", prompts: Prompts) -> Sequence[Intervention]:
    """One for each of SHARES, over up, gate and down."""
    sites = projections(model)
    behaviour, reference = (
        importance(model, [text for text in texts if len(text) > 1], sites)
        for texts in (prompts.behaviour, prompts.reference)
    )
    scores = list(zip(sites, behaviour, reference, strict=True))
    return [
        Intervention("mask", {site: difference(one, other, share) for site, one, other in scores})
        for share in SHARES
    ]
