"""Runs in MLflow: what a stage's run carries, and how it ends.

Tags of a stage's run: `sparc3.stage`, `sparc3.name` (stage@axes), `sparc3.dvc_stage`,
`sparc3.dvc_experiment`, `sparc3.dirty`, `sparc3.product` (digest of what the stage wrote),
`sparc3.error`, MLflow's own for the git commit and the parent run, and what the caller adds.
Every run is addressed by its id through the client; nothing depends on an "active run" hidden in
the process.
"""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from sparc3.base.errors import InputError
from sparc3.base.secrets import first_line, masked, secrets
from sparc3.base.store import connect, public_uri

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


PARENT = "SPARC3_PARENT_RUN_ID"
DECISIVE = ("sparc3", "params.yaml", "dvc.yaml", "data.dvc", "requirements.txt")
MAX_PARAM, MAX_TAG, MAX_BATCH = 6000, 5000, 100  # MLflow's limits, common to all its stores


def hand_down(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for the commands of `main`: its own run becomes the parent of theirs.

    A child of `mlflow run` inherits MLFLOW_RUN_ID and logs into that run, which is right for one
    stage and wrong for a pipeline of them.
    """
    handed = dict(environment)
    if run_id := handed.pop("MLFLOW_RUN_ID", None):
        handed[PARENT] = run_id
    return handed


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"select": {"num_neurons": 60}} -> {"select.num_neurons": 60}; lists become JSON text."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


@dataclass(frozen=True)
class Run:
    """A run that exists in the tracking store, open or ended."""

    client: "MlflowClient"
    experiment: str
    id: str

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """A metric that has this value already is not logged again. ValueError if not finite."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise ValueError(f"metric {name!r} is {value}")
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        logged = self.client.get_run(self.id).data.metrics
        new = [Metric(k, float(v), now, 0) for k, v in metrics.items() if logged.get(k) != v]
        self._log("metrics", new)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Parameters, flattened; one that is there may be logged again with the same value only."""
        from mlflow.entities import Param

        flat = flatten(params)
        self._log("params", [Param(k, masked(v, MAX_PARAM)) for k, v in flat.items()])

    def set_tags(self, tags: Mapping[str, object]) -> None:
        from mlflow.entities import RunTag

        self._log("tags", [RunTag(k, masked(v, MAX_TAG)) for k, v in tags.items()])

    def _log(self, kind: str, items: Sequence[Any]) -> None:
        for start in range(0, len(items), MAX_BATCH):
            batch: dict[str, Any] = {kind: items[start : start + MAX_BATCH]}
            self.client.log_batch(self.id, **batch)

    def set_product(self, digest: str) -> None:
        """Digest of what the stage wrote, by which `pipeline_run` finds the run that wrote it."""
        self.set_tags({"sparc3.product": digest})

    def log_artifact(self, path: Path) -> None:
        """A file, by its name; one of the same name is replaced.

        Raises InputError if the file is missing or holds a secret (`secrets`), ValueError for
        tensors: DVC keeps those, and their digest belongs in a tag.
        """
        if path.suffix == ".safetensors":
            raise ValueError(f"{path}: tensors are kept by DVC; log their digest as a tag")
        if not path.is_file():
            raise InputError(f"{path}: file not found; an artifact must be a file")
        content = path.read_bytes()
        if any(secret.encode() in content for secret in secrets()):
            problem = "holds a token or password of the environment or .env"
            raise InputError(f"{path}: {problem}; not logged")
        self.client.log_artifact(self.id, str(path))


def source() -> dict[str, str]:
    """The code that runs: git commit, and whether what decides results differs from it.

    dvc.lock and metrics/ are results: a pipeline under way changes them, which is not dirt.
    """

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--verify", "HEAD")
    if commit is None:  # not a checkout, or one without a commit
        return {"sparc3.dirty": "unknown"}
    changes = git("status", "--porcelain", "--", *DECISIVE)
    return {
        "mlflow.source.git.commit": commit,
        "sparc3.dirty": "unknown" if changes is None else str(bool(changes)).lower(),
    }


class _Killed(SystemExit):
    """A signal asked the process to end."""


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP raise, so that the run is closed before the process ends with 128 + n."""

    ends = (signal.SIGTERM, signal.SIGHUP)
    caught = [number for number in ends if signal.getsignal(number) is not signal.SIG_IGN]

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in caught:
            signal.signal(each, signal.SIG_IGN)
        raise _Killed(128 + number)

    before = {number: signal.signal(number, stop) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stage_run(
    stage: str,
    axes: Mapping[str, str],
    params: Mapping[str, Any],
    tags: Mapping[str, object] | None = None,
) -> Iterator[Run]:
    """The run of one stage, open while the block runs.

    It ends as FINISHED; as KILLED on Ctrl-C, SIGTERM and SIGHUP; as FAILED on any other exception,
    whose first line becomes the tag `sparc3.error`. The exception goes on. Started by
    `mlflow run -e STAGE`, the run is the one that MLflow opened; started by `main`, it is nested
    under main's.

    Args:
        stage, axes: `attribute`, {"behaviour": "toxicity"} is named `attribute@toxicity`.
        params: nested or flat; logged flattened.
        tags: what else identifies the run, such as digests of model and data.

    Raises InputError if the tracking store cannot be used.
    """
    name = "@".join([stage, *axes.values()])
    started = {"dvc_stage": "DVC_STAGE", "dvc_experiment": "DVC_EXP_NAME"}
    described = {
        "mlflow.runName": name,
        "sparc3.stage": stage,
        "sparc3.name": name,
        **{f"sparc3.{tag}": os.environ[v] for tag, v in started.items() if os.environ.get(v)},
        **source(),
        **(tags or {}),
    }
    with _signals_raise():
        client, experiment = connect()
        run = given(client, "MLFLOW_RUN_ID")
        if run is None:
            run = create(client, experiment, given(client, PARENT))
        with closing(run):
            run.set_tags(described)
            run.log_params({**axes, **params})
            yield run


@contextmanager
def closing(run: Run) -> Iterator[None]:
    """The run ends with the block, and as the block does."""
    try:
        yield
        run.client.set_terminated(run.id, "FINISHED")
    except (KeyboardInterrupt, _Killed):
        run.client.set_terminated(run.id, "KILLED")
        raise
    except BaseException as error:
        run.set_tags({"sparc3.error": f"{type(error).__name__}: {first_line(error)}"})
        run.client.set_terminated(run.id, "FAILED")
        raise


def given(client: "MlflowClient", variable: str) -> Run | None:
    """The run whose id a variable of the environment holds."""
    run_id = os.environ.get(variable)
    if not run_id:
        return None
    from mlflow.exceptions import MlflowException

    try:
        return Run(client, client.get_run(run_id).info.experiment_id, run_id)
    except MlflowException as error:
        problem = f"{run_id} is not a run of {public_uri()} ({first_line(error)})"
        raise InputError(f"{variable}: {problem}; unset it") from None


def create(client: "MlflowClient", experiment: str, parent: Run | None) -> Run:
    """A new run, in the experiment of its parent if it has one: nesting ends at the experiment."""
    command = masked(shlex.join(sys.argv), MAX_TAG)
    tags = {"mlflow.source.type": "LOCAL", "mlflow.source.name": command}
    if parent:
        experiment, tags["mlflow.parentRunId"] = parent.experiment, parent.id
    return Run(client, experiment, client.create_run(experiment, tags=tags).info.run_id)
