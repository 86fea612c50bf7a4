"""Where MLflow keeps runs: address, database and experiment.

MLflow is imported only when a run begins: what reads no more than an address need not wait for it.
"""

import fcntl
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from sparc3.base.errors import InputError
from sparc3.base.files import replacing
from sparc3.base.secrets import first_line, masked

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


EXPERIMENT = "sparc3"
DVC_COPIES = "/.dvc/tmp/exps/"  # where `dvc exp run --temp` and --queue put their checkouts


def checkout() -> Path:
    """The main checkout of the working directory.

    `dvc exp run --temp` works in a copy inside the checkout and removes it afterwards; what must
    outlive the copy is addressed from here.
    """
    return Path(f"{Path.cwd()}/".partition(DVC_COPIES)[0])


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
    """`tracking_uri()` without user name, password and token: fit for messages."""
    uri = tracking_uri()
    user, at, _ = urlsplit(uri).netloc.rpartition("@")
    # urlunsplit would drop slashes of sqlite:////
    return masked(uri.replace(f"{user}{at}", "", 1))


@contextmanager
def locked(uri: str) -> Iterator[None]:
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
    """MLflow's client, with what it will import for this address: 2 s, and 3 s with the garbage
    collector, which looks through the same million objects again and again.
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
    experiment = client.get_experiment_by_name(name)
    if experiment:
        if experiment.lifecycle_stage != "active":
            raise InputError(
                f"MLflow experiment {name!r} was deleted; restore it with: "
                f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
            )
        return experiment.experiment_id
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


def connect() -> tuple["MlflowClient", str]:
    """A client and the id of the experiment, both existing; InputError if that cannot be had."""
    uri = tracking_uri()
    mlflow_client = _import(uri)
    from mlflow.exceptions import MlflowException

    try:
        with locked(uri):
            path = database(uri)
            if path and not path.exists():
                _create_database(path)
            client = mlflow_client(uri)  # it would create a database that is not there
            return client, _experiment(client, uri)
    except MlflowException as error:
        raise InputError(
            f"MLFLOW_TRACKING_URI: {public_uri()} cannot be used: {first_line(error)}"
        ) from error
