"""The tracking UI: MLflow's server on 127.0.0.1, and the link to the runs."""

import os
import socket
import sys

from sparc3.base.errors import InputError
from sparc3.base.store import connect, public_uri, tracking_uri


def ui_link(port: int = 5000) -> str:
    """The page with the runs as a table, on the user's server, or `run`'s at `port`."""
    _, experiment = connect()
    uri = public_uri()
    server = uri.rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{port}"
    return f"{server}/#/experiments/{experiment}/runs?workflowType=machine_learning"


def run(port: int) -> None:
    """Print the link and become MLflow's server on 127.0.0.1; the user's own is only named."""
    uri = tracking_uri()
    if uri.startswith("http"):
        print(f"The runs are at {ui_link()}")
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            problem = f"{port} on 127.0.0.1 cannot be used ({error.strerror})"
            raise InputError(f"PORT: {problem}; try: make ui PORT={port + 1}") from None
    print(f"The runs are at {ui_link(port)}\nStarting the server; Ctrl-C ends it.", flush=True)
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # more processes, for nothing here
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri  # a command line, and so a password, is for all
    options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "server", *options])
