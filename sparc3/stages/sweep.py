"""Sweep: every method at every strength, on the tune split, with one load of the model.

Only deterministic quantities are measured, so the points lie on smooth curves of behaviour against
perplexity, from which `select` may choose. No prompt of the test split is read.
"""

from typing import Any

from tqdm import tqdm

from sparc3.base.artifacts import differential_path, metrics_path, read_prompts, sweep_path
from sparc3.base.files import read_tensors, write_csv, write_json
from sparc3.base.params import Params
from sparc3.circuits.choose import circuit_at
from sparc3.circuits.circuit import INTACT
from sparc3.circuits.methods import check_methods
from sparc3.measure import stereotypes
from sparc3.measure.measures import (
    Texts,
    items,
    likelihood,
    nll_shift,
    perplexity_error,
    perplexity_percent,
    preferences,
    texts,
)
from sparc3.model import loading

COLUMNS = ("method", "protect", "num_neurons", "ppl_delta", "ppl_error", "objective")
MEASURED = {
    "completions": ("nll_shift",),
    "pairs": ("ss", "lms", "icat", "margin"),
}


def objective(measure: str, measured: dict[str, float]) -> float:
    """What `select` maximises, in nats per token.

    For completions the rise of the behaviour's negative log-likelihood beyond that of general text.
    For pairs -|preference margin|: SS and ICAT count preferences and jump from item to item, and on
    a tune split of some dozens of items their best point is one of noise.
    """
    return measured["nll_shift"] if measure == "completions" else -abs(measured["margin"])


def run(params: Params, behaviour: str) -> dict[str, float]:
    check_methods(params)
    spec, sweep = params.behaviours[behaviour], params.sweep
    tokenizer = loading.tokenizer(params.model)
    chosen = {
        name: method
        for name, method in params.methods.items()
        if method.match is None and method.layers is None
    }
    sizes = sorted(sweep.num_neurons)
    curves = [(n, p) for n in chosen for p in sweep.protect] if sizes else []
    columns = [*COLUMNS, *MEASURED[spec.measure]]
    if not curves:  # num_neurons and protect are fixed, and nothing has to be tuned
        write_csv(sweep_path(behaviour), [], columns)
        write_json(metrics_path("sweep", behaviour), {"points": 0.0})
        return {"points": 0.0}
    rows = read_prompts(spec.prompts, "tune")[: sweep.items]
    general = texts(read_prompts(params.differential.general, "tune")[: sweep.texts], tokenizer)
    model = loading.load(params.model)

    sample = (texts if spec.measure == "completions" else items)(rows, tokenizer)
    points: list[dict[str, Any]] = [{"method": "none", "protect": 0.0, "num_neurons": 0}]
    circuits = [INTACT]
    for name, share in curves:
        tensors, _ = read_tensors(differential_path(behaviour, name))
        for k in sizes:
            points.append({"method": name, "protect": share, "num_neurons": k})
            differential, importance = tensors["differential"], tensors["importance"]
            circuits.append(circuit_at(chosen[name], differential, importance, k, share))

    total = len(circuits) * (len(general.ids) + len(sample.ids))
    with tqdm(total=total, desc=f"sweep {behaviour}", unit="text") as bar:
        fixed = sweep.batch_tokens, bar.update
        general_after = likelihood(model, circuits, general, *fixed)
        if isinstance(sample, Texts):
            both = list(
                zip(likelihood(model, circuits, sample, *fixed), general_after, strict=True)
            )
            found = [{"nll_shift": nll_shift(both[0], after)} for after in both]
        else:
            found = [
                stereotypes.values(log_p, sample.groups)
                for log_p in preferences(model, circuits, sample, *fixed)
            ]
    for point, after, measured in zip(points, general_after, found, strict=True):
        point["ppl_delta"] = perplexity_percent(general_after[0], after)
        point["ppl_error"] = perplexity_error(general_after[0], after, general.groups)
        point.update(measured, objective=objective(spec.measure, measured))

    write_csv(sweep_path(behaviour), points, columns)
    best = {name: max(p["objective"] for p in points if p["method"] == name) for name in chosen}
    scalars = {"points": float(len(points)), **{f"{n}.objective": v for n, v in best.items()}}
    write_json(metrics_path("sweep", behaviour), scalars)
    return scalars
