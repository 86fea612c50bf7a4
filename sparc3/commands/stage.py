"""One stage, fetch or confirm, inside its MLflow run: scalars, files and digests are logged, never
tensors.

The mathematics does not see MLflow: what a stage returns and leaves is logged here.
"""

import dataclasses
import gc
import importlib
import json
import logging
import resource
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sparc3
from sparc3.base import comparison, parallel, runs
from sparc3.base.artifacts import (
    OUTPUTS,
    joint_digest,
    metrics_path,
    model_digest,
    model_files,
    prompts_path,
)
from sparc3.base.errors import InputError
from sparc3.base.files import digest, digest_text, locked, read_json, told, write_json
from sparc3.base.params import Params, private_of, sets_of
from sparc3.base.products import Ledger, write_manifest
from sparc3.prompts import own
from sparc3.prompts.sources import SOURCES
from sparc3.stages.fetch import DATA, MODELS_FOLDER, check_model, folder_md5
from sparc3.stages.table import STAGES, Stage, check_axis, idle, made, shown_files

log = logging.getLogger(__name__)

LAYOUT = 2  # of the comparison's runs: those of an earlier one are left as they are


def run(params: Params, word: str, options: Mapping[str, Any]) -> None:
    """Run the stage `word`; `options` are its axis ({"behaviour": "toxicity"}) or fetch's flags.

    InputError: an axis's value that params does not have, several processes where the stage runs
    in one, a tracking store that cannot be used, and what the stage itself refuses.
    """
    stage = STAGES.get(word, Stage(word, model=word == "confirm"))
    axes = {stage.axis: options[stage.axis]} if stage.axis else {}
    check_axis(params, word, axes)
    here = parallel.place()
    if here.world > 1 and not stage.parallel:
        raise InputError(f"{word}: runs in one process, not {here.world}; start it with python -m")
    gc.disable()  # it would search what is imported, a million objects, again and again
    module = None if idle(params, word, axes) else importlib.import_module(f"sparc3.stages.{word}")
    if module and stage.model and word in STAGES and word != "prepare":  # those that cost
        importlib.import_module("sparc3.stages.early").check(params)
    gc.freeze()
    gc.enable()
    if module and here.rank > 0:  # rank 0 has the run
        module.run(params, **options)
        return
    model = checked_model(Path(params.model.path)) if stage.model else None
    tags = {"sparc3.digest.model": model} if model else {}
    if word == "prepare":
        tags |= own_digests(params)
    name = "@".join([word, *axes.values()])
    lock = locked(OUTPUTS / "partial" / f"{name}.lock", name)  # a second process waits
    with lock, runs.stage_run(word, axes, parameters(params, word, axes), tags) as opened:
        value = next(iter(axes.values()), None)
        metrics = produce(params, word, options, model)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        cost = {"seconds": time.monotonic() - sparc3.STARTED, "peak_megabytes": memory}
        steps: dict[str, Callable[[], object]] = {
            "metrics": lambda: opened.log_metrics({**metrics, **cost})
        }
        if axes:
            steps["datasets"] = lambda: opened.log_datasets(datasets(params, axes))
        if DATA.is_dir():
            data = {"sparc3.digest.data": folder_md5(DATA)}
            steps["digest of the data"] = lambda: opened.set_tags(data)
        if word in STAGES and word != "report":
            product = digest(metrics_path(word, value))
            steps["digest of the product"] = lambda: opened.set_product(product)
        for path in shown_files(word, value) if word in STAGES else ():
            if not holds_private(params, value, path):
                steps[str(path)] = partial(opened.log_artifact, path)
        if word == "report":
            steps["comparison"] = lambda: compare(params, opened)
        runs.log_written(steps)


def own_digests(params: Params) -> dict[str, str]:
    """Tags: digests of the own files that prompt sets are made of. InputError: one is missing."""
    return {
        f"sparc3.digest.source.{name}": own.sha256(spec.source)
        for name, (_, spec) in sets_of(params).items()
        if spec.source not in SOURCES
    }


def holds_private(params: Params, value: str | None, path: Path) -> bool:
    """Whether a file has texts of private prompts: the prompts themselves, or their completions."""
    sets = sets_of(params)
    if path.suffix != ".jsonl":
        return False
    if path.parent == prompts_path("any").parent:
        return sets[path.stem][1].private
    return value in params.behaviours and private_of(params, value)


def checked_model(folder: Path) -> str:
    """The digest of a model's folder. InputError: one of those that ship, and not as it ships."""
    files = model_files(folder)
    if folder.parent == MODELS_FOLDER:
        check_model(folder, files)
    return joint_digest(files)


def produce(
    params: Params, word: str, options: Mapping[str, Any], model: str | None
) -> dict[str, float]:
    """Run a stage: every product that it reads is checked, and its manifest is written."""
    ledger, value = Ledger(model), None
    if word in STAGES:
        value = options.get(STAGES[word].axis or "")
    if idle(params, word, options):
        leave_empty(word, value)
        metrics = {}
    else:
        module = importlib.import_module(f"sparc3.stages.{word}")
        if word == "fetch":
            return module.run(params, **options)
        with told(ledger.check):
            metrics = module.run(params, **options)
    if word in STAGES:
        write_manifest(word, value, made(word, value), ledger.read)
    return metrics


def leave_empty(word: str, value: str | None) -> None:
    """What an idle stage leaves: folders of nothing, whatever was there, and metrics of nothing."""
    for product in STAGES[word].products:
        folder = OUTPUTS / product.format(value)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / "nothing").touch()  # DVC warns of an empty folder
    write_json(metrics_path(word, value), {})
    log.info("%s %s: nothing is asked for", word, value)


def run_checked(params: Params, word: str, options: Mapping[str, Any]) -> None:
    """Run a command that reads products, each of which is checked as it is for a stage."""
    module = importlib.import_module(f"sparc3.commands.{word}")
    ledger = Ledger(checked_model(Path(params.model.path)))
    with told(ledger.check):
        module.run(params, **options)


def parameters(params: Params, word: str, axes: Mapping[str, str]) -> dict[str, Any]:
    """What an MLflow run records: the stage's section, the axis's row and the model."""
    tree = dataclasses.asdict(params)
    rows = {f"{axis}s": tree[f"{axis}s"][value] for axis, value in axes.items()}
    return {word: tree[word], "model": tree["model"], **rows}


def datasets(params: Params, axes: Mapping[str, str]) -> list[runs.Dataset]:
    """The prompts that a stage of one prompt set or behaviour is about."""
    uses = {name: "attributed" for axis, name in axes.items() if axis == "prompt_set"}
    if "behaviour" in axes:
        spec = params.behaviours[axes["behaviour"]]
        uses = {spec.prompts: "behaviour", spec.reference: "reference"}
    return [runs.Dataset(prompts_path(name), use) for name, use in uses.items()]


def compare(params: Params, report: runs.Run) -> None:
    """Log the comparison: a parent run for this state of the pipeline, a row for every cell; and
    the behaviours' own models, where they have less of the behaviour.
    """
    from sparc3.reporting import entries, page  # here: no other stage needs them
    from sparc3.reporting.tables import cells

    table = cells(params)
    rows = {
        f"{cell['behaviour']}/{cell['method']}": dataclasses.replace(
            entries.row_entry(params, cell), table=entries.completions(params, cell)
        )
        for cell in table
    }
    values = {None: [None], "prompt_set": params.prompt_sets, "behaviour": params.behaviours}
    products = {
        word if value is None else f"{word}@{value}": digest(metrics_path(word, value))
        for word, stage in STAGES.items()
        if word != "report"
        for value in values[stage.axis]
    }
    everything = dataclasses.asdict(params)
    state = digest_text(json.dumps([everything, products, LAYOUT], sort_keys=True))
    whole = entries.whole_entry(params, table, shown_files("report", None))
    costs = page.with_costs
    comparison.pipeline_run(report, state, everything, whole, rows, products, costs)
    register(params, report, table)


def register(params: Params, report: runs.Run, table: Sequence[Mapping[str, Any]]) -> list[str]:
    """Register the circuits of the behaviours' own methods whose verdict is "reduced", as adapters;
    accepted are those that no control and no budget refuses. Returns `NAME, version N` of each.
    """
    from sparc3.base import registry
    from sparc3.circuits.adapter import write_adapter
    from sparc3.circuits.circuit import read_circuit
    from sparc3.reporting.summary import short
    from sparc3.reporting.tables import CONFIRMATORY, verdict

    base, found = Path(params.model.path), []
    for cell in table:
        words, source = verdict(params, dict(cell)), cell["circuit"]
        if cell["family"] != CONFIRMATORY or not words.startswith("reduced"):
            continue
        width = read_json(source.with_suffix(".json"))["width"]
        kind = read_json(base / "config.json")["model_type"]
        digests = {"circuit": digest(source), "base": model_digest(base)}
        tags = {
            "behaviour": cell["behaviour"],
            "method": cell["method"],
            "verdict": words,
            **digests,
        }
        name = f"{base.name}-without-{cell['behaviour']}"
        with TemporaryDirectory() as made:
            adapter = Path(made)
            write_adapter(adapter, read_circuit(source), kind, width, str(base))
            accepted = short(words) == "reduced"
            edited = registry.Edited(name, adapter, base, params.model.dtype, tags, accepted)
            found.append(f"{name}, version {registry.register(report, edited)}")
    return found
