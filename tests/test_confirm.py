"""The sealed sets are read once for a release, at a commit, behaviour by behaviour."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from sparc3.base.errors import InputError
from sparc3.base.files import read_json
from sparc3.stages import confirm
from sparc3.stages.checks import load

ROOT = Path(__file__).parent.parent
GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@b")


def git(*words: str) -> None:
    subprocess.run([*GIT, *words], check=True, capture_output=True)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A checkout, and the behaviours that are measured; what that takes is evaluate's own test."""
    monkeypatch.chdir(tmp_path)
    for name in ("params.yaml", "pyproject.toml"):
        Path(name).write_text((ROOT / name).read_text())
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    names: list[str] = []

    def measured(params: Any, behaviour: str) -> dict[str, Any]:
        names.append(behaviour)
        if behaviour == "race" and names.count("race") == 1:
            raise KeyboardInterrupt
        return {"circuits": {"lrp": {"test": {"margin": {"value": 1.0}, "values": {}}}}}

    monkeypatch.setattr(confirm, "measured", measured)
    return names


def test_one_that_was_killed_goes_on_and_a_release_is_read_once(asked: list[str]) -> None:
    params = load()
    with pytest.raises(KeyboardInterrupt):
        confirm.run(params)
    assert read_json(confirm.RECORD)["behaviours"].keys() == {"toxicity", "gender"}
    git("add", ".")  # the record is no change of what was frozen
    scalars = confirm.run(params)
    assert asked == ["toxicity", "gender", "race", "race"]
    assert scalars == {f"{name}.lrp.margin": 1.0 for name in ("toxicity", "gender", "race")}
    with pytest.raises(InputError, match=r"were read for 0\.2\.0; raise the version"):
        confirm.run(params)


def test_what_is_not_committed_or_begun_elsewhere_is_refused(asked: list[str]) -> None:
    params = load()
    with pytest.raises(KeyboardInterrupt):
        confirm.run(params)
    Path("pyproject.toml").write_text(Path("pyproject.toml").read_text() + "\n")
    with pytest.raises(InputError, match="not a clean commit; commit first"):
        confirm.run(params)
    git("commit", "-qam", "two")
    with pytest.raises(InputError, match="raise the version"):
        confirm.run(params)
    text = Path("pyproject.toml").read_text().replace('version = "0.2.0"', 'version = "0.3.0"')
    Path("pyproject.toml").write_text(text)
    git("commit", "-qam", "three")
    confirm.run(params)
    assert read_json(confirm.RECORD)["release"] == "0.3.0"
    assert asked[3:] == ["toxicity", "gender", "race"]
