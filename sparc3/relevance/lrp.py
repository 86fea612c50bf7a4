"""Relevance as a modified gradient: AttnLRP (Achtibat et al. 2024, through lxt's `efficient`), and
what else its parts can be put together to.

Within `attnlrp(model)` what autograd computes is no longer dy/dx, but such that x * gradient is
the relevance of x for y. The values of the forward pass do not change.

Only this file imports lxt, whose patches replace functions of transformers and torch for the
whole process: here they are undone on exit.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from lxt.efficient.models import gemma3, gpt2, llama, qwen2, qwen3
from lxt.efficient.patches import (
    layer_norm_forward,
    patch_attention,
    patch_method,
    rms_norm_forward,
)
from lxt.efficient.rules import divide_gradient, stop_gradient
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.mistral import modeling_mistral
from transformers.models.opt import modeling_opt

from sparc3.model.families import family

EPSILON = 1e-10  # lxt's, in f(x) / (x + epsilon)


class Rules(NamedTuple):
    """How relevance passes what is not linear; without a rule as the plain gradient does.

    norm, activation: the identity rule (Eq. 9), for which a norm's scale, and f(x)/x, are constant.
    gate: what is left of the gradients of both factors of a gated MLP, f(g) and u.
    queries, values: what is left of those of queries and keys, and of values, in attention.
    The uniform rule (Eq. 7) halves both factors of every product.
    """

    norm: bool = True
    activation: bool = True
    gate: tuple[float, float] = (0.5, 0.5)
    queries: float = 0.25
    values: float = 0.5
    epsilon: float = EPSILON


ATTNLRP = Rules()
RULE_SETS = {
    "attnlrp": ATTNLRP,
    # Ali et al. 2022, as lxt has it: gates and attention weights are constants.
    "cp-lrp": Rules(gate=(0, 1), queries=0, values=1),
    # RelP (Rezaei Jafari et al. 2025, arXiv 2508.21258), its code's rules: attention has none.
    "relp": Rules(queries=1, values=1),
}


class _Gate(torch.autograd.Function):
    """h = f(g) * u with the identity rule for f and the uniform rule for the product.

    The identity rule replaces f'(g) by r = f(g)/g, the uniform rule halves what each factor
    receives. As h = r*g*u, the two gradients are then r*u/2 and r*g/2 times that of h. Only g and
    u are kept, half of what the composition of lxt's functions keeps.
    """

    @staticmethod
    def forward(ctx: Any, f: Callable[[Tensor], Tensor], g: Tensor, u: Tensor) -> Tensor:
        ctx.f, ctx.rules = f, _rules
        ctx.save_for_backward(g, u)
        return f(g) * u

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor]:
        g, u = ctx.saved_tensors
        to_gate, to_up = ctx.rules.gate
        if ctx.rules.activation:
            shared = _ratio(ctx.f, g, ctx.rules.epsilon).mul_(gradients[0])
            return None, (shared * u).mul_(to_gate), shared.mul_(g).mul_(to_up)
        with torch.enable_grad():
            leaf = g.detach().requires_grad_()
            value = ctx.f(leaf)
        (passed,) = torch.autograd.grad(value, leaf, gradients[0] * u)
        return None, passed * to_gate, value.detach() * gradients[0] * to_up


class _Activation(torch.autograd.Function):
    """h = f(z) with the identity rule, keeping only z."""

    @staticmethod
    def forward(ctx: Any, f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        ctx.f, ctx.rules = f, _rules
        ctx.save_for_backward(z)
        return f(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (z,) = ctx.saved_tensors
        return None, _ratio(ctx.f, z, ctx.rules.epsilon).mul_(gradients[0])


def _ratio(f: Callable[[Tensor], Tensor], x: Tensor, epsilon: float) -> Tensor:
    x = x.float()  # float16 would round epsilon to 0, and 0 / 0 is not finite
    return f(x) / (x + epsilon)


def _gated_mlp_forward(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(_Gate.apply(self.act_fn, self.gate_proj(x), self.up_proj(x)))


def _gpt2_mlp_forward(self: Any, x: Tensor) -> Tensor:
    return self.c_proj(_activated(self.act, self.c_fc(x)))


def _activation_forward(self: Any, z: Tensor) -> Tensor:
    return _activated(self.original_forward, z)


def _activated(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    return _Activation.apply(f, z) if _rules.activation else f(z)


def _patch_attention(module: Any) -> bool:
    """As lxt's, for other shares than AttnLRP's."""

    def sharing(forward: Callable[..., Any]) -> Callable[..., Any]:
        def attention(
            of: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **how: Any
        ) -> Any:
            query, key = (_shared(x, _rules.queries) for x in (query, key))
            return forward(of, query, key, _shared(value, _rules.values), *args, **how)

        return attention

    every = module.ALL_ATTENTION_FUNCTIONS
    module.eager_attention_forward = sharing(module.eager_attention_forward)
    module.ALL_ATTENTION_FUNCTIONS = {name: sharing(each) for name, each in every.items()}
    return True


def _shared(x: Tensor, share: float) -> Tensor:
    """x, of whose gradient only a share is left."""
    if not share:
        return stop_gradient(x)
    return divide_gradient(x, 1 / share)  # pyright: ignore[reportArgumentType]  # of any number


_gated_mlp = partial(patch_method, _gated_mlp_forward)


# What to patch, by config.model_type: class or module -> lxt patch. lxt has no map for Mistral and
# OPT; in its maps only the MLP is replaced, by the same rules in half the memory.
RULES: dict[str, Mapping[Any, Callable[[Any], bool]]] = {
    "llama": {**llama.attnLRP, llama.LlamaMLP: _gated_mlp},
    "qwen2": {**qwen2.attnLRP, qwen2.Qwen2MLP: _gated_mlp},
    "qwen3": {**qwen3.attnLRP, qwen3.Qwen3MLP: _gated_mlp},
    "gemma3_text": {**gemma3.attnLRP, gemma3.Gemma3MLP: _gated_mlp},
    "mistral": {
        modeling_mistral.MistralMLP: _gated_mlp,
        modeling_mistral.MistralRMSNorm: partial(patch_method, rms_norm_forward),
        modeling_mistral: patch_attention,
    },
    "gpt2": {**gpt2.attnLRP, gpt2.GPT2MLP: partial(patch_method, _gpt2_mlp_forward)},
    "opt": {
        nn.LayerNorm: partial(patch_method, layer_norm_forward),
        modeling_opt: patch_attention,
    },
}
_patched = False
_rules = ATTNLRP  # those of the block


@contextmanager
def attnlrp(model: PreTrainedModel, rules: Rules = ATTNLRP) -> Iterator[None]:
    """Within the block, gradients through `model` (and its whole family) are relevance by `rules`.

    Neither reentrant nor thread-safe: the patches belong to the process. It is the block that a
    graph is built in that counts, not where `backward` is called. InputError: unknown family.
    RuntimeError: already inside, or something else has left lxt's patches behind.
    """
    global _patched, _rules
    family(model.config.model_type)
    if _patched:
        raise RuntimeError("attnlrp: already active in this process")
    patches = _patches(model, rules)
    before = {target: dict(vars(target)) for target in patches}
    _patched, _rules = True, rules
    try:
        for target, patch in patches.items():
            if not patch(target):
                raise RuntimeError(f"attnlrp: {target} was patched outside of it")
        _rebind(model)
        yield
    finally:
        for target, attributes in before.items():
            _restore(target, attributes)
        _rebind(model)
        _patched, _rules = False, ATTNLRP


def _patches(model: PreTrainedModel, rules: Rules) -> dict[Any, Callable[[Any], bool]]:
    """What to patch, and how, by the row of RULES and what `rules` leave of it."""
    patches = dict(RULES[model.config.model_type])
    if model.config.model_type == "opt":  # its MLP is inlined in the layer: patch the activation
        activation = type(model.get_submodule("model.decoder.layers.0").activation_fn)
        patches[activation] = partial(patch_method, _activation_forward, keep_original=True)
    for target in [*patches]:
        if isinstance(target, ModuleType):
            if (rules.queries, rules.values) != (ATTNLRP.queries, ATTNLRP.values):
                patches[target] = _patch_attention
        elif "Norm" in target.__name__ and not rules.norm:
            del patches[target]
    return patches


def _restore(target: Any, before: Mapping[str, Any]) -> None:
    for name in [name for name in vars(target) if name not in before]:
        delattr(target, name)
    for name, value in before.items():
        if vars(target).get(name) is not value:
            setattr(target, name, value)


def _rebind(model: PreTrainedModel) -> None:
    # accelerate (device_map) keeps each module's forward as it was when the model was spread out,
    # so a patch of the class, and its removal, would not reach the module.
    for module in model.modules():
        if "_old_forward" in vars(module):
            vars(module)["_old_forward"] = type(module).forward.__get__(module)
