"""Check: can the numbers of a model's folder be trusted? The checks of the tests, on a user's own.

python -m sparc3 check models/mine --dtype bfloat16
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparc3.base.errors import InputError
from sparc3.base.params import Model
from sparc3.circuits.ablate import prune_weights, pruned, pruned_rows
from sparc3.circuits.circuit import Circuit
from sparc3.model import families, loading

EVERY = 7  # of neurons, this many apart, one is removed to try
KEPT = 0.25  # of every second one of those, so that dampening is tried too


def run(model: Path, dtype: str) -> None:
    """A line for each check. InputError: the model cannot be loaded, or a check fails."""
    spec = Model(path=str(model), dtype=dtype)  # pyright: ignore[reportArgumentType]
    loading.tokenizer(spec)
    loaded = loading.load(spec)  # its weights all there and finite, its logits those of eager
    print(f"OK    loading: {structure(loaded)}; logits of eager attention")
    checks: dict[str, Callable[[PreTrainedModel], str]] = {
        "rules of relevance": rules,
        "relevance": conserved,
        "pruning": removed,
    }
    wrong = []
    for name, check in checks.items():
        try:
            print(f"OK    {name}: {check(loaded)}")
        except InputError as error:
            wrong.append(name)
            print(f"WRONG {name}: {error}")
    if wrong:
        trust = "" if "pruning" in wrong else "; all that does without lrp and lrp-abs can"
        raise InputError(f"{model}: numbers that need {', '.join(wrong)} cannot be trusted{trust}")
    print("The numbers can be trusted.")


def structure(model: PreTrainedModel) -> str:
    """What was found; InputError, which names the layer: an MLP unlike the first one."""
    shapes = [families.outgoing(mlp.down).shape for mlp in families.mlps(model)]
    hidden = model.config.hidden_size
    for layer, mlp in enumerate(families.mlps(model)):
        read = [families.incoming(part).shape for part in (mlp.up, mlp.gate or mlp.up)]
        if shapes[layer] != shapes[0] or {*read} != {(shapes[0][1], hidden)}:
            raise InputError(f"model: layer {layer} has an MLP unlike that of layer 0")
    kind = type(model).__name__
    return f"{kind}, {len(shapes)} layers x {families.width(model):,} neurons in {model.dtype}"


@torch.inference_mode()
def rules(model: PreTrainedModel) -> str:
    """AttnLRP changes no logits. InputError: it does, a layer has no rule, or no lxt."""
    from sparc3.relevance.attribution import rules  # here: only now is lxt needed

    ids = loading.short_text(model)
    plain = model(input_ids=ids, use_cache=False).logits
    with rules(model, "attnlrp"):
        patched = model(input_ids=ids, use_cache=False).logits
    return f"every layer has one; logits change by {_apart(plain, patched, model)}"


def conserved(model: PreTrainedModel) -> str:
    """Relevance is found again. InputError: it is not, or no lxt."""
    from sparc3.relevance.attribution import rules

    with rules(model, "attnlrp"):
        pass  # says what is missing
    from sparc3.relevance.conservation import balance

    found = balance(model, loading.short_text(model))
    layers = families.num_layers(model)
    if len(found.attention) != layers:
        raise InputError(f"the rule of attention reached {len(found.attention)} of {layers} layers")
    if not found.error < _tolerance(model):  # NaN is wrong too
        raise InputError(f"{found.error:.1%} of it is lost; take gradient")
    return f"conserved, but for biases and attention, to {found.error:.1g}"


@torch.inference_mode()
def removed(model: PreTrainedModel) -> str:
    """Of some neurons: pruned for a while = scaled while the model runs = exported and loaded."""
    neurons = np.arange(0, families.num_layers(model) * families.width(model), EVERY)
    scales = np.where(np.arange(len(neurons)) % 2, KEPT, 0.0)
    layers, places = np.divmod(neurons, families.width(model))
    circuit = Circuit(layers, places, -np.ones(len(neurons)), scales)
    ids = loading.short_text(model)

    def logits(of: nn.Module = model) -> Tensor:
        return of(input_ids=ids, use_cache=False).logits

    whole = logits()
    with pruned(model, circuit):
        found = logits()
    if torch.allclose(found, whole):
        raise InputError("it changes no logits")
    with pruned_rows(model, [circuit]) as tell:
        tell([0])
        ablated = logits()
    if not torch.equal(logits(), whole):
        raise InputError("the model is not what it was before")
    with tempfile.TemporaryDirectory() as folder:
        prune_weights(model, circuit)
        model.save_pretrained(folder)
        dtype = str(model.dtype).removeprefix("torch.")
        again = loading.load(Model(path=folder, dtype=dtype))  # pyright: ignore[reportArgumentType]
        exported = logits(again)
    apart = _apart(found, ablated, model), _apart(found, exported, model)
    return f"= ablated = exported, to {max(apart, key=float)}, {len(neurons):,} neurons removed"


def _tolerance(model: PreTrainedModel) -> float:
    return torch.finfo(model.dtype).eps ** 0.5


def _apart(a: Tensor, b: Tensor, model: PreTrainedModel) -> str:
    """The relative difference of logits; InputError: more than rounding makes of them."""
    difference = ((a - b).float().norm() / a.float().norm()).item()
    if not difference < _tolerance(model):
        raise InputError(f"logits differ by {difference:.1%}")
    return f"{difference:.1g}"
