"""Shared fixtures: the real embedded model and data, and a small project with them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """torch has one thread at the start of each test, as torchrun gives its processes: what a test
    or its model's `threads` set leads nowhere else, for another number rounds otherwise.
    """
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout, with data/ and models/ in place, and no run more in its store."""
    store = tmp_path_factory.mktemp("store") / "mlflow.db"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{store}"}
    command = [sys.executable, "-m", "sparc3", "fetch"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return ROOT


@pytest.fixture(scope="session")
def project(fetched: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of its own with the project's tracked files, the data and the model, and one
    thread: two test files at a time share two cores.
    """
    folder = tmp_path_factory.mktemp("project")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=fetched, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if not name.startswith(("tests/", "metrics/")) and (fetched / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(fetched / name, folder / name)
    params = (folder / "params.yaml").read_text()
    assert "  threads: 2 " in params
    (folder / "params.yaml").write_text(params.replace("  threads: 2 ", "  threads: 1 "))
    (folder / "dvc.lock").unlink(missing_ok=True)
    for name in ("data", "models"):
        shutil.copytree(
            fetched / name,
            folder / name,
            copy_function=os.link,
            ignore=shutil.ignore_patterns("*.dvc", ".gitignore"),  # tracked, so there already
            dirs_exist_ok=True,
        )
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
        subprocess.run(["git", *identity, *command], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small project of whole.py after every stage; who changes it takes a copy."""
    import whole  # here: it needs torch

    folder = tmp_path_factory.mktemp("whole")
    whole.write_project(folder)
    whole.run(folder)
    return folder


@pytest.fixture(scope="session")
def run_in() -> Command:
    """run_in(folder, *command): runs it with this environment's programs, output captured."""

    def run(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        return subprocess.run(
            command,
            cwd=folder,
            env=environment | variables,
            capture_output=True,
            text=True,
            check=False,
        )

    return run
