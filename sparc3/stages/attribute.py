"""Attribute: the scores of every neuron for every prompt of a set's attribute split.

Scores go to disk shard by shard, so that memory does not grow with the number of prompts, and a
run that was killed goes on after its last finished shard, with the same numbers. Started as several
processes (torchrun, accelerate launch, Slurm), each takes every n-th shard. The folder that later
stages read appears at the end, whole.
"""

import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel

from sparc3.base import files, parallel
from sparc3.base.artifacts import (
    OUTPUTS,
    metrics_path,
    model_digest,
    read_prompts,
    scores_digest,
    scores_folder,
)
from sparc3.base.errors import InputError
from sparc3.base.files import digest, digest_text, write_json, write_tensors
from sparc3.base.params import Attribute, Params, scores_of
from sparc3.model import checkpoint, families, loading, trunk
from sparc3.relevance import attribution, scores
from sparc3.relevance.attribution import FirstToken, Progress, Prompt, score
from sparc3.relevance.scores import Target

log = logging.getLogger(__name__)

# What decides the numbers of a shard, beside the packages.
CODE = [
    Path(__file__),
    *(Path(str(code.__file__)) for code in (attribution, scores, files)),
    Path(__file__).parents[1] / "relevance/lrp.py",  # not imported: lxt need not be there
    *(Path(str(code.__file__)) for code in (checkpoint, families, loading, trunk)),
]
FIRST = "first-token"  # where, beside the scores, each shard's sizes of it wait
VISIBLE = 120.0  # seconds until a network file system shows what another machine has written


def by_target(names: Sequence[str], default: Target) -> dict[Target, dict[str, str]]:
    """Target -> {name: score}. `lrp-abs@max-logit` is the score lrp-abs of that target, whatever
    the set's own; a name without one is of the set's, `default`.
    """
    targets: dict[Target, dict[str, str]] = {}
    for name in names:
        score_name, _, target = name.partition("@")
        targets.setdefault(cast(Target, target or default), {})[name] = score_name
    return targets


def encode(rows: list[dict[str, Any]], tokenizer: Any, target: str) -> list[Prompt]:
    """Rows of a prompt set as token ids: the text, or for `pair` the row's two texts."""
    for row in rows:
        if target == "pair" and "pair" not in row:  # prepared from another source than params say
            raise InputError(f"prompt {row['id']} has no pair; run prepare again (dvc repro)")
    if target == "pair":
        every = [loading.encode_sentences(tokenizer, row["pair"]) for row in rows]
    else:
        every = [[ids] for ids in loading.encode(tokenizer, [row["text"] for row in rows])]
    return [Prompt(row["id"], tuple(each)) for row, each in zip(rows, every, strict=True)]


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
            attribute.first_token,
            [params.model.dtype, params.model.device, model_digest(Path(params.model.path))],
            [digest(path) for path in CODE],
            [version(name) for name in ("torch", "transformers", "lxt") if find_spec(name)],
        ]
    )
    return OUTPUTS / "partial" / prompt_set / digest_text(identity)[:16]


def publish(
    partial: Path, folder: Path, names: Sequence[str], shards: int, visible: float = VISIBLE
) -> dict[str, float]:
    """Move all shards to `folder`, in place of what is there; other parts of the set are removed.

    Returns the share of relevance at the first token, for each name that is summed over tokens.
    InputError if a shard is not there, not even after `visible` seconds.
    """
    sizes = [partial / FIRST / f"{n:05}.json" for n in range(shards)]
    wanted = [partial / name / f"{n:05}.safetensors" for n in range(shards) for name in names]
    wanted += sizes
    deadline = time.monotonic() + visible
    while missing := [path for path in wanted if not path.exists()]:
        if time.monotonic() > deadline:
            raise InputError(
                f"{missing[0]}: file not found, though a process has written it; start all "
                "processes in one folder, on a file system that every machine sees"
            )
        time.sleep(1)
    found: dict[str, list[float]] = {}
    for path in sizes:
        for name, (there, everywhere) in json.loads(path.read_bytes()).items():
            before = found.get(name, [0.0, 0.0])
            found[name] = [before[0] + there, before[1] + everywhere]
    for leftover in partial.glob("*/.*"):  # of a write that was killed
        leftover.unlink()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        folder.replace(tempfile.mkdtemp(dir=partial.parent))
    partial.replace(folder)
    shutil.rmtree(folder / FIRST)  # only now: one that is killed before goes on with it
    shutil.rmtree(partial.parent)
    return {name: there / everywhere for name, (there, everywhere) in found.items() if everywhere}


def run(params: Params, prompt_set: str) -> dict[str, float]:
    """Write outputs/scores/SET; of several processes, each computes its share of the shards.

    InputError: a prompt without what its target needs.
    """
    names = scores_of(params, prompt_set)
    targets = by_target(names, params.prompt_sets[prompt_set].target)
    here = parallel.place()
    device = parallel.device(here, params.model.device)
    tokenizer = loading.tokenizer(params.model)
    rows = read_prompts(prompt_set, "attribute")[: params.prompt_sets[prompt_set].attributed]
    encoded: dict[Target, list[Prompt]] = {
        target: encode(rows, tokenizer, target) for target in targets
    }
    size = params.attribute.shard_prompts
    shards = range(math.ceil(len(rows) / size))
    every = [prompt for prompts in encoded.values() for prompt in prompts]
    partial = partial_folder(params, prompt_set, names, every)

    with parallel.joined(here):
        parallel.agree(here, str(partial))
        *_, last = (name for by_name in targets.values() for name in by_name)  # of a shard
        done = {int(path.stem) for path in (partial / last).glob("*.safetensors")}
        if done:
            log.info("attribute %s: going on after %d finished shards", prompt_set, len(done))
        mine = [n for n in shards if here.shares(n) and n not in done]
        if mine:
            model = loading.load(params.model, device)
            parts: dict[Target, dict[int, list[Prompt]]] = {
                target: {n: prompts[n * size : (n + 1) * size] for n in mine}
                for target, prompts in encoded.items()
            }
            total = sum(len(part) for by_number in parts.values() for part in by_number.values())
            label = f"attribute {prompt_set}"
            with tqdm(total=total, desc=label, unit="prompt", disable=here.rank > 0) as bar:
                write_shards(model, partial, parts, targets, params.attribute, bar.update)
        parallel.wait(here)

    tokens = [sum(map(len, prompt.sequences)) for prompt in every]
    metrics = {
        "prompts": float(len(rows)),
        "tokens": float(sum(tokens)),
        "mean_tokens": float(np.mean(tokens)),
    }
    if here.rank == 0:
        shares = publish(partial, scores_folder(prompt_set), names, len(shards))
        metrics |= {f"first_token.{name}": share for name, share in shares.items()}
        checked = {**metrics, "sha256": scores_digest(prompt_set)}
        write_json(metrics_path("attribute", prompt_set), checked)
        said = "attribute %s: %s of every neuron for %d prompts, %d tokens"
        log.info(said, prompt_set, ", ".join(names), len(rows), sum(tokens))
        for name, share in shares.items():
            log.info(
                "attribute %s: %.0f %% of %s is on the first token", prompt_set, 100 * share, name
            )
    return metrics


def write_shards(
    model: PreTrainedModel,
    folder: Path,
    parts: Mapping[Target, Mapping[int, Sequence[Prompt]]],
    targets: Mapping[Target, Mapping[str, str]],
    how: Attribute,
    progress: Progress,
) -> None:
    """Write folder/NAME/NUMBER.safetensors for the prompts `parts[target][number]`, shard by shard,
    and in each the names of `targets` (`by_target`) in their order.
    """
    firsts = {target: FirstToken(how.first_token) for target in targets}
    streams = [
        score(
            model,
            list(parts[target].values()),
            list(by_name.values()),
            target=target,
            batch_tokens=how.batch_tokens,
            progress=progress,
            first=firsts[target],
        )
        for target, by_name in targets.items()
    ]
    for number, prompts in next(iter(parts.values())).items():
        ids = json.dumps([prompt.id for prompt in prompts])
        computed = [next(stream) for stream in streams]
        sizes = {
            name: firsts[target].sizes.pop(score_name)
            for target, by_name in targets.items()
            for name, score_name in by_name.items()
            if score_name in firsts[target].sizes
        }
        write_json(folder / FIRST / f"{number:05}.json", sizes)
        for values, by_name in zip(computed, targets.values(), strict=True):
            for name, score_name in by_name.items():
                path = folder / name / f"{number:05}.safetensors"
                write_tensors(path, {"scores": values[score_name]}, {"ids": ids})
