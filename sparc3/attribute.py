"""Attribute: the scores of every neuron for every prompt of a set's attribute split.

Scores go to disk shard by shard, so that memory does not grow with the number of prompts, and a
run that was killed goes on after its last finished shard, with the same numbers.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sparc3 import models
from sparc3.artifacts import OUTPUTS, metrics_path, model_digest, read_prompts, scores_folder
from sparc3.errors import InputError
from sparc3.files import digest_text, write_json, write_tensors
from sparc3.params import Params
from sparc3.scores import SCORES, Prompt, score

log = logging.getLogger(__name__)


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


def run(params: Params, prompt_set: str) -> dict[str, float]:
    spec, attribute = params.prompt_sets[prompt_set], params.attribute
    names = attribute.scores if spec.scores is None else spec.scores
    for name in names:
        if name not in SCORES:
            raise InputError(
                f"params: attribute.scores names {name!r}; expected any of {', '.join(SCORES)}"
            )
    tokenizer = models.tokenizer(params.model.path, params.model.revision)
    prompts = encode(read_prompts(prompt_set, "attribute"), tokenizer, spec.target)

    identity = json.dumps(
        [
            [(p.id, p.sequences) for p in prompts],
            [names, spec.target, attribute.batch_tokens, attribute.shard_prompts],
            [params.model.dtype, model_digest(Path(params.model.path))],
        ]
    )
    partial = OUTPUTS / "partial" / f"{prompt_set}-{digest_text(identity)[:16]}"
    last = names[-1]  # the scores of a shard are written in this order
    done = {int(path.stem) for path in (partial / last).glob("*.safetensors")}
    if done:
        log.info("attribute %s: going on after %d finished shards", prompt_set, len(done))

    model = models.load(
        params.model.path, params.model.revision, params.model.dtype, params.model.device
    )
    size = attribute.shard_prompts
    finished = sum(len(prompts[n * size : (n + 1) * size]) for n in done)
    with tqdm(
        total=len(prompts), initial=finished, desc=f"attribute {prompt_set}", unit="prompt"
    ) as bar:
        shards = score(
            model,
            prompts,
            names,
            target=spec.target,
            batch_tokens=attribute.batch_tokens,
            shard=size,
            skip=done,
            progress=bar.update,
        )
        for number, scores in shards:
            ids = json.dumps([p.id for p in prompts[number * size : (number + 1) * size]])
            for name in names:
                path = partial / name / f"{number:05}.safetensors"
                write_tensors(path, {"scores": scores[name]}, {"ids": ids})

    folder = scores_folder(prompt_set)
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(folder)
    metrics = {
        "prompts": float(len(prompts)),
        "tokens": float(sum(len(s) for p in prompts for s in p.sequences)),
        "mean_tokens": float(np.mean([sum(map(len, p.sequences)) for p in prompts])),
    }
    write_json(metrics_path("attribute", prompt_set), metrics)
    return metrics
