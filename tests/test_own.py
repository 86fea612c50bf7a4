"""One's own model and prompts: files as sources, and `init`, whole, in a project of its own."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, DatasetDict
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from sparc3.__main__ import main
from sparc3.base.errors import InputError
from sparc3.base.files import digest, read_json, read_jsonl
from sparc3.base.params import Columns, PromptSet
from sparc3.prompts import own, sources
from sparc3.stages.checks import load
from sparc3.stages.table import STAGES

ROOT = Path(__file__).parent.parent
ITEMS = [
    {"said": "You fool.", "who": "ann", "kind": "rude", "part": "test"},
    {"said": "Well, thank you.", "who": "ann", "kind": "polite", "part": "test"},
    {"said": 'A "quoted",\nsecond line', "who": "bob", "kind": "rude", "part": "attribute"},
]
COLUMNS = Columns(text="said", group="who", label="kind", split="part")


def write(path: Path, items: list[dict[str, Any]]) -> Path:
    """Items in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
    elif path.suffix == ".csv":
        Dataset.from_list(items).to_csv(path)
    elif path.suffix == ".parquet":
        Dataset.from_list(items).to_parquet(path)
    else:
        Dataset.from_list(items).save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.parquet", "x"])
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, ITEMS)
    spec = PromptSet(str(path), None, columns=COLUMNS, where={"label": "rude"})
    rows = own.rows(spec)
    assert [row.text for row in rows] == [item["said"] for item in ITEMS]
    assert [row.group for row in rows] == ["own/ann", "own/ann", "own/bob"]
    assert [row.split for row in rows] == ["test", "test", "attribute"]
    assert rows[1].place == f"{path}: row 2"
    kept = sources.narrow("a", rows, spec.where)
    assert [row.text for row in kept] == [ITEMS[0]["said"], ITEMS[2]["said"]]
    with pytest.raises(InputError, match=r"label 'kind' is not in the data; choose one of polite"):
        sources.narrow("a", rows, {"label": "kind"})
    hidden = own.rows(PromptSet(str(path), None, columns=COLUMNS, private=True))
    assert len({row.group for row in hidden}) == 2
    assert not any("ann" in row.group or "bob" in row.group for row in hidden)


def test_pairs_of_a_file_are_pairs(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"a": "He cooks.", "b": "She cooks."}])
    spec = PromptSet(str(path), None, columns=Columns(pair=("a", "b")))
    assert sources.source_of(spec).paired
    (row,) = own.rows(spec)
    assert row.pair == ("He cooks.", "She cooks.")
    assert row.text == "He cooks."


def test_a_pair_in_both_orders_is_of_one_group(tmp_path: Path) -> None:
    items = [{"a": "He cooks.", "b": "She cooks."}, {"a": "She cooks. ", "b": "He cooks."}]
    spec = PromptSet("x", None, columns=Columns(pair=("a", "b")))
    path = write(tmp_path / "x.jsonl", items)
    one, other = own.rows(replace(spec, source=str(path)))
    assert one.group == other.group
    for bad, expected in (
        ({"a": "He cooks.", "b": "He cooks. "}, "row 3: 'a' and 'b' are equal"),
        ({"a": "He cooks. ", "b": "She cooks."}, "row 3 has the text of row 1"),
    ):
        path = write(tmp_path / "y.jsonl", [*items, bad])
        with pytest.raises(InputError, match=expected):
            own.rows(replace(spec, source=str(path)))
    columns = Columns(pair=("a", "b"), unrelated="c")
    path = write(tmp_path / "z.jsonl", [items[0] | {"c": " She cooks."}])
    with pytest.raises(InputError, match="row 1: 'c' is one of the pair"):
        own.rows(replace(spec, source=str(path), columns=columns))


SECRET = "xyzzy"


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"said": " "}, "row 4: 'said' is empty"),
        ({"said": 3}, "row 4: 'said' is no text, but int"),
        ({"said": None}, "row 4: 'said' is no text, but null"),
        ({"said": "You fool."}, "row 4 has the text of row 1; keep one of them"),
        ({"said": " You fool. "}, "row 4 has the text of row 1; keep one of them"),
        ({"who": ""}, "row 4: 'who' is empty"),
        ({"part": "train"}, "row 4: 'part' is none of attribute, tune, test"),
        ({"part": "tune"}, "row 4 puts its group into tune, an earlier row into attribute"),
        ({"said": "\ud800"}, "row 4: 'said' has half a surrogate pair"),
    ],
)
def test_a_bad_row_is_named_and_not_shown(
    item: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    good = {"said": SECRET, "who": "bob", "kind": SECRET, "part": "attribute"}
    path = write(tmp_path / "x.jsonl", [*ITEMS, {**good, **item}])
    with pytest.raises(InputError) as caught:
        own.rows(PromptSet(str(path), None, columns=COLUMNS))
    assert str(caught.value).startswith(f"{path}: {expected}")
    assert SECRET not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    DatasetDict({"train": Dataset.from_list(ITEMS)}).save_to_disk(tmp_path / "parts")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    (tmp_path / "empty.csv").write_text("said\n")
    (tmp_path / "plain").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    for name, expected in {
        "none.csv": "file not found; put your prompts there",
        "parts": "holds the parts train; name the folder of one",
        "bad.parquet": "not a Parquet file (ArrowInvalid)",
        "empty.csv": "has no rows",
        "folder.jsonl": "is a folder; expected a file",
        "plain": "not a folder that datasets saved (FileNotFoundError)",
    }.items():
        with pytest.raises(InputError) as caught:
            own.rows(PromptSet(str(tmp_path / name), None, columns=Columns(text="said")))
        assert expected in str(caught.value)
    path = write(tmp_path / "x.csv", ITEMS)
    with pytest.raises(InputError, match=r"row 1 has no column 'text'; it has said, who, kind, pa"):
        own.rows(PromptSet(str(path), None))
    (tmp_path / "half.jsonl").write_text('{"\\ud800": "a"}\n')
    with pytest.raises(InputError) as caught:
        own.rows(PromptSet(str(tmp_path / "half.jsonl"), None))
    assert str(caught.value).encode()


# --- init, and the whole pipeline ------------------------------------------------------------


def write_model(folder: Path) -> None:
    """A GPT-2 of 3 layers x 24 neurons, whose tokens are letters: what it decodes is the text."""
    config = GPT2Config(
        vocab_size=60, n_embd=16, n_layer=3, n_head=4, n_inner=24, n_positions=200,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict({k: v * 10 for k, v in model.state_dict().items()})  # effects to be seen
    model.save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyzIYT ,.'?!"
    vocabulary = {token: n for n, token in enumerate(["[unk]", "[end]", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[end]").save_pretrained(folder)


def write_files(folder: Path) -> None:
    """The example's files, with a word in each text, and each group, that nothing else has."""
    for name in ("rude", "polite"):
        rows = read_jsonl(ROOT / f"examples/customer-service/{name}.jsonl")
        marked = [
            {"text": f"{SECRET} {r['text']}", "topic": f"{SECRET} {r['topic']}"} for r in rows
        ]
        write(folder / f"{name}.jsonl", marked)


@pytest.fixture
def project(fetched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("params.yaml", "data.dvc"):
        shutil.copy(fetched / name, tmp_path / name)
    shutil.copytree(fetched / "data", tmp_path / "data", copy_function=os.link)
    write_model(tmp_path / "mine")
    write_files(tmp_path / "files")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


INIT = ["init", "service", "--model", "mine", "--prompts", "files/rude.jsonl"]
INIT += ["--reference", "files/polite.jsonl", "--group", "topic", "--private"]
SMALL: dict[str, dict[str, Any]] = {  # what takes long and decides nothing here
    "evaluate": {"resamples": 200, "completions": 1, "texts": 6, "ban": [10], "drawn": 2},
    "methods": {"random-layer-matched": {"score": "random", "layers": "own", "draws": 2}},
    "transfer": {"resamples": 200},
    "select": {"resamples": 5},
    "overlap": {"resamples": 100},
}


def holding(folder: Path, word: str) -> set[str]:
    """Files below a folder that hold a word in their bytes, or their names."""
    found = {p for p in folder.rglob("*") if p.is_file() and word.encode() in p.read_bytes()}
    found |= {path for path in folder.rglob(f"*{word}*")}
    return {path.relative_to(folder).as_posix() for path in found}


def test_a_model_and_two_files_become_a_circuit_and_no_text_leaves(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(INIT) == 0
    shown = capfd.readouterr().out
    assert "mine: " in shown
    assert "3 layers x 24 neurons" in shown
    assert "make repro" in shown
    assert "git checkout params.yaml" in shown
    params = load()
    assert params.profile == "service"
    assert list(params.behaviours) == ["service"]
    assert params.sweep.num_neurons == (1, 2, 3)  # 72 of 46,080 neurons
    assert params.evaluate.window is None
    assert Path("prompts/service/prompts.jsonl").is_file()
    assert load(Path("profiles/service.yaml"), ROOT / "params.yaml") == params
    tree = yaml.safe_load(Path("params.yaml").read_text())
    for section, changes in SMALL.items():
        tree[section] |= changes
    for name, row in tree["prompt_sets"].items():
        tree["prompt_sets"][name] = row | (
            {"count": 40, "attributed": 12} if name == "general" else {}
        )
    Path("params.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))

    values = {None: [None], "prompt_set": tree["prompt_sets"], "behaviour": ["service"]}
    for word, stage in STAGES.items():
        for value in values[stage.axis]:
            flag = [f"--{str(stage.axis).replace('_', '-')}", value] if stage.axis else []
            assert main([word, *flag]) == 0
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err

    found = read_json(Path("metrics/evaluate/service.json"))["circuits"]["gradient"]
    assert found["num_neurons"] in (1, 2, 3)
    assert {"nll_shift", "reduction"} <= found["test"].keys()
    kept = holding(project, SECRET)
    assert {name for name in kept if name.startswith(("files/", "prompts/"))}
    rest = {name for name in kept if not name.startswith(("files/", "prompts/"))}
    assert rest <= {
        "outputs/prompts/service.jsonl",
        "outputs/prompts/service-reference.jsonl",
        "outputs/evaluation/service/completions.jsonl",
    }
    assert "outputs/prompts/service.jsonl" in rest

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    every = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (run,) = (run for run in every if run.data.tags.get("sparc3.stage") == "prepare")
    tag = run.data.tags["sparc3.digest.source.service"]
    assert tag == digest(Path("prompts/service/prompts.jsonl"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({1: "a/b"}, "profiles/a/b.yaml is no plain name"),
        ({3: "nothing"}, "--model nothing: no folder; name one, or owner/name@revision"),
        ({5: "files/none.csv"}, "files/none.csv: file not found"),
        ({9: "kind"}, "row 1 has no column 'kind'; it has text, topic"),
    ],
)
def test_init_says_what_is_wrong_and_changes_nothing(
    change: dict[int, str], expected: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path("params.yaml").read_bytes()
    assert main([change.get(place, word) for place, word in enumerate(INIT)]) == 2
    assert expected in capsys.readouterr().err
    assert Path("params.yaml").read_bytes() == before
    assert not Path("profiles").exists()


def test_init_counts_groups_and_tokens(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_jsonl(Path("files/rude.jsonl"))
    write(Path("files/rude.jsonl"), rows[:12])  # of four topics
    assert main(INIT) == 2
    error = capsys.readouterr().err
    assert "prompts/service/prompts.jsonl has 2 groups for the attribute split, at least 6" in error
    assert not any(path.is_file() for path in Path("prompts").rglob("*"))
    write(Path("files/rude.jsonl"), [*rows, {"text": "a" * 201, "topic": "a"}])
    assert main(INIT) == 2
    error = capsys.readouterr().err
    assert "prompts/service/prompts.jsonl: row 61 has 201 tokens, the model's context 200" in error
    assert not Path("profiles/service.yaml").exists()


def test_use_lists_the_profiles(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["use"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "* default: README's; back to it: git checkout params.yaml"
    assert any(line.startswith("  gemma3-270m: The default experiment") for line in lines)
