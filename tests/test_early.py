"""Set-ups that a late stage stopped at, hours after the first: each is refused before attribute."""

from pathlib import Path
from typing import Any

import pytest
import small
import yaml

from sparc3.__main__ import main
from sparc3.base.errors import InputError
from sparc3.base.files import read_jsonl, write_jsonl
from sparc3.base.params import scores_of
from sparc3.stages import early
from sparc3.stages.checks import load


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """3 layers x 24 neurons, a context of 64, six groups in every test split."""
    monkeypatch.chdir(small.write_project(tmp_path))
    return tmp_path


def edit(section: str, **changes: Any) -> None:
    path = Path("params.yaml")
    tree = yaml.safe_load(path.read_text())
    tree[section] |= changes
    path.write_text(yaml.safe_dump(tree, sort_keys=False))


def refusal() -> str:
    with pytest.raises(InputError) as caught:
        early.check(load())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("section", "changes", "expected"),
    [
        ("evaluate", {"window": 2048}, "evaluate.window is 2048; expected at most 64, the model's"),
        ("evaluate", {"new_tokens": 64}, "evaluate.new_tokens is 64; expected less than 64"),
        ("evaluate", {"new_tokens": 60}, "tokens, expected at most 4: the model's context less"),
        (
            "evaluate",
            {"texts": 4},
            "prompt_sets.general has 4 texts to read, at least 6 are",
        ),
        ("evaluate", {"prompts": 5}, "talk has 5 groups of prompts for test, at least 6"),
        ("gate", {"prompts": 5}, "prompt_sets.talk has 5 groups to attribute, at least 6"),
        ("transfer", {"items": 5}, "behaviours.talk.prompts has 5 groups for transfer, at least 6"),
        ("sweep", {"num_neurons": [4, 60]}, "sweep.num_neurons asks for 60; expected at most 58"),
        ("select", {"num_neurons": 73}, "select.num_neurons asks for 73; expected at most 58"),
        ("overlap", {"num_neurons": 100}, "overlap.num_neurons asks for 100; expected at most 58"),
        ("sweep", {"texts": 1}, "prompt_sets.general: the sweep needs 2 texts"),
        ("scorers", {"profanity": {"kind": "detoxify", "path": "no"}}, "no: file not found"),
    ],
)
def test_what_failed_late_fails_first(
    project: Path, section: str, changes: dict[str, Any], expected: str
) -> None:
    early.check(load())
    edit(section, **changes)
    assert expected in refusal()


def test_the_stage_does_not_begin(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit("evaluate", texts=4)
    assert main(["attribute", "--prompt-set", "talk"]) == 2
    assert "raise evaluate.texts" in capsys.readouterr().err
    assert not Path("outputs/scores").exists()


def test_a_window_of_null_is_the_context_whatever_the_stride(project: Path) -> None:
    edit("evaluate", window=None, stride=512)
    early.check(load())


def test_what_methods_read_is_computed_and_what_is_no_control_completes(project: Path) -> None:
    tree = yaml.safe_load(Path("params.yaml").read_text())
    rows = {
        "wanda": {"score": "wanda", "contrast": "t"},
        "other": {"score": "lrp-abs@max-logit", "contrast": "auroc"},
        "top": {"score": "lrp", "contrast": "reference-only", "match": "own"},
        "noise": {"score": "random", "match": "own"},
    }
    edit("methods", **rows)
    edit("evaluate", completed=None)
    params = load()
    asked = ("lrp", "wanda", "lrp-abs@max-logit", *tree["attribute"]["scores"])
    assert scores_of(params, "talk") == asked
    assert params.evaluate.completed == ("lrp", "random", "wanda", "other")  # the control too


def test_prompts_that_share_a_group_across_files_are_refused(project: Path) -> None:
    tree = yaml.safe_load(Path("params.yaml").read_text())
    for name in small.SETS:
        tree["prompt_sets"][name]["source"] = f"prompts/{name}.jsonl"
    Path("params.yaml").write_text(yaml.safe_dump(tree))
    early.check(load())
    for name, split in (("talk", "test"), ("general", "attribute")):
        path = Path(f"outputs/prompts/{name}.jsonl")
        rows = read_jsonl(path)
        next(row for row in rows if row["split"] == split)["group"] = "own/7"
        write_jsonl(path, rows)
    assert "prompt_sets.general and prompt_sets.talk have a group, or a text, in common" in (
        refusal()
    )


FAITHFUL = {"scores": ["lrp"], "neurons": 18, "prompts": 6, "num_neurons": [2, 72]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_neurons": [2, 73]}, "faithfulness.num_neurons asks for 73; expected at most 72"),
        ({"neurons": 17}, "faithfulness.neurons is 17; expected at least 18: 6 of each third"),
        ({"prompts": 5}, "talk has 5 prompts for faithfulness, at least 6 are needed for an int"),
    ],
)
def test_what_faithfulness_could_not_measure_is_refused(
    project: Path, changes: dict[str, Any], expected: str
) -> None:
    rows = read_jsonl(Path("outputs/prompts/talk.jsonl"))
    more = [row | {"split": "tune"} for row in small.prompt_rows("more", 6, "tune")]
    write_jsonl(Path("outputs/prompts/talk.jsonl"), [*rows, *more])
    edit("faithfulness", **FAITHFUL)
    edit("faithfulness", **changes)
    early.check(load())  # nobody asks
    talk = yaml.safe_load(Path("params.yaml").read_text())["behaviours"]["talk"]
    edit("behaviours", talk=talk | {"faithfulness": True})
    assert expected in refusal()
    edit("faithfulness", **FAITHFUL)
    early.check(load())


@pytest.mark.parametrize(
    ("count", "changes", "expected"),
    [
        (40, {}, "the model's context less evaluate.new_tokens, less the prompt of steer, 40;"),
        (60, {"new_tokens": 1}, "general text is read"),
        (
            20,
            {"window": 50, "stride": 50},
            "general text is read 50 tokens at a time, and steer puts 20 in fr",
        ),
    ],
)
def test_a_prompt_of_steer_leaves_room_for_what_stands_behind_it(
    project: Path, count: int, changes: dict[str, Any], expected: str
) -> None:
    edit("evaluate", **{"window": None, "new_tokens": 20, "texts": 6} | changes)
    early.check(load())
    edit("steer", interventions={"kind": {"kind": "prompt", "text": "w1 " * count}})
    assert expected in refusal()
    edit("steer", interventions={"kind": {"kind": "prompt", "text": "w1 w2"}})
    early.check(load())


def test_questions_of_the_sweep_are_not_those_of_evaluate(project: Path) -> None:
    tree = yaml.safe_load(Path("params.yaml").read_text())
    tree["test_sets"] = {"quiz": {"source": "siqa", "count": 9}}
    tree["sweep"]["choices"] = ["quiz"]
    Path("params.yaml").write_text(yaml.safe_dump(tree))
    rows = [{**row, "choices": ["w1", "w2"]} for row in small.prompt_rows("quiz", 6, "test")]
    write_jsonl(Path("outputs/prompts/quiz.jsonl"), rows)
    early.check(load())
    read = next(
        r for r in read_jsonl(Path("outputs/prompts/general.jsonl")) if r["split"] == "test"
    )
    rows[0]["group"] = read["group"]
    write_jsonl(Path("outputs/prompts/quiz.jsonl"), rows)
    assert "sweep.choices 'quiz' and 'general', which evaluate reads, have texts in" in refusal()


def test_a_reference_that_is_the_prompts_is_refused(project: Path) -> None:
    for name in ("talk", "general"):
        path = Path(f"outputs/prompts/{name}.jsonl")
        write_jsonl(
            path, [row | {"text": f"w{n % 3} w4"} for n, row in enumerate(read_jsonl(path))]
        )
    assert "behaviours.talk: prompts and reference are the same texts" in refusal()


def test_questions_that_could_not_be_asked_are_refused(project: Path) -> None:
    tree = yaml.safe_load(Path("params.yaml").read_text())
    tree["test_sets"] = {"quiz": {"source": "piqa", "count": 9}}
    tree["evaluate"]["choices"] = ["quiz"]
    Path("params.yaml").write_text(yaml.safe_dump(tree))
    path = Path("outputs/prompts/quiz.jsonl")
    rows = [{**row, "choices": ["w1", "w2"]} for row in small.prompt_rows("quiz", 6, "test")]
    write_jsonl(path, rows)
    early.check(load())
    write_jsonl(path, rows[1:])
    assert "test_sets.quiz has 5 groups to ask, at least 6 are needed for an" in refusal()
    write_jsonl(path, [{**row, "tokens": 64} for row in rows])
    assert "test_sets.quiz: prompt quiz-test-0 has a sentence of 64 tokens, exp" in refusal()
