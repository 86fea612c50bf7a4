"""Differential: one number per neuron that contrasts a reference with a behaviour.

The most negative neurons serve the behaviour most specifically (paper, Eq. 7). Of a set with blocks
also for every block that is tested, from the prompts of the blocks before it.
"""

import logging
from collections.abc import Mapping

import numpy as np
from tqdm import tqdm

from sparc3.base.artifacts import (
    blocks,
    differential_path,
    metrics_path,
    read_scores,
    score_shards,
    seen,
)
from sparc3.base.errors import InputError
from sparc3.base.files import Array, write_json, write_tensors
from sparc3.base.params import Behaviour, Method, Params
from sparc3.circuits.methods import noise
from sparc3.relevance.contrasts import CONTRASTS

log = logging.getLogger(__name__)


def importance(prompt_set: str, score: str) -> Array:
    """Mean absolute score over a set's prompts, shape (layer, neuron): what protection ranks by."""
    total, count = None, 0
    for ids, scores in score_shards(prompt_set, score):
        part = np.abs(scores).sum(0, dtype=np.float64)
        total = part if total is None else total + part
        count += len(ids)
    assert total is not None  # score_shards refuses an empty folder
    return (total / count).astype(np.float32)


def contrasted(spec: Behaviour, method: Method, known: Mapping[str, set[str]]) -> dict[str, Array]:
    """A method's differentials, float32 (layer, neuron), by block. `known`: the ids of the prompts
    that each is from. InputError: too few prompts in a set.
    """
    assert method.contrast is not None  # stages.checks
    _, reference = read_scores(spec.reference, method.score)
    ids, scores = read_scores(spec.prompts, method.score)
    values = {}
    for block, chosen_on in known.items():
        rows = [place for place, prompt in enumerate(ids) if prompt in chosen_on]
        given = scores if len(rows) == len(ids) else scores[rows]
        try:
            values[block] = CONTRASTS[method.contrast](reference, given)
        except InputError as error:  # which knows no names
            sets = f"reference {spec.reference}, behaviour {spec.prompts} {block}".strip()
            raise InputError(f"{error} ({sets})") from None
    return values


def run(params: Params, behaviour: str) -> dict[str, float]:
    general = importance(params.differential.general, params.differential.importance)
    prompts = params.behaviours[behaviour].prompts
    known = {block: {row["id"] for row in seen(prompts, block)} for block in blocks(prompts)}
    scalars: dict[str, float] = {}
    for name, method in tqdm(params.methods.items(), desc=f"differential {behaviour}"):
        if method.score == "random":
            every = {"": noise(params.select.seed, f"{behaviour}/{name}/0", general.shape)}
        else:
            every = contrasted(params.behaviours[behaviour], method, known)
        named = {block or "differential": values for block, values in every.items()}
        write_tensors(differential_path(behaviour, name), {**named, "importance": general})
        values = every[""]
        scalars[f"{name}.negative_share"] = float((values < 0).mean())
        scalars[f"{name}.most_negative"] = float(values.min())
    write_json(metrics_path("differential", behaviour), scalars)
    own = params.behaviours[behaviour].method
    said = "differential %s: by %s, %.0f %% of %d neurons lean towards the behaviour"
    log.info(said, behaviour, own, 100 * scalars[f"{own}.negative_share"], general.size)
    return scalars
