"""Faithfulness: what removing neurons does to the explained target, beside what scores say.

On prompts that no circuit is chosen on: those of the tune split, or, of a set with blocks, those of
its tested ones; never sealed ones. Scores are of the same prompts.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparc3.base.artifacts import OUTPUTS, metrics_path, read_prompts
from sparc3.base.files import Array, write_csv, write_json
from sparc3.base.params import Params
from sparc3.measure import faithfulness
from sparc3.measure.faithfulness import Batch, batch_of
from sparc3.model import families, loading
from sparc3.relevance.attribution import score
from sparc3.relevance.scores import Target
from sparc3.stages.attribute import by_target, encode

log = logging.getLogger(__name__)


def held_out(params: Params, prompt_set: str) -> list[dict[str, Any]]:
    """The prompts whose lengths are nearest to the median, so that little of a batch is padding;
    none of a profile that holds none out.
    """
    blocked, shares = params.prompt_sets[prompt_set].blocks is not None, params.prepare.splits
    split = "tune" if shares["tune"] and not blocked else "test"
    if not blocked and not shares[split]:
        return []
    rows = read_prompts(prompt_set, split)
    middle = np.median([row["tokens"] for row in rows])
    rows.sort(key=lambda row: abs(row["tokens"] - middle))
    return rows[: params.faithfulness.prompts]


def additivity(
    model: Any,
    batch: Batch,
    neurons: Array,
    effect: Array,
    scores: Mapping[str, Array],
    sizes: Sequence[int],
) -> dict[str, Any]:
    """Of the sample, the first neurons by each score: what they do together, and the sum of what
    each does alone. `neurons`: flat ids, in whose order `effect` and the `scores` are.
    """
    orders = {name: np.argsort(-values, kind="stable") for name, values in scores.items()}
    kept, width = [k for k in sizes if k <= len(neurons)], families.width(model)
    first = [(name, k, order[:k]) for name, order in orders.items() for k in kept]
    circuits = [faithfulness.removed(neurons[some], width) for *_, some in first]
    falls = faithfulness.together(model, batch, circuits).mean(1)
    found: dict[str, Any] = {name: {} for name in scores}
    for (name, k, some), fall in zip(first, falls, strict=True):
        found[name][str(k)] = {"together": float(fall), "sum": float(effect[some].sum())}
    return found


def mean_scores(
    params: Params, model: Any, tokenizer: Any, rows: list[dict[str, Any]], target: Target
) -> dict[str, Array]:
    """Means over the prompts `rows`, (layer, neuron), by the names of faithfulness.scores."""
    settings, means = params.faithfulness, dict[str, Array]()
    for explained, names in by_target(settings.scores, target).items():
        prompts, kinds = [encode(rows, tokenizer, explained)], [*names.values()]
        batch_tokens = settings.batch_tokens
        (found,) = score(model, prompts, kinds, target=explained, batch_tokens=batch_tokens)
        means |= {name: found[kind].mean(0, dtype=np.float64) for name, kind in names.items()}
    return {name: means[name] for name in settings.scores}


def measure(
    params: Params, rows: list[dict[str, Any]], target: Target
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each neuron of the sample, and the metrics."""
    settings = params.faithfulness
    sizes, resamples = settings.num_neurons, settings.resamples
    tokenizer, model = loading.tokenizer(params.model), loading.load(params.model)
    means = mean_scores(params, model, tokenizer, rows, target)
    batch = batch_of(model, encode(rows, tokenizer, target), target)
    neurons = faithfulness.strata(means, settings.neurons, settings.seed)
    effect = faithfulness.alone(model, [batch], neurons, settings.batch_tokens)[0].mean(1)
    curves = faithfulness.curves(model, batch, means, sizes)
    layers, width = next(iter(means.values())).shape
    sampled = {name: values.ravel()[neurons] for name, values in means.items()}
    agreement = {
        name: faithfulness.by_depth(values, effect, neurons // width, layers, resamples)
        for name, values in sampled.items()
    }
    lines = [
        {"layer": int(i) // width, "neuron": int(i) % width, "effect": float(effect[n])}
        | {name: float(values[n]) for name, values in sampled.items()}
        for n, i in enumerate(neurons)
    ]
    return lines, {
        "prompts": [row["id"] for row in rows],
        "target": target,
        "neurons": len(neurons),
        "agreement": {
            name: {part: {k: e._asdict() for k, e in row.items()} for part, row in parts.items()}
            for name, parts in agreement.items()
        },
        "num_neurons": list(sizes),
        "curves": {
            name: {way: fall.mean(1).tolist() for way, fall in ways.items()}
            for name, ways in curves.items()
        },
        "area": {
            name: faithfulness.area(ways, sizes, resamples)._asdict()
            for name, ways in curves.items()
        },
        "additivity": additivity(
            model, batch, neurons, effect, {"effect": effect, **sampled}, sizes
        ),
    }


def run(params: Params, behaviour: str) -> dict[str, float]:
    spec = params.behaviours[behaviour]
    rows = held_out(params, spec.prompts)
    lines, metrics = [], dict[str, Any]()
    if rows:
        lines, metrics = measure(params, rows, params.prompt_sets[spec.prompts].target)
    columns = ("layer", "neuron", "effect", *metrics.get("agreement", ()))
    write_csv(OUTPUTS / "faithfulness" / behaviour / "neurons.csv", lines, columns)
    write_json(metrics_path("faithfulness", behaviour), metrics)
    if not rows:
        log.info("faithfulness %s: no prompt is held out", behaviour)
        return {}
    ranks = {n: parts["all"]["spearman"]["value"] for n, parts in metrics["agreement"].items()}
    said = "faithfulness %s: Spearman with the true effects of %d neurons: %s"
    shown = ", ".join(f"{name} {value:.2f}" for name, value in ranks.items())
    log.info(said, behaviour, len(lines), shown)
    return {f"{name}.spearman": value for name, value in ranks.items()}
