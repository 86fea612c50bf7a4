"""A circuit: distinct neurons with what is left of each, and the file that keeps them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparc3.base.errors import InputError
from sparc3.base.files import Array, read_text, write_csv

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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

    @staticmethod
    def load(path: str | Path) -> "Circuit":
        """A circuit from its CSV, from a folder that `export` wrote or peft saved, or from such a
        repository on the hub, `owner/name@revision`. InputError: nothing of the kind, or damaged.
        """
        from sparc3.circuits.adapter import CONFIG, read_adapter

        repository, _, revision = str(path).partition("@")
        if revision and not Path(path).exists():
            path = _of_the_hub(repository, revision)
        path = Path(path)
        if (path / "circuit.csv").is_file():
            return read_circuit(path / "circuit.csv")
        return read_adapter(path) if (path / CONFIG).is_file() else read_circuit(path)

    @staticmethod
    def choose(
        differential: Array,
        k: int,
        importance: Array | None = None,
        protect: float = 0.2,
        scale: float = 0.0,
    ) -> "Circuit":
        """The k most negative neurons of a differential (layer, neuron), each left with `scale`.

        The share `protect` of all neurons that have the largest `importance` (layer, neuron), for
        text that must not suffer, is never chosen. InputError: fewer than k are left.
        """
        from sparc3.circuits.choose import choose, protected

        barred = np.zeros(differential.shape, bool)
        if importance is not None:
            barred = protected(importance, protect)
        ids = choose(differential, k, barred, "k")
        scores = differential.ravel()[ids].astype(np.float64)
        return Circuit(*np.divmod(ids, differential.shape[1]), scores, np.full(k, scale))

    def save(self, path: str | Path) -> None:
        """Write the CSV that `load` reads."""
        write_circuit(Path(path), self)

    def save_adapter(self, folder: str | Path, model: "PreTrainedModel") -> None:
        """Write it as an adapter that peft loads on `model`'s checkpoint. InputError: no neuron, or
        one that the model does not have.
        """
        from sparc3.circuits.ablate import require_neurons
        from sparc3.circuits.adapter import write_adapter
        from sparc3.model.families import width

        require_neurons(model, self)
        kind, base = model.config.model_type, str(model.name_or_path)
        write_adapter(Path(folder), self, kind, width(model), base)

    def applied(self, model: "PreTrainedModel") -> "AbstractContextManager[PreTrainedModel]":
        """Within the block the model is without the circuit; then it is as it was, bit for bit.
        InputError: a neuron that the model does not have.
        """
        from sparc3.circuits.ablate import pruned

        return pruned(model, self)

    def apply(self, model: "PreTrainedModel") -> None:
        """Remove the circuit from the model for good. InputError as `applied`."""
        from sparc3.circuits.ablate import prune_weights

        prune_weights(model, self)

    def scaled(self, strength: float) -> "Circuit":
        """The same neurons with a part of the effect: 1 leaves the circuit as it is, 0 the model;
        a pruned neuron keeps 1 - strength. InputError: not from 0 to 1.
        """
        if not 0 <= strength <= 1:
            raise InputError(f"strength {strength}; expected 0 (no effect) to 1 (as it is)")
        return replace(self, scales=1 - strength * (1 - self.scales))

    def __or__(self, other: "Circuit") -> "Circuit":
        """Both, one after the other: scales of common neurons multiply, the lower score stays."""
        rows = {row[:2]: row for row in self.rows()}
        for layer, neuron, score, scale in other.rows():
            *_, score_here, scale_here = rows.get((layer, neuron), (0, 0, score, 1.0))
            rows[layer, neuron] = layer, neuron, min(score, score_here), scale * scale_here
        return _of_rows(list(rows.values()))

    def __and__(self, other: "Circuit") -> "Circuit":
        """The neurons of both, as they are in this one."""
        there = {row[:2] for row in other.rows()}
        return _of_rows([row for row in self.rows() if row[:2] in there])


def _of_the_hub(repository: str, revision: str) -> str:
    """Where the hub's client keeps the circuit of an exported folder."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from sparc3.base.secrets import hub_reason, hub_token

    try:
        return hf_hub_download(repository, "circuit.csv", revision=revision, token=hub_token())
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        problem = f"{repository}@{revision}: no file, and on the hub no circuit.csv"
        raise InputError(f"{problem} {hub_reason(error)}") from None


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
