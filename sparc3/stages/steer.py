"""Steer: interventions that are no set of neurons, learnt and tuned as circuits are.

Learnt on the attribute split, from the behaviour's prompts and its reference's, or, where prompts
are pairs, from their two sides. Of several strengths the one that does best on the tune split is
taken, within the budget that circuits keep to; of a set with blocks the largest, as the sweep does.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparc3.base.artifacts import (
    OUTPUTS,
    blocks,
    intervention_path,
    metrics_path,
    read_prompts,
    seen,
)
from sparc3.base.files import write_csv, write_json
from sparc3.base.params import Learnt, Params
from sparc3.circuits import choose
from sparc3.circuits.circuit import INTACT
from sparc3.circuits.intervention import Intervention, write_intervention
from sparc3.circuits.interventions import LEARNERS
from sparc3.circuits.responses import Prompts
from sparc3.measure.instruments import swept_of
from sparc3.model import families, loading
from sparc3.stages import sweep
from sparc3.stages.select import chosen_on

log = logging.getLogger(__name__)
COLUMNS = ("intervention", "variant", "strength", *sweep.COLUMNS[3:])

Variants = list[Intervention]


def prompts_of(
    params: Params, behaviour: str, block: str, tokenizer: PreTrainedTokenizerBase
) -> Prompts:
    """What the interventions of a block may be learnt from."""
    spec = params.behaviours[behaviour]
    rows = seen(spec.prompts, block)
    if all("pair" in row for row in rows):
        sides = [loading.encode_sentences(tokenizer, [r["pair"][n] for r in rows]) for n in (0, 1)]
    else:
        reference = read_prompts(spec.reference, "attribute")
        sides = [loading.encode(tokenizer, [r["text"] for r in each]) for each in (rows, reference)]
    return Prompts(sides[0], sides[1], front=len(loading.front(tokenizer)))


def learn(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, row: Learnt
) -> Variants:
    """What an intervention's kind makes of the prompts."""
    if row.text is not None:
        said = tokenizer(row.text, add_special_tokens=False).input_ids
        prompts = prompts._replace(instruction=said)
    return list(LEARNERS[row.kind](model, prompts))


def best(params: Params, points: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The point with the largest objective within the budget; else the cheapest."""
    own = [point for point in points if point["intervention"] == name]
    within = [point for point in own if choose.keeps(params.select.budget, point)]
    if within:
        return max(within, key=lambda point: point["objective"])
    return min(own, key=lambda point: point["ppl_delta"] + point["ppl_error"])


def tuned(
    params: Params,
    behaviour: str,
    variants: Mapping[str, Variants],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[dict[str, Any]], list[str]]:
    """A point for every intervention, variant and strength, as the sweep measures circuits, and
    the names of what is not in COLUMNS.
    """
    spec = params.behaviours[behaviour]
    instruments = swept_of(spec) if params.prompt_sets[spec.prompts].blocks is None else {}
    points: list[dict[str, Any]] = [{"intervention": "none", "variant": 0, "strength": 0.0}]
    edits: list[Any] = [INTACT]
    for name, row in params.steer.interventions.items():
        for place, variant in enumerate(variants[name]):
            for strength in row.strengths:
                points.append({"intervention": name, "variant": place, "strength": strength})
                edits.append(replace(variant, strength=strength))
    for point in points:
        point["objective"], point["objective_error"] = point["strength"], 0.0
    found = sweep.measure(params, behaviour, instruments, edits, model, tokenizer)
    names = sweep.add(points, instruments, *found)
    return points, names


def run(params: Params, behaviour: str) -> dict[str, float]:
    spec, named = params.behaviours[behaviour], params.steer.interventions
    model, tokenizer = loading.load(params.model), loading.tokenizer(params.model)
    every = blocks(spec.prompts)
    learnt: dict[str, dict[str, Variants]] = {}
    for block in tqdm(every, desc=f"steer {behaviour}", unit="block"):
        prompts = prompts_of(params, behaviour, block, tokenizer)
        learnt[block] = {n: learn(model, tokenizer, prompts, row) for n, row in named.items()}
    points, names = tuned(params, behaviour, learnt[every[:2][-1]], model, tokenizer)
    columns = [*COLUMNS, *names]
    points_path = OUTPUTS / "interventions" / behaviour / "points.csv"
    write_csv(points_path, [{c: p[c] for c in columns} for p in points], columns)
    scalars: dict[str, float] = {}
    for name, row in named.items():
        point = best(params, points, name)
        scalars |= {f"{name}.{key}": float(point[key]) for key in ("strength", "variant")}
        for block in every:
            path = intervention_path(behaviour, name, block)
            chosen = replace(learnt[block][name][point["variant"]], strength=point["strength"])
            write_intervention(path, chosen)
            facts = {
                **{"behaviour": behaviour, "block": block, "method": name, "kind": row.kind},
                "strength": point["strength"],
                "layers": families.num_layers(model),
                "width": families.width(model),
            }
            about = chosen_on(params, spec, block, tuned=len(points) > 2)
            write_json(path.with_suffix(".json"), facts | about)
        scalars[f"{name}.bytes"] = float(intervention_path(behaviour, name).stat().st_size)
    write_json(metrics_path("steer", behaviour), scalars)
    said = ", ".join(f"{name} {scalars[f'{name}.strength']:g}" for name in named)
    log.info("steer %s: strengths %s", behaviour, said)
    return scalars
