"""Doctor: is everything there that a run needs? A line each, and what to do about what is not."""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sparc3.base.errors import InputError
from sparc3.base.files import read_text
from sparc3.base.params import Params, hub_of
from sparc3.base.secrets import hub_token
from sparc3.base.store import connect, public_uri
from sparc3.commands import verify
from sparc3.stages.fetch import DATA, is_there

LOCK = Path("requirements.txt")
SPARE = 2e9  # bytes of disk, beside scores: models, completions, runs


def run(params: Params) -> None:
    """Check all, whatever fails. InputError: something must be mended."""
    checks: dict[str, Callable[[Params], str]] = {
        "packages": packages,
        "data": data,
        "model": model,
        "memory": memory,
        "disk": disk,
        "runs": runs,
        "token": token,
        "DVC cache": cache,
    }
    wrong = 0
    for name, check in checks.items():
        try:
            said = f"OK    {name}: {check(params)}"
        except InputError as error:
            wrong += 1
            said = f"MEND  {name}: {error}"
        print(said)
    if wrong:
        raise InputError(f"doctor: {wrong} of {len(checks)} things must be mended; each says how")


def packages(params: Params) -> str:
    """Those of the lock; what its markers leave out on this machine need not be there."""
    others = []
    lines = re.findall(r"^([\w.-]+)(?:\[.*\])?==(\S+)( ;)?", read_text(LOCK), re.M)
    for name, pinned, marked in lines:
        try:
            there = version(name)
        except PackageNotFoundError:
            there = pinned if marked else "missing"
        if there != pinned:
            others.append(f"{name} is {there}, locked {pinned}")
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise InputError(f"{'; '.join(others[:3])}{more}; run: make env")
    python = ".".join(map(str, sys.version_info[:3]))
    return f"Python {python}, {len(lines)} packages as {LOCK} has them"


def data(params: Params) -> str:
    return _sound(DATA, verify.data())


def model(params: Params) -> str:
    folder = Path(params.model.path)
    return _sound(folder, verify.model(folder))


def _sound(folder: Path, problems: Iterable[str]) -> str:
    if not is_there(folder):
        raise InputError(f"{folder}/ is not there; run: python -m sparc3 fetch")
    _refuse(problems)
    return f"{folder}/ is what it was when it came"


def memory(params: Params) -> str:
    """Of the device, against the stage of the plan that needs most."""
    from sparc3.commands import plan  # here: it needs torch, and takes seconds

    planned, device = plan.plan(params, params), plan.here(params)
    plan.refuse(planned, device)
    needed = planned.in_all(device).device
    return f"{needed / 1e9:.1f} GB needed, {device} has {device.memory / 1e9:.1f}"


def disk(params: Params) -> str:
    from sparc3.commands import plan

    needed = SPARE + plan.plan(params, params).in_all(plan.CPU).disk
    free = shutil.disk_usage(Path.cwd()).free
    said = f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} free"
    if free < needed:
        raise InputError(f"{said}; make room")
    return said


def runs(params: Params) -> str:
    connect()
    return public_uri()


def token(params: Params) -> str:
    given, hub = hub_token() is not None, hub_of(params.model.path)
    if hub and not given and not is_there(Path(params.model.path)):
        problem = f"no HF_TOKEN, and {hub[0]} may be gated"
        raise InputError(f"{problem}; set it in the environment or in .env")
    return "HF_TOKEN is there" if given else "no HF_TOKEN, and none is needed"


def cache(params: Params) -> str:
    if not os.access(".dvc", os.W_OK):
        raise InputError(".dvc/ is not there or cannot be written; run in a checkout, or: dvc init")
    _refuse(verify.cache())
    return f"{sum(1 for _ in verify.CACHE.glob('??/*'))} objects, each what its name says"


def _refuse(problems: Iterable[str]) -> None:
    """InputError: the first of them, if there is one."""
    for problem in problems:
        raise InputError(problem)
