"""Doctor: a project that lacks nothing, and each thing that can be wrong by itself."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import whole
import yaml

from sparc3.__main__ import main
from sparc3.commands import doctor, plan
from sparc3.stages.fetch import pin_text

NAMES = ["packages", "data", "model", "memory", "disk", "runs", "token", "DVC cache"]
TOKEN = "hf_a-token-that-must-not-be-seen"


@pytest.fixture
def sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that a run of the small project needs."""
    whole.write_project(tmp_path)
    shutil.copy(whole.ROOT / "requirements.txt", tmp_path)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/own.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    Path("data.dvc").write_text(pin_text(Path("data"), own=True))
    Path("model.dvc").write_text(pin_text(Path("model")))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return tmp_path


def test_a_sound_project_is_a_line_for_each_thing(
    sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"OK    {name}" for name in NAMES]
    assert TOKEN not in said.out + said.err


def edit(section: str, **values: object) -> None:
    tree = yaml.safe_load(Path("params.yaml").read_text())
    tree[section] |= values
    Path("params.yaml").write_text(yaml.safe_dump(tree))


def other_version() -> None:
    lock = Path("requirements.txt").read_text().splitlines()
    Path("requirements.txt").write_text("\n".join([*lock, "numpy==0.1", "no-such-package==1"]))


def rotten_object() -> None:
    path = Path(".dvc/cache/files/md5/ab/cdef")
    path.parent.mkdir(parents=True)
    path.write_text("x")


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "packages": (other_version, "numpy is"),
    "data": (lambda: Path("data/own.jsonl").write_text("[]\n"), "git checkout data.dvc"),
    "model": (lambda: Path("model/more.txt").write_text("x"), "is not what model.dvc pins"),
    "DVC cache": (rotten_object, "remove it, and dvc repro"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_with_its_remedy_and_the_rest_is_checked(
    sound: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, expected = WRONG[name]
    spoil()
    assert main(["doctor"]) == 2
    said = capsys.readouterr()
    (wrong,) = [line for line in said.out.splitlines() if line.startswith("MEND")]
    assert wrong.startswith(f"MEND  {name}: ")
    assert expected in wrong
    assert f"doctor: 1 of {len(NAMES)} things must be mended" in said.err


def test_what_is_still_to_come_and_what_the_machine_lacks(
    sound: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither data nor model, which the hub may not give without a token; a small machine."""
    shutil.rmtree("data")
    Path("profiles/configs").mkdir(parents=True)
    Path("model/config.json").replace("profiles/configs/name.json")
    shutil.rmtree("model")
    edit("fetch", model=None)
    edit("model", path=f"models/owner/name@{'0' * 40}")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(plan, "CPU", plan.CPU._replace(gibibytes=0.1))
    monkeypatch.setattr(doctor, "SPARE", 1e18)
    assert main(["doctor"]) == 2
    wrong = dict(re.findall(r"^MEND  (.+?): (.+)$", capsys.readouterr().out, re.M))
    assert wrong.keys() == set(NAMES) - {"packages", "DVC cache"}
    assert "run: python -m sparc3 fetch" in wrong["data"]
    assert "run: python -m sparc3 fetch" in wrong["model"]
    assert "GB on CPU, which has 0.1 GB; what would fit:" in wrong["memory"]
    assert "1000000000.0 GB needed" in wrong["disk"]
    assert wrong["runs"].startswith("MLFLOW_TRACKING_URI: http://127.0.0.1:9 cannot be used")
    assert "set it in the environment or in .env" in wrong["token"]
