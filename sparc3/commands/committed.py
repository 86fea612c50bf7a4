"""Committed: are the metrics on disk those that were committed?"""

import json
import math
import subprocess
from collections.abc import Iterator
from typing import Any

from sparc3.base.artifacts import METRICS
from sparc3.base.errors import InputError
from sparc3.base.files import read_json

TOLERANCE = 1e-6  # of a number, relative: what another processor rounds otherwise
SHOWN = 5  # differences that are printed
ABSENT = "nothing"


def run() -> None:
    """Print whether metrics/**/*.json equal those of git's HEAD, or the first differences."""
    after = {path.as_posix(): read_json(path) for path in METRICS.rglob("*.json")}
    found = list(differences(committed(), after))
    if not found:
        print(f"metrics equal those committed ({len(after)} files)")
        return
    print(f"metrics differ from those committed in {len(found)} places:")
    for line in found[:SHOWN]:
        print(f"  {line}")


def committed() -> dict[str, Any]:
    """Metrics of git's HEAD, by path."""
    names = _git("ls-tree", "-r", "-z", "--name-only", "HEAD", f"{METRICS}/").split("\0")
    wanted = [name for name in names if name.endswith(".json")]
    found = {name: json.loads(_git("show", f"HEAD:./{name}")) for name in wanted}
    if not found:
        raise InputError(f"{METRICS}: git's HEAD has no metrics to compare with; commit some")
    return found


def differences(before: Any, after: Any, name: str = "") -> Iterator[str]:
    """`NAME: BEFORE committed, AFTER now` wherever two trees of JSON differ, numbers by more than
    TOLERANCE of the larger, and of 1.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            pair = before.get(key, ABSENT), after.get(key, ABSENT)
            yield from differences(*pair, f"{name}/{key}".lstrip("/"))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{name}[{number}]")
    elif isinstance(before, int | float) and isinstance(after, int | float):
        if not math.isclose(before, after, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            yield f"{name}: {before} committed, {after} now"
    elif before != after:
        yield f"{name}: {_short(before)} committed, {_short(after)} now"


def _short(value: Any) -> str:
    text = value if value == ABSENT else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"git {arguments[0]}: {done.stderr.strip()}; run it in a git checkout")
    return done.stdout
