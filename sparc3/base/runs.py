"""Runs in MLflow: what a stage's run carries, and how it ends.

Tags of a stage's run: `sparc3.stage`, `sparc3.name` (stage@axes), `sparc3.dvc_stage`,
`sparc3.dvc_experiment`, `sparc3.dirty`, `sparc3.product` (digest of what the stage wrote),
`sparc3.error`, `sparc3.host` and `sparc3.process` (where it runs), MLflow's own for the git commit
and the parent run, and what the caller adds.
Every run is addressed by its id through the client; nothing depends on an "active run" hidden in
the process.
"""

import json
import logging
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from sparc3.base.errors import InputError
from sparc3.base.files import digest
from sparc3.base.parallel import began
from sparc3.base.secrets import first_line, masked, secrets
from sparc3.base.store import answering, connect, public_uri, refusals

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


log = logging.getLogger(__name__)
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


class Dataset(NamedTuple):
    """A file of prompts, and what a run uses it for."""

    path: Path
    use: str


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

    def log_datasets(self, datasets: Sequence["Dataset"]) -> None:
        """The files of prompts that a run reads, as MLflow's inputs; known by name and digest."""
        from mlflow import entities

        inputs = [
            entities.DatasetInput(
                entities.Dataset(
                    name=data.path.stem,
                    digest=digest(data.path)[:32],  # MLflow takes no more than 36
                    source_type="local",
                    source=json.dumps({"uri": data.path.as_posix()}),
                ),
                [entities.InputTag("mlflow.data.context", data.use)],
            )
            for data in datasets
        ]
        self.client.log_inputs(self.id, inputs)

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
        _refuse_secrets(str(path), path.read_bytes())
        self.client.log_artifact(self.id, str(path))

    def log_text(self, name: str, text: str) -> None:
        """A file of this name; one of the same name is replaced. InputError: it holds a secret."""
        _refuse_secrets(name, text.encode())
        self.client.log_text(self.id, text, name)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table that MLflow's UI lays out as one; one of the same name is replaced.

        Raises InputError if it holds a secret.
        """
        text = json.dumps({"columns": list(columns), "data": list(rows)}, ensure_ascii=False)
        self.log_text(name, text)
        shown = json.dumps([{"path": name, "type": "table"}])
        self.client.set_tag(self.id, "mlflow.loggedArtifacts", shown)


def _refuse_secrets(name: str, content: bytes) -> None:
    if any(secret.encode() in content for secret in secrets()):
        problem = "holds a token or password of the environment or .env"
        raise InputError(f"{name}: {problem}; not logged")


def source() -> dict[str, str]:
    """The code that runs: git commit, and whether what decides results differs from it.

    dvc.lock and metrics/ are results: a pipeline under way changes them, which is not dirt.
    """

    def git(*arguments: str, **environment: str) -> str | None:
        given = {**os.environ, **environment}
        command = ["git", *arguments]
        done = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--verify", "HEAD")
    if commit is None:  # not a checkout, or one without a commit
        return {"sparc3.dirty": "unknown"}
    with TemporaryDirectory() as folder:
        # An index without times: by them git takes a quick change of equal size for none.
        index = f"{folder}/index"
        git("read-tree", "HEAD", GIT_INDEX_FILE=index)
        changes = git("status", "--porcelain", "--", *DECISIVE, GIT_INDEX_FILE=index)
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
def _signals_wait() -> Iterator[None]:
    """Signals that would end the process take effect after the block."""
    came: list[int] = []
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _process() -> dict[str, str]:
    """The tags by which a later process sees whether this one has ended."""
    pid = os.getpid()
    return {"sparc3.host": socket.gethostname(), "sparc3.process": f"{pid} {began(pid)}"}


def _end_dead(client: "MlflowClient", experiment: str) -> None:
    """Mark the runs KILLED that processes of this host, killed themselves, left RUNNING."""
    mine = f"status = 'RUNNING' and tags.`sparc3.host` = '{socket.gethostname()}'"
    for record in client.search_runs([experiment], mine):
        pid, start = record.data.tags["sparc3.process"].split()
        ended, run_id = began(int(pid)) != start, record.info.run_id
        if ended and client.get_run(run_id).info.status == "RUNNING":  # not well, since the search
            client.set_terminated(run_id, "KILLED")


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
        **_process(),
        **source(),
        **(tags or {}),
    }
    with _signals_raise(), ExitStack() as stack:
        client, experiment = connect()
        with answering():
            _end_dead(client, experiment)
            parent = given(client, PARENT)
            with _signals_wait():  # a run that is created is also ended
                run = given(client, "MLFLOW_RUN_ID") or create(client, experiment, parent)
                stack.enter_context(closing(run))
            run.set_tags(described)
            run.log_params({**axes, **params})
        yield run


@contextmanager
def closing(run: Run) -> Iterator[None]:
    """The run ends with the block, and as the block does, whether or not the store can take it."""
    try:
        yield
        _end(run, "FINISHED")
    except BaseException as error:
        if came := _signal_behind(error):
            sys.unraisablehook = lambda _: None  # what fails while it is taken down is no news
            _end(run, "KILLED")
            raise came from None
        _end(run, "FAILED", {"sparc3.error": f"{type(error).__name__}: {first_line(error)}"})
        raise


def _signal_behind(error: BaseException | None) -> KeyboardInterrupt | _Killed | None:
    """The signal that an error is, or that a library was unwinding from when it failed: torch's
    own bookkeeping does, if it is interrupted halfway.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt | _Killed):
        error = error.__context__
    return error


def _end(run: Run, status: str, tags: Mapping[str, str] | None = None) -> None:
    try:
        run.set_tags(tags or {})
        run.client.set_terminated(run.id, status)
    except refusals() as problem:
        said = "run %s is %s, which %s did not take: %s"
        log.warning(said, run.id, status, public_uri(), first_line(problem))


def log_written(steps: Mapping[str, Callable[[], object]]) -> None:
    """Log what a stage has written, step by step, each named by what it logs.

    Where the tracking store does not take a step, that and all after it are named, and the stage
    has still done its work: its outputs exist.
    """
    left = dict(steps)
    try:
        for name, step in steps.items():
            step()
            del left[name]
    except refusals() as error:
        said = "outputs are written, but %s lacks: %s; to log the comparison later: "
        said += "python -m sparc3 report (%s)"
        log.warning(said, public_uri(), ", ".join(left), first_line(error))


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


def create(
    client: "MlflowClient", experiment: str, parent: Run | None, began: int | None = None
) -> Run:
    """A new run, in the experiment of its parent if it has one: nesting ends at the experiment.

    began: when it did, in milliseconds; else now.
    """
    program = Path(sys.argv[0]).name.replace("__main__.py", "sparc3")  # not whose folder it is in
    command = masked(shlex.join([program, *sys.argv[1:]]), MAX_TAG)
    tags = {"mlflow.source.type": "LOCAL", "mlflow.source.name": command, **_process()}
    if parent:
        experiment, tags["mlflow.parentRunId"] = parent.experiment, parent.id
    return Run(client, experiment, client.create_run(experiment, began, tags).info.run_id)
