"""Slurm jobs: what the scripts ask for and, where Slurm is installed, a cluster of one node."""

import getpass
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small

from sparc3.__main__ import main
from sparc3.base.artifacts import scores_folder
from sparc3.base.errors import InputError
from sparc3.base.params import Cluster, Params
from sparc3.commands import submit
from sparc3.stages import attribute, checks

ROOT = Path(__file__).parent.parent
BOUND = 300  # seconds after which a job counts as hung, on a machine with much else to do
GIVEN = {"device": "CPU", "memory": 2, "minutes": 7}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    changes = {"cluster": {**GIVEN, "tasks": 2}}
    monkeypatch.chdir(small.write_project(tmp_path / "project", changes))
    return Path.cwd()


def with_cluster(**values: Any) -> Params:
    return replace(checks.load(), cluster=Cluster(**{**GIVEN, **values}))


def asked(script: str) -> dict[str, str]:
    """The options of a script, by their names."""
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", script, re.MULTILINE))


# --- the script ------------------------------------------------------------------------------


def test_attribution_has_a_process_for_each_task(project: Path) -> None:
    params = with_cluster(partition="long", nodes=3, tasks=2, cpus=4, options=("--qos=high",))
    script = submit.script(params, "attribute", {"prompt_set": "general"})
    found = asked(script)
    assert found["nodes"] == "3"
    assert found["ntasks-per-node"] == "2"
    assert found["cpus-per-task"] == "4"
    assert (found["mem"], found["time"]) == ("2G", "7")
    assert (found["partition"], found["qos"]) == ("long", "high")
    assert found["chdir"] == str(project)
    assert "export WORLD_SIZE=6 LOCAL_WORLD_SIZE=2\n" in script
    assert "-m sparc3 attribute --prompt-set general\n" in script
    assert "gpus-per-node" not in found


def test_other_stages_have_one_process(project: Path) -> None:
    script = submit.script(with_cluster(nodes=3, tasks=2), "gate", {"behaviour": "talk"})
    assert (asked(script)["nodes"], asked(script)["ntasks-per-node"]) == ("1", "1")
    assert "WORLD_SIZE" not in script
    assert "-m sparc3 gate --behaviour talk\n" in script


@pytest.mark.parametrize(
    ("device", "tasks", "stage", "cards"),
    [
        ("cuda", 4, "attribute", "4"),  # one for each process
        ("cuda", 4, "transfer", "1"),
        ("auto", 1, "attribute", "4"),  # one process over all
        ("auto", 1, "transfer", "4"),
        ("cuda", 4, "overlap", None),
    ],
)
def test_cards_that_a_stage_asks_for(
    project: Path, device: str, tasks: int, stage: str, cards: str | None
) -> None:
    params = with_cluster(gpus=4, tasks=tasks)
    params = replace(params, model=replace(params.model, device=device))
    axes = {"prompt_set": "general"} if stage == "attribute" else {}
    assert asked(submit.script(params, stage, axes)).get("gpus-per-node") == cards


@pytest.mark.parametrize(
    ("device", "tasks", "gpus"), [("cuda", 3, 2), ("auto", 2, 2), ("auto", 1, 0)]
)
def test_tasks_and_cards_must_match(project: Path, device: str, tasks: int, gpus: int) -> None:
    params = with_cluster(tasks=tasks, gpus=gpus)
    params = replace(params, model=replace(params.model, device=device))
    with pytest.raises(InputError, match=f"cluster.tasks is {tasks} with {gpus} gpus"):
        submit.script(params, "transfer", {})


def test_memory_and_time_come_from_the_plan(project: Path) -> None:
    params = with_cluster(memory=None, minutes=None, tasks=2)
    one, two = (
        asked(submit.script(params, *stage))
        for stage in (("transfer", {}), ("attribute", {"prompt_set": "general"}))
    )
    assert (int(one["mem"][:-1]), int(two["mem"][:-1])) == (
        2,
        3,
    )  # 0.9 GB a process, a quarter on top
    assert int(one["time"]) >= submit.SPARE
    bigger = replace(params, evaluate=replace(params.evaluate, completions=1000, new_tokens=10**4))
    longer = asked(submit.script(bigger, "evaluate", {"behaviour": "talk"}))
    assert int(longer["time"]) > int(one["time"])
    with pytest.raises(InputError, match=r"cluster\.device 'V100' is not known"):
        submit.script(with_cluster(device="V100", memory=None), "transfer", {})


def test_what_cannot_be_submitted_is_said(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["submit", "attribute", "--prompt-set", "general"]) == 2
    assert "written, but sbatch is not here" in capsys.readouterr().err
    assert Path("outputs/slurm/attribute-general.sbatch").is_file()
    assert main(["submit", "attribute", "--prompt-set", "none"]) == 2
    assert "'none' is not in params.prompt_sets" in capsys.readouterr().err
    small.write_project(project, {"cluster": {**GIVEN, "gpu": 1}})
    assert main(["submit", "transfer"]) == 2
    assert "params: unknown key cluster.gpu" in capsys.readouterr().err
    small.write_project(project)
    assert main(["submit", "transfer"]) == 2
    assert "params: missing key cluster" in capsys.readouterr().err


# --- a cluster of one node -------------------------------------------------------------------

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
CredType=cred/munge
SlurmctldPort={controller}
SlurmdPort={worker}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4096
PartitionName=test Nodes={host} Default=YES State=UP
"""


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


def until(happens: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + BOUND
    while not happens():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """munged, slurmctld and slurmd on this machine, of this user; their slurm.conf."""
    programs = ("munged", "slurmctld", "slurmd", "sbatch")
    if any(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None for name in programs):
        pytest.skip("Slurm is not installed (Debian: slurm-wlm and munge)")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("run", "state", "spool"):
        (folder / name).mkdir()
    key, configuration = folder / "munge.key", folder / "slurm.conf"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host, (controller, worker) = socket.gethostname().partition(".")[0], free_ports()
    configuration.write_text(
        CONFIGURATION.format(
            host=host,
            user=getpass.getuser(),
            folder=folder,
            controller=controller,
            worker=worker,
        )
    )
    munge = {"socket": "munge.socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
    options = [f"--{key}={folder}/run/{name}" for key, name in munge.items()]
    commands = [
        # Forced, for it takes a folder below one that is open to all for insecure.
        ["munged", "--foreground", "--force", f"--key-file={key}", *options],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", host],
    ]
    variables = {"SLURM_CONF": str(configuration), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    with ExitStack() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        for command in commands:
            log = running.enter_context((folder / f"{command[0]}.log").open("w"))
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            running.callback(process.wait, 30)
            running.callback(process.terminate)
            if command[0] == "munged":
                until((folder / "run/munge.socket").exists, "munged does not start")
        until(lambda: "idle" in output("sinfo", "-h", "-o", "%T"), f"no node is up; see {folder}")
        yield configuration


def finished(job: str) -> str:
    """The state in which a job has ended."""
    state = ""

    def ended() -> bool:
        nonlocal state
        shown = re.search(r"JobState=(\w+)", output("scontrol", "show", "job", job))
        state = shown.group(1) if shown else "lost"
        return state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")

    until(ended, f"job {job} does not end")
    return state


def test_two_tasks_give_the_scores_of_one_process(
    slurm: Path, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    attribute.run(checks.load(), "general")
    expected = small.files(scores_folder("general"))
    shutil.rmtree(scores_folder("general"))

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert main(["submit", "attribute", "--prompt-set", "general"]) == 0
    job = re.findall(r"^job (\d+)", capsys.readouterr().out)[0]
    state = finished(job)
    log = Path(f"outputs/slurm/attribute-general-{job}.log").read_text()
    assert state == "COMPLETED", log
    assert small.files(scores_folder("general")) == expected


def test_a_job_whose_params_have_changed_does_not_run(
    slurm: Path, project: Path, capsys: Any
) -> None:
    submit.run(with_cluster(options=("--hold",)), "transfer")
    job = re.findall(r"^job (\d+)", capsys.readouterr().out)[0]
    path = project / "params.yaml"
    path.write_text(path.read_text() + "# another time\n")
    subprocess.run(["scontrol", "release", job], check=True)
    assert finished(job) == "FAILED"
    log = Path(f"outputs/slurm/transfer-{job}.log").read_text()
    assert "params.yaml has changed since the job was submitted" in log


def test_what_slurm_refuses_is_said(slurm: Path, project: Path) -> None:
    with pytest.raises(InputError, match=r"sbatch refuses it: .*partition"):
        submit.run(with_cluster(partition="none"), "transfer")
