"""Killed anywhere, full disks, two at once, no network: on a small project, by its command line."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
from faults import Moment, files, start, statuses

from sparc3.__main__ import unraisable
from sparc3.commands.main import mend_lock

TOKEN = "hf_neverToBeSeenAnywhere"
ALONE = ("unshare", "--map-root-user", "--net")  # no network but a loopback that is down
ATTRIBUTE = [sys.executable, "-m", "sparc3", "attribute", "--prompt-set", "rude"]
MOMENTS = [
    Moment("attribute@rude", signal.SIGKILL, 0.9, wiped=True, fresh=False),
    Moment("select@bias", signal.SIGTERM, 0.8, wiped=True, fresh=False),
    Moment("evaluate@rude", signal.SIGINT, 0.7, wiped=False, fresh=False),
    Moment("prepare", signal.SIGKILL, 0.6, wiped=False, fresh=True),
    Moment("dvc gate@rude", signal.SIGINT, 0.7, wiped=False, fresh=False),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project in which everything has been run; and its files."""
    folder = tmp_path_factory.mktemp("faults") / "project"
    faults.write_project(folder)
    faults.run_all(folder)
    return folder, files(folder)


@pytest.mark.parametrize("moment", MOMENTS, ids=[f"{m.name} {m.number.name}" for m in MOMENTS])
def test_a_kill_leaves_nothing_behind_and_the_same_files(project, moment):
    folder, expected = project
    command = faults.commands(faults.load(folder / "params.yaml"))[moment.name]
    usual = faults.undisturbed(folder, command)
    assert files(folder) == expected
    assert faults.faults_of(folder, moment, command, usual, expected) == []


def test_the_second_of_two_equal_stages_waits_and_says_for_whom(project):
    folder, expected = project
    shutil.rmtree(folder / "outputs/scores/rude")
    first = start(folder, ATTRIBUTE)
    lock = folder / "outputs/partial/attribute@rude.lock"
    while not (
        lock.exists() and lock.read_text() == f"process {first.pid} on {socket.gethostname()}"
    ):
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)
    second = start(folder, ATTRIBUTE)
    assert second.stdout is not None
    said = second.stdout.readline()
    first.send_signal(signal.SIGCONT)
    waited = f"attribute@rude: waiting for process {first.pid} on {socket.gethostname()}, which"
    assert said.startswith(waited)
    for process in (first, second):
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
        assert "waiting" not in said
    assert files(folder) == expected
    assert statuses(folder)["RUNNING"] == 0


def test_two_pipelines_at_once_leave_what_one_does(project):
    """DVC lets one of them write; the other waits for it, or says that it is held by another."""
    folder, expected = project
    command = ["dvc", "repro", "-s", "-f", "differential@rude"]
    both = [start(folder, command) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    codes = [process.returncode for process in both]
    assert 0 in codes, said
    for code, text in zip(codes, said, strict=True):
        assert "Traceback" not in text
        assert code == 0 or "lock" in text, text
    assert (
        subprocess.run(command, cwd=folder, env=faults.environment(), check=False).returncode == 0
    )
    assert files(folder) == expected
    assert statuses(folder)["RUNNING"] == 0


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.97])
def test_a_lock_file_that_dvc_left_half_written_is_put_back(tmp_path, monkeypatch, caplog, share):
    monkeypatch.chdir(tmp_path)
    whole = (faults.whole.ROOT / "dvc.lock").read_text()
    lines = whole.splitlines(keepends=True)
    half = "".join(lines[: round(share * len(lines))]).rstrip() + "\n      md"
    for command in (["git", "init", "-q"], ["git", "add", "-A"], ["git", "commit", "-qm", "x"]):
        Path("dvc.lock").write_text(whole)
        identity = {"GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t", "GIT_COMMITTER_NAME": "t"}
        environment = {**faults.environment(), **identity, "GIT_COMMITTER_EMAIL": "t"}
        subprocess.run(command, env=environment, check=True)
    mend_lock()
    assert caplog.text == ""
    Path("dvc.lock").write_text(half)
    mend_lock()
    assert Path("dvc.lock").read_text() == whole
    assert "git's is put back" in caplog.text
    shutil.rmtree(".git")
    Path("dvc.lock").write_text(half)
    mend_lock()
    assert not Path("dvc.lock").exists()


def tmpfs(folder: Path, options: str) -> None:
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    subprocess.run(command, check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
@pytest.mark.parametrize(
    ("place", "problem"),
    [("full", "No space left on device"), ("read-only", "Read-only file system")],
)
@pytest.mark.parametrize(("word", "product"), [("prepare", "outputs"), ("export", "there")])
def test_a_place_that_takes_nothing_is_one_line(project, tmp_path, place, problem, word, product):
    """What the stage reads is a copy; where it writes is a disk of its own."""
    folder = tmp_path / "project"
    shutil.copytree(project[0], folder, symlinks=True)
    kept = folder / product
    if kept.exists():
        kept.rename(tmp_path / "kept")
    command = faults.commands(faults.load(folder / "params.yaml"))[word]
    if word == "export":
        command = [*command[:-1], "there/out"]
    tmpfs(kept, "size=16m")
    try:
        if (tmp_path / "kept").exists():
            shutil.copytree(tmp_path / "kept", kept, dirs_exist_ok=True)
        if place == "full":
            with pytest.raises(OSError, match=problem), (kept / "filler").open("wb") as stream:
                while True:
                    stream.write(bytes(1 << 16))
                    stream.flush()
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(kept)], check=True)
        before = files(folder)
        process = start(folder, command)
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 2, said
        assert said.splitlines()[-1].startswith("sparc3: error: "), said
        assert problem in said.splitlines()[-1]
        assert "Traceback" not in said
        assert files(folder) == before
    finally:
        subprocess.run(["umount", str(kept)], check=True)


def test_everything_after_fetch_runs_without_a_network_and_shows_no_token(project, tmp_path):
    """In a network namespace of its own; HF_TOKEN, given in .env, is in no file and no line."""
    if subprocess.run([*ALONE, "true"], check=False).returncode:
        pytest.skip("this machine gives no network namespace")
    folder, expected = tmp_path / "project", project[1]
    shutil.copytree(project[0], folder, symlinks=True)
    (folder / ".env").write_text(f"HF_TOKEN={TOKEN}\n")
    lines = faults.commands(faults.load(folder / "params.yaml"))
    words = ["prepare", "attribute@rude", "gate@rude", "differential@rude", "sweep@rude"]
    words += ["select@rude", "evaluate@rude", "transfer", "overlap", "report", "export"]
    for name in ("rude", "mlruns"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "mlflow.db").unlink(missing_ok=True)
    for word in words:
        process = start(folder, [*ALONE, *lines[word]])
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
        assert TOKEN not in said
    assert {n: d for n, d in files(folder).items() if n != ".env"} == expected
    seen = [p for p in folder.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert seen == [folder / ".env"]
    found = statuses(folder)
    assert {*found} == {"FINISHED"}
    assert found["FINISHED"] > len(words) - 1  # export has no run; the comparison has several


@pytest.mark.parametrize(
    ("error", "said"), [(KeyboardInterrupt, False), (SystemExit, False), (ValueError, True)]
)
def test_a_signal_while_a_library_cleans_up_is_no_traceback(
    error: type[BaseException],
    said: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Python goes on after what is raised there, and would only say so."""

    class Closing:
        def __del__(self) -> None:
            raise error

    monkeypatch.setattr(sys, "unraisablehook", unraisable)
    Closing()
    assert ("Traceback" in capsys.readouterr().err) == said
