"""Submit: one stage as a Slurm job, by a script that params.cluster and the plan fill in.

A stage that can do so runs as one process per task, any other as one process. The script is kept
in outputs/slurm; the job runs in this folder, with this Python, on a file system that the nodes
share.
"""

import math
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from sparc3.base.artifacts import OUTPUTS
from sparc3.base.errors import InputError
from sparc3.base.files import digest, write_text
from sparc3.base.params import Cluster, Params
from sparc3.stages.checks import PARAMS
from sparc3.stages.table import STAGES, axis_flag, check_axis

MARGIN = 1.25  # of the memory that the plan expects
LATE = 2.0  # of the time that the plan expects, on top of
SPARE = 30  # minutes


def requested(
    params: Params, cluster: Cluster, job: str, nodes: int, tasks: int
) -> tuple[int, int]:
    """Memory per node in GB and minutes: as given, else from the plan; InputError: too big."""
    if cluster.memory is not None and cluster.minutes is not None:
        return cluster.memory, cluster.minutes
    from sparc3.commands import plan  # here: it needs the model's config.json, and takes seconds

    cards = cluster.gpus if params.model.device == "auto" else nodes * tasks
    needs = plan.of_stage(params, job, cluster.device, cards)
    memory = math.ceil(MARGIN * tasks * needs.machine / 1e9)
    minutes = math.ceil(LATE * needs.seconds / 60) + SPARE
    return cluster.memory or memory, cluster.minutes or minutes


def script(params: Params, stage: str, axes: Mapping[str, str]) -> str:
    """The batch script of one stage. InputError: params.cluster is missing or cannot be."""
    cluster = params.cluster
    if cluster is None:
        raise InputError("params: missing key cluster; a job needs one with the device it runs on")
    job = "@".join([stage, *axes.values()])
    device = params.model.device
    auto = device == "auto"
    if device != "cpu" and (cluster.gpus < cluster.tasks or (auto and cluster.tasks > 1)):
        raise InputError(
            f"params: cluster.tasks is {cluster.tasks} with {cluster.gpus} gpus and model.device "
            f"{device}; expected a card for each task, or one task in all for auto"
        )
    nodes, tasks = (cluster.nodes, cluster.tasks) if STAGES[stage].parallel else (1, 1)
    memory, minutes = requested(params, cluster, job, nodes, tasks)
    name = job.replace("@", "-")
    options = {
        "job-name": f"sparc3-{name}",
        "chdir": Path.cwd(),
        "output": OUTPUTS / "slurm" / f"{name}-%j.log",
        "nodes": nodes,
        "ntasks-per-node": tasks,
        "cpus-per-task": cluster.cpus,
        "mem": f"{memory}G",
        "time": minutes,
    }
    if cluster.partition is not None:
        options["partition"] = cluster.partition
    if device != "cpu" and STAGES[stage].model:
        options["gpus-per-node"] = cluster.gpus if auto else tasks
    flags = [f"{axis_flag(STAGES[stage])} {shlex.quote(value)}" for value in axes.values()]
    command = " ".join([shlex.quote(sys.executable), "-m sparc3", stage, *flags])
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in options.items()),
        *(f"#SBATCH {option}" for option in cluster.options),
        "set -euo pipefail",
        *cluster.setup,
        f"echo '{digest(PARAMS)}  {PARAMS}' | sha256sum --check --quiet || {{",
        f"  echo 'sparc3: error: {PARAMS} has changed since the job was submitted' >&2; exit 2; }}",
        f"export OMP_NUM_THREADS={cluster.cpus}",
    ]
    if nodes * tasks > 1:
        lines += [
            "# The processes of a job, as base/parallel.py reads them.",
            'export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
            'export MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"',
            f"export WORLD_SIZE={nodes * tasks} LOCAL_WORLD_SIZE={tasks}",
            f"srun --cpus-per-task={cluster.cpus} --kill-on-bad-exit=1 --label \\",
            "  bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec \"$@\"' - \\",
            f"  {command}",
        ]
    else:
        lines.append(f"srun --cpus-per-task={cluster.cpus} {command}")
    return "\n".join(lines) + "\n"


def run(params: Params, stage: str, **axes: str) -> None:
    """Write the script, hand it to sbatch and print the job's number.

    InputError: as `script`; an unknown axis; no sbatch here, or what sbatch says against the job.
    """
    check_axis(params, stage, axes)
    path = OUTPUTS / "slurm" / f"{'-'.join([stage, *axes.values()])}.sbatch"
    write_text(path, script(params, stage, axes))
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise InputError(f"{path}: written, but sbatch is not here; submit it there") from None
    if done.returncode:
        raise InputError(f"{path}: sbatch refuses it: {' '.join(done.stderr.split())}")
    job = done.stdout.strip().partition(";")[0]
    print(f"job {job}: follow it with squeue, and in outputs/slurm")
