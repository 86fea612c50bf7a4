"""Metrics of a fresh run against those that git has, in a scratch repository."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sparc3.__main__ import main
from sparc3.base.errors import InputError
from sparc3.commands import committed

METRICS: dict[str, Any] = {
    "transfer": {"a": {"b": {"value": 12.5, "p": 0.0}}},
    "gate/a": {"passed": 1.0, "layers": [1, 2, 3]},
}


def write(folder: Path, metrics: dict[str, Any]) -> None:
    for name, tree in metrics.items():
        path = folder / "metrics" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tree))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder below a repository's top, with METRICS committed."""
    folder = tmp_path / "project"
    write(folder, METRICS)
    (folder / "metrics/table.md").write_text("| a |\n")
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True)
    monkeypatch.chdir(folder)
    return folder


def test_equal_metrics_are_one_line_and_rounding_is_no_difference(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["committed"]) == 0
    write(repository, {"transfer": {"a": {"b": {"value": 12.5000001, "p": 1e-9}}}})
    committed.run()
    assert capsys.readouterr().out == "metrics equal those committed (2 files)\n" * 2


def test_what_differs_is_named_with_both_values(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(
        repository,
        {
            "transfer": {"a": {"b": {"value": -12.5, "low": 1.0}}},
            "gate/a": {"passed": 1.0, "layers": [1, 2, 4]},
            "gate/new": {"passed": 0.0},
        },
    )
    committed.run()
    assert capsys.readouterr().out.splitlines() == [
        "metrics differ from those committed in 5 places:",
        "  metrics/gate/a.json/layers[2]: 3 committed, 4 now",
        '  metrics/gate/new.json: nothing committed, {"passed": 0.0} now',
        "  metrics/transfer.json/a/b/low: nothing committed, 1.0 now",
        "  metrics/transfer.json/a/b/p: 0.0 committed, nothing now",
        "  metrics/transfer.json/a/b/value: 12.5 committed, -12.5 now",
    ]


def test_many_differences_are_counted_and_the_first_shown(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository / "metrics/gate/a.json").unlink()
    write(repository, {f"gate/{n}": {"passed": n} for n in range(9)})
    committed.run()
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "metrics differ from those committed in 10 places:"
    assert len(lines) == committed.SHOWN


def test_without_a_commit_of_metrics_there_is_nothing_to_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="run it in a git checkout"):
        committed.run()
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    for command in (["init", "-q"], ["commit", "-qm", "start", "--allow-empty"]):
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True)
    with pytest.raises(InputError, match="no metrics to compare with"):
        committed.run()
