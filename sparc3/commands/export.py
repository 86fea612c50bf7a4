"""Export: the edit as a folder that other tools load, with its model card.

python -m sparc3 export --behaviour toxicity --method lrp --folder exported/toxicity
python -m sparc3 export --behaviour toxicity --method lrp --as adapter --folder toxicity-adapter

Of an intervention: its file and a card, for the model's weights are as they were.
"""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import GenerationConfig, PreTrainedModel

import sparc3
from sparc3.base.artifacts import (
    circuit_path,
    intervention_path,
    metrics_path,
    model_files,
    prompts_path,
)
from sparc3.base.errors import InputError
from sparc3.base.files import digest, read_json, replacing, usual_rights, write_json, write_text
from sparc3.base.params import Params
from sparc3.circuits.ablate import prune_weights, pruned
from sparc3.circuits.adapter import write_adapter
from sparc3.circuits.circuit import Circuit, read_circuit
from sparc3.circuits.intervention import read_intervention
from sparc3.commands import remeasure
from sparc3.commands.remeasure import EXACT, EXPECTED, INPUTS, PARAMS, PROBE
from sparc3.model import families, loading
from sparc3.model.checkpoint import TERMS
from sparc3.reporting.card import Edit, Evidence, card, intervention_card
from sparc3.reporting.terms import base_of, notice
from sparc3.stages.table import check_axis, check_circuit

log = logging.getLogger(__name__)
Form = Literal["model", "adapter"]
LOCK = Path("requirements-hashed.txt")


def beyond(behaviour: str, method: str) -> tuple[dict[str, Any] | None, float | None]:
    """What the sealed prompts say of this very circuit, if it is the one that they were read for,
    and how much the blocks' agree with it.
    """
    sealed, selected = metrics_path("confirm"), metrics_path("select", behaviour)
    found = read_json(sealed)["behaviours"].get(behaviour, {}) if sealed.is_file() else {}
    scalars = read_json(selected) if selected.is_file() else {}
    row = found.get("circuits", {}).get(method, {})
    row = row if row.get("sha256") == digest(circuit_path(behaviour, method)) else {}
    return row.get("in_sample", row.get("test")), scalars.get(f"{method}.agreement")


def write_steered(params: Params, behaviour: str, method: str, folder: Path) -> dict[str, float]:
    """intervention.safetensors and README.md. InputError: evaluated at another strength."""
    source, metrics = intervention_path(behaviour, method), metrics_path("evaluate", behaviour)
    strength = read_intervention(source).strength
    found = read_json(metrics)["circuits"].get(method) if metrics.is_file() else None
    if found is not None and found["strength"] != strength:
        raise InputError(
            f"{metrics}: {method} at strength {found['strength']:g}, but {strength:g} in {source}; "
            "run the evaluate stage again (dvc repro)"
        )
    text = intervention_card(params, behaviour, method, strength, Evidence(found))
    with replacing(folder, folder=True) as temporary:
        shutil.copyfile(source, temporary / "intervention.safetensors")
        write_text(temporary / "README.md", text)
        usual_rights(temporary)
    return {"strength": strength}


def evaluation(behaviour: str, method: str, circuit: Circuit) -> dict[str, Any] | None:
    """What `evaluate` left of a behaviour, if it did. InputError: of another circuit."""
    metrics = metrics_path("evaluate", behaviour)
    if not metrics.exists():
        return None
    results, again = read_json(metrics), "run the evaluate stage again (dvc repro)"
    if method not in results["circuits"]:
        raise InputError(f"{metrics}: no circuit {method!r}; {again}")
    if (count := results["circuits"][method]["num_neurons"]) != len(circuit):
        raise InputError(
            f"{metrics}: {count} neurons in circuit {method!r}, but {len(circuit)} in "
            f"{circuit_path(behaviour, method)}; {again}"
        )
    return results


def run(
    params: Params, behaviour: str, method: str, folder: Path, form: Form = "model"
) -> dict[str, float]:
    """Write the model pruned by a circuit, or the circuit as an adapter of it: safetensors,
    README.md, circuit.csv and `reproduce/`. The folder is then loaded by another process and
    measured; it appears when it gives the numbers that it promises.

    `method` names the circuit of `behaviour` (a control with several draws has one for each), and
    `folder` must be new or empty. Returns the numbers of neurons; of an intervention its strength.
    InputError: it does not.
    """
    check_axis(params, "evaluate", {"behaviour": behaviour})
    check_circuit(params, method, params.steer.interventions)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: there is something already; name a new or an empty folder")
    if method in params.steer.interventions:
        if form == "adapter":
            raise InputError(f"--as adapter: {method} is an intervention, which peft has no form "
                             "for; leave --as out")  # fmt: skip
        return write_steered(params, behaviour, method, folder)
    source, given = circuit_path(behaviour, method), Path(params.model.path)
    circuit = read_circuit(source)
    results = evaluation(behaviour, method, circuit)
    model, base = loading.load(params.model, "cpu"), base_of(params)
    with pruned(model, circuit):
        value = remeasure.probe(model)
    expected = {PROBE: {"value": value, "within": EXACT[params.model.dtype]}}
    measured = None
    if results is not None:
        expected |= remeasure.promised(params, behaviour, method, results)
        measured = results["circuits"][method]
    edit = Edit(behaviour, method, circuit, digest(source), form, base)
    with replacing(folder, folder=True) as temporary:
        if form == "adapter":
            kind, width = model.config.model_type, families.width(model)
            named = base.repository or str(given), base.revision
            write_adapter(temporary, circuit, kind, width, *named)
        else:
            write_model(params, model, circuit, temporary)
        shutil.copyfile(source, temporary / "circuit.csv")
        for file in sorted({file for name in TERMS for file in given.glob(name)}):
            shutil.copyfile(file, temporary / file.name)
        if text := notice(base):
            write_text(temporary / "NOTICE", text)
        evidence = Evidence(measured, *beyond(behaviour, method))
        write_text(temporary / "README.md", card(params, edit, evidence))
        write_record(params, edit, expected, temporary)
        usual_rights(temporary)
        check(temporary, folder)
    removed = int((circuit.scales == 0).sum())
    return {"removed": float(removed), "dampened": float(len(circuit) - removed)}


def write_model(params: Params, model: PreTrainedModel, circuit: Circuit, folder: Path) -> None:
    """The pruned model and its tokenizer."""
    prune_weights(model, circuit)
    defaults = Path(params.model.path) / "generation_config.json"
    if defaults.is_file():  # is copied, for some that transformers reads it refuses to write
        model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    loading.save_tokenizer(loading.tokenizer(params.model), folder)
    if defaults.is_file():
        shutil.copyfile(defaults, folder / defaults.name)


def write_record(
    params: Params, edit: Edit, expected: Mapping[str, Mapping[str, float]], folder: Path
) -> None:
    """`reproduce/`: params, lock, digests of what was read, and what `remeasure` shall find."""
    tree = json.loads(json.dumps(dataclasses.asdict(params)))  # lists for tuples
    write_text(folder / PARAMS, yaml.safe_dump(tree, sort_keys=False))
    given = Path(params.model.path)
    prompts = {
        path.as_posix(): digest(path)
        for path in map(prompts_path, remeasure.prompt_sets(params, edit.behaviour))
        if path.is_file()
    }
    model = {f"{given}/{name}": sha256 for name, sha256 in model_files(given).items()}
    sha256 = {"circuit.csv": edit.sha256, **model, **prompts}
    about = {"behaviour": edit.behaviour, "method": edit.method, "as": edit.form}
    write_json(folder / INPUTS, {**about, "sha256": sha256})
    write_json(folder / EXPECTED, expected)
    if LOCK.is_file():
        shutil.copyfile(LOCK, folder / remeasure.FOLDER / LOCK.name)


def check(written: Path, folder: Path) -> None:
    """InputError: another process finds other numbers in what was `written`, to become `folder`."""
    command = [sys.executable, "-m", "sparc3", "remeasure", str(written)]
    here = [str(Path(sparc3.__file__).parent.parent), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, here))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stdout if done.returncode == 1 else done.stderr
        wrong = [
            line for line in said.splitlines() if "DOES NOT" in line or "error" in line.lower()
        ]
        raise InputError(
            f"{folder}: loaded again it does not give what it promises, so it was not kept: "
            f"{'; '.join(wrong).replace(str(written), str(folder)) or done.stderr[-300:]}"
        )
    log.info("export: %s", done.stdout.splitlines()[-1].replace(str(written), str(folder)))
