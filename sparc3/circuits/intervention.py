"""An intervention that is no set of neurons: how it acts on a model, and the file that keeps it.

What is learnt is arrays by the name of the module that they act at; a form is what is done with
them there. Strength 0 leaves the model as it is, 1 does all that was learnt.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparc3.base.errors import InputError
from sparc3.base.files import Array, read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Arrays = Mapping[str, Array]


@dataclass(frozen=True, eq=False)
class Intervention:
    """A form of FORMS, with what it needs, and how strongly it acts."""

    form: str
    arrays: Arrays
    strength: float = 1.0

    def on(self, model: "PreTrainedModel") -> "AbstractContextManager[PreTrainedModel]":
        """Within it, `model` is changed; undone at the end, also after an exception."""
        return FORMS[self.form](model, self.arrays, self.strength)

    @property
    def at_head(self) -> bool:
        """Whether it changes what leaves the head, and nothing below."""
        return self.form in AT_HEAD

    def change(self, values: "Tensor") -> "Tensor":
        """Of one that acts `at_head`: what left the head (..., vocabulary), changed in place."""
        return AT_HEAD[self.form](self.arrays, values, self.strength)


def write_intervention(path: Path, intervention: Intervention) -> None:
    """Safetensors: the arrays, and form and strength as metadata."""
    about = {"form": intervention.form, "strength": repr(intervention.strength)}
    write_tensors(path, intervention.arrays, about)


def read_intervention(path: Path) -> Intervention:
    """An intervention from its file. InputError: not one."""
    arrays, about = read_tensors(path)
    if about.get("form") not in FORMS:
        raise InputError(f"{path}: not an intervention; expected a form, one of {', '.join(FORMS)}")
    return Intervention(about["form"], arrays, float(about["strength"]))


def transported(arrays: Arrays, y: "Tensor", strength: float) -> "Tensor":
    """y + strength (scale y + shift - y), in float32; where there are `low` and `high`, only of
    coordinates between them (Rodriguez et al. 2025, arXiv 2410.23054, Eq. 4 and section 3.4).
    """
    import torch

    given = {name: torch.from_numpy(array).to(y.device) for name, array in arrays.items()}
    values = y.float()
    move = given["scale"] * values + given["shift"] - values
    if "low" in given:
        move = move * ((given["low"] < values) & (values < given["high"]))
    return (values + strength * move).to(y.dtype)


def _projected(arrays: Arrays, y: "Tensor", strength: float) -> "Tensor":
    """y less strength times its part along a unit vector."""
    import torch

    direction = torch.from_numpy(arrays["direction"]).to(y.device)
    values = y.float()
    return (values - strength * (values @ direction)[..., None] * direction).to(y.dtype)


def replace_output(output: Any, change: "Callable[[Tensor], Tensor]") -> Any:
    """What a module returns, its first tensor changed."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


@contextmanager
def _at_outputs(
    change: "Callable[[Arrays, Tensor, float], Tensor]",
    model: "PreTrainedModel",
    arrays: Arrays,
    strength: float,
) -> "Iterator[PreTrainedModel]":
    """`change` of the output of every module that arrays are named after: MODULE/ARRAY."""
    sites: dict[str, dict[str, Array]] = {}
    for name, array in arrays.items():
        site, _, kind = name.rpartition("/")
        sites.setdefault(site, {})[kind] = array

    def hook(of_site: Arrays, module: "nn.Module", args: Any, output: Any) -> Any:
        return replace_output(output, lambda y: change(of_site, y, strength))

    with ExitStack() as stack:
        for site, of_site in sites.items():
            module = _module(model, site)
            stack.callback(module.register_forward_hook(partial(hook, of_site)).remove)
        yield model


def _module(model: "PreTrainedModel", site: str) -> "nn.Module":
    try:
        return model.get_submodule(site)
    except AttributeError:
        raise InputError(f"intervention: the model has no module {site}: it is another's") from None


@contextmanager
def _masked(
    model: "PreTrainedModel", arrays: Arrays, strength: float
) -> "Iterator[PreTrainedModel]":
    """Single weights of modules times 1 - strength, put back bit for bit: flat places by module."""
    import torch

    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        for site, array in arrays.items():
            flat = _module(model, site).get_parameter("weight").detach().view(-1)
            places = torch.from_numpy(array).to(flat.device, torch.long)
            kept.append((flat, places, flat[places]))
            flat[places] = flat[places] * (1 - strength)
        yield model
    finally:
        for flat, places, values in kept:
            flat[places] = values


def _lowered(arrays: Arrays, values: "Tensor", strength: float) -> "Tensor":
    """Each of `tokens` lower by `strength`, in place."""
    import torch

    values[..., torch.from_numpy(arrays["tokens"]).long().to(values.device)] -= strength
    return values


@contextmanager
def banned(
    model: "PreTrainedModel", arrays: Arrays, strength: float
) -> "Iterator[PreTrainedModel]":
    """Each of `tokens` has logits lower by `strength` nats.

    What leaves the output embedding is lowered, so likelihoods, completions and the model's own
    `forward` all see it; a cap on final logits comes after that and weakens it.
    """
    from sparc3.model.families import head

    def lower(module: "nn.Module", args: Any, values: "Tensor") -> None:
        _lowered(arrays, values, strength)

    hook = head(model).register_forward_hook(lower)
    try:
        yield model
    finally:
        hook.remove()


@contextmanager
def _prefixed(
    model: "PreTrainedModel", arrays: Arrays, strength: float
) -> "Iterator[PreTrainedModel]":
    """Every sequence that is read from its begin has `tokens` in front, after the `front` tokens
    that all begin with; last hidden states are of the given tokens alone, and the one that predicts
    the first given token is that of the last one in front. InputError: beyond the context.
    """
    import torch

    from sparc3.model.families import body, context

    tokens, front = torch.from_numpy(arrays["tokens"]).long(), int(arrays["front"][0])
    count = len(tokens) if strength else 0
    cut, limit, put = max(front - 1, 0), context(model.config.to_dict()), False

    def before(module: "nn.Module", args: Any, given: dict[str, Any]) -> tuple[Any, Any]:
        nonlocal put
        ids, cache = given["input_ids"], given.get("past_key_values")
        put = cache is None or not cache.get_seq_length()
        if not put:
            if cache is not None and cache.get_seq_length() + ids.shape[1] > limit:
                raise InputError(f"a prompt of {count} tokens, a text and its completion exceed "
                                 f"the model's context, {limit}; cut one of them")  # fmt: skip
            return args, given
        length = ids.shape[1] + count
        if length > limit:
            raise InputError(f"a text of {ids.shape[1]} tokens and a prompt of {count} are longer "
                             f"than the model's context, {limit}; cut one of them")  # fmt: skip
        own = tokens.to(ids.device).expand(len(ids), -1)[:, :count]
        changed = {"input_ids": torch.cat([ids[:, :front], own, ids[:, front:]], 1)}
        at = torch.cat([torch.arange(front), torch.arange(front + count, length)]).to(ids.device)
        if given.get("position_ids") is not None:
            places = torch.arange(length, device=ids.device).repeat(len(ids), 1)
            moved = given["position_ids"]
            places[:, at] = torch.where(moved < front, moved, moved + count)
            changed["position_ids"] = places
        if given.get("attention_mask") is not None:
            mask = given["attention_mask"]
            lowest = torch.finfo(mask.dtype).min
            whole = torch.full((length, length), lowest, dtype=mask.dtype, device=mask.device)
            whole = whole.triu(1).repeat(len(ids), 1, 1, 1)
            whole[:, :, at[:, None], at] = mask
            changed["attention_mask"] = whole
        return args, {**given, **changed}

    def after(module: "nn.Module", args: Any, output: Any) -> None:
        if put:
            states = output.last_hidden_state
            output.last_hidden_state = torch.cat([states[:, :cut], states[:, cut + count :]], 1)

    hooks = (
        body(model).register_forward_pre_hook(before, with_kwargs=True),
        body(model).register_forward_hook(after),
    )
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


Form = Callable[["PreTrainedModel", Arrays, float], "AbstractContextManager[PreTrainedModel]"]
FORMS: dict[str, Form] = {
    "transport": partial(_at_outputs, transported),
    "projection": partial(_at_outputs, _projected),
    "mask": _masked,
    "ban": banned,
    "prefix": _prefixed,
}
AT_HEAD = {"ban": _lowered}  # forms that change what leaves the head, and nothing below


def as_tokens(tokens: Any) -> Array:
    """Token ids as an array that a file can hold."""
    return np.array(tokens, dtype=np.int64)
