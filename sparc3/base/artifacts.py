"""Where every product of the pipeline lies, and how it is read and written.

Paths are relative to the project's folder, the current directory.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from sparc3.base.errors import InputError
from sparc3.base.files import Array, digest, digest_text, digests, read_jsonl, read_tensors
from sparc3.base.params import Method, Params

OUTPUTS = Path("outputs")
METRICS = Path("metrics")


def prompts_path(prompt_set: str) -> Path:
    return OUTPUTS / "prompts" / f"{prompt_set}.jsonl"


def scores_folder(prompt_set: str) -> Path:
    return OUTPUTS / "scores" / prompt_set


def differential_path(behaviour: str, method: str) -> Path:
    return OUTPUTS / "differential" / behaviour / f"{method}.safetensors"


def sweep_path(behaviour: str) -> Path:
    return OUTPUTS / "sweep" / f"{behaviour}.csv"


def circuit_path(behaviour: str, method: str, block: str = "") -> Path:
    """Of the circuit chosen on all that may be seen, or on what comes before a block."""
    return OUTPUTS / "circuits" / behaviour / block / f"{method}.csv"


def circuit_names(name: str, method: Method) -> list[str]:
    """A method's circuits: one, or one per draw."""
    return [name] if method.draws == 1 else [f"{name}-{draw}" for draw in range(method.draws)]


def intervention_path(behaviour: str, name: str, block: str = "") -> Path:
    """Of an intervention, as `circuit_path`."""
    return OUTPUTS / "interventions" / behaviour / block / f"{name}.safetensors"


def names_of(params: Params, method: str) -> list[str]:
    """A method's circuits; what is none, an intervention or the ban, by its own name."""
    return circuit_names(method, params.methods[method]) if method in params.methods else [method]


def stability_path(behaviour: str, method: str | None = None) -> Path:
    """A method's selection frequencies, or every method's curve of agreement."""
    return OUTPUTS / "stability" / behaviour / f"{method or 'curves'}.csv"


def evaluation_folder(behaviour: str) -> Path:
    return OUTPUTS / "evaluation" / behaviour


def metrics_path(stage: str, axis: str | None = None) -> Path:
    return METRICS / stage / f"{axis}.json" if axis else METRICS / f"{stage}.json"


def read_prompts(prompt_set: str, split: str | None) -> list[dict[str, Any]]:
    """Rows of one split of a prompt set, or of all, in file order; at least one (InputError)."""
    path = prompts_path(prompt_set)
    rows = [row for row in read_jsonl(path) if split in (None, *_splits_of(row))]
    if not rows:
        remedy = f"raise prompt_sets.{prompt_set}.count"
        raise InputError(f"{path}: no prompt in the {split} split; {remedy}")
    return rows


def _splits_of(row: Mapping[str, Any]) -> list[str]:
    """A row of a block is tested, unless the block is the first, and circuits are chosen on it."""
    split = row["split"]
    if not split.startswith("block-"):
        return [split]
    return [split, "attribute", *(["test"] if split != "block-0" else [])]


def held_out(prompt_set: str) -> dict[str, list[dict[str, Any]]]:
    """Test prompts by the block that they are tested in; all of them in "" where there are none."""
    by_block: dict[str, list[dict[str, Any]]] = {}
    for row in read_prompts(prompt_set, "test"):
        by_block.setdefault("" if row["split"] == "test" else row["split"], []).append(row)
    return {block: by_block[block] for block in sorted(by_block, key=_number)}


def seen(prompt_set: str, block: str) -> list[dict[str, Any]]:
    """Prompts that the circuits are chosen on which are tested in a block; for "" all that are."""
    rows = read_prompts(prompt_set, "attribute")
    return [row for row in rows if not block or _number(row["split"]) < _number(block)]


def blocks(prompt_set: str) -> list[str]:
    """The blocks for which circuits are chosen, and "" for those of all that may be seen."""
    splits = {row["split"] for row in read_prompts(prompt_set, "attribute")}
    return ["", *sorted(splits - {"attribute", "block-0"}, key=_number)]


def _number(block: str) -> int:
    return int(block.removeprefix("block-") or 0)


def groups_of(prompt_set: str, ids: Sequence[str]) -> list[str]:
    """Grouping keys of prompts of a set's attribute split, in the order of their ids."""
    groups = {row["id"]: row["group"] for row in read_prompts(prompt_set, "attribute")}
    return [groups[prompt] for prompt in ids]


def score_shards(prompt_set: str, score: str) -> Iterator[tuple[list[str], Array]]:
    """Shards in order: prompt ids, and scores of shape (prompt, layer, neuron)."""
    folder = scores_folder(prompt_set) / score
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise InputError(f"{folder}: no scores; run attribute for {prompt_set} (dvc repro)")
    for shard in shards:
        tensors, metadata = read_tensors(shard)
        yield json.loads(metadata["ids"]), tensors["scores"]


def read_scores(prompt_set: str, score: str) -> tuple[list[str], Array]:
    """All prompt ids of a set's attribute split, and scores (prompt, layer, neuron)."""
    ids, scores = zip(*score_shards(prompt_set, score), strict=True)
    return list(chain.from_iterable(ids)), np.concatenate(scores)


def scores_digest(prompt_set: str) -> str:
    """One digest of all scores of a set."""
    return joint_digest(digests(scores_folder(prompt_set)))


def model_files(folder: Path) -> dict[str, str]:
    """sha256 of the files of a model folder: configuration, tokenizer, weights, in whatever files.

    InputError: no folder.
    """
    if not folder.is_dir():
        raise InputError(
            f"params: model.path: {folder} is no folder; name one with config.json, safetensors "
            "and tokenizer.json, or one that fetch is to make: python -m sparc3 fetch"
        )
    files = [path for path in folder.iterdir() if path.is_file() and path.name[0] != "."]
    return {path.name: digest(path) for path in sorted(files)}


def model_digest(folder: Path) -> str:
    """One digest of a model folder; InputError as `model_files`."""
    return joint_digest(model_files(folder))


def joint_digest(files: Mapping[str, str]) -> str:
    """One digest of files by their names and digests."""
    return digest_text("\n".join(f"{name} {sha256}" for name, sha256 in files.items()))
