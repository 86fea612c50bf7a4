"""Transfer: prune for one behaviour, measure all of them, and general text by its kind.

The circuit of each behaviour's own method, one load of the model, deterministic quantities of the
test split only.
"""

import logging
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from sparc3.base.artifacts import OUTPUTS, circuit_path, metrics_path, read_prompts
from sparc3.base.files import read_json, write_csv, write_json
from sparc3.base.params import Params
from sparc3.circuits.circuit import INTACT, read_circuit, refuse_leak
from sparc3.measure.differences import (
    Differences,
    pair_differences,
    perplexity_difference,
    shift_difference,
)
from sparc3.measure.measures import (
    Items,
    Texts,
    items,
    likelihood,
    preferences,
    texts,
    windowed_likelihood,
)
from sparc3.model import loading

log = logging.getLogger(__name__)


COLUMNS = ("pruned_for", "measured", "quantity", "value", "low", "high")


def run(params: Params) -> dict[str, float]:
    transfer, evaluate = params.transfer, params.evaluate
    if params.prepare.splits["test"] == 0:
        log.warning("transfer: prepare.splits leaves no test split, so nothing is measured")
        write_csv(OUTPUTS / "transfer" / "matrix.csv", [], COLUMNS)
        write_json(metrics_path("transfer"), {})
        return {}
    tokenizer = loading.tokenizer(params.model)
    rows = {
        name: read_prompts(spec.prompts, "test")[: transfer.items]
        for name, spec in params.behaviours.items()
    }
    circuits = {}
    for name in params.behaviours:
        path = circuit_path(name, params.behaviours[name].method)
        for tested in rows.values():
            refuse_leak(tested, read_json(path.with_suffix(".json")), str(path))
        circuits[name] = read_circuit(path)
    general = {
        name: texts(read_prompts(name, "test")[: transfer.items], tokenizer)
        for name in transfer.texts
    }
    measured: dict[str, Texts | Items] = {
        name: (items if spec.measure == "pairs" else texts)(rows[name], tokenizer)
        for name, spec in params.behaviours.items()
    }
    model = loading.load(params.model)

    samples = {**general, **measured}
    pruned_by = [INTACT, *circuits.values()]
    found_on: dict[str, Sequence[Any]] = {}
    total = len(pruned_by) * sum(len(sample.ids) for sample in samples.values())
    with tqdm(total=total, desc="transfer", unit="text") as bar:
        fixed = transfer.batch_tokens, bar.update
        for name, sample in samples.items():
            if isinstance(sample, Items):
                found_on[name] = preferences(model, pruned_by, sample, *fixed)
            elif name in general:
                windows = evaluate.window, evaluate.stride
                found_on[name] = windowed_likelihood(model, pruned_by, sample, *windows, *fixed)
            else:
                found_on[name] = likelihood(model, pruned_by, sample, *fixed)
    before, *others = (
        dict(zip(found_on, values, strict=True)) for values in zip(*found_on.values(), strict=True)
    )

    results: dict[str, dict[str, Differences]] = {}
    for pruned_for, after in zip(circuits, others, strict=True):
        found: dict[str, Differences] = {}
        for name in general:
            found[name] = {
                "ppl_delta": perplexity_difference(before[name], after[name], transfer.resamples)
            }
        first = transfer.texts[0]
        for name, sample in measured.items():
            if isinstance(sample, Items):
                found[name] = pair_differences(
                    before[name], after[name], sample.groups, transfer.resamples
                )
            else:
                found[name] = {
                    "nll_shift": shift_difference(
                        (before[name], before[first]),
                        (after[name], after[first]),
                        sample.groups,
                        transfer.resamples,
                    ),
                }
        results[pruned_for] = found

    table = [
        {
            "pruned_for": pruned_for,
            "measured": name,
            "quantity": quantity,
            **{key: difference[key] for key in ("value", "low", "high")},
        }
        for pruned_for, found in results.items()
        for name, differences in found.items()
        for quantity, difference in differences.items()
    ]
    write_csv(OUTPUTS / "transfer" / "matrix.csv", table, COLUMNS)
    write_json(metrics_path("transfer"), results)
    return {f"{r['pruned_for']}.{r['measured']}.{r['quantity']}": float(r["value"]) for r in table}
