"""One job of several processes, as torchrun, `accelerate launch` and Slurm start them.

The processes share out the work by its numbers and leave the results as files in one folder, on
one machine or on a file system that all machines see. All they exchange is that they do the same
and are ready. Gloo does that with graphics cards and without, and names the process that is
missing, which NCCL cannot.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from sparc3.base.errors import InputError

START = timedelta(minutes=30)  # for all processes to appear, and to have read the model's files
WAIT = timedelta(hours=6)  # for the slowest process: longer than any shard


class Place(NamedTuple):
    """Where this process stands in its job; without a job of several, it is the only one."""

    rank: int = 0  # 0 to world - 1; rank 0 does what is done once
    world: int = 1
    local_rank: int = 0  # among the processes of this machine
    local_world: int = 1

    def shares(self, number: int) -> bool:
        """Whether the piece of work of this number (0, 1, ...) is this process's."""
        return number % self.world == self.rank


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """This process's place, from RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.

    InputError if only some of them are there, or if they contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {name: environment[name] for name in names if name in environment}
    if "RANK" not in given:
        return Place()
    try:
        here = Place(*(int(given[name]) for name in names))
    except (KeyError, ValueError):
        here = None
    if here is None or not (
        0 <= here.rank < here.world and 0 <= here.local_rank < here.local_world
    ):
        shown = " ".join(f"{name}={given.get(name)}" for name in names)
        remedy = "start the processes with torchrun, or unset RANK to run only one"
        raise InputError(f"environment: {shown} is no place in a job; {remedy}")
    return here


def began(process: int) -> str | None:
    """When a process of this host began, in clock ticks since boot; None if it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]  # a zombie has ended


@contextmanager
def joined(here: Place) -> Iterator[None]:
    """Within the block the job's processes are connected; a lost one is an error in the others."""
    if here.world == 1:
        yield
        return
    from torch import distributed

    distributed.init_process_group("gloo", timeout=START)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def _others() -> Iterator[None]:
    """What the connection says of another process, as one line: the cause is that one's error."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"another process of this job has ended or is stuck: {reason}") from None


def agree(here: Place, identity: str) -> None:
    """InputError, in every process, unless all of them give the same `identity`."""
    if here.world == 1:
        return
    from torch import distributed

    identities = [""] * here.world
    with _others():
        distributed.all_gather_object(identities, identity)
    other = next((n for n, value in enumerate(identities) if value != identities[0]), None)
    if other is not None:
        raise InputError(
            f"rank {other} has other prompts, parameters, model files or packages than rank 0; "
            "give all processes the same folder and environment"
        )


def wait(here: Place, timeout: timedelta = WAIT) -> None:
    """Until every process is here. InputError if one has ended or takes longer (it is named)."""
    if here.world == 1:
        return
    from torch import distributed

    with _others():
        distributed.monitored_barrier(timeout=timeout, wait_all_ranks=True)


def device(here: Place, name: str) -> str:
    """`model.device` for this process: one card for each. InputError if there are too few."""
    if here.local_world == 1 or name not in ("auto", "cuda"):
        return name
    import torch

    if name == "auto":
        raise InputError(
            f"model.device: auto spreads one model over all cards of a machine, and "
            f"{here.local_world} processes share them; set it to cuda, or start one process"
        )
    if here.local_world > torch.cuda.device_count():
        raise InputError(
            f"model.device: {here.local_world} processes on this machine and "
            f"{torch.cuda.device_count()} cards; start one process per card"
        )
    return f"cuda:{here.local_rank}"
