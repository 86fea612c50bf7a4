"""Where MLflow keeps runs: address, database and experiment.

MLflow is imported only when a run begins: what reads no more than an address need not wait for it.
"""

import gc
import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from sparc3.base.errors import InputError
from sparc3.base.files import locked, replacing
from sparc3.base.secrets import first_line, masked

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


log = logging.getLogger(__name__)
EXPERIMENT = "sparc3"
# A server is asked three times, in ten seconds at most; what the user sets counts more.
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
DVC_COPIES = "/.dvc/tmp/exps/"  # where `dvc exp run --temp` and --queue put their checkouts


def checkout() -> Path:
    """The main checkout of the working directory.

    `dvc exp run --temp` works in a copy inside the checkout and removes it afterwards; what must
    outlive the copy is addressed from here.
    """
    return Path(f"{Path.cwd()}/".partition(DVC_COPIES)[0])


def database(uri: str) -> Path | None:
    """The file of a SQLite address, absolute; None for any other kind of address."""
    scheme, separator, path = uri.partition("?")[0].partition(":///")
    if scheme not in ("sqlite", "sqlite+pysqlite") or not separator:
        return None
    return checkout() / unquote(path)


def sqlite_uri(path: Path) -> str:
    """The address of a SQLite file; what SQLAlchemy would read otherwise than it stands is quoted.

    Then the driver is named: for sqlite:/// MLflow makes the file's folder, of the quoted name.
    """
    quoted = str(path).replace("%", "%25").replace("?", "%3F")
    return f"sqlite{'' if quoted == str(path) else '+pysqlite'}:///{quoted}"


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or mlflow.db in the main checkout; a SQLite path is made absolute."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    try:
        _ = urlsplit(uri).port
    except ValueError:  # which may show a part of the password
        problem = "not an address; is a letter of the password, such as / or #, not quoted (%2F)?"
        raise InputError(f"MLFLOW_TRACKING_URI: {problem}") from None
    path = database(uri)
    return uri if path is None else sqlite_uri(path) + "".join(uri.partition("?")[1:])


def public_uri() -> str:
    """`tracking_uri()` without user name, password and token: fit for messages."""
    uri = tracking_uri()
    user, at, _ = urlsplit(uri).netloc.rpartition("@")
    # urlunsplit would drop slashes of sqlite:////
    return masked(uri.replace(f"{user}{at}", "", 1))


def alone(uri: str) -> AbstractContextManager[None]:
    """Exclusive among processes that share a SQLite file; a server needs no lock and gets none."""
    path = database(uri)
    return locked(path.with_name(f"{path.name}.lock")) if path else nullcontext()


def private(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for DVC: its site cache, of which it loads pickles and which lies in a folder
    open to all, is one of this checkout and its owner's alone, unless the user names another.
    """
    folder = checkout() / ".dvc" / "tmp" / "site"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return {"DVC_SITE_CACHE_DIR": str(folder), **environment}


def _import(uri: str) -> "type[MlflowClient]":
    """MLflow's client, with what it will import for this address: 2 s, and 3 s with the garbage
    collector, which looks through the same million objects again and again.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # every retry is a warning
    collecting = gc.isenabled()
    gc.disable()
    try:
        from mlflow.tracking import MlflowClient

        if not uri.startswith("http"):
            import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
            from mlflow.store.db import utils

            utils.MAX_RETRY_COUNT = 3  # ten would take 102 s
    finally:
        if collecting:
            gc.enable()
    return MlflowClient


def _create_database(path: Path) -> None:
    """A complete database or none: two processes at work on a fresh one break it for good."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with replacing(path) as temporary:
        SqlAlchemyStore(sqlite_uri(temporary), artifact_root(path)).engine.dispose()


def artifact_root(path: Path) -> str:
    """The address of the folder beside a SQLite file that keeps its artifacts."""
    return (path.parent / "mlruns").as_uri()


def _readdress(path: Path) -> None:
    """What a moved or copied store of this checkout keeps beside it is addressed here again.

    MLflow's addresses are absolute, and experiment 0 has the one with which the store was made.
    A run whose artifacts stayed behind keeps its address; how many do is said.
    """
    new, places = artifact_root(path), {"experiments": "artifact_location", "runs": "artifact_uri"}
    with closing(sqlite3.connect(path, timeout=60)) as connection, connection:

        def addresses(table: str) -> list[tuple[int, str]]:
            return connection.execute(f"select rowid, {places[table]} from {table}").fetchall()

        old = dict(addresses("experiments")).get(0, "").removesuffix("/0")
        ours = path.is_relative_to(checkout()) and old.startswith(("/", "file:///"))
        if old == new or not ours or Path(old).name != "mlruns":
            return
        for table, column in places.items():
            for row, address in addresses(table):
                moved = new + quote(unquote(address.removeprefix(old)))
                here = (
                    table == "experiments" or _file(moved).exists() or not _file(address).exists()
                )
                if here and address.startswith(f"{old}/"):
                    update = f"update {table} set {column} = ? where rowid = ?"
                    connection.execute(update, (moved, row))
        if _file(old) != _file(new):
            log.info("%s was moved: artifacts of its runs are in %s now", path, _file(new))
        every = [address for table in places for _, address in addresses(table)]
        if elsewhere := [address for address in every if not address.startswith(f"{new}/")]:
            said = "%s: %d experiments and runs keep artifacts elsewhere, as in %s"
            log.warning(said, path, len(elsewhere), masked(elsewhere[0]))


def _file(address: str) -> Path:
    """Where MLflow finds a local artifact address: it resolves %-escapes of plain paths too."""
    return Path(unquote(urlsplit(address).path if address.startswith("file:") else address))


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
    location = f"{artifact_root(path)}/{quote(name, safe='')}"
    return client.create_experiment(name, artifact_location=location)


def refusals() -> tuple[type[Exception], ...]:
    """What is raised where the tracking store does not answer or does not take."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, sqlite3.Error, OSError


@contextmanager
def answering() -> Iterator[None]:
    """InputError, one line, where the tracking store cannot be used in the block."""
    try:
        yield
    except (*refusals(), ImportError) as error:  # ImportError: of a database's driver
        problem = f"{public_uri()} cannot be used: {first_line(error)}"
        raise InputError(f"MLFLOW_TRACKING_URI: {problem}") from error


@answering()
def connect() -> tuple["MlflowClient", str]:
    """A client and the id of the experiment, both existing; InputError if that cannot be had."""
    uri = tracking_uri()
    mlflow_client = _import(uri)
    with alone(uri):
        path = database(uri)
        if path and not (path.exists() and path.stat().st_size):
            _create_database(path)
        if path:
            _readdress(path)
        client = mlflow_client(uri)  # it would create a database that is not there
        return client, _experiment(client, uri)
