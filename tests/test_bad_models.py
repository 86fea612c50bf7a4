"""Folders that hold no good model: each refused in one line, early, by the function that reads it.

One row for each kind: what is made wrong of a good folder, and the line.
"""

import ast
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_scorers import bert_tokenizer, spec_of, tiny_bert
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from sparc3.base.errors import InputError
from sparc3.base.params import Model
from sparc3.measure import scorers
from sparc3.measure.scorers import scorer
from sparc3.model import loading
from sparc3.stages import prepare

ROOT = Path(__file__).parent.parent
Damage = Callable[[Path], object]


def config(**changes: Any) -> Damage:
    """Other values in config.json; None takes a key away."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        tree = json.loads(file.read_text()) | changes
        file.write_text(
            json.dumps({key: value for key, value in tree.items() if value is not None})
        )

    return change


def text(name: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def pointer(name: str) -> Damage:
    lines = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 269060552\n"
    return text(name, lines)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def save(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return save


def stored(name: str, value: Any) -> Damage:
    """A weight made otherwise of what it was."""
    return weights(lambda held: held.update({name: value(held[name])}))


def cut(begin: float, more: bytes = b"") -> Damage:
    def write(folder: Path) -> None:
        file = folder / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * begin)] + more)

    return write


def pickled(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(held, folder / "pytorch_model.bin")


def sharded(lost: str) -> Damage:
    """In two files, of which one is lost, or a pointer, or damaged."""

    def write(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        names = sorted(held)
        (folder / "model.safetensors").unlink()
        of = {name: f"model-0000{1 + (n > 9)}-of-00002.safetensors" for n, name in enumerate(names)}
        for file in set(of.values()):
            part = {name: held[name] for name in names if of[name] == file}
            save_file(part, folder / file, metadata={"format": "pt"})
        index = {"metadata": {"total_size": 0}, "weight_map": of}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        second = folder / "model-00002-of-00002.safetensors"
        {"none": lambda: None, "file": second.unlink, "end": lambda: second.write_bytes(b"x")}[
            lost
        ]()

    return write


NORM = "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"
QUANTISED = r"it is quantised: config\.json has quantization_config\); name the model .* made from"
BOTH: list[tuple[str, Damage, str]] = [  # whoever reads the folder says so: also `prepare`
    ("no folder", shutil.rmtree, r"is no folder; run .*fetch, or name a folder"),
    ("no config", lambda f: (f / "config.json").unlink(), r"no config\.json\); name a folder"),
    ("pointer config", pointer("config.json"), r"config\.json is a Git LFS pointer.*git lfs pull"),
    ("pointer tokenizer", pointer("tokenizer.json"), r"tokenizer\.json is a Git LFS .* lfs pull"),
    ("pointer weights", pointer("model.safetensors"), r"model\.safetensors is a Git LFS pointer"),
    ("config of text", text("config.json", "Entry not found"), r"JSONDecodeError: .*name a folder"),
    ("config a list", text("config.json", "[]"), r"config\.json is no JSON object\); get it again"),
    ("config of bytes", text("config.json", b"\xff\xfe\x00"), r"UnicodeDecodeError: .*name"),
    ("bnb", config(quantization_config={"load_in_4bit": True}), QUANTISED),
    ("gptq", config(quantization_config={"quant_method": "gptq", "bits": 4}), QUANTISED),
    ("awq", config(quantization_config={"quant_method": "awq", "bits": 4}), QUANTISED),
    ("fp8", config(quantization_config={"quant_method": "fp8"}), QUANTISED),
    ("unknown way", config(quantization_config={"quant_method": "of tomorrow"}), QUANTISED),
    (
        "wrapper",
        config(model_type="gemma3", text_config={"model_type": "gemma3_text"}),
        r"is of 'gemma3' around a language model, 'gemma3_text'\); name .* alone",
    ),
    ("wrapper, LLaVA", config(model_type="llava", text_config={}), r"'llava' around a language"),
    (
        "experts, Mixtral",
        config(model_type="mixtral", num_local_experts=8),
        r"mixture of experts: config\.json has num_local_experts: 8\); name a dense model",
    ),
    ("experts, OLMoE", config(model_type="olmoe", num_experts=64), r"has num_experts: 64\); name"),
    ("another family", config(model_type="mamba"), r"config\.json: family 'mamba' is not known"),
    ("no family", config(model_type=None), r"config\.json: family None is not known; choose one"),
    ("no context", config(max_position_embeddings=None), r"no number max_position_embeddings\); a"),
    ("context of 0", config(max_position_embeddings=0), r"no number max_position_embeddings\)"),
    ("context of text", config(max_position_embeddings="64"), r"no number max_position_embeddings"),
]
OF_WEIGHTS: list[tuple[str, Damage, str]] = [
    ("cut", cut(0.5), r"model\.safetensors \(SafetensorError: .*get it again"),
    ("cut in its header", cut(0.01), r"model\.safetensors \(SafetensorError: .*get it again"),
    ("empty", cut(0), r"model\.safetensors \(SafetensorError: .*get it again"),
    ("longer", cut(1, b"\0" * 8), r"model\.safetensors \(SafetensorError: .*get it again"),
    (
        "a page",
        text("model.safetensors", "<!doctype html>" * 9),
        r"SafetensorError: .*get it again",
    ),
    ("pickled", pickled, r"no safetensors, but pytorch_model\.bin, .*; save it by save_pretrained"),
    ("no weights", lambda f: (f / "model.safetensors").unlink(), r"\(no safetensors\); save it"),
    ("a shard lost", sharded("file"), r"model-00002-of-00002\.safetensors is missing, which its"),
    ("a shard cut", sharded("end"), r"model-00002-of-00002\.safetensors \(SafetensorError"),
    (
        "an index of text",
        lambda f: (
            (f / "model.safetensors").unlink(),
            (f / "model.safetensors.index.json").write_text("{"),
        ),
        r"JSONDecodeError: .*get it again",
    ),
    ("int8", stored(UP, lambda w: w.to(torch.int8)), rf"quantised: {UP} is of type I8\); name"),
    ("fp8", stored(UP, lambda w: w.to(torch.float8_e4m3fn)), rf"{UP} is of type F8_E4M3\); name"),
    (
        "packed",
        weights(lambda h: h.update({f"{UP}_packed": torch.zeros(3, dtype=torch.int32), UP: h[UP]})),
        rf"{UP}_packed is of type I32\)",
    ),
    ("another shape", stored(UP, lambda w: w[:3].clone()), rf"{UP} is of another shape; get both"),
    ("one missing", weights(lambda held: held.pop(UP)), rf"{UP} is missing; get both"),
    (
        "heads do not divide",
        config(num_attention_heads=3),
        r"different models: model\.layers\.0|Validation.*; name",
    ),
    ("a size of text", config(hidden_size="16"), r"cannot load .*Error: .*name a folder"),
    ("no layers", config(num_hidden_layers=-1), r"not the model's; get both"),
    ("an activation", config(hidden_act="of my own"), r"cannot load .*KeyError: .*name a folder"),
    ("NaN", stored(NORM, lambda w: w * np.nan), rf"{NORM} holds values .* not finite; get the wei"),
    ("infinite", stored(UP, lambda w: w / 0), rf"{UP} holds values that are not finite; get the w"),
]
OF_TOKENIZERS: list[tuple[str, Damage, str]] = [
    ("text", text("tokenizer.json", "Entry not found"), r"cannot load .*; name a folder"),
    ("another", text("tokenizer.json", '{"version": "1.0"}'), r"cannot load .*; name a folder"),
    ("larger", config(vocab_size=40), r"has a token 49, and vocab_size is 40\); get tokenizer and"),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    small.write_model(folder)
    return folder


def refused(read: Callable[[Model], object], good: Path, at: Path, how: Damage, line: str) -> None:
    folder = at / "model"
    shutil.copytree(good, folder)
    read(Model(path=str(folder)))
    how(folder)
    with pytest.raises(InputError, match=line) as caught:
        read(Model(path=str(folder)))
    said = str(caught.value)
    assert said.startswith("model.path: ")
    assert str(folder) in said
    assert "; " in said
    assert "\n" not in said


def rows(*tables: list[tuple[str, Damage, str]]) -> pytest.MarkDecorator:
    every = [pytest.param(how, line, id=name) for table in tables for name, how, line in table]
    return pytest.mark.parametrize(("how", "line"), every)


@rows(BOTH, OF_WEIGHTS)
def test_a_bad_model_is_refused(good, tmp_path, how, line, monkeypatch, capfd):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    refused(loading.load, good, tmp_path, how, line)
    assert capfd.readouterr().err == ""


@rows(BOTH, OF_TOKENIZERS)
@pytest.mark.parametrize("read", [loading.tokenizer, prepare.load_tokenizer])
def test_a_bad_tokenizer_is_refused(good, tmp_path, how, line, read):
    refused(read, good, tmp_path, how, line)


def test_weights_are_read_after_everything_else_is_seen(good, tmp_path, monkeypatch):
    """Of another shape: known from the headers, without a single value."""
    shutil.copytree(good, tmp_path / "model")
    stored(UP, lambda w: w[:3].clone())(tmp_path / "model")
    asked, own = [], loading.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        loading.AutoModelForCausalLM,
        "from_pretrained",
        lambda *args, **how: asked.append(how["device_map"]) or own(*args, **how),
    )
    with pytest.raises(InputError, match="of another shape"):
        loading.load(Model(path=str(tmp_path / "model")))
    assert asked == ["meta"]


def test_a_sharded_model_is_read(good, tmp_path):
    shutil.copytree(good, tmp_path / "model")
    sharded("none")(tmp_path / "model")
    ids = torch.tensor(tiny.sequences([9]))
    one, two = (
        loading.load(Model(path=str(path)))(ids).logits for path in (good, tmp_path / "model")
    )
    assert torch.equal(one, two)


def test_logits_that_overflow_are_refused_with_another_dtype(good, tmp_path):
    shutil.copytree(good, tmp_path / "model")
    stored(NORM, lambda w: w * 3e4)(tmp_path / "model")
    spec = Model(path=str(tmp_path / "model"))
    loading.load(spec)
    with pytest.raises(InputError, match=r"use model\.dtype float32 or bfloat16, or name another"):
        loading.load(replace(spec, dtype="float16"))


@pytest.mark.parametrize(
    ("device", "dtype", "room", "message"),
    [
        (
            "cpu",
            "float32",
            3.9,
            r"model\.dtype bfloat16, .* GB, or a model of up to .* param",
        ),
        ("cpu", "float32", 1.9, r"has \S+; what would fit: a model of up to .* parameters$"),
        ("cpu", "bfloat16", 1.9, r"in torch\.bfloat16, .*fit: a model of up to .* parameters$"),
        (
            "cuda:0",
            "float32",
            1.1,
            r"would fit: model\.device auto over 4 of these or more, or",
        ),
    ],
)
def test_a_model_larger_than_memory_is_refused_with_what_would_fit(
    good, monkeypatch, device, dtype, room, message
):
    """`room` is in bytes for each of its parameters."""
    spec: Any = Model(path=str(good), dtype=dtype)
    parameters = sum(p.numel() for p in loading.load(spec).parameters())
    monkeypatch.setattr(loading, "memory", lambda device: room * parameters)
    monkeypatch.setattr(loading, "_require_finite", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(InputError, match=message):
        loading.load(spec, device)


def test_code_beside_a_known_model_is_not_run_and_nothing_is_asked(good, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    shutil.copytree(good, tmp_path / "model")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    code = {**{name: "own.Own" for name in names}, "AutoTokenizer": ["own.Own", "own.Own"]}
    config(auto_map=code)(tmp_path / "model")
    (tmp_path / "model/own.py").write_text("raise SystemExit('it ran')\n")
    spec = Model(path=str(tmp_path / "model"))
    loading.load(spec)
    loading.tokenizer(spec)


def test_every_call_that_loads_says_that_no_code_of_others_is_run():
    """trust_remote_code is given, by name or within one of two tables; nothing calls pickle."""
    calls = 0
    for file in sorted((ROOT / "sparc3").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            where = f"{file.name}:{node.lineno}"
            assert ast.unparse(node.func) not in ("pickle.load", "joblib.load"), where
            of_code = ast.unparse(node.func.value) != "PeftModel"  # an adapter has none
            if node.func.attr == "from_pretrained" and of_code:
                calls += 1
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                spread = [ast.unparse(k.value) for k in node.keywords if k.arg is None]
                known = {"LOCAL", "EVERY_WEIGHT", "code", "source"}
                assert given.get("trust_remote_code") == "False" or known & set(spread), where
    assert calls >= 5
    assert loading.LOCAL["trust_remote_code"] is loading.EVERY_WEIGHT["trust_remote_code"] is False
    assert loading.EVERY_WEIGHT["use_safetensors"] is True


@pytest.mark.parametrize("template", ["$A", "w0 $A", "w0 $A w1"])
def test_what_stands_in_front_takes_room_of_the_context(good, tmp_path, template):
    """A text of as many tokens as the context has fits only without the first token."""
    shutil.copytree(good, tmp_path / "model")
    file = tmp_path / "model/tokenizer.json"
    words = Tokenizer.from_file(str(file))
    words.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("w0", 0), ("w1", 1)]
    )
    words.save(str(file))
    spec = Model(path=str(tmp_path / "model"))
    _, longest = prepare.load_tokenizer(spec)
    longest = int(longest)
    (ids,) = loading.encode(loading.tokenizer(spec), [" ".join(["w7"] * longest)])
    assert len(ids) == 64 == loading.load(spec).config.max_position_embeddings


# --- scorers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    bert_tokenizer(folder)
    tiny_bert(2).save_pretrained(folder)
    return folder


HEAD = "classifier.weight"
OF_SCORERS: list[tuple[str, Damage, str]] = [
    ("pointer weights", pointer("model.safetensors"), r"model\.safetensors is a Git LFS pointer"),
    ("pointer tokenizer", pointer("tokenizer.json"), r"tokenizer\.json is a Git LFS pointer"),
    ("cut", cut(0.5), r"SafetensorError: .*get it again"),
    ("pickled", pickled, r"no safetensors, but pytorch_model\.bin"),
    ("no config", lambda f: (f / "config.json").unlink(), r"no config\.json\); name a folder"),
    ("quantised", config(quantization_config={"quant_method": "gptq"}), QUANTISED),
    ("int8", stored(HEAD, lambda w: w.to(torch.int8)), rf"{HEAD} is of type I8"),
    (
        "NaN",
        stored(HEAD, lambda w: w * np.nan),
        "gives a non-finite score to text 1 of 3; name",
    ),
    ("tokenizer of text", text("tokenizer.json", "x"), r"cannot load .*; give a folder"),
    ("larger tokenizer", config(vocab_size=3), r"different models: bert\.embeddings\.word_embed"),
    ("no family", config(model_type="own"), r"cannot load .*ValueError: .*; give a folder"),
    (
        "code",
        config(model_type="own", auto_map={"AutoConfig": "own.Own"}),
        r"cannot load .*ValueError: .*; give a folder",
    ),
]


@rows(OF_SCORERS)
def test_a_bad_classifier_is_refused(classifier, tmp_path, how, line, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    folder = tmp_path / "classifier"
    shutil.copytree(classifier, folder)
    how(folder)
    with pytest.raises(InputError, match=line) as caught:
        scorer(spec_of("classifier", str(folder), "LABEL_1"))
    said = str(caught.value)
    assert said.startswith("scorer: ")
    assert "; " in said
    assert "\n" not in said


def test_an_encoder_whose_config_names_code_asks_nothing(tmp_path, monkeypatch):
    """A configuration that transformers knows, and no classifier of its kind but the folder's."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    bert_tokenizer(tmp_path)
    code = {"AutoModelForSequenceClassification": "own.Own"}
    tree = {"model_type": "dpr", "auto_map": code}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    arguments = {"arch": {"args": {"num_classes": 1}}, "dataset": {"args": {"classes": ["toxic"]}}}
    torch.save({"state_dict": {}, "config": arguments}, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=r"^scorer: cannot load .*; give a folder"):
        scorer(spec_of("detoxify", str(tmp_path)))


def words(folder: Path, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of w5 to w49 without model_max_length; texts begin by token 2 and end by 3."""
    vocabulary = {f"<{n}>" if n < 5 else f"w{n}": n for n in range(50)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<4>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="<2> $A <3>", special_tokens=[("<2>", 2), ("<3>", 3)]
    )
    names = ["input_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=names, **special)
    tokenizer.save_pretrained(folder)
    assert tokenizer.model_max_length > scorers.LONG
    return tokenizer


SIZES: dict[str, Any] = {"vocab_size": 50, "num_labels": 2, "initializer_range": 0.5}
ENCODER: dict[str, Any] = SIZES | {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
LENGTHS = [0, 1, 5, 30, 31, 90]
CASES: dict[str, tuple[Any, dict[str, str], int | None]] = {  # model, special tokens, its context
    "roberta": (
        lambda: RobertaForSequenceClassification(
            RobertaConfig(**ENCODER, max_position_embeddings=34, pad_token_id=1)
        ),
        {"pad_token": "<1>"},
        32,
    ),
    "gpt2 without padding": (
        lambda: GPT2ForSequenceClassification(
            GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=2, n_positions=32)
        ),
        {},
        32,
    ),
    "gpt2 padded with another token": (
        lambda: GPT2ForSequenceClassification(
            GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=0)
        ),
        {"pad_token": "<1>"},
        32,
    ),
    "xlnet": (
        lambda: XLNetForSequenceClassification(
            XLNetConfig(**SIZES, d_model=16, n_layer=2, n_head=2, d_inner=24, pad_token_id=0)
        ),
        {"pad_token": "<0>"},
        None,
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_classifiers_of_other_kinds_score_each_text_as_if_alone(kind, tmp_path):
    """Whatever their positions and their padding: naively, one after the other, cut by hand."""
    make, special, longest = CASES[kind]
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path)
    words(tmp_path, **special)
    ids = [torch.randint(5, 50, (length,)).tolist() for length in LENGTHS]
    expected = []
    for each in ids:
        cut_ids = each if longest is None else each[: longest - 2]
        with torch.no_grad():
            logits = model(torch.tensor([[2, *cut_ids, 3]])).logits[0]
        expected.append(logits.softmax(-1)[1].item())
    assert np.ptp(expected) > 0.01
    score = scorer(spec_of("classifier", str(tmp_path), "LABEL_1"))
    scores = score([" ".join(f"w{n}" for n in each) for each in ids])
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_a_classifier_that_cannot_read_an_empty_text_is_refused_at_once(tmp_path):
    """As a completion may be one."""
    make, special, _ = CASES["gpt2 without padding"]
    make().save_pretrained(tmp_path)
    words(tmp_path, **special)
    file = tmp_path / "tokenizer.json"
    tree = json.loads(file.read_text())
    file.write_text(json.dumps(tree | {"post_processor": None}))
    with pytest.raises(InputError, match=r"cannot load .*; no text can be scored; name another"):
        scorer(spec_of("classifier", str(tmp_path), "LABEL_1"))


@pytest.mark.parametrize("name", sorted(scorers.PROFANITY))
def test_a_pickle_that_is_not_the_wheels_is_not_unpickled(name, tmp_path, monkeypatch):
    package = tmp_path / "profanity_check"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('it was imported')\n")
    real = Path(str(getattr(find_spec("profanity_check"), "origin", ""))).parent
    for each in scorers.PROFANITY:
        shutil.copy(real / "data" / each, package / "data" / each)
    data = bytearray((package / "data" / name).read_bytes())
    data[1000] ^= 1
    (package / "data" / name).write_bytes(data)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "profanity_check", raising=False)
    for read in (scorer, scorers.describe):
        with pytest.raises(InputError, match=rf"^scorer: .*{name} has sha256 .* not unpickled; i"):
            read(spec_of("profanity"))
