"""The registry of edited models, in a real store, with what MLflow itself loads and runs."""

import shutil
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparc3.base import runs
from sparc3.base.store import tracking_uri
from sparc3.circuits.circuit import read_circuit
from sparc3.commands.stage import register
from sparc3.reporting.tables import CONFIRMATORY, cells, verdict
from sparc3.stages.checks import load


@pytest.fixture
def project(
    finished: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A whole small project as the current directory, with a store of its own."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("registry") / "project")
    monkeypatch.chdir(folder)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    mlflow.set_tracking_uri(tracking_uri())
    return folder


def reduced(row: dict[str, Any], plainly: bool) -> dict[str, Any]:
    """The same cell with an effect that its tests find, and that controls do not refuse, or do."""
    sign = 1 if row["change"]["value"] >= 0 else -1
    clear = {"value": sign * 9.0, "low": sign * 9.0, "high": sign * 9.0}
    among = {
        name: {**each, "n": 19, "p": 0.05, "value": 9.0, "most": 1.0}
        for name, each in row["among"].items()
    }
    return row | {
        **{"p": 0.001, "sign": sign, "broken": False, "overshot": False, "among": among},
        **{"against": clear if plainly else None, "against_ban": None},
        "differences": {**row["differences"], "ppl_worst": {"value": 0.5}},
    }


def test_only_what_is_reduced_is_registered_and_mlflow_generates_with_it(project: Path) -> None:
    params = load()
    own = {row["behaviour"]: row for row in cells(params) if row["family"] == CONFIRMATORY}
    with runs.stage_run("report", {}, {}) as run:
        missed = [row for row in own.values() if not verdict(params, row).startswith("reduced")]
        assert register(params, run, missed) == []
        assert run.client.search_registered_models() == []

        table = [reduced(own["rude"], plainly=True), reduced(own["bias"], plainly=False)]
        assert verdict(params, table[0]).startswith("reduced, beyond 19 random draws")
        assert verdict(params, table[1]) == "reduced; no control of its size"
        names = ["model-without-rude, version 1", "model-without-bias, version 1"]
        assert register(params, run, table) == names
        assert register(params, run, table) == names  # not again
        aliases = {
            m.name: {*run.client.get_registered_model(m.name).aliases}
            for m in run.client.search_registered_models()
        }
        assert aliases == {
            "model-without-rude": {"candidate", "accepted"},
            "model-without-bias": {"candidate"},
        }
        tags = run.client.get_model_version("model-without-rude", "1").tags
        assert tags["verdict"] == verdict(params, table[0])

    kept = [p for p in Path("mlruns").rglob("models/**/*") if p.is_file()]
    assert sum(p.stat().st_size for p in kept) < 50_000
    assert not [p for p in kept if p.suffix in (".pkl", ".bin")]

    served = mlflow.pyfunc.load_model("models:/model-without-rude@accepted")
    assert served.metadata.signature is not None
    assert [c.name for c in served.metadata.signature.inputs] == ["prompt"]
    prompts = ["the old man", "she is"]
    found = served.predict(pd.DataFrame({"prompt": prompts}), params={"max_new_tokens": 5})
    assert len(served.predict(served.input_example)) == 1

    tokenizer = AutoTokenizer.from_pretrained("model")
    model = AutoModelForCausalLM.from_pretrained("model").eval()
    circuit = read_circuit(Path("outputs/circuits/rude/lrp.csv"))
    with circuit.applied(model), torch.no_grad():
        for prompt, text in zip(prompts, found, strict=True):
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            drawn = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
            assert text == tokenizer.decode(drawn)
