"""Sweep: every method at every strength, on the tune split, with one load of the model.

What is measured lies on smooth curves of behaviour against perplexity, from which `select` may
choose. No prompt of the test split is read. A set with blocks has no tune split: the circuits are
those of its first block, of which only the perplexity of general text is measured, and the
objective is the size. So the largest that the budget allows is chosen without a tested group.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparc3.base.artifacts import blocks, metrics_path, read_prompts, sweep_path
from sparc3.base.files import write_csv, write_json
from sparc3.base.params import Method, Params
from sparc3.circuits.ablate import Edit
from sparc3.circuits.choose import BUDGETS, circuit_at, read_differential
from sparc3.circuits.circuit import INTACT, Circuit
from sparc3.circuits.methods import swept
from sparc3.measure.instrument import How, Instrument, Measured, Reading, objective_error
from sparc3.measure.instruments import accuracy, perplexity, swept_of
from sparc3.model import loading

log = logging.getLogger(__name__)
COLUMNS = ("method", "protect", "num_neurons", *BUDGETS["perplexity"], *BUDGETS["kl"])
COLUMNS += ("objective", "objective_error")


def curves(
    params: Params, behaviour: str, methods: Mapping[str, Method]
) -> tuple[list[dict[str, Any]], list[Circuit]]:
    """The points, first that of the unpruned model, and their circuits."""
    points: list[dict[str, Any]] = [{"method": "none", "protect": 0.0, "num_neurons": 0}]
    circuits = [INTACT]
    first = blocks(params.behaviours[behaviour].prompts)[:2][-1]  # that is tested, if any
    for name, method in methods.items():
        differential = read_differential(behaviour, name, first)
        for share in params.sweep.protect:
            for k in sorted(params.sweep.num_neurons):
                points.append({"method": name, "protect": share, "num_neurons": k})
                circuits.append(circuit_at(method, *differential, k, share, "sweep.num_neurons"))
    return points, circuits


def measure(
    params: Params,
    behaviour: str,
    instruments: Mapping[str, Instrument],
    edits: Sequence[Edit],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[dict[str, Reading]], list[perplexity.Compared], list[dict[str, float]]]:
    """Readings of the tune split by each instrument, and of general text, and what is lost on
    questions, if there are any, under each edit.
    """
    sweep = params.sweep
    prompts = params.behaviours[behaviour].prompts
    rows = read_prompts(prompts, "tune")[: sweep.items] if instruments else []
    texts = read_prompts(params.differential.general, "tune")[: sweep.texts]
    asked = [row for name in sweep.choices for row in read_prompts(name, None)]
    total = len(edits) * (len(texts) + len(instruments) * len(rows) + len(asked))
    with tqdm(total=total, desc=f"sweep {behaviour}", unit="text") as bar:
        how = How(params.evaluate, sweep.batch_tokens, tokenizer, progress=bar.update)
        general = perplexity.read_until(model, edits, texts, how, sweep.error)
        found = {
            name: each.read(model, edits, each.encode(rows, tokenizer), how)
            for name, each in instruments.items()
        }
        lost = accuracy.costs(model, edits, asked, how)
    by_edit = [{name: each[at] for name, each in found.items()} for at in range(len(edits))]
    return by_edit, general, lost


def add(
    points: Sequence[dict[str, Any]],
    instruments: Mapping[str, Instrument],
    by_edit: Sequence[Mapping[str, Reading]],
    general: Sequence[perplexity.Compared],
    lost: Sequence[Mapping[str, float]],
) -> list[str]:
    """Add to each point what `measure` found: costs, levels, and the objective, if there is an
    instrument. Returned are the names of what is not in COLUMNS.
    """
    names: dict[str, None] = {}
    for point, readings, text, points_lost in zip(points, by_edit, general, lost, strict=True):
        point |= {**perplexity.costs(*text), **points_lost}
        names |= dict.fromkeys(points_lost)
        for name, instrument in reversed(list(instruments.items())):  # the first has the last word
            before = Measured(by_edit[0][name], text.before)
            after = Measured(readings[name], text.after)
            levels = instrument.levels(after.reading)
            point |= {**levels, "objective": instrument.objective(before, after)}
            point["objective_error"] = objective_error(instrument.objective, before, after)
            names |= dict.fromkeys(levels)
    return list(names)


def run(params: Params, behaviour: str) -> dict[str, float]:
    spec = params.behaviours[behaviour]
    methods = swept(params.methods, spec.method)
    instruments = swept_of(spec) if params.prompt_sets[spec.prompts].blocks is None else {}
    points, circuits = curves(params, behaviour, methods)
    if len(points) == 1:  # num_neurons and protect are fixed, and nothing has to be tuned
        write_csv(sweep_path(behaviour), [], COLUMNS)
        write_json(metrics_path("sweep", behaviour), {"points": 0.0})
        return {"points": 0.0}
    model, tokenizer = loading.load(params.model), loading.tokenizer(params.model)
    found = measure(params, behaviour, instruments, circuits, model, tokenizer)
    for point in points:
        point["objective"], point["objective_error"] = point["num_neurons"], 0.0
    columns = [*COLUMNS, *add(points, instruments, *found)]
    write_csv(sweep_path(behaviour), points, columns)
    best = {name: max(p["objective"] for p in points if p["method"] == name) for name in methods}
    scalars = {"points": float(len(points)), **{f"{n}.objective": v for n, v in best.items()}}
    write_json(metrics_path("sweep", behaviour), scalars)
    said = "sweep %s: %d circuits of %s: perplexity %+.1f to %+.1f %%"
    cost = [point["ppl_delta"] for point in points[1:]]
    log.info(said, behaviour, len(cost), ", ".join(methods), min(cost), max(cost))
    return scalars
