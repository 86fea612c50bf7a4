"""A circuit: distinct neurons with what is left of each, and the file that keeps them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparc3.base.errors import InputError
from sparc3.base.files import Array, read_text, write_csv

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
