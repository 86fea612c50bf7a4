"""Transfer: prune for one behaviour, measure all of them, and general text by its kind.

The circuit of each behaviour's own method, one load of the model, test split only, by the
instruments that a sweep reads.
"""

import logging
from typing import Any

from tqdm import tqdm

from sparc3.base.artifacts import OUTPUTS, circuit_path, metrics_path, read_prompts
from sparc3.base.files import read_json, write_csv, write_json
from sparc3.base.params import Params
from sparc3.circuits.circuit import INTACT, Circuit, read_circuit, refuse_leak
from sparc3.measure.instrument import Differences, How, Measured, Reading, differences
from sparc3.measure.instruments import perplexity, swept_of
from sparc3.model import loading

log = logging.getLogger(__name__)

COLUMNS = ("pruned_for", "measured", "quantity", "value", "low", "high")

Rows = dict[str, list[dict[str, Any]]]


def read_rows(params: Params) -> tuple[Rows, Rows]:
    """The first test prompts of every behaviour, and of every kind of general text."""
    count = params.transfer.items
    behaviours = {
        name: read_prompts(spec.prompts, "test")[:count] for name, spec in params.behaviours.items()
    }
    return behaviours, {text: read_prompts(text, "test")[:count] for text in params.transfer.texts}


def read_circuits(params: Params, held_out: Rows) -> dict[str, Circuit]:
    """Each behaviour's own circuit. InputError: it was chosen on what is held out."""
    circuits = {}
    for name, spec in params.behaviours.items():
        path = circuit_path(name, spec.method)
        for rows in held_out.values():
            refuse_leak(rows, read_json(path.with_suffix(".json")), str(path))
        circuits[name] = read_circuit(path)
    return circuits


def compare(params: Params, read: dict[tuple[str, str], list[Reading]]) -> dict[str, Any]:
    """Pruned for -> measured -> differences. `read`: by behaviour and instrument, or text and
    "perplexity", the readings of the unpruned model and without each behaviour's circuit.
    """
    resamples, first = params.transfer.resamples, params.transfer.texts[0]
    results: dict[str, dict[str, Differences]] = {}
    for place, pruned_for in enumerate(params.behaviours, start=1):
        found: dict[str, Differences] = {}
        for text in params.transfer.texts:
            readings = read[text, "perplexity"]
            change = perplexity.change(readings[0], readings[place], resamples)
            found[text] = {"ppl_delta": change._asdict()}
        for name, spec in params.behaviours.items():
            found[name] = {}
            for key, instrument in swept_of(spec).items():
                before, after = (
                    Measured(read[name, key][at], read[first, "perplexity"][at])
                    for at in (0, place)
                )
                found[name] |= differences(instrument.values, before, after, resamples)
        results[pruned_for] = found
    return results


def run(params: Params) -> dict[str, float]:
    transfer = params.transfer
    if params.prepare.splits["test"] == 0:
        log.warning("transfer: prepare.splits leaves no test split, so nothing is measured")
        write_csv(OUTPUTS / "transfer" / "matrix.csv", [], COLUMNS)
        write_json(metrics_path("transfer"), {})
        return {}
    behaviours, texts = read_rows(params)
    circuits = [INTACT, *read_circuits(params, {**behaviours, **texts}).values()]
    tokenizer = loading.tokenizer(params.model)
    encoded = {
        (text, "perplexity"): (perplexity.read, perplexity.encode(rows, tokenizer))
        for text, rows in texts.items()
    } | {
        (name, key): (instrument.read, instrument.encode(behaviours[name], tokenizer))
        for name, spec in params.behaviours.items()
        for key, instrument in swept_of(spec).items()
    }
    model = loading.load(params.model)
    total = len(circuits) * sum(len(sample.ids) for _, sample in encoded.values())
    with tqdm(total=total, desc="transfer", unit="text") as bar:
        how = How(params.evaluate, transfer.batch_tokens, tokenizer, progress=bar.update)
        readings = {
            key: read(model, circuits, sample, how) for key, (read, sample) in encoded.items()
        }
    results = compare(params, readings)
    table = [
        {
            "pruned_for": pruned_for,
            "measured": name,
            "quantity": quantity,
            **{key: difference[key] for key in ("value", "low", "high")},
        }
        for pruned_for, found in results.items()
        for name, changes in found.items()
        for quantity, difference in changes.items()
    ]
    write_csv(OUTPUTS / "transfer" / "matrix.csv", table, COLUMNS)
    write_json(metrics_path("transfer"), results)
    return {f"{r['pruned_for']}.{r['measured']}.{r['quantity']}": float(r["value"]) for r in table}
