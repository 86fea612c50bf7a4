"""Sweep: every method at every strength, on the tune split, with one load of the model.

Only deterministic quantities are measured, so the points lie on smooth curves of behaviour against
perplexity, from which `select` may choose. A curve goes from few neurons to many and ends with the
first point that costs more than `sweep.ceiling`. No prompt of the test split is read.
"""

from tqdm import tqdm

from sparc3 import models, stereotypes
from sparc3.artifacts import differential_path, metrics_path, read_prompts, sweep_path
from sparc3.differential import check_methods
from sparc3.files import read_tensors, write_csv, write_json
from sparc3.measures import (
    Texts,
    items,
    likelihood,
    mean_nll,
    perplexity_error,
    perplexity_percent,
    preferences,
    texts,
)
from sparc3.params import Params
from sparc3.prune import circuit_at, pruned

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
    tokenizer = models.tokenizer(params.model.path, params.model.revision)
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
    model = models.load(
        params.model.path, params.model.revision, params.model.dtype, params.model.device
    )

    sample = (texts if spec.measure == "completions" else items)(rows, tokenizer)
    calm = (
        mean_nll(likelihood(model, sample, sweep.batch_tokens))
        if isinstance(sample, Texts)
        else 0.0
    )
    before = likelihood(model, general, sweep.batch_tokens)

    def measure() -> dict[str, float]:
        after = likelihood(model, general, sweep.batch_tokens)
        found = {
            "ppl_delta": perplexity_percent(before, after),
            "ppl_error": perplexity_error(before, after, general.groups),
        }
        if isinstance(sample, Texts):
            shift = mean_nll(likelihood(model, sample, sweep.batch_tokens)) - calm
            found["nll_shift"] = shift - (mean_nll(after) - mean_nll(before))
        else:
            log_p = preferences(model, sample, sweep.batch_tokens)
            terms, table = stereotypes.per_term(*log_p.T, terms=sample.groups)
            found |= {k: float(v) for k, v in stereotypes.pairs(table).items()}
            triples = stereotypes.triples(terms, table)[1]
            if len(triples):
                known = stereotypes.stereoset(triples)
                found |= {"lms": float(known["lms"]), "icat": float(known["icat"])}
        return found | {"objective": objective(spec.measure, found)}

    points: list[dict[str, object]] = [
        {"method": "none", "protect": 0.0, "num_neurons": 0, **measure()}
    ]
    bar = tqdm(curves, desc=f"sweep {behaviour}", unit="curve")
    for name, share in bar:
        tensors, _ = read_tensors(differential_path(behaviour, name))
        values, importance = tensors["differential"], tensors["importance"]
        for k in sizes:
            circuit = circuit_at(chosen[name], values, importance, k, share)
            with pruned(model, circuit):
                measured = measure()
            points.append({"method": name, "protect": share, "num_neurons": k, **measured})
            bar.set_postfix(method=name, neurons=k, ppl=f"{measured['ppl_delta']:+.2f} %")
            if measured["ppl_delta"] > sweep.ceiling:
                break

    write_csv(sweep_path(behaviour), points, columns)
    best = {
        name: max(float(str(p["objective"])) for p in points if p["method"] == name)
        for name in chosen
    }
    scalars = {"points": float(len(points)), **{f"{n}.objective": v for n, v in best.items()}}
    write_json(metrics_path("sweep", behaviour), scalars)
    return scalars
