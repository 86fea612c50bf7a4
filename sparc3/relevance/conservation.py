"""Where relevance goes: none is lost but what biases and attention keep (AttnLRP, section 3.3).

That is so of a model whose every layer has its rule: of a layer without, relevance is not what
enters it from above.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparc3.model import families
from sparc3.relevance.lrp import attnlrp


class Balance(NamedTuple):
    """Of the relevance for the largest logit at the last position of a text."""

    explained: float  # at the last hidden state
    entered: float  # at the input of the first layer
    biases: float
    attention: tuple[float, ...]  # what that of each layer keeps: biased by its softmax

    @property
    def error(self) -> float:
        """What is not accounted for, as a share of all parts' sizes."""
        parts = [self.explained, -self.entered, -self.biases, *(-kept for kept in self.attention)]
        return abs(sum(parts)) / sum(map(abs, parts))


def balance(model: PreTrainedModel, ids: Tensor) -> Balance:
    """The parts of the relevance for the largest logit after `ids` (1, token)."""
    body = families.body(model)
    biases = [p for name, p in body.named_parameters() if name.endswith("bias")]
    frozen = [bias for bias in biases if not bias.requires_grad]
    inputs: list[Tensor] = []

    def start(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        inputs.append(x if x.requires_grad else x.requires_grad_())

    hook = families.layers(model)[0].register_forward_pre_hook(start, with_kwargs=True)
    try:
        for bias in frozen:
            bias.requires_grad_()
        with attnlrp(model), _recording(model) as attentions:
            hidden = body(input_ids=ids, use_cache=False).last_hidden_state
        last = hidden[:, -1].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(families.logits(model, last).max(), last)
        tensors = [*inputs, *biases, *(tensor for each in attentions for tensor in each)]
        gradients = torch.autograd.grad(hidden[:, -1], tensors, gradient, allow_unused=True)
    finally:
        hook.remove()
        for bias in frozen:
            bias.requires_grad_(False)

    def relevance(x: Tensor, gradient: Tensor | None) -> float:
        return 0.0 if gradient is None else (x.double() * gradient.double()).sum().item()

    entered, *found = map(relevance, tensors, gradients)
    of_attention = iter(found[len(biases) :])
    kept = (output - q - k - v for q, k, v, output in zip(*[of_attention] * 4, strict=True))
    explained = relevance(last.detach(), gradient)
    return Balance(explained, entered, sum(found[: len(biases)]), tuple(kept))


@contextmanager
def _recording(
    model: PreTrainedModel,
) -> Iterator[list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """(query, key, value, output) of every call of attention, within `attnlrp`."""
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    kind, module = model.config._attn_implementation, cast(Any, sys.modules[type(model).__module__])
    eager = kind == "eager"
    inner = module.eager_attention_forward if eager else ALL_ATTENTION_FUNCTIONS[kind]

    def record(owner, query, key, value, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN202
        query, key, value = query * 1, key * 1, value * 1  # so that each has a gradient of its own
        output, weights = inner(owner, query, key, value, *args, **kwargs)
        found.append((query, key, value, output))
        return output, weights

    def put(function: object) -> None:
        if eager:
            module.eager_attention_forward = function
        else:
            ALL_ATTENTION_FUNCTIONS[kind] = function

    put(record)
    try:
        yield found
    finally:
        put(inner)
