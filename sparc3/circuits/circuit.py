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
    """Distinct neurons, arrays (neuron,): indices from 0, the finite score each was chosen by, and
    the factor left on it, in [0, 1], where 0 prunes and anything between dampens.
    """

    layers: Array
    neurons: Array
    scores: Array
    scales: Array

    def __len__(self) -> int:
        return len(self.layers)

    def rows(self) -> Iterator[tuple[int, int, float, float]]:
        """(layer, neuron, score, scale) of every neuron."""
        columns = (self.layers, self.neurons, self.scores, self.scales)
        yield from zip(*(column.tolist() for column in columns), strict=True)

    def first(self, count: int) -> "Circuit":
        """Its first neurons: as it is kept, those of the most negative scores."""
        columns = (self.layers, self.neurons, self.scores, self.scales)
        return Circuit(*(column[:count] for column in columns))


def _of_rows(rows: Sequence[tuple[int, int, float, float]]) -> Circuit:
    layers, neurons, scores, scales = np.array(rows, np.float64).reshape(-1, len(COLUMNS)).T
    return Circuit(layers.astype(np.int64), neurons.astype(np.int64), scores, scales)


INTACT = _of_rows([])  # the model as it is: a circuit of no neuron


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
        name = f"layer {row[0]}, neuron {row[1]}"
        first = seen.setdefault(row[:2], number)
        for wrong, problem in (
            (min(row[:2]) < 0, f"{name}; expected indices from 0"),
            (not np.isfinite(row[2]), f"score {row[2]}; expected a finite number"),
            (not 0 <= row[3] <= 1, f"scale {row[3]}; expected 0 (prune) to 1 (leave as it is)"),
            (first != number, f"{name} is on line {first} already"),
        ):
            if wrong:
                raise InputError(f"{where}: {problem}")
        rows.append(row)
    return _of_rows(rows)


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
