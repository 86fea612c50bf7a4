"""Attribute: the scores of every neuron for every prompt of a set's attribute split.

Scores go to disk shard by shard, so that memory does not grow with the number of prompts, and a
run that was killed goes on after its last finished shard, with the same numbers. Started as several
processes (torchrun, accelerate launch, Slurm), each takes every n-th shard. The folder that later
stages read appears at the end, whole.
"""

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sparc3 import models, parallel
from sparc3.artifacts import OUTPUTS, metrics_path, model_digest, read_prompts, scores_folder
from sparc3.errors import InputError
from sparc3.files import digest, digest_text, write_json, write_tensors
from sparc3.params import Params
from sparc3.scores import SCORES, Prompt, score

log = logging.getLogger(__name__)

VISIBLE = 120.0  # seconds until a network file system shows what another machine has written


def encode(rows: list[dict[str, Any]], tokenizer: Any, target: str) -> list[Prompt]:
    """Rows of a prompt set as token ids: the text, or for `pair` the row's two texts."""
    prompts = []
    for row in rows:
        texts = [row["text"]] if target == "max-logit" else row.get("pair")
        if texts is None:
            raise InputError(
                f"prompt {row['id']} has no pair, which target pair needs; use target: max-logit, "
                "or a source of pairs"
            )
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        prompts.append(Prompt(row["id"], tuple(encoded)))
    return prompts


def partial_folder(
    params: Params, prompt_set: str, names: Sequence[str], prompts: Sequence[Prompt]
) -> Path:
    """Where finished shards wait for the others: one folder for all that decides their numbers.

    So a run goes on only with shards of the same prompts, parameters, model, code and packages.
    """
    spec, attribute = params.prompt_sets[prompt_set], params.attribute
    identity = json.dumps(
        [
            [(p.id, p.sequences) for p in prompts],
            [names, spec.target, attribute.batch_tokens, attribute.shard_prompts],
            [params.model.dtype, params.model.device, model_digest(Path(params.model.path))],
            [
                digest(Path(__file__).with_name(f"{name}.py"))
                for name in ("scores", "lrp", "models")
            ],
            [version(package) for package in ("torch", "transformers", "lxt")],
        ]
    )
    return OUTPUTS / "partial" / prompt_set / digest_text(identity)[:16]


def publish(
    partial: Path, folder: Path, names: Sequence[str], shards: int, visible: float = VISIBLE
) -> None:
    """Move all shards to `folder`, in place of what is there; other parts of the set are removed.

    InputError if a shard is not there, not even after `visible` seconds.
    """
    wanted = [partial / name / f"{n:05}.safetensors" for n in range(shards) for name in names]
    deadline = time.monotonic() + visible
    while missing := [path for path in wanted if not path.exists()]:
        if time.monotonic() > deadline:
            raise InputError(
                f"{missing[0]}: file not found, though a process has written it; start all "
                "processes in one folder, on a file system that every machine sees"
            )
        time.sleep(1)
    for leftover in partial.glob("*/.*"):  # of a write that was killed
        leftover.unlink()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        folder.replace(tempfile.mkdtemp(dir=partial.parent))
    partial.replace(folder)
    shutil.rmtree(partial.parent)


def run(params: Params, prompt_set: str) -> dict[str, float]:
    spec, attribute = params.prompt_sets[prompt_set], params.attribute
    names = attribute.scores if spec.scores is None else spec.scores
    if not names:
        raise InputError(f"params: no scores for prompt set {prompt_set}; give at least one")
    for name in names:
        if name not in SCORES:
            raise InputError(
                f"params: attribute.scores names {name!r}; expected any of {', '.join(SCORES)}"
            )
    here = parallel.place()
    device = parallel.device(here, params.model.device)
    tokenizer = models.tokenizer(params.model.path, params.model.revision)
    prompts = encode(read_prompts(prompt_set, "attribute"), tokenizer, spec.target)
    size = attribute.shard_prompts
    shards = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    partial = partial_folder(params, prompt_set, names, prompts)

    with parallel.joined(here):
        parallel.agree(here, str(partial))
        last = names[-1]  # the scores of a shard are written in this order
        done = {int(path.stem) for path in (partial / last).glob("*.safetensors")}
        if done:
            log.info("attribute %s: going on after %d finished shards", prompt_set, len(done))
        mine = [n for n in range(len(shards)) if here.shares(n) and n not in done]
        if mine:
            model = models.load(
                params.model.path, params.model.revision, params.model.dtype, device
            )
            with tqdm(
                total=sum(len(shards[n]) for n in mine),
                desc=f"attribute {prompt_set}",
                unit="prompt",
                disable=here.rank > 0,
            ) as bar:
                for number, found in score(
                    model,
                    prompts,
                    names,
                    target=spec.target,
                    batch_tokens=attribute.batch_tokens,
                    shard=size,
                    skip=set(range(len(shards))).difference(mine),
                    progress=bar.update,
                ):
                    ids = json.dumps([p.id for p in shards[number]])
                    for name in names:
                        path = partial / name / f"{number:05}.safetensors"
                        write_tensors(path, {"scores": found[name]}, {"ids": ids})
        parallel.wait(here)

    metrics = {
        "prompts": float(len(prompts)),
        "tokens": float(sum(len(s) for p in prompts for s in p.sequences)),
        "mean_tokens": float(np.mean([sum(map(len, p.sequences)) for p in prompts])),
    }
    if here.rank == 0:
        publish(partial, scores_folder(prompt_set), names, len(shards))
        write_json(metrics_path("attribute", prompt_set), metrics)
    return metrics
