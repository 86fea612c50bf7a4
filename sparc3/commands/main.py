"""Main: fetch, then `dvc repro`, whose stages nest under the run that `mlflow run` opened."""

import os
import subprocess
import sys

from sparc3.base.runs import hand_down
from sparc3.base.store import private


def run() -> None:
    """Ends the process with the status of the first command that fails (SystemExit)."""
    environment = private(hand_down(os.environ))
    for command in ([sys.executable, "-m", "sparc3", "fetch"], ["dvc", "repro"]):
        done = subprocess.run(command, env=environment, check=False)
        if done.returncode:
            raise SystemExit(done.returncode)
