"""Differential: one number per neuron that contrasts a reference with a behaviour.

The most negative neurons serve the behaviour most specifically (paper, Eq. 7).
"""

import numpy as np
from tqdm import tqdm

from sparc3.base.artifacts import differential_path, metrics_path, read_scores, score_shards
from sparc3.base.errors import InputError
from sparc3.base.files import Array, write_json, write_tensors
from sparc3.base.params import Behaviour, Method, Params
from sparc3.circuits.methods import noise
from sparc3.relevance.contrasts import CONTRASTS


def importance(prompt_set: str, score: str) -> Array:
    """Mean absolute score over a set's prompts, shape (layer, neuron): what protection ranks by."""
    total, count = None, 0
    for ids, scores in score_shards(prompt_set, score):
        part = np.abs(scores).sum(0, dtype=np.float64)
        total = part if total is None else total + part
        count += len(ids)
    assert total is not None  # score_shards refuses an empty folder
    return (total / count).astype(np.float32)


def contrasted(spec: Behaviour, method: Method) -> Array:
    """A method's differential, float32 (layer, neuron). InputError: too few prompts in a set."""
    assert method.contrast is not None  # stages.checks
    sets = spec.reference, spec.prompts
    scores = (read_scores(prompt_set, method.score)[1] for prompt_set in sets)
    try:
        return CONTRASTS[method.contrast](*scores)
    except InputError as error:  # which knows no names
        raise InputError(f"{error} (reference {sets[0]}, behaviour {sets[1]})") from None


def run(params: Params, behaviour: str) -> dict[str, float]:
    general = importance(params.differential.general, params.differential.importance)
    scalars: dict[str, float] = {}
    for name, method in tqdm(params.methods.items(), desc=f"differential {behaviour}"):
        if method.score == "random":
            values = noise(params.select.seed, f"{behaviour}/{name}/0", general.shape)
        else:
            values = contrasted(params.behaviours[behaviour], method)
        write_tensors(
            differential_path(behaviour, name), {"differential": values, "importance": general}
        )
        scalars[f"{name}.negative_share"] = float((values < 0).mean())
        scalars[f"{name}.most_negative"] = float(values.min())
    write_json(metrics_path("differential", behaviour), scalars)
    return scalars
