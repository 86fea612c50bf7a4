"""The tracking UI: MLflow's server on 127.0.0.1, and the link to the runs."""

import json
import os
import socket
import sys

from sparc3.base.comparison import GROUP
from sparc3.base.errors import InputError
from sparc3.base.store import answering, connect, public_uri, tracking_uri

COLUMNS = {  # tags of the rows, and the columns' widths in pixels; all fit in a window of 1600
    "behaviour": 80,
    "method": 120,
    "neurons": 70,
    "verdict": 175,
    "reduction": 165,
    "perplexity": 195,
    "differential": 155,
}


def view() -> str:
    """A saved view of MLflow's runs table: rows with their answers, grouped by pipeline.

    It is written as the table itself writes one that is shared, so that it is in its menu, too.
    """
    columns = {f"tags.`{tag}`": width for tag, width in COLUMNS.items()}
    widths = {"attributes.`Run Name`": 190, "runDateAndNestInfo": 110, **columns}
    state = {
        "searchFilter": f"tags.{GROUP} LIKE '%'",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "selectedColumns": list(columns),
        "columnOrder": list(widths),
        "columnWidths": widths,
        "groupBy": {
            "aggregateFunction": "average",
            "groupByKeys": [{"mode": "tag", "groupByData": GROUP}],
        },
    }
    return json.dumps({"name": "results", "createdAt": 0, "state": json.dumps(state)})


def ui_link(port: int = 5000) -> str:
    """The page with the runs as a table, on the user's server, or `run`'s at `port`.

    The view that it opens is kept with the experiment.
    """
    client, experiment = connect()
    with answering():
        client.set_experiment_tag(experiment, "mlflow.sharedViewState.sparc3", view())
    uri = public_uri()
    server = uri.rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{port}"
    shown = "viewStateShareKey=sparc3&workflowType=machine_learning"
    return f"{server}/#/experiments/{experiment}/runs?{shown}"


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
