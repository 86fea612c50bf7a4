"""How the stages that only read files, and DVC, stand hundreds of behaviours and ten methods.

    PYTHONPATH=tests python -m benchmarks.load

The small project of the tests, run once; then its behaviour under many names: what a model would
measure is copied, all else is computed. Seconds are of a stage for all behaviours, memory is the
peak of the process so far. Every number of behaviours has a process of its own.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import whole
import yaml

from benchmarks.generation import machine
from sparc3.base.artifacts import model_digest
from sparc3.base.files import read_json, write_json
from sparc3.base.params import Params
from sparc3.base.products import write_manifest
from sparc3.commands import stage
from sparc3.stages.checks import load
from sparc3.stages.table import STAGES, made

BEHAVIOURS = (10, 30, 100, 300)
METHODS = 10
FIRST, SECOND = "b0", "bias"


def many(count: int) -> Params:
    """`count` behaviours that are the project's first, and its second; METHODS methods."""
    path = Path("params.yaml")
    tree = yaml.safe_load(path.read_text())
    rude, bias = tree["behaviours"].values()
    tree["behaviours"] = {**{f"b{n}": rude for n in range(count)}, SECOND: bias}
    for n in range(METHODS - len(tree["methods"])):
        tree["methods"][f"t{n}"] = {"score": "lrp", "contrast": "t", "match": "own"}
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return load()


def copied(word: str, names: list[str]) -> None:
    """What a stage made of FIRST, as that of all others."""
    for name in names[1:]:
        for source, target in zip(made(word, FIRST), made(word, name), strict=False):
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
        for source in made(word, FIRST):
            if source.is_file():
                shutil.copy(source, source.with_stem(name))
        write_manifest(word, name, made(word, name), {})


def measure(count: int) -> None:
    """Print a line for each stage."""
    params, model = many(count), model_digest(Path("model"))
    names = [f"b{n}" for n in range(count)]

    def timed(word: str, values: list[str] | None) -> None:
        start = time.perf_counter()
        for value in values or [""]:
            stage.produce(params, word, {"behaviour": value} if values else {}, model)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{count:10d}  {word:12}  {seconds:7.1f}  {1000 * seconds / count:8.0f}  {peak:7.2f}")

    def measured(word: str) -> None:
        for name in (FIRST, SECOND):
            stage.produce(params, word, {"behaviour": name}, model)
        copied(word, names)

    timed("gate", [*names, SECOND])
    timed("differential", [*names, SECOND])
    measured("sweep")
    timed("select", [*names, SECOND])
    measured("evaluate")
    timed("overlap", None)
    transfer = read_json(Path("metrics/transfer.json"))
    row = {name: transfer["rude"]["rude"] for name in names} | transfer["rude"]
    write_json(Path("metrics/transfer.json"), {name: row for name in [*names, SECOND]})
    write_manifest("transfer", None, made("transfer", None), {})
    timed("report", None)


def status(count: int) -> None:
    """DVC's own time to look through the pipeline of so many behaviours."""
    for name in ("dvc.yaml", "requirements.txt"):
        shutil.copy(whole.ROOT / name, ".")
    shutil.copytree(whole.ROOT / "sparc3", "sparc3")
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"]):
        subprocess.run(command, check=True)
    start = time.perf_counter()
    subprocess.run(["dvc", "status", "-q"], check=False)
    stages = len(STAGES) * count
    print(f"{count:10d}  dvc status    {time.perf_counter() - start:7.1f}  ({stages} stages or so)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    if count := parser.parse_args().alone:
        measure(count)
        status(count)
        return
    print(f"{machine()}, {METHODS} methods\n")
    print(
        f"{'behaviours':10}  {'stage':12}  {'seconds':>7}  {'ms each':>8}  {'peak GB':>7}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first"
        whole.write_project(first)
        whole.run(first)
        path = os.pathsep.join(str(whole.ROOT / name) for name in (".", "tests"))
        for count in BEHAVIOURS:
            place = Path(folder) / str(count)
            shutil.copytree(first, place)
            command = [sys.executable, "-m", "benchmarks.load", "--alone", str(count)]
            subprocess.run(command, cwd=place, env=os.environ | {"PYTHONPATH": path}, check=True)


if __name__ == "__main__":
    main()
