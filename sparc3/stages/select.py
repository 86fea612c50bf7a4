"""Select: the circuit of each method, the neurons that will be pruned.

With `select.num_neurons` and `select.protect` given, they hold for every method. A null stands for
those that the sweep has; of several, each method takes the best on the tune split under the
perplexity budget. The test split is never looked at.
"""

import numpy as np
from tqdm import tqdm

from sparc3.base.artifacts import (
    circuit_names,
    circuit_path,
    differential_path,
    groups_of,
    metrics_path,
    read_prompts,
    read_scores,
    stability_path,
    sweep_path,
)
from sparc3.base.errors import InputError
from sparc3.base.files import Array, read_csv, read_tensors, write_csv, write_json
from sparc3.base.params import Params
from sparc3.circuits.choose import choose, choose_per_layer, protected, scales
from sparc3.circuits.circuit import Circuit, write_circuit
from sparc3.circuits.methods import leader, noise
from sparc3.circuits.stability import (
    CANDIDATES,
    SHARES,
    Candidates,
    mean_overlap,
    resampled_circuits,
    selection_frequency,
)


def best_point(
    rows: list[dict[str, str]], method: str, k: int | None, protect: float | None, budget: float
) -> tuple[int, float]:
    """(num_neurons, protect) of the sweep's point with the largest objective within the budget.

    `budget` bounds ppl_delta plus one standard error, in percent: of several noisy points the one
    that is chosen tends to be cheap by luck, and would cost more than the budget on other texts.
    Where no point is within it, the cheapest point is taken: a method that cannot stay within the
    budget is shown at its best, and its cost with it.
    """
    points = [
        (
            float(row["objective"]),
            float(row["ppl_delta"]) + float(row["ppl_error"]),
            int(row["num_neurons"]),
            row["protect"],
        )
        for row in rows
        if row["method"] == method
        and k in (None, int(row["num_neurons"]))
        and protect in (None, float(row["protect"]))
    ]
    if not points:
        raise InputError(
            f"select: the sweep has no point for method {method} with num_neurons={k}, "
            f"protect={protect}; add it to sweep, or give both select.num_neurons and "
            "select.protect"
        )
    within = [p for p in points if p[1] <= budget]
    best = max(within, key=lambda p: p[0]) if within else min(points, key=lambda p: p[1])
    return best[2], float(best[3])


def candidates(prompt_set: str, score: str, ids: Array) -> Candidates:
    """The scores of some neurons, by their flat ids, for every prompt of a set."""
    prompts, scores = read_scores(prompt_set, score)
    return Candidates(scores.reshape(len(scores), -1)[:, ids], groups_of(prompt_set, prompts))


def measure_stability(
    params: Params, behaviour: str, name: str, ids: Array, differential: Array, barred: Array
) -> list[dict[str, object]]:
    """Write each chosen neuron's selection frequency; return the method's curve of agreement.

    `ids`: the circuit. The curve has a row per share of the prompts: how many of the behaviour's
    that is, and how much of the circuit a bootstrap resample of that size finds again.
    """
    spec, method = params.behaviours[behaviour], params.methods[name]
    assert method.contrast is not None  # only methods that score are measured
    free = int(barred.size - barred.sum())
    among = choose(differential, min(CANDIDATES * ids.size, free), barred)
    reference, prompts = (
        candidates(prompt_set, method.score, among) for prompt_set in (spec.reference, spec.prompts)
    )
    sizes = [max(2, round(share * len(prompts.scores))) for share in SHARES]
    chosen = resampled_circuits(
        reference,
        prompts,
        method.contrast,
        ids.size,
        sizes,
        params.select.resamples,
        params.select.seed,
    )
    frequency = selection_frequency(chosen[-1], among.size)[: ids.size]
    rows = [
        {
            "layer": int(i) // differential.shape[1],
            "neuron": int(i) % differential.shape[1],
            "frequency": float(f),
        }
        for i, f in zip(ids, frequency, strict=True)
    ]
    write_csv(stability_path(behaviour, name), rows, ("layer", "neuron", "frequency"))
    return [
        {"method": name, "prompts": size, "overlap": mean_overlap(found, ids.size)}
        for size, found in zip(sizes, chosen, strict=True)
    ]


def run(params: Params, behaviour: str) -> dict[str, float]:
    spec, select = params.behaviours[behaviour], params.select
    rows = read_csv(sweep_path(behaviour))
    sizes = params.sweep.num_neurons if select.num_neurons is None else (select.num_neurons,)
    protects = params.sweep.protect if select.protect is None else (select.protect,)
    seen = {
        prompt_set: read_prompts(prompt_set, "attribute")
        for prompt_set in dict.fromkeys((spec.prompts, spec.reference, params.differential.general))
    }
    if len(sizes) * len(protects) > 1:  # chosen by what the sweep measured
        for prompt_set in (spec.prompts, params.differential.general):
            seen[prompt_set] = [*seen[prompt_set], *read_prompts(prompt_set, "tune")]
    chosen_on = {name: [row["id"] for row in found] for name, found in seen.items()}
    groups = sorted({row["group"] for found in seen.values() for row in found})
    circuits: dict[str, Array] = {}
    shares: dict[str, float] = {}
    scalars: dict[str, float] = {}
    curves: list[dict[str, object]] = []
    # A method that takes its number of neurons from another comes after it.
    order = sorted(params.methods.items(), key=lambda item: bool(item[1].match or item[1].layers))
    for name, method in tqdm(order, desc=f"select {behaviour}", unit="method"):
        tensors, _ = read_tensors(differential_path(behaviour, name))
        values, importance = tensors["differential"], tensors["importance"]
        leads = leader(method, spec.method)
        if leads is not None:
            k = circuits[leads].size
            share = shares[leads] if method.protect is None else method.protect
        elif len(sizes) == len(protects) == 1:
            k, share = sizes[0], protects[0]
        else:
            k, share = best_point(rows, name, select.num_neurons, select.protect, select.ppl_budget)
        barred = protected(importance, share)
        ids = np.empty(0, dtype=np.int64)
        for draw, circuit in enumerate(circuit_names(name, method)):
            if method.score == "random":
                values = noise(select.seed, f"{behaviour}/{name}/{draw}", importance.shape)
            if method.layers is not None and leads is not None:
                counts = np.bincount(circuits[leads] // values.shape[1], minlength=values.shape[0])
                ids = choose_per_layer(values, counts, barred)
            else:
                ids = choose(values, k, barred)
            about = {
                "behaviour": behaviour,
                "method": name,
                "draw": draw,
                "num_neurons": int(ids.size),
                "protect": share,
                "of_neurons": int(values.size),
                "layers": int(values.shape[0]),
                "width": int(values.shape[1]),
                "chosen_on": chosen_on,
                "groups": groups,
            }
            path = circuit_path(behaviour, circuit)
            layers, neurons = np.divmod(ids, values.shape[1])
            scores = values.ravel()[ids].astype(np.float64)
            write_circuit(path, Circuit(layers, neurons, scores, scales(method, scores)))
            write_json(path.with_suffix(".json"), about)
        circuits[name], shares[name] = ids, share
        scalars[f"{name}.num_neurons"] = float(k)
        scalars[f"{name}.protect"] = share
        if method.score != "random":
            curve = measure_stability(params, behaviour, name, ids, values, barred)
            curves += curve
            scalars[f"{name}.stability"] = float(str(curve[-1]["overlap"]))
    write_csv(stability_path(behaviour), curves, ("method", "prompts", "overlap"))
    write_json(metrics_path("select", behaviour), scalars)
    return scalars
