"""The same inputs give the same circuits, by one thread or two, and the bytes that were frozen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from sparc3.base.files import digest
from sparc3.circuits.ablate import prune_weights
from sparc3.circuits.circuit import Circuit

EXPORTS = json.loads((Path(__file__).parent / "exports.json").read_text())
RUN = """
import sys, torch, whole, yaml
from pathlib import Path
torch.set_num_threads(int(sys.argv[2]))
folder, wanted = Path(sys.argv[1]), yaml.safe_load(sys.argv[3])
whole.PARAMS["model"] |= {"threads": wanted}
whole.write_project(folder)
whole.run(folder, "bias")
(folder / "threads").write_text(str(torch.get_num_threads()))
"""


def exported(family: str, folder: Path) -> str:
    """sha256 of the weights of a model, every one of them a known number, without four neurons."""
    model = tiny.model(family)
    with torch.no_grad():
        for place, weight in enumerate(model.parameters()):
            numbers = torch.arange(place, place + weight.numel(), dtype=torch.float32) % 97 / 97
            weight.copy_(numbers.reshape(weight.shape) - 0.5)
    scales = np.array([0, 0, 0.25, 0])
    circuit = Circuit(np.array([0, 0, 1, 1]), np.array([1, 5, 0, 7]), np.zeros(4), scales)
    prune_weights(model, circuit)
    model.save_pretrained(folder)
    return digest(folder / "model.safetensors")


@pytest.mark.parametrize("family", EXPORTS)
def test_an_export_has_the_bytes_that_it_had(family: str, tmp_path: Path) -> None:
    assert exported(family, tmp_path) == EXPORTS[family]


def test_every_family_has_frozen_bytes() -> None:
    assert set(EXPORTS) == set(tiny.CONFIGS)


def run(folder: Path, threads: int, wanted: int | None = None) -> dict[str, str]:
    """Digest of every file that a small pipeline makes where torch finds so many threads, and its
    params want others.
    """
    path = os.pathsep.join(["tests", *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", RUN, str(folder), str(threads), json.dumps(wanted)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    made = [p for top in ("outputs", "metrics") for p in (folder / top).rglob("*") if p.is_file()]
    return {path.relative_to(folder).as_posix(): digest(path) for path in made}


def test_one_thread_and_two_choose_the_same_circuits(tmp_path: Path) -> None:
    """That two equal runs give equal bytes, test_faults sees."""
    once, two = (run(tmp_path / str(threads), threads) for threads in (1, 2))
    # With a number in params what torch finds does not count.
    assert run(tmp_path / "params", 2, wanted=1) == once != two
    assert [(tmp_path / n / "threads").read_text() for n in ("1", "2", "params")] == ["1", "2", "1"]
    assert len(once) > 50
    assert once.keys() == two.keys()
    neurons = {}
    for number in (1, 2):
        circuits = sorted((tmp_path / str(number) / "outputs/circuits").rglob("*.csv"))
        neurons[number] = [
            [line.split(",")[:2] for line in path.read_text().splitlines()] for path in circuits
        ]
    assert neurons[1] == neurons[2]
