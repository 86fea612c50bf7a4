"""Faults on purpose: commands of a small project are killed at random moments and run again.

    PYTHONPATH=.:tests python -m faults --moments 30 --seed 0        (make faults)

A moment is one command (a stage, fetch, export, or a stage by DVC), one of SIGKILL, SIGTERM and
Ctrl-C, and a time within what the command takes. In half of them its products are wiped out
before, in some MLflow's database. Then it is run again, undisturbed, and nothing may tell that it
was ever killed. Counts are printed, by signal, and the process ends with 1 where there is a fault.
"""

import argparse
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import raw
import whole
import yaml

from sparc3.base.artifacts import model_digest
from sparc3.base.files import digest, write_jsonl
from sparc3.base.params import Params
from sparc3.commands.main import mend_lock
from sparc3.commands.stage import produce
from sparc3.measure.instruments import completions
from sparc3.stages.checks import load
from sparc3.stages.fetch import pin_text
from sparc3.stages.table import STAGES, axis_flag

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PATIENCE = 300.0  # seconds for a command that takes a few: longer is stuck
ENDING = 20.0  # seconds that a process may take to end by itself
OURS = re.compile(r"MLFLOW_|DVC_|SPARC3_|HF_|GIT_|PYTEST_|COV_|RANK$|WORLD_SIZE$")
KEPT = re.compile(
    r"mlflow\.db|mlruns/|\.dvc/|\.git/|\.dvcignore|(.*/)?\.gitignore|dvc\.lock|.*__pycache__"
    r"|outputs/partial/[^/]*\.lock$"
)


# --- the project ---------------------------------------------------------------------------------


def write_project(folder: Path) -> None:
    """`whole`'s project with raw data, so that prepare has work too, and DVC; nothing is run."""
    whole.write_project(folder)
    shutil.rmtree(folder / "outputs")
    (folder / "data").mkdir()
    with patch.object(raw, "WORDS", [*whole.PLAIN, *whole.RUDE]):
        raw.write_data(folder / "data")
    kinds = {"bias": "race", "general-pairs": "profession"}
    items = [raw.stereoset_item(k, f"{k} {n % 24}", n) for k in kinds.values() for n in range(48)]
    write_jsonl(folder / "data/stereoset.jsonl", items)
    (folder / "data.dvc").write_text(pin_text(folder / "data", own=True))
    tree = yaml.safe_load((folder / "params.yaml").read_text())
    tree["fetch"] = {"model": None}
    tree["model"]["threads"] = 1  # the first run is made by this process, the others are not
    for name, spec in tree["prompt_sets"].items():
        pairs = {"count": 40, "where": {"bias_type": kinds.get(name)}}
        spec |= pairs if name in kinds else {"count": 20, "max_tokens": 12}
    tree["gate"]["prompts"], tree["select"]["budget"]["perplexity"] = 40, 99
    tree["behaviours"]["bias"]["second"] = None
    (folder / "params.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    shutil.copytree(whole.ROOT / "sparc3", folder / "sparc3")
    (folder / "prompts").mkdir()  # of one's own: none
    for name in ("dvc.yaml", "requirements.txt"):
        shutil.copy(whole.ROOT / name, folder)
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"]):
        subprocess.run(command, cwd=folder, env=environment(), check=True)


def run_all(folder: Path) -> None:
    """Every stage and the exports, in this process."""
    with whole.inside(folder):
        produce(load(), "prepare", {}, model_digest(Path("model")))
    whole.run(folder, most=completions.MOST)


def environment(**more: str) -> dict[str, str]:
    """This process's, without what leads elsewhere."""
    kept = {name: value for name, value in os.environ.items() if not OURS.match(name)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    settings = {"DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": os.devnull, "OMP_NUM_THREADS": "1"}
    return {**kept, **settings, "PATH": path, **more}


def commands(params: Params) -> dict[str, list[str]]:
    """Name -> command line of every stage, of fetch, export, and of stages by DVC."""
    python = [sys.executable, "-m", "sparc3"]
    found = {"fetch": [*python, "fetch"]}
    for word, stage in STAGES.items():
        for value in getattr(params, f"{stage.axis}s") if stage.axis else [None]:
            axis = [axis_flag(stage), value] if value else []
            found["@".join([word, *axis[1:]])] = [*python, word, *axis]
    by_dvc = {f"dvc {name}": ["dvc", "repro", "-q", "-s", "-f", name] for name in [*found][1:]}
    export = [*python, "export", "--behaviour", "rude", "--method", "lrp", "--folder", "rude"]
    return found | {"export": export} | by_dvc


# --- what is there -------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, str]:
    """Digest of every file by its path, but for what differs from run to run."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: digest(path) for name, path in found.items() if not KEPT.match(name)}


def statuses(folder: Path) -> Counter[str]:
    """How many of MLflow's runs are in what state."""
    with closing(sqlite3.connect(folder / "mlflow.db", timeout=60)) as connection:
        return Counter(status for (status,) in connection.execute("select status from runs"))


def alive(session: int) -> list[str]:
    """Command lines of the processes of a session that have not ended."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append((entry / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


# --- killing -------------------------------------------------------------------------------------


class Undisturbed(NamedTuple):
    """What a command takes, and the files that it writes."""

    seconds: float
    products: list[str]


class Moment(NamedTuple):
    """One kill."""

    name: str
    number: signal.Signals
    share: float  # of the command's time
    wiped: bool
    fresh: bool  # without MLflow's database


def moments(params: Params, number: int, seed: int) -> Iterator[Moment]:
    """`number` of them, each signal as often as another and no command twice before all had one."""
    draw, names = random.Random(seed), list(commands(params))
    left: list[str] = []
    for n in range(number):
        left = left or draw.sample(names, len(names))
        wiped, fresh = draw.random() < 0.5, draw.random() < 0.2
        yield Moment(left.pop(), SIGNALS[n % 3], draw.random(), wiped, fresh)


def start(folder: Path, command: list[str]) -> subprocess.Popen[str]:
    """A command in a session of its own, in which Ctrl-C is not ignored."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def undisturbed(folder: Path, command: list[str]) -> Undisturbed:
    """Run a command as it is; its products are what is newer afterwards."""
    if command[-2:-1] == ["--folder"]:
        shutil.rmtree(folder / command[-1], ignore_errors=True)
    before = {name: (folder / name).stat().st_mtime_ns for name in files(folder)}
    begun = time.monotonic()
    process = start(folder, command)
    said = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, said
    seconds = time.monotonic() - begun
    after = {name: (folder / name).stat().st_mtime_ns for name in files(folder)}
    return Undisturbed(seconds, [name for name in after if after[name] != before.get(name)])


def killed(folder: Path, command: list[str], moment: Moment, seconds: float) -> list[str]:
    """Start a command and kill it; what is wrong with how it ends. Ctrl-C, and whatever ends DVC,
    goes to all processes of the terminal.
    """
    process = start(folder, command)
    together = moment.number == signal.SIGINT or command[0] == "dvc"
    faults = []
    try:
        said = process.communicate(timeout=moment.share * seconds)[0]
    except subprocess.TimeoutExpired:
        (os.killpg if together else os.kill)(process.pid, moment.number)
        process.wait(PATIENCE)
        patience = time.monotonic() + ENDING  # for a child that ends by itself
        while alive(process.pid) and time.monotonic() < patience:
            time.sleep(0.1)
        faults += [f"left alone: {line}" for line in alive(process.pid)]
        said = process.communicate(timeout=PATIENCE)[0]
    expected = (0, -moment.number, 128 + moment.number)
    if process.returncode not in expected and command[0] != "dvc":
        faults.append(f"ended with {process.returncode}")
    if "Traceback" in said:
        faults.append(f"traceback:\n{said}")
    return faults


def compared(found: Mapping[str, str], expected: Mapping[str, str], whole: bool) -> list[str]:
    """What differs from an undisturbed run's files; unless `whole`, only what is visible counts."""
    faults = [f"differs: {n}" for n in found if found[n] != expected.get(n, found[n])]
    if whole:
        faults += [f"missing: {name}" for name in expected if name not in found]
        faults += [f"left: {name}" for name in found if name not in expected]
    return faults


def faults_of(
    folder: Path, moment: Moment, command: list[str], usual: Undisturbed, expected: dict[str, str]
) -> list[str]:
    """Kill a command once, run it again, and say what is not as if nothing had happened."""
    for name in usual.products if moment.wiped or moment.name == "export" else ():
        (folder / name).unlink()
    if moment.fresh:
        shutil.rmtree(folder / "mlruns")
        (folder / "mlflow.db").unlink()
    found = killed(folder, command, moment, usual.seconds)
    found += compared(files(folder), expected, whole=False)
    again = [command, commands(load(folder / "params.yaml"))["gate@rude"]]  # export has no run
    if moment.name == "export" and (folder / "rude").exists() and any((folder / "rude").iterdir()):
        again = again[1:]
    for line in again:
        with whole.inside(folder):
            mend_lock()  # as `main` does
        process = start(folder, line)
        try:
            said = process.communicate(timeout=PATIENCE)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            return [*found, "stuck: a person is needed"]
        if process.returncode:
            found.append(f"run again, it ends with {process.returncode}:\n{said}")
    found += compared(files(folder), expected, whole=True)
    if running := statuses(folder)["RUNNING"]:
        found.append(f"{running} runs are left RUNNING")
    return found


def tried(folder: Path, number: int, seed: int) -> dict[Moment, list[str]]:
    """Every moment, and its faults; `folder` becomes the project."""
    write_project(folder)
    run_all(folder)
    params = load(folder / "params.yaml")
    lines, expected, usual = commands(params), files(folder), {}
    found = {}
    for moment in moments(params, number, seed):
        command = lines[moment.name]
        if moment.name not in usual:
            usual[moment.name] = undisturbed(folder, command)
            changed = compared(files(folder), expected, whole=True)
            assert not changed, f"{moment.name} is not the same twice: {changed}"
        found[moment] = faults_of(folder, moment, command, usual[moment.name], expected)
        print(f"{moment}: {'; '.join(found[moment]) or 'no fault'}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="faults", description=__doc__)
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sparc3-faults-") as name:
        found = tried(Path(name), options.moments, options.seed)
    for number in SIGNALS:
        faults = [lines for moment, lines in found.items() if moment.number == number]
        print(f"{number.name}: {len(faults)} moments, {sum(map(bool, faults))} with a fault")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
