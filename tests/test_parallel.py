"""Attribution over processes: the same bits whatever their number, and nothing lost or hung."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import small
import torch

from sparc3.base import parallel
from sparc3.base import params as parameters
from sparc3.base.artifacts import read_prompts, scores_folder
from sparc3.base.errors import InputError
from sparc3.base.files import write_json
from sparc3.base.parallel import Place
from sparc3.model import loading
from sparc3.stages import attribute, checks

ROOT = Path(__file__).parent.parent
BOUND = 240  # seconds after which a process counts as hung, on a machine with much else to do

# `world` processes of one job, forked when the imports are done; fails if one of them fails.
FORKED = """
import os, sys
from pathlib import Path
from sparc3.stages import attribute, checks
world, prompt_set = int(sys.argv[1]), sys.argv[2]
ranks = []
for rank in range(world):
    child = os.fork()
    if child == 0:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
        attribute.run(checks.load(Path("params.yaml")), prompt_set)
        os._exit(0)
    ranks.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in ranks))
"""

# Killed by SIGKILL as soon as it has begun to write its second shard.
KILLED = """
import os, signal, sys
from pathlib import Path
from sparc3.stages import attribute, checks
write = attribute.write_tensors
def dying(path, *arguments):
    if path.stem == "00001" and path.parent.name == "activation":
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, *arguments)
attribute.write_tensors = dying
attribute.run(checks.load(Path("params.yaml")), sys.argv[1])
"""

# Rank 1 of a job of two, to which the test is rank 0. It outlives its stay in neither of them.
PEER = """
import sys, time
from sparc3.base import parallel
from sparc3.base.errors import InputError
from sparc3.base.files import write_json
here = parallel.place()
with parallel.joined(here):
    parallel.agree(here, "same")
    parallel.wait(here)
    try:
        parallel.agree(here, "other")
    except InputError as error:
        print(error, flush=True)
    if sys.argv[1] == "hangs":
        time.sleep(600)
    sys.exit(3)
"""


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | {"PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1"} | more


def start(folder: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=BOUND)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes then, and would not if it were killed
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def torchrun(folder: Path, processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    launch = ["torchrun", "--standalone", "--nproc-per-node", str(processes)]
    return start(folder, *launch, "-m", "sparc3", *command)


def free_port() -> str:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return str(bound.getsockname()[1])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(small.write_project(tmp_path / "project"))
    return Path.cwd()


def one_process(prompt_set: str) -> dict[str, bytes]:
    """The files of a set's scores, made by this process alone; they are not left behind."""
    attribute.run(checks.load(), prompt_set)
    folder = scores_folder(prompt_set)
    found = small.files(folder)
    shutil.rmtree(folder)
    return found


def partial(prompt_set: str) -> Path:
    params = checks.load()
    prompts = attribute.encode(
        read_prompts(prompt_set, "attribute"), loading.tokenizer(params.model), "max-logit"
    )
    return attribute.partial_folder(
        params, prompt_set, parameters.scores_of(params, prompt_set), prompts
    )


def times(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*.safetensors") if p.is_file()}


# --- the job as a whole ----------------------------------------------------------------------


def test_four_processes_give_the_bits_of_one(project: Path) -> None:
    """4 shards of general, one each; 3 of talk, so that one process has none."""
    for prompt_set in small.SETS:
        expected = one_process(prompt_set)
        port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        done = start(project, sys.executable, "-c", FORKED, "4", prompt_set, **port)
        assert done.returncode == 0, done.stderr
        assert small.files(scores_folder(prompt_set)) == expected
    assert small.scores(project, "general", "lrp").shape == (7, 3, 24)


def test_a_rank_that_fails_ends_the_job_and_the_next_run_finishes_it(project: Path) -> None:
    expected = one_process("general")
    obstacle = partial("general") / "lrp" / "00003.safetensors"  # the second shard of rank 1
    obstacle.mkdir(parents=True)
    failed = torchrun(project, 2, "attribute", "--prompt-set", "general")
    assert failed.returncode not in (0, None)
    assert "sparc3: error:" in failed.stderr
    assert "Is a directory" in failed.stderr
    assert str(obstacle) in failed.stderr
    assert not scores_folder("general").exists()
    finished = times(partial("general") / "activation")
    assert str(partial("general") / "activation" / "00001.safetensors") in finished

    obstacle.rmdir()
    done = torchrun(project, 2, "attribute", "--prompt-set", "general")
    assert done.returncode == 0, done.stderr
    assert small.files(scores_folder("general")) == expected
    folder = scores_folder("general")
    now = times(folder)
    assert all(now[str(folder / "activation" / Path(p).name)] == t for p, t in finished.items())
    _check_runs(project)


def _check_runs(project: Path) -> None:
    """One MLflow run for each of two starts, of rank 0; metrics logged once."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments()]
    second, first = client.search_runs(experiments, order_by=["start_time DESC"])
    assert (first.info.status, second.info.status) == ("FAILED", "FINISHED")
    assert second.data.metrics["prompts"] == 7
    assert len(client.get_metric_history(second.info.run_id, "prompts")) == 1


def test_killed_after_a_shard_and_run_again(project: Path) -> None:
    expected = one_process("general")
    killed = start(project, sys.executable, "-c", KILLED, "general")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not scores_folder("general").exists()
    ((path, time),) = times(partial("general") / "activation").items()
    assert Path(path).stem == "00000"

    attribute.run(checks.load(), "general")
    folder = scores_folder("general")
    assert small.files(folder) == expected
    assert times(folder)[str(folder / "activation/00000.safetensors")] == time


def test_killed_after_the_last_shard_and_run_again(project: Path) -> None:
    """All that is left is to move the folder: the model is not loaded again."""
    expected = one_process("general")
    part = partial("general")
    for name, content in expected.items():
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        (part / name).write_bytes(content)
    (part / "first-token").mkdir()
    for name in expected:
        (part / "first-token" / Path(name).name).with_suffix(".json").write_text("{}")
    finished = times(part)
    attribute.run(checks.load(), "general")
    assert small.files(scores_folder("general")) == expected
    assert sorted(times(scores_folder("general")).values()) == sorted(finished.values())
    assert not part.parent.exists()


@pytest.mark.parametrize("manner", ["dies", "hangs"])
def test_a_peer_that_does_not_come(manner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    for name, value in {**job, "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    peer = subprocess.Popen(
        [sys.executable, "-c", PEER, manner],
        env=environment(**job, RANK="1", LOCAL_RANK="1"),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        here = parallel.place()
        with parallel.joined(here):
            parallel.agree(here, "same")
            parallel.wait(here)
            with pytest.raises(InputError, match="rank 1 has other prompts"):
                parallel.agree(here, "not the same")
            limit = timedelta(seconds=2 if manner == "hangs" else BOUND)
            named = "Ranks? 1" if manner == "hangs" else ""
            with pytest.raises(InputError, match=f"has ended or is stuck: .*{named}"):
                parallel.wait(here, limit)
    finally:
        peer.kill()
        printed, _ = peer.communicate()
    assert "rank 1 has other prompts" in printed


# --- its parts -------------------------------------------------------------------------------


def test_alone_unless_started_as_a_job() -> None:
    assert parallel.place({}) == Place()
    assert parallel.place({"WORLD_SIZE": "2"}) == Place()
    job = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert parallel.place(job) == Place(5, 8, 1, 4)


@pytest.mark.parametrize(
    "job",
    [
        {"RANK": "0"},
        {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"},
        {"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        {"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
    ],
)
def test_an_impossible_place_is_refused(job: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"environment: RANK=.* is no place in a job"):
        parallel.place(job)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_every_shard_is_one_rank_s(world: int) -> None:
    for number in range(10):
        assert sum(Place(rank, world).shares(number) for rank in range(world)) == 1


def test_a_card_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parallel.device(Place(), "cuda") == "cuda"
    assert parallel.device(Place(1, 2, 1, 2), "cpu") == "cpu"
    assert parallel.device(Place(1, 2, 0, 1), "auto") == "auto"  # two machines, one process each
    with pytest.raises(InputError, match="auto spreads one model over all cards"):
        parallel.device(Place(1, 2, 1, 2), "auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parallel.device(Place(3, 4, 1, 2), "cuda") == "cuda:1"
    with pytest.raises(InputError, match="4 processes on this machine and 2 cards"):
        parallel.device(Place(1, 4, 1, 4), "cuda")


def test_other_stages_run_in_one_process(project: Path, capsys: Any) -> None:
    from sparc3.__main__ import main

    job = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in job.items():
            patch.setenv(name, value)
        assert main(["gate", "--behaviour", "talk"]) == 2
    assert "gate: runs in one process, not 2" in capsys.readouterr().err


def write_parts(folder: Path, names: tuple[str, ...], shards: int) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(shards):
            (folder / name / f"{number:05}.safetensors").write_text(f"{name} {number}")
    for number in range(shards):
        write_json(folder / attribute.FIRST / f"{number:05}.json", {"lrp": [1.0 + number, 6.0]})


def test_publish_replaces_the_scores_and_forgets_the_parts(tmp_path: Path) -> None:
    names, folder = ("lrp", "activation"), tmp_path / "scores" / "general"
    ours, stale = tmp_path / "partial/general/aaaa", tmp_path / "partial/general/bbbb"
    other = tmp_path / "partial/general-pairs/cccc"
    for part in (ours, stale, other):
        write_parts(part, names, 2)
    (ours / "lrp" / ".00001.safetensors.x1y2z3").write_text("half a write")
    write_parts(folder, ("wanda",), 3)
    assert attribute.publish(ours, folder, names, 2) == {"lrp": (1.0 + 2.0) / (6.0 + 6.0)}
    assert small.files(folder) == {
        f"{name}/{n:05}.safetensors": f"{name} {n}".encode() for name in names for n in range(2)
    }
    assert not (tmp_path / "partial/general").exists()
    assert len(small.files(other)) == 6


def test_publish_never_moves_part_of_the_scores(tmp_path: Path) -> None:
    ours, folder = tmp_path / "partial/general/aaaa", tmp_path / "scores" / "general"
    write_parts(ours, ("lrp",), 2)
    write_parts(folder, ("lrp",), 1)
    with pytest.raises(InputError, match=r"00002\.safetensors: file not found"):
        attribute.publish(ours, folder, ("lrp",), 3, visible=0)
    assert len(small.files(folder)) == 2
    assert len(small.files(ours)) == 4


def test_parts_belong_to_all_that_decides_their_numbers(project: Path) -> None:
    params = checks.load()
    prompts = attribute.encode(
        read_prompts("general", "attribute"), loading.tokenizer(params.model), "max-logit"
    )

    def folder(
        params: parameters.Params = params, names: Any = ("lrp",), prompts: Any = prompts
    ) -> Path:
        return attribute.partial_folder(params, "general", names, prompts)

    def changed(section: str, **values: object) -> parameters.Params:
        return replace(params, **{section: replace(getattr(params, section), **values)})

    first = folder()
    assert folder(changed("gate", threshold=1.0)) == first
    spec = params.prompt_sets["general"]
    found = {
        first,
        folder(changed("attribute", batch_tokens=21)),
        folder(changed("attribute", shard_prompts=3)),
        folder(changed("model", dtype="bfloat16")),
        folder(changed("model", device="cuda")),
        folder(replace(params, prompt_sets={"general": replace(spec, target="pair")})),
        folder(names=("lrp", "wanda")),
        folder(prompts=prompts[:-1]),
        folder(prompts=[*prompts[:-1], prompts[-1]._replace(sequences=((1, 2, 3),))]),
    }
    small.write_model(project / "model", "qwen2")
    found.add(folder())
    assert len(found) == 10
    assert {path.parent for path in found} == {first.parent}
