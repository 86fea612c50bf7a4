"""Relevance as a modified gradient: AttnLRP (Achtibat et al. 2024, through lxt's `efficient`), and
what else its parts can be put together to.

Within `attnlrp(model)` what autograd computes is no longer dy/dx, but such that x * gradient is
the relevance of x for y. The values of the forward pass do not change. AttnLRP by structure:

- attention: the uniform rule for both products, the gradient through the softmax;
- an MLP: the identity rule for its activation, the uniform rule for the product of a gated one;
- a norm: the identity rule, by which its denominator counts as a constant.

Only this file imports lxt. Its patches, and those here, replace functions of transformers and torch
for the whole process: they are undone on exit.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import lxt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, activations
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from sparc3.base.errors import InputError
from sparc3.model.families import body, family, layers


def _lxt_patches() -> ModuleType:
    """lxt.efficient.patches without the models that lxt imports beside it: those need torchvision,
    and functions that transformers 5 no longer has.
    """
    package = ModuleType("lxt.efficient")
    package.__path__ = [str(Path(str(lxt.__file__)).parent / "efficient")]
    whole = sys.modules.setdefault("lxt.efficient", package)
    try:
        return import_module("lxt.efficient.patches")
    finally:
        if whole is package:
            del sys.modules["lxt.efficient"]


_patches = _lxt_patches()
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


def _fused_mlp_forward(self: Any, x: Tensor) -> Tensor:
    gate, up = self.gate_up_proj(x).chunk(2, -1)
    return self.down_proj(_Gate.apply(self.activation_fn, gate, up))


def _identity_rule(activation: type[nn.Module]) -> Callable[[Any, Tensor], Tensor]:
    original: Any = activation.forward
    return lambda self, z: _Activation.apply(lambda x: original(self, x), z)


def _layer_norm_forward(self: Any, x: Tensor) -> Tensor:
    return _patches.layer_norm_forward(self, x.float()).to(x.dtype)  # as PyTorch's own does


def _constant(rsqrt: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Every RMS norm of transformers takes its denominator from torch.rsqrt, whatever else it does
    with weights and types.
    """
    return lambda *args, **kwargs: rsqrt(*args, **kwargs).detach()


def _attention(forward: Callable[..., Any], rules: Rules) -> Callable[..., Any]:
    """An attention function, of transformers' public interface, by the rules."""
    if (rules.queries, rules.values) == (ATTNLRP.queries, ATTNLRP.values):
        return _patches.wrap_attention_forward(forward)

    def attention(
        of: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **how: Any
    ) -> Any:
        query, key = (_shared(x, rules.queries) for x in (query, key))
        return forward(of, query, key, _shared(value, rules.values), *args, **how)

    return attention


def _shared(x: Tensor, share: float) -> Tensor:
    """x, of whose gradient only a share is left."""
    if not share:
        return _patches.stop_gradient(x)
    return _patches.divide_gradient(x, 1 / share)


# Layers that need no rule: linear in their input, or, in evaluation, not there.
LINEAR = (nn.Linear, Conv1D, nn.Embedding, nn.Dropout, nn.Identity)


def patches(model: PreTrainedModel, rules: Rules) -> list[tuple[Any, str, Callable[..., Any]]]:
    """(class or module, name, what it is within `attnlrp`). InputError: unknown family, or a type
    of layer for which there is no rule, by name.
    """
    norms: dict[tuple[Any, str], Callable[..., Any]] = {}
    names, plain = family(model.config.model_type), []
    for name, module in body(model).named_modules():
        kind = type(module)
        if list(module.children()) or isinstance(module, LINEAR) or "Rotary" in kind.__name__:
            continue
        if isinstance(module, nn.LayerNorm):
            norms[nn.LayerNorm, "forward"] = _layer_norm_forward
        elif kind.__name__.endswith("Norm") and kind.__module__.startswith("transformers."):
            norms[torch, "rsqrt"] = _constant(torch.rsqrt)
        elif kind.__module__ in (activations.__name__, nn.modules.activation.__name__):
            plain.append(kind)
        else:
            raise InputError(
                f"lrp: no rule for a layer of type {kind.__name__} ({name}) in a model of family "
                f"{model.config.model_type}; take gradient, or a model without"
            )
    found = norms if rules.norm else {}
    if names.gate is None:
        rule = {(kind, "forward"): _identity_rule(kind) for kind in plain}
        found |= rule if rules.activation else {}
    else:
        mlp = type(layers(model)[0].get_submodule(names.down.rpartition(".")[0]))
        fused = names.gate == names.up
        found[mlp, "forward"] = _fused_mlp_forward if fused else _gated_mlp_forward
    attention = sys.modules[type(model).__module__]
    eager = attention.eager_attention_forward
    found[attention, "eager_attention_forward"] = _attention(eager, rules)
    return [(target, name, new) for (target, name), new in found.items()]


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
    replacing = patches(model, rules)
    if _patched:
        raise RuntimeError("attnlrp: already active in this process")
    before = [(target, name, getattr(target, name)) for target, name, _ in replacing]
    for module in {type(module) for module in model.modules()}:
        if module.forward.__module__.startswith("lxt."):
            raise RuntimeError(f"attnlrp: {module.__name__} was patched outside of it")
    kind = model.config._attn_implementation
    attention = ALL_ATTENTION_FUNCTIONS.get(kind)
    _patched, _rules = True, rules
    try:
        for target, name, new in replacing:
            setattr(target, name, new)
        if attention is not None:  # eager attention is the module's own
            ALL_ATTENTION_FUNCTIONS[kind] = _attention(attention, rules)
        _rebind(model)
        yield
    finally:
        for target, name, old in before:
            setattr(target, name, old)
        if attention is not None:
            ALL_ATTENTION_FUNCTIONS[kind] = attention
        _rebind(model)
        _patched, _rules = False, ATTNLRP


def _rebind(model: PreTrainedModel) -> None:
    # accelerate (device_map) keeps each module's forward as it was when the model was spread out,
    # so a patch of the class, and its removal, would not reach the module.
    for module in model.modules():
        if "_old_forward" in vars(module):
            vars(module)["_old_forward"] = type(module).forward.__get__(module)
