"""Edited models in MLflow's registry: an adapter and the address of its base. No weights of the
base and no pickle are kept: MLflow loads such a model by the code in `served`.
"""

import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from sparc3.base.runs import Run
from sparc3.base.store import alone, tracking_uri

CODE = Path(__file__).with_name("served.py")
NEEDS = ("mlflow", "peft", "torch", "transformers")
CANDIDATE, ACCEPTED = "candidate", "accepted"  # aliases
EXAMPLE = "The weather today is"
NEW_TOKENS = 20


class Edited(NamedTuple):
    """A model to register. adapter: folder of its files; base: that of the base model; tags: what
    it is, by which it is known again; accepted: nothing speaks against it.
    """

    name: str
    adapter: Path
    base: Path
    dtype: str
    tags: Mapping[str, str]
    accepted: bool


def register(run: Run, edited: Edited) -> str:
    """The version of a registered model, made by `run`; one of the same tags is not made again.

    The alias `candidate` goes to it, and, if it is accepted, `accepted` too.
    """
    with alone(tracking_uri()):
        found = run.client.search_model_versions(f"name = '{edited.name}'")
        same = [v.version for v in found if edited.tags.items() <= v.tags.items()]
        number = same[0] if same else _new_version(run, edited, first=not found)
        for alias in (CANDIDATE, *([ACCEPTED] if edited.accepted else ())):
            run.client.set_registered_model_alias(edited.name, alias, number)
    return number


def _new_version(run: Run, edited: Edited, first: bool) -> str:
    client, tags = run.client, dict(edited.tags)
    model = client.create_logged_model(run.experiment, edited.name, run.id, tags)
    with TemporaryDirectory() as folder:
        _save(Path(folder) / "model", edited)
        client.log_model_artifacts(model.model_id, f"{folder}/model")
    client.finalize_logged_model(model.model_id, "READY")
    if first:
        client.create_registered_model(edited.name)
    source = f"models:/{model.model_id}"
    return client.create_model_version(
        edited.name, source, run.id, tags, model_id=model.model_id
    ).version


def _save(path: Path, edited: Edited) -> None:
    """A folder that MLflow loads."""
    import pandas as pd
    from mlflow import pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    params: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    kinds = {"max_new_tokens": "long", "do_sample": "boolean"}
    signature = ModelSignature(
        inputs=Schema([ColSpec("string", "prompt")]),
        outputs=Schema([ColSpec("string")]),
        params=ParamSchema([ParamSpec(name, kinds[name], value) for name, value in params.items()]),
    )
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)  # it announces each step
    pyfunc.save_model(
        path,
        python_model=str(CODE),
        artifacts={"adapter": str(edited.adapter)},
        model_config={"base": str(edited.base.resolve()), "dtype": edited.dtype},
        signature=signature,
        input_example=(pd.DataFrame({"prompt": [EXAMPLE]}), params),
        pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in NEEDS],
    )
