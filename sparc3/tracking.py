"""Runs in MLflow: where they are kept, what a stage's run carries, and the comparison of results.

The only file that imports MLflow, and only when a run begins: what reads no more than an address
need not wait for it. Every run is addressed by its id through the client; nothing here depends on
an "active run" hidden in the process.

Tags of a stage's run: `sparc3.stage`, `sparc3.name` (stage@axes), `sparc3.dvc_stage`,
`sparc3.dvc_experiment`, `sparc3.dirty`, `sparc3.product` (digest of what the stage wrote),
`sparc3.error`, MLflow's own for the git commit and the parent run, and what the caller adds.
Tags of the comparison: `sparc3.state` (digest of the pipeline's state), `sparc3.row`, and
`stage.NAME`, the id of the run of each stage that made the numbers.
"""

import fcntl
import gc
import hashlib
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote, urlsplit

from sparc3.errors import InputError
from sparc3.files import replacing

if TYPE_CHECKING:
    from mlflow.entities import Run as Record
    from mlflow.tracking import MlflowClient

EXPERIMENT = "sparc3"
PARENT = "SPARC3_PARENT_RUN_ID"
DVC_COPIES = "/.dvc/tmp/exps/"  # where `dvc exp run --temp` and --queue put their checkouts
DECISIVE = ("sparc3", "params.yaml", "dvc.yaml", "data.dvc", "requirements.txt")
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_KEY|ACCESS_KEY")
MAX_PARAM, MAX_TAG, MAX_BATCH = 6000, 5000, 100  # MLflow's limits, common to all its stores


# Where runs are kept


def checkout(folder: Path | None = None) -> Path:
    """The main checkout of `folder` (default: the working directory).

    `dvc exp run --temp` works in a copy inside the checkout and removes it afterwards; what must
    outlive the copy is addressed from here.
    """
    path = (folder or Path.cwd()).absolute()
    return Path(f"{path}/".partition(DVC_COPIES)[0])


def database(uri: str) -> Path | None:
    """The file of a SQLite address, absolute; None for any other kind of address."""
    scheme, separator, path = uri.partition(":///")
    return checkout() / unquote(path) if (scheme, separator) == ("sqlite", ":///") else None


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or mlflow.db in the main checkout; a SQLite path is made absolute."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    path = database(uri)
    return uri if path is None else f"sqlite:///{path}"


def public_uri() -> str:
    """`tracking_uri()` without a user name and password: fit for messages."""
    uri = tracking_uri()
    user, at, _ = urlsplit(uri).netloc.rpartition("@")
    return uri.replace(f"{user}{at}", "", 1)  # urlunsplit would drop slashes of sqlite:////


def hand_down(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for the commands of `main`: its own run becomes the parent of theirs.

    A child of `mlflow run` inherits MLFLOW_RUN_ID and logs into that run, which is right for one
    stage and wrong for a pipeline of them.
    """
    handed = dict(environment)
    if run_id := handed.pop("MLFLOW_RUN_ID", None):
        handed[PARENT] = run_id
    return handed


@contextmanager
def _locked(uri: str) -> Iterator[None]:
    """Exclusive among processes that share a SQLite file; a server needs no lock and gets none."""
    path = database(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _import(uri: str) -> "type[MlflowClient]":
    """MLflow's client, with what it will import for this address: 2 s, and 3 s when the garbage
    collector looks through the same million objects again and again meanwhile.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    collecting = gc.isenabled()
    gc.disable()
    try:
        from mlflow.tracking import MlflowClient

        if database(uri):
            import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    finally:
        if collecting:
            gc.enable()
    return MlflowClient


def _create_database(path: Path) -> None:
    """A complete database or none: two processes at work on a fresh one break it for good."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with replacing(path) as temporary:
        SqlAlchemyStore(f"sqlite:///{temporary}", str(path.parent / "mlruns")).engine.dispose()


def _experiment(client: "MlflowClient", uri: str) -> str:
    """Id of the experiment: as `mlflow run` or the user says, else `sparc3`; created at need."""
    if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return given
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    found = client.get_experiment_by_name(name)
    if found:
        if found.lifecycle_stage != "active":
            raise InputError(
                f"MLflow experiment {name!r} was deleted; restore it with: "
                f"mlflow experiments restore --experiment-id {found.experiment_id}"
            )
        return found.experiment_id
    path = database(uri)
    if path is None:
        return client.create_experiment(name)
    # `mlflow run` without an experiment puts its runs under id 0. In the project's own database
    # that is therefore the experiment, or stages and their parent would be kept apart.
    ours = name == EXPERIMENT and path == checkout() / "mlflow.db"
    if ours and client.get_experiment("0").name == "Default":
        client.rename_experiment("0", name)
        return "0"
    return client.create_experiment(name, artifact_location=str(path.parent / "mlruns" / name))


def _connect() -> tuple["MlflowClient", str]:
    """A client and the id of the experiment, both existing; InputError if that cannot be had."""
    uri = tracking_uri()
    mlflow_client = _import(uri)
    from mlflow.exceptions import MlflowException

    try:
        with _locked(uri):
            path = database(uri)
            if path and not path.exists():
                _create_database(path)
            client = mlflow_client(uri)  # it would create a database that is not there
            return client, _experiment(client, uri)
    except MlflowException as error:
        raise InputError(
            f"MLFLOW_TRACKING_URI: {public_uri()} cannot be used: {_first_line(error)}"
        ) from error


def ui_link(port: int = 5000) -> str:
    """The page with the runs as a table: MLflow's own first page is another.

    For a tracking server it is on that server, else on the one that `serve` starts at `port`.
    """
    _, experiment = _connect()
    uri = public_uri()
    server = uri.rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{port}"
    return f"{server}/#/experiments/{experiment}/runs?workflowType=machine_learning"


def serve(port: int) -> None:
    """Print the link and become MLflow's server on 127.0.0.1; the user's own server is only named.

    Raises InputError if the port is taken.
    """
    uri = tracking_uri()
    if uri.startswith("http"):
        print(f"The runs are at {ui_link()}")
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise InputError(
                f"PORT: {port} on 127.0.0.1 cannot be used ({error.strerror}); "
                f"choose another: make ui PORT={port + 1}"
            ) from None
    print(f"The runs are at {ui_link(port)}\nStarting the server; Ctrl-C ends it.", flush=True)
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # more processes, for nothing here
    options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", uri]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "server", *options, *stores])


# What may be logged


def _secrets() -> list[str]:
    """Values of the environment that must not be seen; short ones are switches (`..._TOKEN=1`)."""
    return [v for k, v in os.environ.items() if SECRET.search(k.upper()) and len(v) >= 8]


def _text(value: object, limit: int) -> str:
    """As logged: without secrets, and cut so that different long values stay different."""
    text = str(value)
    for secret in _secrets():
        text = text.replace(secret, "***")
    if len(text) <= limit:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    mark = f"... [{len(text)} characters, sha256 {digest}]"
    return text[: limit - len(mark)] + mark


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return _text(lines[0] if lines else type(error).__name__, MAX_TAG)


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"select": {"num_neurons": 60}} -> {"select.num_neurons": 60}; lists become JSON text."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


def interval(name: str, difference: Mapping[str, float | None]) -> dict[str, float]:
    """A difference {"value", "low", "high", "p", ...} as metrics `name`, `name_low`, ...

    What is None (a bound that does not exist) is left out.
    """
    return {
        name if key == "value" else f"{name}_{key}": value
        for key, value in difference.items()
        if value is not None
    }


# A run


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
        for batch in _batches(new):
            self.client.log_batch(self.id, metrics=batch)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Parameters, flattened; one that is there may be logged again with the same value only."""
        from mlflow.entities import Param

        flat = flatten(params)
        for batch in _batches(Param(k, _text(v, MAX_PARAM)) for k, v in flat.items()):
            self.client.log_batch(self.id, params=batch)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        from mlflow.entities import RunTag

        for batch in _batches(RunTag(k, _text(v, MAX_TAG)) for k, v in tags.items()):
            self.client.log_batch(self.id, tags=batch)

    def set_product(self, digest: str) -> None:
        """Digest of what the stage wrote, by which `pipeline_run` finds the run that wrote it."""
        self.set_tags({"sparc3.product": digest})

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """A file, under `folder` of the run's artifacts; one of the same name is replaced.

        Raises InputError if the file is missing or holds a secret of the environment, ValueError
        for tensors: DVC keeps those, and their digest belongs in a tag.
        """
        if path.suffix == ".safetensors":
            raise ValueError(f"{path}: tensors are kept by DVC; log their digest as a tag")
        if not path.is_file():
            raise InputError(f"{path}: file not found; an artifact must be a file")
        content = path.read_bytes()
        if any(secret.encode() in content for secret in _secrets()):
            raise InputError(f"{path}: holds a token or password of the environment; not logged")
        self.client.log_artifact(self.id, str(path), folder)

    def end(self, status: str) -> None:
        """FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.id, status)


def _batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    everything = list(items)
    for start in range(0, len(everything), MAX_BATCH):
        yield everything[start : start + MAX_BATCH]


def _source() -> dict[str, str]:
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

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for caught in before:
            signal.signal(caught, signal.SIG_IGN)
        raise _Killed(128 + number)

    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)}
    before = {s: handler for s, handler in before.items() if handler is not signal.SIG_IGN}
    for caught in before:
        signal.signal(caught, stop)
    try:
        yield
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


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
    name = "@".join([stage, "-".join(axes.values())]) if axes else stage
    described = {
        "mlflow.runName": name,
        "sparc3.stage": stage,
        "sparc3.name": name,
        **({"sparc3.dvc_stage": value} if (value := os.environ.get("DVC_STAGE")) else {}),
        **({"sparc3.dvc_experiment": value} if (value := os.environ.get("DVC_EXP_NAME")) else {}),
        **_source(),
        **(tags or {}),
    }
    with _signals_raise():
        client, experiment = _connect()
        run = _given(client, "MLFLOW_RUN_ID")
        if run is None:
            run = _create(client, experiment, _given(client, PARENT))
        with _closing(run):
            run.set_tags(described)
            run.log_params({**axes, **params})
            yield run


@contextmanager
def _closing(run: Run) -> Iterator[None]:
    """The run ends with the block, and as the block does."""
    try:
        yield
        run.end("FINISHED")
    except (KeyboardInterrupt, _Killed):
        run.end("KILLED")
        raise
    except BaseException as error:
        run.set_tags({"sparc3.error": f"{type(error).__name__}: {_first_line(error)}"})
        run.end("FAILED")
        raise


def _given(client: "MlflowClient", variable: str) -> Run | None:
    """The run whose id a variable of the environment holds."""
    run_id = os.environ.get(variable)
    if not run_id:
        return None
    from mlflow.exceptions import MlflowException

    try:
        return Run(client, client.get_run(run_id).info.experiment_id, run_id)
    except MlflowException as error:
        raise InputError(
            f"{variable}: {run_id} is not a run of {public_uri()} ({_first_line(error)}); unset it"
        ) from None


def _create(client: "MlflowClient", experiment: str, parent: Run | None) -> Run:
    """A new run, in the experiment of its parent if it has one: nesting ends at the experiment."""
    command = _text(shlex.join(sys.argv), MAX_TAG)
    tags = {"mlflow.source.type": "LOCAL", "mlflow.source.name": command}
    if parent:
        experiment, tags["mlflow.parentRunId"] = parent.experiment, parent.id
    return Run(client, experiment, client.create_run(experiment, tags=tags).info.run_id)


# The comparison


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a behaviour under a method.

    `stages` names the stage runs (`evaluate@toxicity`) that made its numbers.
    """

    behaviour: str
    method: str
    metrics: Mapping[str, float]
    artifacts: Sequence[Path] = ()
    stages: Sequence[str] = ()


def pipeline_run(
    report: Run,
    state: str,
    params: Mapping[str, Any],
    rows: Sequence[Row],
    products: Mapping[str, str],
    artifacts: Sequence[Path] = (),
) -> str:
    """One run for a state of the pipeline and, nested in it, one per row; returns the parent's id.

    A stage that DVC finds unchanged does not run and logs nothing, so the comparison is logged from
    the results. Called again for the same state, it updates the runs that are there. Under `main`,
    main's own run is the parent. The parent carries every row's metrics as `behaviour/method/name`,
    so that states are compared without unfolding them.

    Args:
        report: the open run of the stage that calls.
        state: digest of all that decides the rows: equal state, equal `params`.
        params: nested or flat, of the whole pipeline; logged on the parent and on every row.
        rows: the cells, enumerated from params.
        products: digest of what each stage wrote, by the stage run's name (`evaluate@toxicity`),
            as given to `set_product`. The latest finished run with that name and digest made it: it
            is linked by the tag `stage.NAME`, and nested under the parent unless it has one.
            A product without a run here (it came from a DVC remote) is not linked.
        artifacts: files of the whole (result table, figures).
    """
    client, main = report.client, _given(report.client, PARENT)
    with _locked(tracking_uri()):
        makers = {name: _maker(report, name, digest) for name, digest in products.items()}
        made = {name: maker for name, maker in makers.items() if maker}
        parent = _found(report, state, "all") or main or _create(client, report.experiment, None)
        # Main's own run is ended by `mlflow run`, when all of main has ended.
        with _closing(parent) if parent != main else nullcontext():
            title = os.environ.get("DVC_EXP_NAME") or f"pipeline {state[:8]}"
            parent.set_tags({"mlflow.runName": title, **_identity(state, "all", made.values())})
            parent.log_params(params)
            for path in artifacts:
                parent.log_artifact(path)
            for row in rows:
                name = f"{row.behaviour}/{row.method}"
                run = _found(report, state, name) or _create(client, parent.experiment, parent)
                with _closing(run):
                    by = [made[stage] for stage in row.stages if stage in made]
                    run.set_tags({"mlflow.runName": name, **_identity(state, name, by)})
                    run.set_tags({"mlflow.parentRunId": parent.id})
                    run.log_params({**params, "behaviour": row.behaviour, "method": row.method})
                    run.log_metrics(row.metrics)
                    for path in row.artifacts:
                        run.log_artifact(path)
                parent.log_metrics({f"{name}/{key}": value for key, value in row.metrics.items()})
            for record in (*made.values(), client.get_run(report.id)):
                if "mlflow.parentRunId" not in record.data.tags:
                    client.set_tag(record.info.run_id, "mlflow.parentRunId", parent.id)
    return parent.id


def _identity(state: str, row: str, makers: Iterable["Record"]) -> dict[str, str]:
    """The tags by which a run of the comparison is found again, and what made it."""
    links = {
        f"stage.{maker.data.tags['sparc3.name'].replace('@', '.')}": maker.info.run_id
        for maker in makers
    }
    return {"sparc3.state": state, "sparc3.row": row, **_source(), **links}


def _search(report: Run, tags: Mapping[str, str]) -> list["Record"]:
    """Runs of the experiment with these tags, latest first; values hold no quotation marks."""
    conditions = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    return list(
        report.client.search_runs([report.experiment], conditions, order_by=["start_time DESC"])
    )


def _found(report: Run, state: str, row: str) -> Run | None:
    records = _search(report, {"sparc3.state": state, "sparc3.row": row})
    return Run(report.client, report.experiment, records[0].info.run_id) if records else None


def _maker(report: Run, name: str, digest: str) -> "Record | None":
    records = _search(report, {"sparc3.name": name, "sparc3.product": digest})
    return next((r for r in records if r.info.status == "FINISHED"), None)


def latest_metrics(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Name of a stage run -> these metrics of its latest finished run that has them all."""
    client, experiment = _connect()
    found: dict[str, dict[str, float]] = {}
    token = None
    while True:
        page = client.search_runs(
            [experiment],
            "attributes.status = 'FINISHED'",
            order_by=["attributes.start_time DESC"],
            page_token=token,
        )
        for record in page:
            name, metrics = record.data.tags.get("sparc3.name"), record.data.metrics
            if name and name not in found and all(key in metrics for key in names):
                found[name] = {key: metrics[key] for key in names}
        token = page.token
        if not token:
            return found
