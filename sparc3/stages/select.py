"""Select: the circuit of each method, the neurons that will be pruned.

With `select.num_neurons` and `select.protect` given, they hold for every method. A null stands for
those that the sweep has; of several, each method takes the best on the tune split under the
perplexity budget. The test split is never looked at. Of a set with blocks there is a circuit of all
its prompts, and one for every block that is tested, of those before it; they have one size.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from sparc3.base import artifacts
from sparc3.base.errors import InputError
from sparc3.base.files import Array, read_csv, write_csv, write_json
from sparc3.base.params import Behaviour, Budget, Params
from sparc3.circuits import choose, stability
from sparc3.circuits.circuit import Circuit, write_circuit
from sparc3.circuits.correlation import read_flat
from sparc3.circuits.methods import leader, noise
from sparc3.relevance.contrasts import CONTRASTS

log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """How many neurons a method takes, of which the most important `share` are left alone."""

    k: int
    share: float
    key: str  # of params, that asks for k


def best_point(
    rows: list[dict[str, str]], method: str, k: int | None, protect: float | None, budget: Budget
) -> tuple[int, float]:
    """(num_neurons, protect) of the sweep's point with the largest objective within the budget.

    Where no point is within it, the cheapest in perplexity is taken: a method that cannot stay
    within the budget is shown at its best, and its cost with it.
    """
    points = [
        row
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

    def cost(row: dict[str, str]) -> float:
        return float(row["ppl_delta"]) + float(row["ppl_error"])

    within = [row for row in points if choose.keeps(budget, row)]
    best = max(within, key=lambda r: float(r["objective"])) if within else min(points, key=cost)
    return int(best["num_neurons"]), float(best["protect"])


def choice(
    params: Params, name: str, followed: Choice | None, rows: list[dict[str, str]], values: Array
) -> Choice:
    """A method's choice: of the method it follows, all that its differential `values` has, what
    `select` fixes, or the sweep's best.
    """
    method, select = params.methods[name], params.select
    if method.all:
        return Choice(int((values < 0).sum()), method.protect or 0.0, f"methods.{name}")
    if followed is not None:
        share = followed.share if method.protect is None else method.protect
        return Choice(followed.k, share, f"methods.{name}")
    key = "sweep.num_neurons" if select.num_neurons is None else "select.num_neurons"
    sizes, shares = strengths(params)
    if len(sizes) == len(shares) == 1:
        return Choice(sizes[0], shares[0], key)
    fixed = select.num_neurons, select.protect
    return Choice(*best_point(rows, name, *fixed, select.budget), key)


def strengths(params: Params) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Numbers of neurons and shares to choose from: of `select`, or, where null, of the sweep."""
    select, sweep = params.select, params.sweep
    return (
        sweep.num_neurons if select.num_neurons is None else (select.num_neurons,),
        sweep.protect if select.protect is None else (select.protect,),
    )


def chosen_on(params: Params, spec: Behaviour, block: str, tuned: bool) -> dict[str, Any]:
    """Prompts and groups that what is chosen for a block depends on, none of which may test it;
    `tuned`: also on what a sweep measured.
    """
    general = params.differential.general
    seen = {
        prompt_set: artifacts.read_prompts(prompt_set, "attribute")
        for prompt_set in dict.fromkeys((spec.prompts, spec.reference, general))
    } | {spec.prompts: artifacts.seen(spec.prompts, block)}
    if tuned:
        blocked = params.prompt_sets[spec.prompts].blocks is not None
        for prompt_set in (general,) if blocked else (spec.prompts, general):
            seen[prompt_set] = [*seen[prompt_set], *artifacts.read_prompts(prompt_set, "tune")]
        seen |= {name: artifacts.read_prompts(name, None) for name in params.sweep.choices}
    return {
        "chosen_on": {name: [row["id"] for row in rows] for name, rows in seen.items()},
        "groups": sorted({row["group"] for rows in seen.values() for row in rows}),
    }


def agreement(circuit: Circuit, before: Sequence[Circuit]) -> float:
    """Mean share of a circuit's neurons that the circuits of the blocks have too, in [0, 1]."""
    neurons = {row[:2] for row in circuit.rows()}
    shares = [len(neurons & {row[:2] for row in each.rows()}) / len(neurons) for each in before]
    return float(np.mean(shares))


def measure_stability(
    params: Params, behaviour: str, name: str, circuit: Circuit, share: float
) -> list[dict[str, Any]]:
    """Write each chosen neuron's selection frequency; return the method's curve of agreement.

    `share`: of all neurons, that were protected. The curve has a row per share of the prompts: how
    many of the behaviour's that is, and how much of the circuit bootstrap resamples of that size
    find again: the mean, and where 95 % of them lie.
    """
    spec, method = params.behaviours[behaviour], params.methods[name]
    assert method.contrast is not None  # only methods that score are measured
    differential, importance = choose.read_differential(behaviour, name)
    ids = circuit.layers * differential.shape[1] + circuit.neurons
    barred = choose.protected(importance, share)
    among = choose.ranked(differential, barred)[: stability.CANDIDATES * ids.size]
    reference, prompts = (
        read_flat(prompt_set, method.score, among) for prompt_set in (spec.reference, spec.prompts)
    )
    sizes = [max(2, round(share * len(prompts.values))) for share in stability.SHARES]
    contrast, settings = CONTRASTS[method.contrast], params.select
    chosen = stability.resampled_circuits(
        reference, prompts, contrast, ids.size, sizes, settings.resamples, settings.seed
    )
    frequency = stability.selection_frequency(chosen[-1], among.size)[: ids.size]
    columns = "layer", "neuron", "frequency"
    values = *np.divmod(ids, differential.shape[1]), frequency
    rows: list[dict[str, object]] = [
        dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)
    ]
    write_csv(artifacts.stability_path(behaviour, name), rows, columns)
    found = [stability.overlaps(drawn, ids.size) for drawn in chosen]
    return [
        {
            **{"method": name, "prompts": size, "overlap": float(again.mean())},
            **dict(zip(("low", "high"), np.quantile(again, (0.025, 0.975)).tolist(), strict=True)),
        }
        for size, again in zip(sizes, found, strict=True)
    ]


def choose_all(
    params: Params, behaviour: str, block: str, rows: list[dict[str, str]]
) -> dict[str, tuple[Choice, list[Circuit]]]:
    """Every method's choice, and its circuits, one for each draw, from what a block may see."""
    spec, seed = params.behaviours[behaviour], params.select.seed
    chosen: dict[str, tuple[Choice, list[Circuit]]] = {}
    # A method that takes its number of neurons from another comes after it.
    order = sorted(params.methods.items(), key=lambda item: bool(leader(*item, spec.method)))
    for name, method in tqdm(order, desc=f"select {behaviour} {block}".strip(), unit="method"):
        values, importance = choose.read_differential(behaviour, name, block)
        leads = leader(name, method, spec.method)
        followed, theirs = (None, None) if leads is None else chosen[leads]
        k, share, key = taken = choice(params, name, followed, rows, values)
        barred = choose.protected(importance, share)
        circuits = []
        for draw in range(method.draws):
            if method.score == "random":
                values = noise(seed, f"{behaviour}/{name}/{draw}", importance.shape)
            if method.layers is not None and theirs is not None:
                counts = np.bincount(theirs[0].layers, minlength=len(values))
                ids = choose.choose_per_layer(values, counts, barred, key)
            else:
                ids = choose.choose(values, k, barred, key)
            circuits.append(choose.circuit_of(method, values, ids))
        chosen[name] = taken, circuits
    return chosen


def write_circuits(
    params: Params, behaviour: str, block: str, chosen: dict[str, tuple[Choice, list[Circuit]]]
) -> None:
    """Each circuit, and beside it what it is and what it was chosen on."""
    shape = choose.read_differential(behaviour, next(iter(chosen)))[1].shape
    sizes, shares = strengths(params)
    tuned = len(sizes) * len(shares) > 1
    about = chosen_on(params, params.behaviours[behaviour], block, tuned)
    for name, (taken, circuits) in chosen.items():
        names = artifacts.circuit_names(name, params.methods[name])
        for draw, (circuit_name, circuit) in enumerate(zip(names, circuits, strict=True)):
            path = artifacts.circuit_path(behaviour, circuit_name, block)
            write_circuit(path, circuit)
            facts = {
                "behaviour": behaviour,
                "block": block,
                "method": name,
                "draw": draw,
                "num_neurons": len(circuit),
                "protect": taken.share,
                "layers": shape[0],
                "width": shape[1],
            }
            write_json(path.with_suffix(".json"), facts | about)


def run(params: Params, behaviour: str) -> dict[str, float]:
    spec = params.behaviours[behaviour]
    rows, blocks = read_csv(artifacts.sweep_path(behaviour)), artifacts.blocks(spec.prompts)
    every = {block: choose_all(params, behaviour, block, rows) for block in blocks}
    for block, chosen in every.items():
        write_circuits(params, behaviour, block, chosen)
    scalars: dict[str, float] = {}
    curves: list[dict[str, Any]] = []
    for name, method in params.methods.items():
        (k, share, _), (circuit, *_) = every[""][name]
        scalars |= {f"{name}.num_neurons": float(k), f"{name}.protect": share}
        if method.score == "random":
            continue
        if not method.all:
            curve = measure_stability(params, behaviour, name, circuit, share)
            curves += curve
            scalars[f"{name}.stability"] = curve[-1]["overlap"]
        if len(blocks) > 1:
            before = [every[block][name][1][0] for block in blocks[1:]]
            scalars[f"{name}.agreement"] = agreement(circuit, before)
    columns = ("method", "prompts", "overlap", "low", "high")
    write_csv(artifacts.stability_path(behaviour), curves, columns)
    write_json(artifacts.metrics_path("select", behaviour), scalars)
    own, again = spec.method, scalars.get(f"{spec.method}.stability")
    found = "" if again is None else f"; a bootstrap over prompts finds {100 * again:.0f} % again"
    log.info("select %s: %s takes %d neurons%s", behaviour, own, every[""][own][0].k, found)
    return scalars
