"""Main: fetch, then `dvc repro`, whose stages nest under the run that `mlflow run` opened."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import yaml

from sparc3.base.runs import hand_down
from sparc3.base.store import private

LOCK = Path("dvc.lock")
log = logging.getLogger(__name__)


def mend_lock() -> None:
    """Put back git's dvc.lock where half of it is there: DVC, killed while it wrote, leaves that,
    and then refuses to run. Stages that were done since come from its cache.
    """
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from dvc.utils.strictyaml import YAMLValidationError, validate

    try:
        validate(yaml.safe_load(LOCK.read_text(encoding="utf-8")) or {}, COMPILED_LOCKFILE_SCHEMA)
    except FileNotFoundError:
        return
    except (YAMLValidationError, yaml.YAMLError, UnicodeDecodeError):
        log.warning("%s: not whole, since DVC was killed while it wrote; git's is put back", LOCK)
        LOCK.unlink()
        subprocess.run(["git", "checkout", "-q", "--", LOCK], capture_output=True, check=False)


def run() -> None:
    """Ends the process with the status of the first command that fails (SystemExit)."""
    environment = private(hand_down(os.environ))
    mend_lock()
    for command in ([sys.executable, "-m", "sparc3", "fetch"], ["dvc", "repro"]):
        done = subprocess.run(command, env=environment, check=False)
        if done.returncode:
            raise SystemExit(done.returncode)
