"""A project folder in which `python -m sparc3 attribute` runs in no time: a tiny random model."""

from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparc3.base.files import read_tensors, write_jsonl
from sparc3.base.products import write_manifest
from sparc3.stages.table import made

SETS = {"general": 7, "talk": 6}  # prompts of the attribute split
WORDS = tiny.VOCABULARY


def write_model(folder: Path, family: str = "llama") -> None:
    """Config, safetensors and a tokenizer that reads `w7 w12` as [7, 12]."""
    tiny.model(family).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def prompt_rows(name: str, count: int, split: str) -> list[dict[str, Any]]:
    """Prompts of different lengths: 4 words, 5, ..."""
    rng = np.random.default_rng(count)
    return [
        {
            "id": f"{name}-{split}-{i}",
            "text": " ".join(f"w{word}" for word in rng.integers(3, WORDS, 4 + i)),
            "group": f"{name}-{split}-{i}",
            "split": split,
            "seed": 0,
            "tokens": 4 + i,
        }
        for i in range(count)
    ]


def write_project(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """The project's own params.yaml with small sets, their prompts, and a model; `folder` back.

    `changes` replaces whole sections of params.yaml.
    """
    tree = yaml.safe_load((Path(__file__).parent.parent / "params.yaml").read_text())
    tree |= {
        "model": {"path": "model"},
        "test_sets": {},
        "methods": {
            "lrp": {"score": "lrp", "contrast": "mean-difference"},
            "random": {"score": "random"},
        },
        "differential": {"general": "general", "importance": "lrp"},
        "evaluate": tree["evaluate"]
        | {"general": ["general"], "completed": ["lrp"], "control": "random", "ban": []},
        "transfer": tree["transfer"] | {"texts": ["general"]},
        "sweep": tree["sweep"] | {"num_neurons": [4]},
        "overlap": tree["overlap"] | {"num_neurons": 10},
        "prompt_sets": {name: {"source": "news", "count": n} for name, n in SETS.items()},
        "behaviours": {
            "talk": tree["behaviours"]["toxicity"]
            | {"prompts": "talk", "reference": "general", "scorers": ["profanity"]}
            | {"faithfulness": False}
        },
        "attribute": tree["attribute"]
        | {"scores": ["activation"], "batch_tokens": 20, "shard_prompts": 2},
        **(changes or {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(tree))
    (folder / "data.dvc").write_text("outs: []\n")
    write_model(folder / "model")
    for name, count in SETS.items():
        rows = [
            row
            for split, number in (("attribute", count), ("tune", 2), ("test", 6))
            for row in prompt_rows(name, number, split)
        ]
        write_jsonl(folder / f"outputs/prompts/{name}.jsonl", rows)
    with chdir(folder):
        write_manifest("prepare", None, made("prepare", None), {})
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def scores(folder: Path, prompt_set: str, score: str) -> np.ndarray:
    """All scores of a set as published, (prompt, layer, neuron)."""
    shards = sorted((folder / "outputs/scores" / prompt_set / score).glob("*.safetensors"))
    return np.concatenate([read_tensors(path)[0]["scores"] for path in shards])
