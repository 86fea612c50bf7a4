"""The exported folder, through plain transformers, against the pruned model in memory."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from sparc3.base.artifacts import circuit_path, metrics_path
from sparc3.base.errors import InputError
from sparc3.base.params import Model, Params
from sparc3.circuits.ablate import prune_weights, pruned
from sparc3.circuits.circuit import Circuit, read_circuit, write_circuit
from sparc3.commands import export
from sparc3.model import loading
from sparc3.reporting.card import licence
from sparc3.stages.checks import load

IDS = torch.tensor(tiny.sequences([12, 12]))
ROOT = Path(__file__).parent.parent
CIRCUIT = Circuit(
    np.array([0, 2, 2, 1]), np.array([1, 7, 23, 4]), -np.arange(4.0), np.array([0, 0, 0, 0.25])
)
EVALUATION = {
    "baseline": {"perplexity": 20.0},
    "circuits": {
        "lrp": {
            "num_neurons": 4,
            "ppl_delta": {"value": 0.8123456, "low": -0.1, "high": 1.5, "p": 0.04, "n": 40},
            "test": {
                "nll_shift": {"value": 0.21, "low": 0.1, "high": 0.3, "n": 40},
                "values": {"nll": 3.2},
            },
            "among_controls": {
                "nll": {"value": 0.2, "mean": 0.01, "low": -0.1, "high": 0.03, "p": 0.25, "n": 3}
            },
        },
        "aura": {"num_neurons": 4, "ppl_delta": {"value": 77.7, "low": 1, "high": 99, "p": 1}},
    },
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project's folder with a tiny model of any family, its tokenizer and a circuit."""
    monkeypatch.chdir(tmp_path)

    def make(family: str = "llama", dtype: str = "float32") -> Params:
        tiny.model(family).save_pretrained("models/tiny")
        words = {word: i for i, word in enumerate(["[UNK]", "a", "good", "day"])}
        backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
        backend.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained("models/tiny")
        Path("models/tiny/LICENSE").write_text("terms")
        write_circuit(circuit_path("toxicity", "lrp"), CIRCUIT)
        return replace(
            load(ROOT / "params.yaml"),
            model=Model(path="models/tiny", dtype=dtype),  # pyright: ignore[reportArgumentType]
        )

    return make


@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_transformers_gives_the_logits_of_the_model_in_memory(project, family, dtype):
    params = project(family, dtype)
    counts = export.run(params, "toxicity", "lrp", Path("out/model"))
    assert counts == {"removed": 3, "dampened": 1}
    model = loading.load(Model(path="models/tiny", dtype=dtype))
    with pruned(model, CIRCUIT):
        by_column = model(IDS).logits
    assert (by_column - model(IDS).logits).abs().max() > 1e-2
    again = AutoModelForCausalLM.from_pretrained("out/model", dtype="auto").eval()
    assert again.dtype == loading.DTYPES[dtype]
    torch.testing.assert_close(again(IDS).logits, by_column)
    prune_weights(model, CIRCUIT)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_folder_holds_weights_tokenizer_card_and_circuit(project):
    params = project()
    export.run(params, "toxicity", "lrp", Path("out"))
    names = {p.name for p in Path("out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert Path("out/LICENSE").read_text() == "terms"
    weights = load_file("out/model.safetensors")
    assert not weights["model.layers.0.mlp.up_proj.weight"][1].any()
    assert not weights["model.layers.0.mlp.gate_proj.weight"][1].any()
    assert not weights["model.layers.0.mlp.down_proj.weight"][:, 1].any()
    assert weights["model.layers.1.mlp.up_proj.weight"][4].all()  # dampened: its rows stay
    assert "lm_head.weight" not in weights  # tied
    assert list(read_circuit(Path("out/circuit.csv")).rows()) == sorted(
        CIRCUIT.rows(), key=lambda row: row[2]
    )
    text = AutoTokenizer.from_pretrained("out")("a good day")["input_ids"]
    assert text == loading.tokenizer(Model(path="models/tiny"))("a good day")["input_ids"]
    modes = {p.stat().st_mode & 0o777 for p in Path("out").rglob("*") if p.is_file()}
    assert modes == {0o644}
    assert {p.name for p in Path().iterdir()} == {"models", "outputs", "out"}  # nothing left over


def test_card_lists_every_neuron(project):
    export.run(project(), "toxicity", "lrp", Path("out"))
    card = Path("out/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for line in ("- layer 0: 1", "- layer 1: 4 (0.25)", "- layer 2: 7, 23"):
        assert f"\n{line}\n" in card
    assert "3 MLP neurons removed and 1 dampened" in card
    assert "metrics/evaluate/toxicity.json` was not there" in card


def test_card_says_what_lrp_means_for_whoever_ships_the_model(project):
    export.run(project(), "toxicity", "lrp", Path("out"))
    assert "grants no patent rights" in Path("out/README.md").read_text()
    params = load(ROOT / "params.yaml")
    silent = {method for method in params.methods if not licence(params, method)}
    assert silent == {
        "gradient",
        "gradient-t",
        "max-activation-auroc",
        "max-activation-auroc-all",
        "random-layer-matched",
    }
    assert licence(params, "random-layer-matched-0") == ""


def test_card_shows_this_circuits_evaluation(project):
    params = project()
    path = metrics_path("evaluate", "toxicity")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(EVALUATION))
    export.run(params, "toxicity", "lrp", Path("out"))
    card = Path("out/README.md").read_text()
    assert "| ppl_delta | 0.8123 | -0.1 | 1.5 | 0.04 | 40 |\n" in card
    assert "| test.nll_shift | 0.21 | 0.1 | 0.3 |  | 40 |\n" in card
    assert "\n| nll | 0.2 | 0.01 | -0.1 | 0.03 | 0.25 | 3 |\n" in card
    assert "among_controls" not in card  # no interval of a difference
    assert "77.7" not in card  # another circuit's
    assert "was not there" not in card


@pytest.mark.parametrize(
    ("circuits", "message"),
    [
        ({"aura": EVALUATION["circuits"]["aura"]}, "no circuit 'lrp'; run the evaluate stage"),
        ({"lrp": {"num_neurons": 9}}, "9 neurons in circuit 'lrp', but 4 in"),
    ],
)
def test_evaluation_of_something_else_is_refused(project, circuits, message):
    params = project()
    path = metrics_path("evaluate", "toxicity")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"circuits": circuits}))
    with pytest.raises(InputError, match=message):
        export.run(params, "toxicity", "lrp", Path("out"))
    assert not Path("out").exists()


def test_target_with_something_in_it_is_refused_untouched(project):
    params = project()
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    Path("file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(InputError, match=f"^{name}: there is something already"):
            export.run(params, "toxicity", "lrp", Path(name))
    assert [p.name for p in Path("full").iterdir()] == ["notes.txt"]
    Path("empty").mkdir()
    export.run(params, "toxicity", "lrp", Path("empty"))
    assert Path("empty/model.safetensors").exists()


def test_failure_leaves_nothing_behind(project, monkeypatch):
    params = project()
    beyond = Circuit(np.array([3]), np.array([0]), np.zeros(1), np.zeros(1))
    write_circuit(circuit_path("toxicity", "lrp"), beyond)
    with pytest.raises(InputError, match="layers 0 to 2"):
        export.run(params, "toxicity", "lrp", Path("out"))
    with pytest.raises(InputError, match=r"max-activation-auroc\.csv: file not found"):
        export.run(params, "toxicity", "max-activation-auroc", Path("out"))
    write_circuit(circuit_path("toxicity", "lrp"), CIRCUIT)
    monkeypatch.setattr(export, "digest", lambda _: pytest.fail("the disk is full"))
    with pytest.raises(pytest.fail.Exception):
        export.run(params, "toxicity", "lrp", Path("out"))
    assert {p.name for p in Path().iterdir()} == {"models", "outputs"}


def test_a_generation_config_that_transformers_will_not_save_is_copied(project):
    params = project()
    invalid = '{"do_sample": false,  "temperature": 0.5}'
    Path("models/tiny/generation_config.json").write_text(invalid)
    model = AutoModelForCausalLM.from_pretrained("models/tiny")
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained("refused")
    export.run(params, "toxicity", "lrp", Path("out"))
    assert Path("out/generation_config.json").read_text() == invalid
    assert GenerationConfig.from_pretrained("out").temperature == 0.5


def test_a_tokenizer_of_a_class_that_builds_its_own_is_exported_as_it_reads(project):
    """transformers 5 makes a LlamaTokenizer of the vocabulary; tokenizer.json is what was used."""
    params = project()
    settings = Path("models/tiny/tokenizer_config.json")
    settings.write_text(
        json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "LlamaTokenizer"})
    )
    used = loading.tokenizer(params.model)
    assert type(used).__name__ == "LlamaTokenizerFast"
    export.run(params, "toxicity", "lrp", Path("out"))
    written = json.loads(Path("out/tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = AutoTokenizer.from_pretrained("out")
    assert dict(again("a good day")) == dict(used("a good day"))
    assert again.special_tokens_map == used.special_tokens_map
