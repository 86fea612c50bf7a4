"""The exported folder, through plain transformers, against the pruned model in memory."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from sparc3.__main__ import main
from sparc3.base.artifacts import circuit_path, metrics_path
from sparc3.base.errors import InputError
from sparc3.base.files import digest, read_json, write_json
from sparc3.base.params import Model, Params
from sparc3.circuits.ablate import prune_weights, pruned
from sparc3.circuits.circuit import Circuit, read_circuit, write_circuit
from sparc3.commands import export, remeasure
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
    """A project's folder with a tiny model of any family, its tokenizer and a circuit; what is
    exported is measured again in this process, which is quicker.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "check", lambda written, folder: remeasure.run(written))

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
    kind = model.config._attn_implementation  # transformers 4 forgets Gemma 2's cap unless told
    again = AutoModelForCausalLM.from_pretrained(
        "out/model", dtype="auto", attn_implementation=kind
    ).eval()
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
    assert silent == {"gradient", "gradient-t", "random-layer-matched"}
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


def test_the_sealed_prompts_speak_of_the_list_that_they_were_read_for(project):
    project()
    row = {"test": {"margin": {"value": 1.0}}}
    for sha256, said in ((digest(circuit_path("toxicity", "lrp")), row["test"]), ("another", None)):
        circuits = {"circuits": {"lrp": row | {"sha256": sha256}}}
        write_json(metrics_path("confirm"), {"behaviours": {"toxicity": circuits}})
        assert export.beyond("toxicity", "lrp") == (said, None)


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
    with pytest.raises(InputError, match=r"gradient-t\.csv: file not found"):
        export.run(params, "toxicity", "gradient-t", Path("out"))
    write_circuit(circuit_path("toxicity", "lrp"), CIRCUIT)
    monkeypatch.setattr(export, "check", lambda *_: pytest.fail("the disk is full"))
    with pytest.raises(pytest.fail.Exception):
        export.run(params, "toxicity", "lrp", Path("out"))
    assert {p.name for p in Path().iterdir()} == {"models", "outputs"}


def test_a_generation_config_that_transformers_will_not_save_is_copied(project):
    params = project()
    invalid = '{"do_sample": false,  "temperature": 0.5}'
    Path("models/tiny/generation_config.json").write_text(invalid)
    model = AutoModelForCausalLM.from_pretrained("models/tiny")
    if transformers.__version__ < "5":
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
    assert (
        used("a good day").input_ids
        == Tokenizer.from_file("models/tiny/tokenizer.json").encode("a good day").ids
    )
    export.run(params, "toxicity", "lrp", Path("out"))
    written = json.loads(Path("out/tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = AutoTokenizer.from_pretrained("out")
    assert dict(again("a good day")) == dict(used("a good day"))
    assert again.special_tokens_map == used.special_tokens_map


def test_as_an_adapter_it_is_small_and_plain_peft_loads_it_on_the_base(project):
    params = project("gpt2")
    export.run(params, "toxicity", "lrp", Path("out"), "adapter")
    names = {p.relative_to("out").as_posix() for p in Path("out").rglob("*") if p.is_file()}
    assert names == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "circuit.csv"),
        *("LICENSE", "reproduce/params.yaml", "reproduce/inputs.json", "reproduce/expected.json"),
    }
    assert sum(p.stat().st_size for p in Path("out").glob("adapter*")) < 2000
    named = read_json(Path("out/adapter_config.json"))["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(named).eval()
    model = loading.load(params.model)
    with pruned(model, CIRCUIT):
        assert torch.equal(PeftModel.from_pretrained(base, "out")(IDS).logits, model(IDS).logits)
    assert "`unmerge_adapter`" in Path("out/README.md").read_text()


@pytest.mark.parametrize("form", ["model", "adapter"])
def test_the_hub_reads_the_cards_metadata(project, form):
    params = project()
    for name in ("LICENSE", "GEMMA_TERMS.html"):
        Path("models/tiny", name).write_text("Gemma Terms of Use")
    metrics_path("evaluate", "toxicity").parent.mkdir(parents=True)
    metrics_path("evaluate", "toxicity").write_text(json.dumps(EVALUATION))
    export.run(params, "toxicity", "lrp", Path("out"), form)
    text = Path("out/README.md").read_text()
    data: Any = ModelCard(text).data
    assert data.base_model == "tiny"
    assert data["base_model_relation"] == {"model": "finetune", "adapter": "adapter"}[form]
    assert data.license == "gemma"
    assert {"allenai/real-toxicity-prompts", "google/boolq"} <= {*data.datasets}
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_type) == ("toxicity", "nll_shift")
    assert result.metric_value == 0.21
    assert "[0.1, 0.3]" in result.metric_name
    assert "Prohibited" not in text
    assert "https://ai.google.dev/gemma/terms" in text
    assert Path("out/NOTICE").read_text().startswith("Gemma is provided under and subject to the")
    assert Path("out/GEMMA_TERMS.html").is_file()


def test_a_model_of_the_hub_is_named_with_its_commit(project):
    params = project()
    write_json(Path("models/tiny/sparc3-origin.json"), {"repository": "me/lm", "revision": "0a1b"})
    Path("models/tiny/README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    export.run(params, "toxicity", "lrp", Path("out"), "adapter")
    config = read_json(Path("out/adapter_config.json"))
    data: Any = ModelCard(Path("out/README.md").read_text()).data
    assert (data.base_model, data.license) == ("me/lm", "mit")
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/lm", "0a1b")


@pytest.fixture(scope="module")
def measured(finished, tmp_path_factory):
    """A whole project with `export`s that another process has measured: rude, bias."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("measured") / "project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for behaviour, method, form in (
            ("rude", "lrp", "adapter"),
            ("bias", "gradient-t", "model"),
        ):
            words = ["--behaviour", behaviour, "--method", method, "--as", form]
            assert main(["export", *words, "--folder", f"kept/{behaviour}"]) == 0
    return folder


def test_a_folder_says_what_it_gives_and_that_is_measured_again(measured, monkeypatch, capsys):
    monkeypatch.chdir(measured)
    results = read_json(metrics_path("evaluate", "rude"))
    promise = read_json(Path("kept/rude/reproduce/expected.json"))
    assert {*promise} == {"probe_nll", "perplexity_general", "perplexity_news", "nll", "profanity"}
    row, before = results["circuits"]["lrp"], results["baseline"]["perplexity_general"]
    assert promise["nll"]["value"] == row["test"]["values"]["nll"]
    general = promise["perplexity_general"]["value"]
    assert 100 * (general / before - 1) == pytest.approx(row["ppl_delta"]["value"])
    for behaviour in ("rude", "bias"):
        assert main(["remeasure", f"kept/{behaviour}"]) == 0
        said = capsys.readouterr().out
        assert "DOES NOT" not in said
        number = len(read_json(Path(f"kept/{behaviour}/reproduce/expected.json")))
        assert f"{number} of {number} numbers hold" in said


def test_other_weights_do_not_hold_and_other_inputs_are_refused(measured, monkeypatch, capsys):
    monkeypatch.chdir(measured)
    file = Path("kept/rude/adapter_model.safetensors")
    kept, prompts = file.read_bytes(), Path("outputs/prompts/rude.jsonl")
    save_file({name: torch.ones_like(each) for name, each in load_file(file).items()}, file)
    with pytest.raises(SystemExit, match="1"):
        main(["remeasure", "kept/rude"])
    assert "| DOES NOT |" in capsys.readouterr().out
    file.write_bytes(kept)
    text = prompts.read_text()
    prompts.write_text(text + "\n")
    assert main(["remeasure", "kept/rude"]) == 2
    assert "outputs/prompts/rude.jsonl: is not what kept/rude" in capsys.readouterr().err
    prompts.write_text(text)
    assert main(["remeasure", "outputs"]) == 2
    assert "no folder with a model or an adapter that `export` wrote" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("expected", {}),
        ("expected", {"x": 1}),
        ("expected", {"probe_nll": {"value": "a", "within": 1}}),
        ("inputs", {}),
        ("inputs", {"sha256": {}, "behaviour": "nope"}),
    ],
)
def test_a_record_that_export_did_not_write_is_refused(
    name, content, measured, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(measured)
    folder = tmp_path / "copy"
    shutil.copytree("kept/rude", folder)
    write_json(folder / f"reproduce/{name}.json", content)
    assert main(["remeasure", str(folder)]) == 2
    assert f"reproduce/{name}.json: not as `export` wrote it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--behaviour", "nope", "--method", "lrp"], "--behaviour 'nope' is not in params"),
        (["--behaviour", "rude", "--method", ""], "--method '' is no circuit; known: lrp"),
        (["--behaviour", "rude", "--method", "random-layer-matched"], "random-layer-matched-0"),
        (["--behaviour", "rude", "--method", "act", "--as", "adapter"], "act is an intervention"),
    ],
)
def test_what_is_no_circuit_is_named(words, expected, measured, monkeypatch, capsys):
    monkeypatch.chdir(measured)
    assert main(["export", *words, "--folder", "none"]) == 2
    assert expected in capsys.readouterr().err
    assert not Path("none").exists()


def test_a_folder_that_breaks_its_promise_is_not_kept(measured, monkeypatch):
    """Here the promise is another model's: the neurons are those of another circuit."""
    monkeypatch.chdir(measured)
    monkeypatch.setattr(remeasure, "probe", lambda model: 99.0)
    with pytest.raises(InputError, match=r"^broken: loaded again it does not give .*probe_nll"):
        export.run(load(), "rude", "lrp", Path("broken"), "adapter")
    assert not Path("broken").exists()
