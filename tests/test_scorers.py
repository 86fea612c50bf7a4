"""Scorers: the real loading code on tiny checkpoints of the published formats."""

import re
import shutil
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import transformers.utils.hub
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

from sparc3.base.errors import InputError
from sparc3.base.files import digest
from sparc3.base.params import Scorer
from sparc3.measure import scorers
from sparc3.measure.scorers import SCORERS, describe, scorer

WORDS = ["you", "are", "a", "nice", "bad", "awful", "person", "##s", "the", "weather", "is", "."]
TEXTS = ["you are a bad person.", "", "nice", "the weather is awful. " * 9, "persons?", "bad bad"]
JIGSAW = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]
BIASES = {0: "racial", 1: "gender", 2: "age"}


def spec_of(kind, path=None, label=None, revision=None):
    return Scorer(kind=kind, path=path, label=label, revision=revision)


def bert_tokenizer(folder: Path) -> BertTokenizerFast:
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(str(vocabulary), model_max_length=32)
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_bert(labels: int) -> BertForSequenceClassification:
    torch.manual_seed(labels)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=labels,
        initializer_range=0.5,  # scores that differ from text to text
    )
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def detoxify_folder(tmp_path: Path) -> Path:
    """A checkpoint as Detoxify's releases have it, beside its encoder's configuration."""
    folder = tmp_path / "detoxify"
    model = tiny_bert(len(JIGSAW))
    bert_tokenizer(folder)
    BertConfig.from_dict(model.config.to_dict() | {"num_labels": 2}).save_pretrained(folder)
    state = OrderedDict(model.state_dict())
    state["bert.embeddings.position_ids"] = torch.arange(32)[None]
    arch = {
        "num_classes": len(JIGSAW),
        "model_type": str(folder),  # bert-base-uncased in the releases; a folder works as well
        "model_name": "BertForSequenceClassification",
        "tokenizer_name": "BertTokenizer",
    }
    config = {"arch": {"type": "BERT", "args": arch}, "dataset": {"args": {"classes": JIGSAW}}}
    torch.save({"state_dict": state, "config": config}, folder / "toxic.ckpt")
    return folder


@pytest.fixture
def bias_folder(tmp_path: Path) -> Path:
    """A ModernBERT classifier of independent labels, as the published bias classifier is one."""
    folder = tmp_path / "modernbert"
    torch.manual_seed(0)
    tokenizer = bert_tokenizer(folder)
    model = ModernBertForSequenceClassification(
        ModernBertConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            cls_token_id=2,
            sep_token_id=3,
            id2label=BIASES,
            label2id={v: k for k, v in BIASES.items()},
            problem_type="multi_label_classification",
            initializer_range=0.5,
            initializer_cutoff_factor=3,
        )
    )
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        model_max_length=64,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    return folder


def one_by_one(model, tokenizer, texts, activation, column, limit=32):
    """No batch, no padding, no sorting."""
    scores = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")
        with torch.no_grad():
            scores.append(activation(model(**ids).logits[0])[column].item())
    return np.array(scores)


def test_profanity_ranks_and_is_bounded_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = scorer(spec_of("profanity"))(["have a nice day", "you fucking idiot", ""])
    assert scores.shape == (3,)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert scores[1] > 0.9 > 0.1 > scores[0]
    assert scores[2] < 0.1  # an empty text: the intercept alone


def test_profanity_loads_in_a_fresh_process_without_warnings():
    code = (
        "from sparc3.measure.scorers import *; import sys; scorer(Spec(kind='profanity'))(['a']);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def fields(message: bytes) -> dict[int, list[Any]]:
    """A message of protocol buffers: number of a field -> its values; bytes, or whole numbers."""
    found, at = {}, 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        key = number()
        if key & 7 == 0:
            value = number()
        else:
            length = {1: 8, 5: 4}.get(key & 7) or number()
            value, at = message[at : at + length], at + length
        found.setdefault(key >> 3, []).append(value)
    return found


def hatesonar_naively(file: Path, texts: list[str]) -> list[float]:
    """tf-idf of lowered words, in unit length, and softmax of three linear functions of it."""
    graph = fields(fields(file.read_bytes())[7][0])
    kept = {}  # attributes by operator and name
    for node in map(fields, graph[1]):
        for attribute in map(fields, node.get(5, [])):
            kept[node[4][0].decode(), attribute[1][0].decode()] = attribute
    idf = next(t for t in map(fields, graph[5]) if t[8] == [b"idfcst"])[4][0]
    weights = kept["LinearClassifier", "coefficients"][7]
    biases = kept["LinearClassifier", "intercepts"][7]
    weights, biases = (np.frombuffer(b"".join(v), "<f4") for v in (weights, biases))
    words = [word.decode() for word in kept["TfIdfVectorizer", "pool_strings"][9]]
    places = {word: i for i, word in enumerate(words)}
    scores = []
    for text in texts:
        x = np.zeros(len(words))
        for word in re.findall("[a-z0-9_]+", text.lower()):
            if word in places:
                x[places[word]] += np.frombuffer(idf, "<f4")[places[word]]
        logits = weights.reshape(3, -1) @ (x / (np.linalg.norm(x) or 1)) + biases
        scores.append(1 - np.exp(logits[2]) / np.exp(logits).sum())  # 2: neither
    return scores


SAID = [
    "You are an IDIOT",
    "you are an idiot",
    "",
    "the weather is nice",
    "what the fuck, Ünï!",
    "%",
]


def test_hatesonar_is_the_linear_model_of_its_file(fetched, monkeypatch):
    monkeypatch.chdir(fetched)
    scores = scorer(spec_of("hatesonar"))(SAID)
    np.testing.assert_allclose(scores, hatesonar_naively(scorers.HATESONAR, SAID), atol=1e-6)
    assert scores[0] == scores[1] > scores[3]
    assert scores[4] > 0.9
    alone = [scorer(spec_of("hatesonar"))([text])[0] for text in reversed(SAID)]
    assert alone[::-1] == scores.tolist()  # to the last bit


def test_hatesonar_is_its_own_file_or_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"models/hatesonar/model.onnx: file not found; .* fetch$"):
        scorer(spec_of("hatesonar"))
    scorers.HATESONAR.parent.mkdir(parents=True)
    scorers.HATESONAR.write_bytes(b"other")
    with pytest.raises(InputError, match=f"expected {scorers.HATESONAR_SHA256}; move it away"):
        describe(spec_of("hatesonar"))


OWN = """
def shouting(texts):
    return [sum(c.isupper() for c in text) / max(1, len(text)) for text in texts]

def percent(texts):
    return [50.0 for text in texts]

def one(texts):
    return 0.5

def ranked(texts):
    return [i / len(texts) for i, _ in enumerate(texts)]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "mine_of_a_test.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "mine_of_a_test.py"
    sys.modules.pop("mine_of_a_test", None)


def test_a_function_of_the_project_is_a_scorer(own):
    spec = spec_of("python", "mine_of_a_test:shouting")
    assert scorer(spec)(["ABcd", "", "e"]).tolist() == [0.5, 0.0, 0.0]
    path = {"path": "mine_of_a_test:shouting", "sha256 mine_of_a_test.py": digest(own)}
    assert describe(spec) == {"kind": "python", **path}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("mine_of_a_test:percent", "gives .*50.* expected a number from 0 to 1 for each"),
        ("mine_of_a_test:one", "gives 0.5 for 1 texts; expected a number"),
        ("mine_of_a_test:ranked", "scores a text otherwise beside other texts"),
        ("mine_of_a_test:none", "has no function none; add it"),
        ("mine_of_a_test", "has no function ; add it"),
        ("nowhere.at_all:f", r"nowhere\.at_all is not found; expected a module below"),
        ("json:loads", r"json is .*json/__init__\.py; expected a module below"),
        (".:f", r"\. is not found"),
    ],
)
def test_what_is_no_scorer_of_the_project_is_refused(own, path, message):
    with pytest.raises(InputError, match=f"^scorer: .*{message}"):
        scorer(spec_of("python", path))


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_detoxify_is_the_sigmoid_of_the_toxicity_logit(detoxify_folder, batch_size, monkeypatch):
    monkeypatch.setattr(scorers, "BATCH", batch_size)
    spec = spec_of("detoxify", str(detoxify_folder))
    model = tiny_bert(len(JIGSAW))
    tokenizer = BertTokenizerFast.from_pretrained(detoxify_folder)
    expected = one_by_one(model, tokenizer, TEXTS, torch.sigmoid, 0)
    assert np.ptp(expected) > 0.05
    scores = scorer(spec, device="auto")(TEXTS)
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    attack = scorer(spec_of("detoxify", spec.path, "identity_attack"))(TEXTS)
    np.testing.assert_allclose(
        attack, one_by_one(model, tokenizer, TEXTS, torch.sigmoid, 5), atol=1e-6
    )


def test_detoxify_equals_the_detoxify_package(detoxify_folder):
    from detoxify import Detoxify

    package = Detoxify(checkpoint=str(detoxify_folder / "toxic.ckpt")).predict(TEXTS)
    for label in ("toxicity", "severe_toxicity", "insult"):
        ours = scorer(spec_of("detoxify", str(detoxify_folder), label))(TEXTS)
        np.testing.assert_allclose(ours, package[label], atol=1e-6)


def test_published_checkpoint_comes_from_the_cache_or_the_network(
    detoxify_folder, tmp_path, monkeypatch
):
    """Both through torch.hub's real code: the release's address is a file, its name ends right."""
    made = detoxify_folder / "toxic.ckpt"
    release = tmp_path / "release" / f"toxic-{digest(made)[:8]}.ckpt"
    release.parent.mkdir()
    release.write_bytes(made.read_bytes())
    monkeypatch.setattr(scorers, "CHECKPOINT", release.as_uri())
    monkeypatch.setattr(scorers, "ENCODER", str(detoxify_folder))
    monkeypatch.setattr(scorers, "ENCODER_REVISION", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    expected = scorer(spec_of("detoxify", str(detoxify_folder)))(TEXTS)
    np.testing.assert_array_equal(scorer(spec_of("detoxify"))(TEXTS), expected)
    release.unlink()
    np.testing.assert_array_equal(scorer(spec_of("detoxify"))(TEXTS), expected)
    cached = tmp_path / "torch" / "hub" / "checkpoints" / release.name
    cached.write_bytes(b"damaged")
    with pytest.raises(InputError, match=f"expected {digest(made)[:8]}"):
        scorer(spec_of("detoxify"))
    cached.unlink()
    with pytest.raises(InputError, match=r"cannot download .* give its place as path"):
        scorer(spec_of("detoxify"))


def test_encoder_comes_from_the_hub_cache_at_the_pinned_commit(
    detoxify_folder, tmp_path, monkeypatch
):
    """A checkpoint alone: its encoder's files are looked up by name and commit."""
    name, commit = scorers.ENCODER.replace("/", "--"), scorers.ENCODER_REVISION
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes((detoxify_folder / "toxic.ckpt").read_bytes())
    snapshot = tmp_path / "hub" / f"models--{name}" / "snapshots" / commit
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(transformers.utils.hub, "_is_offline_mode", True)
    monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(tmp_path / "hub"))
    with pytest.raises(InputError, match=f"cannot load {scorers.ENCODER}"):
        scorer(spec_of("detoxify", str(alone)))
    detoxify_folder.joinpath("toxic.ckpt").rename(tmp_path / "toxic.ckpt")
    shutil.copytree(detoxify_folder, snapshot)
    expected = one_by_one(
        tiny_bert(len(JIGSAW)),
        BertTokenizerFast.from_pretrained(detoxify_folder),
        TEXTS,
        torch.sigmoid,
        0,
    )
    scores = scorer(spec_of("detoxify", str(alone), revision=digest(alone)))(TEXTS)
    np.testing.assert_allclose(scores, expected, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_modernbert_scores_its_label_by_itself(bias_folder, batch_size, monkeypatch):
    monkeypatch.setattr(scorers, "BATCH", batch_size)
    model = ModernBertForSequenceClassification.from_pretrained(bias_folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bias_folder)
    expected = one_by_one(model, tokenizer, TEXTS, torch.sigmoid, 1, limit=64)
    assert np.ptp(expected) > 0.05
    spec = spec_of("classifier", str(bias_folder), "gender")
    scores = scorer(spec)(TEXTS)
    np.testing.assert_allclose(scores, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "problem"),
    [(3, "multi_label_classification"), (3, "single_label_classification"), (3, None), (1, None)],
)
def test_classifier_equals_the_pipeline_of_transformers(tmp_path, labels, problem):
    model = tiny_bert(labels)
    model.config.problem_type = problem
    model.config.id2label = {i: f"bias {i}" for i in range(labels)}
    model.config.label2id = {v: k for k, v in model.config.id2label.items()}
    model.save_pretrained(tmp_path)
    bert_tokenizer(tmp_path)
    reference = pipeline("text-classification", str(tmp_path), top_k=None, device="cpu")
    for label in model.config.id2label.values():
        ours = scorer(spec_of("classifier", str(tmp_path), label))(TEXTS)
        rows: Any = reference(TEXTS, truncation=True)
        theirs = [next(r["score"] for r in row if r["label"] == label) for row in rows]
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_order_and_company_of_texts_do_not_matter(bias_folder, monkeypatch):
    monkeypatch.setattr(scorers, "BATCH", 4)
    score = scorer(spec_of("classifier", str(bias_folder), "age"))
    scores = score(TEXTS)
    turn = np.random.default_rng(0).permutation(len(TEXTS))
    np.testing.assert_allclose(score([TEXTS[i] for i in turn]), scores[turn], atol=1e-6)
    np.testing.assert_allclose(score(TEXTS[:1]), scores[:1], atol=1e-6)
    assert score([]).shape == (0,)


def test_descriptions_pin_what_scored(detoxify_folder, bias_folder):
    assert set(SCORERS) == {"profanity", "hatesonar", "python", "detoxify", "classifier"}
    profanity = describe(spec_of("profanity"))
    assert {"alt-profanity-check", "scikit-learn"} < set(profanity)
    assert {f"sha256 {name}": of for name, of in scorers.PROFANITY.items()}.items() < (
        profanity.items()
    )
    detoxify = describe(spec_of("detoxify", str(detoxify_folder)))
    assert detoxify["sha256"] == digest(detoxify_folder / "toxic.ckpt")
    assert detoxify["label"] == "toxicity"
    bias = describe(spec_of("classifier", str(bias_folder), "gender"))
    assert bias["sha256 model.safetensors"] == digest(bias_folder / "model.safetensors")
    hub = describe(spec_of("classifier", "cirimus/x", "gender", "ab" * 20))
    assert hub["revision"] == "ab" * 20
    for about in (profanity, detoxify, bias, hub):
        assert all(isinstance(value, str) for value in about.values())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (spec_of("classifier", "cirimus/x", "gender"), "revision is None"),
        (spec_of("classifier", "cirimus/x", "gender", "main"), "revision is 'main'"),
        (spec_of("detoxify", "nowhere.ckpt"), r"nowhere\.ckpt: file not found"),
    ],
)
def test_bad_spec_is_named(spec, message):
    with pytest.raises(InputError, match=message):
        scorer(spec)


def test_bad_files_are_named(detoxify_folder, bias_folder, tmp_path):
    def refused(message, kind, path, label=None, revision=None):
        with pytest.raises(InputError, match=message):
            scorer(spec_of(kind, str(path), label, revision))

    refused("'sex'; choose one of: age, gender, racial", "classifier", bias_folder, "sex")
    refused(
        "'sex'; choose one of: identity_attack, .* toxicity", "detoxify", detoxify_folder, "sex"
    )
    checkpoint = detoxify_folder / "toxic.ckpt"
    refused("expected 00000000", "detoxify", detoxify_folder, revision="00000000")
    (tmp_path / "empty").mkdir()
    refused("cannot load", "classifier", tmp_path / "empty", "gender")
    refused("0 files", "detoxify", tmp_path / "empty")
    tiny_bert(2).bert.save_pretrained(tmp_path / "headless")
    bert_tokenizer(tmp_path / "headless")
    refused(
        r"as a text-classification model: .*: classifier\.bias and 1 more are missing",
        "classifier",
        tmp_path / "headless",
        "LABEL_0",
    )
    settings = bias_folder / "config.json"
    fewer = settings.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 2')
    settings.write_text(fewer)
    refused(r"layers\.2\..* more are not the model's", "classifier", bias_folder, "gender")

    saved = torch.load(checkpoint)
    torch.save({"state_dict": saved["state_dict"]}, checkpoint)
    refused("not a Detoxify checkpoint", "detoxify", detoxify_folder)
    torch.save(saved | {"state_dict": tiny_bert(3).state_dict()}, checkpoint)
    refused("do not fit the encoder", "detoxify", detoxify_folder)
    torch.save(saved | {"more": Path()}, checkpoint)  # an object, which could be anything
    refused("not a Detoxify checkpoint", "detoxify", detoxify_folder)
    checkpoint.write_bytes(b"damaged")
    refused("not a Detoxify checkpoint", "detoxify", detoxify_folder)


def test_non_finite_score_is_an_error(detoxify_folder):
    checkpoint = detoxify_folder / "toxic.ckpt"
    saved = torch.load(checkpoint)
    saved["state_dict"]["classifier.bias"][0] = float("nan")
    torch.save(saved, checkpoint)
    with pytest.raises(InputError, match="non-finite score to text 1 of 3; name another"):
        scorer(spec_of("detoxify", str(detoxify_folder)))  # before any text is made to be scored
