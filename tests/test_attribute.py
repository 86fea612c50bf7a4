"""Attribution of a prompt set: which score of which target is stored under which name."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import yaml

from sparc3.__main__ import main
from sparc3.base import params as parameters
from sparc3.base.artifacts import read_prompts, read_scores
from sparc3.base.errors import InputError
from sparc3.base.files import read_jsonl, write_jsonl
from sparc3.model import loading
from sparc3.relevance.attribution import Prompt, score
from sparc3.stages import attribute, checks
from sparc3.stages.attribute import by_target


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(small.write_project(tmp_path / "project"))
    return Path.cwd()


def with_set(folder: Path, scores: list[str], **changes: Any) -> parameters.Params:
    tree = yaml.safe_load((folder / "params.yaml").read_text())
    tree["prompt_sets"]["talk"] |= {"scores": scores, **changes}
    (folder / "params.yaml").write_text(yaml.safe_dump(tree))
    return checks.load()


def test_names_by_target() -> None:
    names = ["lrp", "lrp-abs@max-logit", "gradient", "wanda@max-logit"]
    assert by_target(names, "pair") == {
        "pair": {"lrp": "lrp", "gradient": "gradient"},
        "max-logit": {"lrp-abs@max-logit": "lrp-abs", "wanda@max-logit": "wanda"},
    }
    assert list(by_target(["lrp@likelihood", "lrp@max-logit"], "max-logit")) == [
        "likelihood",
        "max-logit",
    ]


def test_each_name_holds_the_score_of_its_target(project: Path) -> None:
    path = project / "outputs/prompts/talk.jsonl"
    write_jsonl(path, [{**r, "pair": [r["text"], "w5 w6 w7 w8"]} for r in read_jsonl(path)])
    names = ["lrp", "lrp@max-logit", "lrp-abs@likelihood", "activation"]
    params = with_set(project, names, target="pair", source="stereoset")
    tokenizer = loading.tokenizer(params.model)
    tokenizer.eos_token = "w0"  # what stands in front of a pair's sentences
    tokenizer.save_pretrained(params.model.path)
    attribute.run(params, "talk")
    model = loading.load(params.model)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    rows = read_prompts("talk", "attribute")
    assert len(rows) == small.SETS["talk"]
    for name, target in zip(names, ("pair", "max-logit", "likelihood", "pair"), strict=True):
        stored_ids, stored = read_scores("talk", name)
        assert stored_ids == [row["id"] for row in rows]
        score_name = name.partition("@")[0]
        for row, values in zip(rows, stored, strict=True):
            texts = row["pair"] if target == "pair" else [row["text"]]
            front = [0] if target == "pair" else []
            prompt = Prompt(row["id"], tuple([*front, *ids(text)] for text in texts))
            (alone,) = score(model, [[prompt]], [score_name], target=target)
            np.testing.assert_allclose(values, alone[score_name][0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["magic", "lrp@magic", "magic@pair", "@pair"])
def test_an_unknown_score_or_target_is_named(project: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"prompt_sets.talk.scores names '{name}'.*@likelihood"):
        with_set(project, [name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"new_tokens": 61},
            r"prompt_sets\.talk: prompt talk-test-0 has 4 tokens, expected at most 3",
        ),
        ({"prompts": 5}, r"behaviours\.talk\.prompts: talk has 5 groups of prompts for test, at "),
    ],
)
def test_what_would_stop_the_evaluation_stops_attribution(
    project: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    tree = yaml.safe_load((project / "params.yaml").read_text())
    tree["evaluate"] |= changes
    (project / "params.yaml").write_text(yaml.safe_dump(tree))
    assert main(["attribute", "--prompt-set", "general"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not Path("outputs/scores").exists()


def test_without_lxt_only_lrp_is_missing(project: Path) -> None:
    code = (
        "import sys; sys.modules['lxt'] = None\n"
        "import importlib.metadata as installed; own = installed.version\n"
        "installed.version = lambda name: own(name if name != 'lxt' else 'no-such-package')\n"
        "from sparc3.__main__ import main\n"
        "sys.exit(main(['attribute', '--prompt-set', 'general']))"
    )
    root = Path(attribute.__file__).parents[2]

    def run(scores: list[str]) -> subprocess.CompletedProcess[str]:
        tree = yaml.safe_load((project / "params.yaml").read_text())
        tree["attribute"]["scores"] = scores
        tree["differential"]["importance"] = scores[0]
        tree["methods"] = {
            **{score: {"score": score, "contrast": "t"} for score in scores},
            "random": {"score": "random"},
        }
        tree["behaviours"]["talk"]["method"] = tree["gate"]["score"] = scores[0]
        tree["overlap"]["method"] = tree["report"]["method"] = scores[0]
        tree["evaluate"] |= {"completed": scores, "in_sample": scores}
        (project / "params.yaml").write_text(yaml.safe_dump(tree))
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=project,
            env={**os.environ, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=False,
        )

    done = run(["gradient", "activation"])
    assert done.returncode == 0, done.stderr
    done = run(["lrp"])
    assert done.returncode == 2
    assert (
        "lrp and its variants need the package lxt, which is not installed; install it by: python"
        in done.stderr
    )
    assert "Traceback" not in done.stderr
