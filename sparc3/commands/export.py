"""Export: the pruned model as a folder that plain transformers loads, with its model card.

python -m sparc3 export --behaviour toxicity --method lrp --folder exported/toxicity

Of an intervention: its file and a card, for the model's weights are as they were.
"""

import shutil
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from sparc3.base.artifacts import circuit_path, intervention_path, metrics_path
from sparc3.base.errors import InputError
from sparc3.base.files import digest, read_json, replacing, usual_rights, write_text
from sparc3.base.params import Params
from sparc3.circuits.ablate import prune_weights
from sparc3.circuits.circuit import read_circuit
from sparc3.circuits.intervention import read_intervention
from sparc3.model import loading
from sparc3.reporting.card import Evidence, card, intervention_card


def beyond(behaviour: str, method: str) -> tuple[dict[str, Any] | None, float | None]:
    """What the sealed prompts say of this very circuit, and how much the blocks' agree with it."""
    sealed, selected = metrics_path("confirm"), metrics_path("select", behaviour)
    found = read_json(sealed)["behaviours"].get(behaviour, {}) if sealed.is_file() else {}
    scalars = read_json(selected) if selected.is_file() else {}
    row = found.get("circuits", {}).get(method, {})
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


def run(params: Params, behaviour: str, method: str, folder: Path) -> dict[str, float]:
    """Write the model pruned by a circuit: safetensors, tokenizer, README.md and circuit.csv.

    `method` names the circuit of `behaviour` (a control with several draws has one for each), and
    `folder` must be new or empty. It appears when it is complete. Returns the numbers of neurons;
    of an intervention its strength.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: there is something already; name a new or an empty folder")
    if method in params.steer.interventions:
        return write_steered(params, behaviour, method, folder)
    source = circuit_path(behaviour, method)
    circuit = read_circuit(source)
    metrics = metrics_path("evaluate", behaviour)
    evidence = Evidence(None, *beyond(behaviour, method))
    if metrics.exists():
        circuits = read_json(metrics)["circuits"]
        if method not in circuits:
            raise InputError(
                f"{metrics}: no circuit {method!r}; run the evaluate stage again (dvc repro)"
            )
        evaluation = circuits[method]
        evidence = evidence._replace(evaluation=evaluation)
        if evaluation["num_neurons"] != len(circuit):
            raise InputError(
                f"{metrics}: {evaluation['num_neurons']} neurons in circuit {method!r}, but "
                f"{len(circuit)} in {source}; run the evaluate stage again (dvc repro)"
            )
    tokenizer, given = loading.tokenizer(params.model), Path(params.model.path)
    model = loading.load(params.model, "cpu")
    prune_weights(model, circuit)

    with replacing(folder, folder=True) as temporary:
        defaults = given / "generation_config.json"
        if defaults.is_file():  # is copied, for some that transformers reads it refuses to write
            model.generation_config = GenerationConfig()
        model.save_pretrained(temporary)
        loading.save_tokenizer(tokenizer, temporary)
        shutil.copyfile(source, temporary / "circuit.csv")
        licences = sorted(given.glob("LICENSE*"))  # go where weights go
        for file in [*licences, *given.glob(defaults.name)]:
            shutil.copyfile(file, temporary / file.name)
        text = card(params, behaviour, method, circuit, digest(source), evidence)
        write_text(temporary / "README.md", text)
        usual_rights(temporary)
    removed = int((circuit.scales == 0).sum())
    return {"removed": float(removed), "dampened": float(len(circuit) - removed)}
