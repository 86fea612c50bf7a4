"""Circuits: chosen from a differential, kept as files, pruned from a model or dampened in it.

A neuron is one coordinate of the vector that enters an MLP's output projection, so multiplying its
column there by `scale` multiplies its activation by `scale`, in gated and plain MLPs alike. That is
all `pruned` does, reversibly; `prune_weights` also clears the rows that feed a neuron of scale 0.
Two ways measure many circuits of one model: `without_each` one after the other on the same tokens,
`pruned_rows` side by side in one batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sparc3.errors import InputError
from sparc3.files import Array, read_text, write_csv
from sparc3.params import Method

if TYPE_CHECKING:  # stages that only read circuits do without torch, which takes seconds to import
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from sparc3.models import MLP

Found = TypeVar("Found")

COLUMNS: tuple[str, ...] = ("layer", "neuron", "score", "scale")


@dataclass(frozen=True, eq=False)
class Circuit:
    """Distinct neurons, each with the score it was chosen by and the factor left on it.

    Arrays of shape (neuron,): layers and neurons are indices from 0, scores finite, scales in
    [0, 1], where 0 prunes and anything between dampens. Raises InputError otherwise.
    """

    layers: Array
    neurons: Array
    scores: Array
    scales: Array

    def __post_init__(self) -> None:
        shapes = {a.shape for a in (self.layers, self.neurons, self.scores, self.scales)}
        if shapes != {(len(self),)}:
            raise InputError(f"circuit: arrays of shapes {shapes}; expected one value per neuron")
        for layer, neuron, score, scale in self.rows():
            _check(layer, neuron, score, scale, "circuit")
        pairs, counts = np.unique(np.stack([self.layers, self.neurons]), axis=1, return_counts=True)
        if (counts > 1).any():
            layer, neuron = pairs[:, counts > 1][:, 0]
            raise InputError(f"circuit: layer {layer}, neuron {neuron} is in it twice")

    def __len__(self) -> int:
        return len(self.layers)

    def rows(self) -> Iterator[tuple[int, int, float, float]]:
        """(layer, neuron, score, scale) of every neuron."""
        columns = (self.layers, self.neurons, self.scores, self.scales)
        yield from zip(*(column.tolist() for column in columns), strict=True)


# The model as it is: a circuit of no neuron.
INTACT = Circuit(*(np.empty(0, kind) for kind in (np.int64, np.int64, np.float64, np.float64)))


def protected(importance: Array, share: float) -> Array:
    """Boolean (layer, neuron): the `share` of all neurons that matter most for general text."""
    count = round(share * importance.size)
    mask = np.zeros(importance.size, dtype=bool)
    mask[np.argsort(-importance, axis=None, kind="stable")[:count]] = True
    return mask.reshape(importance.shape)


def choose(differential: Array, k: int, barred: Array) -> Array:
    """Flat ids (layer * width + neuron) of the k most negative neurons that are not barred.

    Sorted from the most negative on; ties go to the lower id. Raises InputError if fewer than k
    neurons are left.
    """
    free = int(differential.size - barred.sum())
    if k > free:
        raise InputError(
            f"select.num_neurons is {k}, but only {free} of {differential.size} neurons are not "
            "protected; lower num_neurons or protect"
        )
    values = np.where(barred, np.inf, differential).ravel()
    return np.argsort(values, kind="stable")[:k]


def choose_per_layer(differential: Array, counts: Array, barred: Array) -> Array:
    """As `choose`, with counts[l] neurons from every layer l."""
    width = differential.shape[1]
    chosen = [
        layer * width + choose(differential[layer : layer + 1], int(k), barred[layer : layer + 1])
        for layer, k in enumerate(counts)
        if k
    ]
    ids = np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64)
    return ids[np.argsort(differential.ravel()[ids], kind="stable")]


def scales(method: Method, differential: Array) -> Array:
    """Factor left on each neuron of a circuit, from its differential; 0 prunes.

    `auroc` is AurA's dampening, 1 - 2 (AUROC - 0.5) (Suau et al. 2024, Eq. 4), and the `auroc`
    contrast is 0.5 - AUROC.
    """
    if method.scale == "auroc":
        return np.clip(1 + 2 * differential, 0, 1)
    return np.full(differential.shape, method.scale)


def circuit_at(
    method: Method, differential: Array, importance: Array, k: int, share: float
) -> Circuit:
    """The circuit of k neurons that a differential gives, with `share` of all protected."""
    ids = choose(differential, k, protected(importance, share))
    layers, neurons = np.divmod(ids, differential.shape[1])
    scores = differential.ravel()[ids].astype(np.float64)
    return Circuit(layers, neurons, scores, scales(method, scores))


def _check(layer: int, neuron: int, score: float, scale: float, where: str) -> None:
    if layer < 0 or neuron < 0:
        raise InputError(f"{where}: layer {layer}, neuron {neuron}; expected indices from 0")
    if not np.isfinite(score):
        raise InputError(f"{where}: score {score}; expected a finite number")
    if not 0 <= scale <= 1:
        raise InputError(f"{where}: scale {scale}; expected 0 (prune) to 1 (leave as it is)")


def write_circuit(path: Path, circuit: Circuit) -> None:
    """CSV of COLUMNS, sorted by score, ascending, then by layer and neuron; values exact."""
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in circuit.rows()]
    write_csv(path, sorted(rows, key=lambda r: (r["score"], r["layer"], r["neuron"])), COLUMNS)


def read_circuit(path: Path) -> Circuit:
    """A circuit from a CSV of COLUMNS. Raises InputError, naming file and line."""
    header, *lines = read_text(path).splitlines() or [""]
    if header != ",".join(COLUMNS):
        raise InputError(f"{path}: line 1 is {header!r}; expected {','.join(COLUMNS)!r}")
    rows: list[tuple[int, int, float, float]] = []
    seen: dict[tuple[int, int], int] = {}
    for number, line in enumerate(lines, start=2):
        where = f"{path}: line {number}"
        try:
            layer, neuron, score, scale = line.split(",")
            row = int(layer), int(neuron), float(score), float(scale)
        except ValueError:
            raise InputError(f"{where} is {line!r}; expected {','.join(COLUMNS)}") from None
        _check(*row, where)
        first = seen.setdefault(row[:2], number)
        if first != number:
            raise InputError(f"{where}: layer {row[0]}, neuron {row[1]} is on line {first} already")
        rows.append(row)
    layers, neurons, scores, scales = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Circuit(
        np.array(layers, np.int64),
        np.array(neurons, np.int64),
        np.array(scores, np.float64),
        np.array(scales, np.float64),
    )


def refuse_leak(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], name: str) -> None:
    """InputError if a circuit was chosen on a prompt, or a group, that it is to be tested on."""
    used = {prompt for ids in about["chosen_on"].values() for prompt in ids}
    groups = set(about["groups"])
    leaked = [row["id"] for row in rows if row["id"] in used or row["group"] in groups]
    if leaked:
        raise InputError(
            f"{name}: chosen on {len(leaked)} of the {len(rows)} test prompts or their groups "
            f"(first: {leaked[0]}): nothing measured on them is held out; rebuild the circuit "
            "from the attribute split"
        )


def _per_layer(
    model: "PreTrainedModel", circuit: Circuit
) -> "list[tuple[MLP, Tensor, Tensor, Tensor]]":
    """(MLP, its (output, neuron) weight, indices, scales) of every layer that holds neurons."""
    import torch

    from sparc3.models import mlps, outgoing

    layers = mlps(model)
    for layer, neuron, *_ in circuit.rows():
        if layer >= len(layers):
            raise InputError(
                f"circuit: layer {layer}, neuron {neuron}; the model has layers 0 to "
                f"{len(layers) - 1}: the circuit belongs to another model"
            )
        width = outgoing(layers[layer].down).shape[1]
        if neuron >= width:
            raise InputError(
                f"circuit: layer {layer}, neuron {neuron}; the model has neurons 0 to {width - 1}: "
                "the circuit belongs to another model"
            )
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
    """Within the block, `model` has the circuit's columns multiplied by its scales.

    Only those columns are copied, and put back bit for bit at the end, also after an exception: one
    more circuit costs its own forward passes and no reload. Raises InputError for a neuron that the
    model does not have.
    """
    parts = [(weight, neurons, scales) for _, weight, neurons, scales in _per_layer(model, circuit)]
    kept = [weight[:, neurons] for weight, neurons, _ in parts]
    try:
        for (weight, neurons, scales), columns in zip(parts, kept, strict=True):
            weight[:, neurons] = (columns * scales).to(weight.dtype)
        yield model
    finally:
        for (weight, neurons, _), columns in zip(parts, kept, strict=True):
            weight[:, neurons] = columns


def without_each(
    model: "PreTrainedModel", circuits: Sequence[Circuit], run: Callable[[], Found]
) -> list[Found]:
    """What `run` finds without each of `circuits`, in their order; INTACT is the model as it is.

    `run` must pass the same tokens through the model's body each time, and once. What lies below a
    circuit's first layer gives what it gives in the whole model, and is kept instead of computed
    again: a circuit of late layers costs a part of a pass. Memory: one layer's output for every
    layer that a circuit begins with. Raises InputError as `pruned` does.
    """
    from sparc3.models import layers

    blocks = layers(model)
    first = [int(c.layers.min()) if len(c) else len(blocks) for c in circuits]
    latest_first = sorted(range(len(circuits)), key=lambda place: -first[place])
    kept: dict[int, Any] = {}
    found: dict[int, Found] = {}
    for place in latest_first:
        begin = first[place]
        with ExitStack() as stack:
            stack.enter_context(pruned(model, circuits[place]))
            if not found:  # its own neurons lie above all that the others need
                for layer in {at - 1 for at in first if 0 < at < len(blocks)}:
                    stack.enter_context(_keeping(blocks[layer], layer, kept))
            elif 0 < begin < len(blocks):
                stack.enter_context(_skipping(blocks[:begin], kept[begin - 1]))
            found[place] = run()
    return [found[place] for place in range(len(circuits))]


@contextmanager
def _keeping(block: "nn.Module", layer: int, kept: dict[int, Any]) -> Iterator[None]:
    def keep(module: "nn.Module", args: Any, output: Any) -> None:
        kept[layer] = output

    handle = block.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _skipping(blocks: "Sequence[nn.Module]", output: Any) -> Iterator[None]:
    """Within the block `blocks` compute nothing: whatever enters them, `output` leaves them."""
    own = [vars(block).get("forward") for block in blocks]  # accelerate puts one there
    try:
        for block in blocks:
            vars(block)["forward"] = lambda *args, **kwargs: output
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                vars(block).pop("forward", None)
            else:
                vars(block)["forward"] = forward


@contextmanager
def pruned_rows(
    model: "PreTrainedModel", circuits: Sequence[Circuit]
) -> Iterator[Callable[[Sequence[int]], None]]:
    """Within the block every row of a batch is run without a circuit of its own.

    Yields a function that is told, before the model runs, the place in `circuits` of each row's
    circuit. Activations are scaled here, not weights: the same function, up to rounding where a
    scale is neither 0 nor 1. Raises InputError as `pruned` does.
    """
    import torch

    from sparc3.models import mlps, outgoing

    factors: dict[int, Tensor] = {}
    downs = [mlp.down for mlp in mlps(model)]
    for place, circuit in enumerate(circuits):
        _per_layer(model, circuit)  # refuses neurons that the model does not have
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

    def scale_rows(layer: int) -> Callable[["nn.Module", tuple[Any, ...]], tuple[Any, ...]]:
        def hook(module: "nn.Module", args: tuple[Any, ...]) -> tuple[Any, ...]:
            h, factor = args[0], factors[layer][places.to(args[0].device)]
            rows = h.view(len(factor), -1, h.shape[-1])  # OPT runs all tokens as one axis
            return ((rows * factor[:, None]).view(h.shape),)

        return hook

    handles = [downs[layer].register_forward_pre_hook(scale_rows(layer)) for layer in factors]
    try:
        yield tell
    finally:
        for handle in handles:
            handle.remove()


def prune_weights(model: "PreTrainedModel", circuit: Circuit) -> None:
    """Prune for good: the same function as within `pruned`, and nothing to put back.

    Multiplies columns of the output projection by their scales, and sets to zero what feeds the
    neurons of scale 0: their rows, and biases, of the up and gate projections. Pruning twice is
    pruning once; dampening twice dampens twice. Raises InputError as `pruned` does, before anything
    is changed.
    """
    from sparc3.models import incoming

    for mlp, weight, neurons, scales in _per_layer(model, circuit):
        weight[:, neurons] = (weight[:, neurons] * scales).to(weight.dtype)
        removed = neurons[scales == 0]
        for projection in (mlp.up, mlp.gate):
            if projection is not None:
                bias = dict(projection.named_parameters()).get("bias")
                for rows in (incoming(projection), bias):
                    if rows is not None:
                        rows.detach()[removed.to(rows.device)] = 0
