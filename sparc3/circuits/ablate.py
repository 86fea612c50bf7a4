"""Remove a circuit from a model: reversibly, for one or many circuits, or for good.

A neuron is one coordinate of the vector that enters an MLP's output projection, so multiplying its
column there by `scale` multiplies its activation by `scale`, in gated and plain MLPs alike. Many
circuits are measured one after the other on the same tokens (`without_each`), or side by side in
one batch (`pruned_rows`). An intervention takes the place of a circuit wherever an `Edit` is asked.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sparc3.base.errors import InputError
from sparc3.circuits.circuit import Circuit
from sparc3.circuits.intervention import Intervention
from sparc3.model.trunk import keeping, skipping

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from sparc3.model.families import MLP

Result = TypeVar("Result")
Edit = Circuit | Intervention


def require_neurons(model: "PreTrainedModel", circuit: Circuit) -> None:
    """InputError for the first neuron of a circuit that the model does not have."""
    from sparc3.model.families import mlps, outgoing

    widths = [outgoing(mlp.down).shape[1] for mlp in mlps(model)]
    for layer, neuron, *_ in circuit.rows():
        if layer >= len(widths) or neuron >= widths[layer]:
            raise InputError(
                f"circuit: layer {layer}, neuron {neuron}; the model has layers 0 to "
                f"{len(widths) - 1} with neurons 0 to {widths[min(layer, len(widths) - 1)] - 1}: "
                "the circuit belongs to another model"
            )


def _per_layer(
    model: "PreTrainedModel", circuit: Circuit
) -> "list[tuple[MLP, Tensor, Tensor, Tensor]]":
    """(MLP, its (output, neuron) weight, indices, scales) of every layer that holds neurons."""
    import torch

    from sparc3.model.families import mlps, outgoing

    require_neurons(model, circuit)
    layers = mlps(model)
    parts = []
    for layer in np.unique(circuit.layers).tolist():
        weight = outgoing(layers[layer].down).detach()
        if weight.is_meta:
            raise InputError(
                f"model.device: the weights of layer {layer} are not in memory, so they cannot be "
                "pruned; use devices that hold the whole model"
            )
        chosen = circuit.layers == layer
        neurons = torch.from_numpy(circuit.neurons[chosen]).to(weight.device)
        scales = torch.from_numpy(circuit.scales[chosen]).to(weight.device, torch.float32)
        parts.append((layers[layer], weight, neurons, scales))
    return parts


@contextmanager
def pruned(model: "PreTrainedModel", circuit: Circuit) -> "Iterator[PreTrainedModel]":
    """Within the block, `model` has the circuit's columns multiplied by its scales: copied, and put
    back bit for bit, also after an exception. InputError: a neuron that the model does not have.
    """
    parts = _per_layer(model, circuit)
    kept = [(weight, neurons, weight[:, neurons]) for _, weight, neurons, _ in parts]
    try:
        for _, weight, neurons, scales in parts:
            weight[:, neurons] = (weight[:, neurons] * scales).to(weight.dtype)
        yield model
    finally:
        for weight, neurons, columns in kept:
            weight[:, neurons] = columns


def edited(model: "PreTrainedModel", edit: Edit) -> "AbstractContextManager[PreTrainedModel]":
    """Within it, `model` is without a circuit, or under an intervention."""
    return pruned(model, edit) if isinstance(edit, Circuit) else edit.on(model)


def without_each(
    model: "PreTrainedModel", edits: Sequence[Edit], run: Callable[[], Result]
) -> list[Result]:
    """What `run` returns without each circuit of `edits`, or under each intervention, in their
    order; INTACT is the model as it is.

    `run` must pass the same tokens through the model's body each time, and once. What lies below a
    circuit's first layer is kept instead of computed again: a circuit of late layers costs a part
    of a pass, a ban of words none. Memory: one layer's output for every layer that a circuit begins
    with. Raises InputError as `pruned` does.
    """
    from sparc3.model.families import layers

    blocks = layers(model)
    first = [_begin(edit, len(blocks)) for edit in edits]
    kept: dict[int, Any] = {}
    results: dict[int, Result] = {}
    for place, begin in sorted(enumerate(first), key=lambda item: -item[1]):
        with ExitStack() as stack:
            stack.enter_context(edited(model, edits[place]))
            if not results:  # its own neurons lie above all that the others need
                below = {at - 1 for at in first if at > 0}
                kept = stack.enter_context(keeping(blocks, below))
            elif begin > 0:
                stack.enter_context(skipping(blocks[:begin], kept[begin - 1]))
            results[place] = run()
    return [results[place] for place in range(len(edits))]


def _begin(edit: Edit, layers: int) -> int:
    """The first layer that an edit changes, as far as is known; `layers` where it changes none."""
    if not isinstance(edit, Circuit):
        return layers if edit.at_head else 0
    return int(edit.layers.min()) if len(edit) else layers


@contextmanager
def pruned_rows(
    model: "PreTrainedModel", circuits: Sequence[Circuit]
) -> Iterator[Callable[[Sequence[int]], None]]:
    """Within the block every row of a batch is run without a circuit of its own.

    Yields a function that is told, before the model runs, the place in `circuits` of each row's.
    Activations are scaled here, not weights: the same up to rounding, where a scale is neither 0
    nor 1. Raises InputError as `pruned` does.
    """
    import torch

    from sparc3.model.families import mlps, outgoing

    factors: dict[int, Tensor] = {}
    downs = [mlp.down for mlp in mlps(model)]
    for place, circuit in enumerate(circuits):
        require_neurons(model, circuit)
        for layer, neuron, _, scale in circuit.rows():
            if layer not in factors:
                weight = outgoing(downs[layer])
                shape = len(circuits), weight.shape[1]
                factors[layer] = torch.ones(shape, dtype=weight.dtype, device=weight.device)
            factors[layer][place, neuron] = scale
    places = torch.empty(0, dtype=torch.long)

    def tell(rows: Sequence[int]) -> None:
        nonlocal places
        places = torch.tensor(rows)

    def scale_rows(layer: int, module: "nn.Module", args: tuple[Any, ...]) -> tuple[Any, ...]:
        h, factor = args[0], factors[layer][places.to(args[0].device)]
        rows = h.view(len(factor), -1, h.shape[-1])  # OPT runs all tokens as one axis
        return ((rows * factor[:, None]).view(h.shape),)

    with ExitStack() as stack:
        for layer in factors:
            hook = downs[layer].register_forward_pre_hook(partial(scale_rows, layer))
            stack.callback(hook.remove)
        yield tell


def prune_weights(model: "PreTrainedModel", circuit: Circuit) -> None:
    """Prune for good: the same function as within `pruned`. What feeds neurons of scale 0 becomes 0
    too: their rows, and biases, of the up and gate projections. Dampening twice dampens twice.
    Raises InputError as `pruned` does, before anything is changed.
    """
    from sparc3.model.families import bias, incoming

    for mlp, weight, neurons, scales in _per_layer(model, circuit):
        weight[:, neurons] = (weight[:, neurons] * scales).to(weight.dtype)
        removed = neurons[scales == 0]
        for part in (mlp.up, mlp.gate):
            if part is not None:
                for rows in (incoming(part), bias(part)):
                    if rows is not None:
                        rows.detach()[removed.to(rows.device)] = 0
