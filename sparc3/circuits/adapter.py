"""A circuit as an IA3 adapter of the library peft: a few kilobytes that any tool loads on the base
model (Liu et al. 2022, arXiv 2205.05638).

IA3 multiplies what enters a feedforward module by a vector. What enters an MLP's output projection
are its neurons, so a circuit's scales are that vector. The format is that of peft 0.21, which is
needed neither to write nor to read it.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from sparc3.base.errors import InputError
from sparc3.base.files import Array, read_json, read_tensors, write_json, write_tensors
from sparc3.circuits.circuit import Circuit
from sparc3.model.families import FAMILIES, family

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "base_model.model.{}.{}.{}.ia3_l"  # of a layer's vector, in peft
TRANSPOSED = ("gpt2",)  # families of Conv1D, which stores (in, out)


def write_adapter(
    folder: Path,
    circuit: Circuit,
    model_type: str,
    width: int,
    base: str,
    revision: str | None = None,
) -> None:
    """Write CONFIG and WEIGHTS: a float32 vector (1, width) for every layer of the circuit.

    model_type, width: the model's family, and the neurons of a layer; base: its name on the hub, at
    `revision`, or its folder. InputError: no neuron.
    """
    if not len(circuit):
        raise InputError("circuit: it has no neuron, and an adapter needs one")
    names, layers = family(model_type), np.unique(circuit.layers).tolist()
    vectors = {layer: np.ones((1, width), np.float32) for layer in layers}
    for layer, neuron, _, scale in circuit.rows():
        vectors[layer][0, neuron] = scale
    modules = [f"{names.layers}.{layer}.{names.down}" for layer in layers]
    config: dict[str, Any] = {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "target_modules": modules,
        "feedforward_modules": modules,
        "fan_in_fan_out": model_type in TRANSPOSED,
        "init_ia3_weights": True,
        "modules_to_save": None,
    }
    write_json(folder / CONFIG, config)
    tensors = {NAME.format(names.layers, layer, names.down): v for layer, v in vectors.items()}
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})


def read_adapter(folder: Path) -> Circuit:
    """The circuit of an adapter, all scores 0.

    InputError: an adapter of another kind, of other modules than the output projections of a known
    family, or with a scale that is not from 0 to 1.
    """
    kind, path = read_json(folder / CONFIG).get("peft_type"), folder / WEIGHTS
    if kind != "IA3":
        raise InputError(f"{folder / CONFIG}: peft_type {kind!r}; a circuit is an IA3 adapter")
    rows: list[tuple[int, int, float]] = []
    for name, vector in read_tensors(path)[0].items():
        places = (NAME.format(f.layers, r"(\d+)", f.down) for f in FAMILIES.values())
        found = (re.fullmatch(place, name) for place in places)
        layer = next(filter(None, found), None)
        if layer is None:
            raise InputError(f"{path}: {name} is of no MLP's output projection of a known family")
        flat: Array = vector.reshape(-1).astype(np.float64)
        rows += [(int(layer[1]), n, flat[n]) for n in np.flatnonzero(flat != 1).tolist()]
    layers, neurons, scales = np.array(sorted(rows), np.float64).reshape(-1, 3).T
    if not ((scales >= 0) & (scales <= 1)).all():
        raise InputError(f"{path}: a scale is not from 0 (prune) to 1 (leave as it is)")
    return Circuit(layers.astype(int), neurons.astype(int), np.zeros(len(scales)), scales)
