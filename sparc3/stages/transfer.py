"""Transfer: prune for one behaviour, measure all of them, and general text by its kind.

The circuit of each behaviour's own method, one load of the model, test split only, by the
instruments that a sweep reads. Where a set has blocks, its own behaviour's circuits are those that
were chosen without the block, and the others' those of all their prompts.
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

from sparc3.base.artifacts import OUTPUTS, circuit_path, held_out, metrics_path, read_prompts
from sparc3.base.files import read_json, write_csv, write_json
from sparc3.base.params import Params
from sparc3.circuits.circuit import INTACT, Circuit, read_circuit, refuse_leak
from sparc3.measure.instrument import (
    Differences,
    How,
    Measured,
    Reading,
    Sample,
    differences,
    joined,
)
from sparc3.measure.instruments import perplexity, swept_of
from sparc3.model import loading

log = logging.getLogger(__name__)

COLUMNS = ("pruned_for", "measured", "quantity", "value", "low", "high")

Rows = dict[str, list[dict[str, Any]]]  # by block, or kind of text
Encode = Callable[..., Sample]


def read_rows(params: Params) -> tuple[dict[str, Rows], Rows]:
    """The first test prompts of every behaviour, by block, and of every kind of general text."""
    count = params.transfer.items
    behaviours = {}
    for name, spec in params.behaviours.items():
        by_block = held_out(spec.prompts)
        each = math.ceil(count / len(by_block))
        behaviours[name] = {block: rows[:each] for block, rows in by_block.items()}
    return behaviours, {text: read_prompts(text, "test")[:count] for text in params.transfer.texts}


def read_own(params: Params, behaviour: str, block: str, held_out: Rows) -> Circuit:
    """A behaviour's own circuit. InputError: it was chosen on what is held out."""
    path = circuit_path(behaviour, params.behaviours[behaviour].method, block)
    for rows in held_out.values():
        refuse_leak(rows, read_json(path.with_suffix(".json")), str(path))
    return read_circuit(path)


def circuits_on(params: Params, measured: str, block: str, held_out: Rows) -> list[Circuit]:
    """The unpruned model's and each behaviour's own circuit, for a block of one of them."""
    return [
        INTACT,
        *(
            read_own(params, name, block if name == measured else "", held_out)
            for name in params.behaviours
        ),
    ]


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


def across(params: Params, results: Mapping[str, Mapping[str, Differences]]) -> str:
    """Which behaviour's circuit moves another one, by the matrix's value and its interval."""
    moved = []
    for name, spec in params.behaviours.items():
        cell = next(iter(swept_of(spec).values())).cell
        for pruned_for, found in results.items():
            change = found[name][cell]
            if pruned_for != name and not change["low"] <= 0 <= change["high"]:
                moved.append(f"{pruned_for}'s on {name}")
    pairs = len(results) * (len(results) - 1)
    named = f": {', '.join(moved)}" if moved else ""
    return f"{len(moved)} of {pairs} effects on another behaviour exclude 0{named}"


def run(params: Params) -> dict[str, float]:
    transfer = params.transfer
    if params.prepare.splits["test"] == 0:
        log.warning("transfer: prepare.splits leaves no test split, so nothing is measured")
        write_csv(OUTPUTS / "transfer" / "matrix.csv", [], COLUMNS)
        write_json(metrics_path("transfer"), {})
        return {}
    behaviours, texts = read_rows(params)
    tokenizer = loading.tokenizer(params.model)
    # By what is read: every part's rows, and circuits that were not chosen on them.
    parts = {
        name: [
            (rows, circuits_on(params, name, block, {block: rows}))
            for block, rows in by_block.items()
        ]
        for name, by_block in behaviours.items()
    } | {text: [(rows, circuits_on(params, text, "", texts))] for text, rows in texts.items()}
    model = loading.load(params.model)

    def read(name: str, instrument: Callable[..., list[Reading]], encode: Encode) -> list[Reading]:
        every = [
            instrument(model, circuits, encode(rows, tokenizer), how)
            for rows, circuits in parts[name]
        ]
        return [joined(readings) for readings in zip(*every, strict=True)]

    total = sum(len(circuits) * len(rows) for each in parts.values() for rows, circuits in each)
    with tqdm(total=total, desc="transfer", unit="text") as bar:
        how = How(params.evaluate, transfer.batch_tokens, tokenizer, progress=bar.update)
        readings = {
            (text, "perplexity"): read(text, perplexity.read, perplexity.encode) for text in texts
        } | {
            (name, key): read(name, instrument.read, instrument.encode)
            for name, spec in params.behaviours.items()
            for key, instrument in swept_of(spec).items()
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
    log.info("transfer: %s", across(params, results))
    return {f"{r['pruned_for']}.{r['measured']}.{r['quantity']}": float(r["value"]) for r in table}
