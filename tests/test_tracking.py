"""Runs in real MLflow stores: SQLite files made here, processes started here."""

import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path

import pytest

from sparc3.base import comparison, runs, store
from sparc3.base.errors import InputError
from sparc3.base.files import digest, write_text
from sparc3.base.secrets import first_line, hub_reason, masked, secrets
from sparc3.commands import ui

REPOSITORY = Path(__file__).parent.parent
AWKWARD = "what? a%20b ä #x"  # a checkout's name of all that means something else in an address
FOREIGN = re.compile(r"MLFLOW_|DVC_|SPARC3_|HF_TOKEN|GIT_")
STAGE = """
    import signal, sys, time
    from pathlib import Path
    from sparc3.base.runs import stage_run

    # A shell's background job, which the tests may be part of, ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with stage_run(sys.argv[1], {}, {"select": {"k": 1}}) as run:
        Path("note.txt").write_text(sys.argv[1])
        run.log_artifact(Path("note.txt"))
        print("open", flush=True)
        time.sleep(float(sys.argv[2]))
"""


def environment(**more):
    """This process's, without what would send a run elsewhere."""
    kept = {k: v for k, v in os.environ.items() if not FOREIGN.match(k)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    git = {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "DVC_NO_ANALYTICS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "1",
    }
    return {**kept, **git, "PATH": path, "PYTHONPATH": str(REPOSITORY), **more}


def call(folder, *command, **more):
    done = subprocess.run(
        command, cwd=folder, env=environment(**more), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(folder, *arguments, **more):
    return subprocess.Popen(
        [sys.executable, "stage.py", *arguments],
        cwd=folder,
        env=environment(**more),
        stdout=subprocess.PIPE,
        text=True,
    )


def commit(folder):
    call(folder, "git", "add", "-A")
    call(folder, "git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "all")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A git checkout with one stage, whose database three processes found missing at once."""
    folder = tmp_path_factory.mktemp("root") / AWKWARD
    folder.mkdir()
    (folder / "stage.py").write_text(textwrap.dedent(STAGE))
    (folder / "params.yaml").write_text("k: 1\n")
    (folder / ".gitignore").write_text("/mlflow.db*\n/mlruns/\nnote.txt\n")
    call(folder, "git", "init", "-q")
    commit(folder)
    together = [start(folder, f"stage{i}", "0") for i in range(3)]
    for process in together:
        process.communicate()
    assert [process.returncode for process in together] == [0, 0, 0]
    return folder


@pytest.fixture
def here(project, monkeypatch, request):
    """Work in the project, in an experiment of the test's own."""
    monkeypatch.chdir(project)
    for name in list(os.environ):
        if FOREIGN.match(name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", request.node.name)
    return project


@contextmanager
def opened(stage="select", axes=None, params=None, **more):
    with runs.stage_run(stage, axes or {}, params or {}, **more) as run:
        yield run


def recorded(run):
    return run.client.get_run(run.id)


def all_runs(folder, name):
    """Every run of an experiment, read with a client of its own."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store.sqlite_uri(folder / "mlflow.db"))
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    return client.search_runs([experiment.experiment_id], max_results=1000)


# Where runs are kept


def test_processes_that_find_no_database_create_one(project):
    runs = [
        r
        for r in all_runs(project, "sparc3")
        if str(r.info.run_name) in {f"stage{i}" for i in range(3)}
    ]
    assert sorted(str(r.info.run_name) for r in runs) == ["stage0", "stage1", "stage2"]
    assert {r.info.status for r in runs} == {"FINISHED"}
    # The experiment is the one in which `mlflow run` puts its runs.
    assert {r.info.experiment_id for r in runs} == {"0"}
    for run in runs:
        note = project / "mlruns" / "0" / run.info.run_id / "artifacts" / "note.txt"
        assert note.read_text() in {"stage0", "stage1", "stage2"}
    assert not list(project.glob(".mlflow.db*")), "the temporary database is left behind"


@pytest.mark.parametrize(
    ("folder", "given", "address"),
    [
        ("", None, "{root}/mlflow.db"),
        (".dvc/tmp/exps/standalone/tmp1", None, "{root}/mlflow.db"),
        (".dvc/tmp/exps/standalone/tmp1", "sqlite:///runs/a.db", "{root}/runs/a.db"),
        (".dvc/tmp/exps/standalone/tmp1", "sqlite:////elsewhere/a.db", "/elsewhere/a.db"),
        ("", "sqlite:////else%20where/a.db", "/else where/a.db"),
        ("", "sqlite:////elsewhere/a.db?timeout=60", "/elsewhere/a.db?timeout=60"),
    ],
)
def test_sqlite_addresses_are_absolute_and_outlive_dvcs_copy(
    tmp_path, monkeypatch, folder, given, address
):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if given:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert store.tracking_uri() == f"sqlite:///{address.format(root=tmp_path)}"


def test_the_users_server_is_used_and_its_password_not_shown(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@runs.example:8443/mlflow")
    assert store.tracking_uri() == "https://me:secret@runs.example:8443/mlflow"
    assert store.public_uri() == "https://runs.example:8443/mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@runs.example/?token=abc&x=1")
    assert store.public_uri() == "https://runs.example/?***&x=1"
    for plain in ("sqlite:////srv/runs/mlflow.db", "http://127.0.0.1:5000"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", plain)
        assert store.public_uri() == plain


def test_a_users_database_gets_the_experiment_and_keeps_its_artifacts(here, tmp_path, monkeypatch):
    template = here / "mlflow.db"  # creating one takes seconds; a copy is as foreign
    (tmp_path / "mine.db").write_bytes(template.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mine.db'}")
    write_text(tmp_path / "a.txt", "a")
    with opened() as run:
        run.log_artifact(tmp_path / "a.txt")
    assert [p.name for p in (tmp_path / "mlruns").rglob("*.txt")] == ["a.txt"]


@pytest.mark.parametrize("name", ["a%20b", "what?", "ä b", "#x", "it's", "a:b"])
def test_a_store_that_was_copied_with_its_checkout_works_there(
    here, tmp_path, monkeypatch, name, caplog, request
):
    """As an old version left it, addresses being plain paths, and in any folder."""
    write_text(tmp_path / "a.txt", "a")
    with opened() as kept:
        kept.log_artifact(tmp_path / "a.txt")
    with opened() as left:
        left.log_artifact(tmp_path / "a.txt")
    with opened() as foreign:
        pass
    new, old = tmp_path / name / "again", tmp_path / "old"
    for folder in (new, old):  # a copy, the original and what is not in the copy
        shutil.copytree(here / "mlruns", folder / "mlruns")
    shutil.rmtree(next((new / "mlruns").rglob(left.id)))
    shutil.copy(here / "mlflow.db", new)
    with closing(sqlite3.connect(new / "mlflow.db")) as connection, connection:
        root = store.artifact_root(here / "mlflow.db")
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            change = f"update {table} set {column} = replace({column}, ?, ?)"
            connection.execute(change, (root, str(old / "mlruns")))
        change = "update runs set artifact_uri = 's3://a/b' where run_uuid = ?"
        connection.execute(change, (foreign.id,))
    monkeypatch.chdir(new)
    caplog.set_level("INFO")
    with opened() as run:
        run.log_artifact(tmp_path / "a.txt")
    (said,) = [r.getMessage() for r in caplog.records if "was moved" in r.getMessage()]
    assert str(new / "mlruns") in said
    (said,) = [r.getMessage() for r in caplog.records if "elsewhere" in r.getMessage()]
    assert ": 2 experiments and runs keep artifacts elsewhere" in said
    assert [p.parent.parent.name for p in new.rglob(f"*{run.id}/artifacts/a.txt")] == [run.id]
    next(new.rglob(f"{kept.id}/artifacts/a.txt")).write_text("the copy's")
    for each, content in ((kept, "the copy's"), (left, "a"), (run, "a")):
        assert Path(run.client.download_artifacts(each.id, "a.txt")).read_text() == content
    assert f"/experiments/{run.experiment}/" in ui.ui_link()
    assert not list(old.rglob(run.id))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({"a.txt", "old", name})
    caplog.clear()
    with opened():
        pass
    assert not [r for r in caplog.records if r.name == "sparc3.base.store"], "said once"


@pytest.mark.parametrize("content", [b"", b"a text\n" * 999, b"SQLite format 3\0 and no more"])
def test_a_file_that_is_no_database_is_one_line(here, tmp_path, monkeypatch, content):
    (tmp_path / "text.db").write_bytes(content)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'text.db'}")
    if not content:  # as `touch` leaves it: becomes a database
        assert "/experiments/" in ui.ui_link()
        return
    with pytest.raises(InputError, match=r"text\.db cannot be used: file is not a database$"):
        ui.ui_link()


def test_a_database_of_another_mlflow_is_one_line(here, monkeypatch, tmp_path):
    other = tmp_path / "other.db"
    other.write_bytes((here / "mlflow.db").read_bytes())
    with closing(sqlite3.connect(other)) as connection, connection:
        connection.execute("update alembic_version set version_num = '451aebb31d03'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    message = r"^MLFLOW_TRACKING_URI: .*other\.db cannot be used: .*out-of-date[^\n]*$"
    with pytest.raises(InputError, match=message):
        ui.ui_link()


def test_a_deleted_experiment_is_named(here):
    link = ui.ui_link()
    with opened() as run:
        pass
    run.client.delete_experiment(run.experiment)
    assert f"/experiments/{run.experiment}/" in link
    with pytest.raises(InputError, match=f"restore --experiment-id {run.experiment}"):
        ui.ui_link()


# A stage's run


def test_a_finished_run_carries_what_was_logged(here, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "attribute@toxicity")
    monkeypatch.setenv("DVC_EXP_NAME", "rusty-fern")
    write_text(tmp_path / "circuit.csv", "layer,neuron\n")
    params = {"select": {"num_neurons": 60, "q": 0.001, "seeds": [0, 1]}, "model.path": "models/x"}
    with opened(
        "attribute", {"behaviour": "toxicity"}, params, tags={"digest.model": "abc"}
    ) as run:
        run.log_metrics({"reduction": -23.5, "n": 7})
        run.log_artifact(tmp_path / "circuit.csv")
        run.set_product("def")
    record = recorded(run)
    assert (record.info.status, record.info.run_name) == ("FINISHED", "attribute@toxicity")
    assert record.data.params == {
        "behaviour": "toxicity",
        "select.num_neurons": "60",
        "select.q": "0.001",
        "select.seeds": "[0, 1]",
        "model.path": "models/x",
    }
    assert record.data.metrics == {"reduction": -23.5, "n": 7.0}
    assert [a.path for a in run.client.list_artifacts(run.id)] == ["circuit.csv"]
    head = call(here, "git", "rev-parse", "HEAD").strip()
    expected = {
        "sparc3.stage": "attribute",
        "sparc3.name": "attribute@toxicity",
        "sparc3.dvc_stage": "attribute@toxicity",
        "sparc3.dvc_experiment": "rusty-fern",
        "sparc3.product": "def",
        "digest.model": "abc",
        "mlflow.source.git.commit": head,
        "sparc3.dirty": "false",
    }
    assert expected.items() <= record.data.tags.items()
    source = record.data.tags["mlflow.source.name"]  # of whose home a server need not know
    assert not source.startswith("/")
    assert "mlflow.parentRunId" not in record.data.tags


def test_dirty_means_what_decides_results(here):
    def dirty():
        with opened() as run:
            pass
        return recorded(run).data.tags["sparc3.dirty"]

    results = [here / "dvc.lock", here / "metrics" / "a.json"]
    for path in results:
        write_text(path, "{}")
    assert dirty() == "false"
    (here / "params.yaml").write_text("k: 2\n")
    assert dirty() == "true"
    call(here, "git", "checkout", "-q", "params.yaml")
    (here / "sparc3").mkdir()
    write_text(here / "sparc3" / "new.py", "")  # untracked code decides results too
    assert dirty() == "true"
    for path in (*results, here / "sparc3" / "new.py"):
        path.unlink()


def test_without_git_the_commit_is_not_made_up(here, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.sqlite_uri(here / "mlflow.db"))
    monkeypatch.chdir(tmp_path)
    with opened() as run:
        pass
    tags = recorded(run).data.tags
    assert tags["sparc3.dirty"] == "unknown"
    assert "mlflow.source.git.commit" not in tags


@pytest.mark.parametrize(
    ("error", "tag"),
    [
        (InputError("params.yaml: select.k: expected int"), "InputError: params.yaml: select.k: "),
        (RuntimeError("first line\nsecond line"), "RuntimeError: first line"),
        (SystemExit(), "SystemExit: SystemExit"),
    ],
)
def test_an_exception_ends_the_run_as_failed_and_goes_on(here, error, tag):
    with pytest.raises(type(error)) as caught, opened() as run:
        run.log_metrics({"loss": 1.0})
        raise error
    record = recorded(run)
    assert caught.value is error
    assert record.info.status == "FAILED"
    assert record.data.tags["sparc3.error"].startswith(tag)
    assert "second" not in record.data.tags["sparc3.error"]
    assert record.data.metrics == {"loss": 1.0}


def test_signals_end_the_run_as_killed(project):
    sent = {"term": signal.SIGTERM, "int": signal.SIGINT}
    processes = {name: start(project, name, "600") for name in sent}
    for name, process in processes.items():
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        process.send_signal(sent[name])
    codes = {name: process.wait(timeout=300) for name, process in processes.items()}
    assert codes == {"term": 128 + 15, "int": -signal.SIGINT}
    status = {str(r.info.run_name): r.info.status for r in all_runs(project, "sparc3")}
    assert {name: status[name] for name in sent} == dict.fromkeys(sent, "KILLED")


def test_a_library_that_fails_while_a_signal_unwinds_it_is_interrupted(here, request, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", request.node.name)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    def interrupted():
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("half done")

    with pytest.raises(KeyboardInterrupt), opened("interrupted"):
        interrupted()
    with pytest.raises(RuntimeError, match="half done"), opened("failed"):
        raise RuntimeError("half done")
    status = {r.info.run_name: r.info.status for r in all_runs(here, request.node.name)}
    assert status == {"interrupted": "KILLED", "failed": "FAILED"}


def test_runs_whose_process_was_killed_are_ended_by_the_next(here, request):
    name = request.node.name
    started = [start(here, word, "600", MLFLOW_EXPERIMENT_NAME=name) for word in ("dead", "alive")]
    try:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
        started[0].kill()
        time.sleep(0.5)  # not waited for: a zombie is dead too
        with opened("far") as far:
            far.set_tags({"sparc3.host": "another.example", "sparc3.process": "1 1"})
            far.client.update_run(far.id, status="RUNNING")
            with opened("reused") as reused:  # its number is another process's by now
                reused.set_tags({"sparc3.process": f"{os.getpid()} 1"})
                with opened("next"):
                    status = {r.info.run_name: r.info.status for r in all_runs(here, name)}
    finally:
        for process in started:
            process.kill()
            process.wait()
    running = dict.fromkeys(("alive", "far", "next"), "RUNNING")
    assert status == {**running, **dict.fromkeys(("dead", "reused"), "KILLED")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_run_is_created_ends_it(here, monkeypatch, number):
    made, create = [], runs.create

    def interrupted(*arguments):
        made.append(create(*arguments))
        signal.raise_signal(number)
        return made[0]

    monkeypatch.setattr(runs, "create", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)), opened():
            pytest.fail("the block was entered")
    finally:
        signal.signal(signal.SIGINT, before)
    assert recorded(made[0]).info.status == "KILLED"


# A store that does not answer


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(answer):
    """The port of a server that gives this answer to every connection; None: it is silent."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            kept = []
            with suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    kept.append(connection)
                    if answer:
                        connection.recv(65536)
                        connection.sendall(answer)
                        connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("kind", ["refuses", "silent", "busy"])
def test_a_server_that_is_down_is_one_line_in_ten_seconds(here, monkeypatch, kind):
    busy = b"HTTP/1.1 503 Busy\r\nRetry-After: 600\r\nContent-Length: 0\r\n\r\n"
    with server(busy if kind == "busy" else None) as port:
        refusing = free_port()
        address = f"127.0.0.1:{refusing if kind == 'refuses' else port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@{address}")
        begun = time.monotonic()
        with pytest.raises(InputError) as caught, opened():
            pytest.fail("the block was entered")
        assert time.monotonic() - begun < 11
    said = str(caught.value)
    assert said.startswith(f"MLFLOW_TRACKING_URI: http://{address} cannot be used: ")
    assert "secret" not in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("nonsense+x://a", "nonsense\\+x://a cannot be used: "),
        ("mysql+nodriver://h/x", "mysql\\+nodriver://h/x cannot be used: .*nodriver"),
        ("postgresql://[/x", "not an address"),
        ("http://me:never/seen@host", "not an address"),
    ],
)
def test_an_address_that_is_none_and_a_driver_that_is_missing_are_one_line(
    here, monkeypatch, uri, problem
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(InputError, match=f"^MLFLOW_TRACKING_URI: {problem}[^\n]*$") as caught:
        ui.ui_link()
    assert "never" not in str(caught.value)


def test_an_experiment_id_that_does_not_exist_is_one_line(here, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "987654")
    with pytest.raises(InputError, match=r"cannot be used: [^\n]*987654[^\n]*$"), opened():
        pytest.fail("the block was entered")


def test_a_stage_whose_outputs_are_written_does_not_fail_where_they_are_not_logged(
    here, tmp_path, monkeypatch, caplog
):
    write_text(tmp_path / "a.txt", "a")

    def refuse(*arguments, **named):
        raise OSError(f"no space left {SECRET}")

    monkeypatch.setenv("HF_TOKEN", SECRET)
    with opened() as run:
        steps = {
            "metrics": lambda: run.log_metrics({"a": 1.0}),
            "a.txt": lambda: run.log_artifact(tmp_path / "a.txt"),
            "digest": lambda: run.set_product("p"),
        }
        monkeypatch.setattr(run.client, "log_artifact", refuse)
        runs.log_written(steps)
    (said,) = [r.getMessage() for r in caplog.records if r.name == "sparc3.base.runs"]
    assert "lacks: a.txt, digest; to log the comparison later: python -m sparc3 report" in said
    assert "(no space left ***)" in said
    assert recorded(run).info.status == "FINISHED"
    assert recorded(run).data.metrics == {"a": 1.0}
    with pytest.raises(InputError, match="file not found"), opened():  # a defect of the stage's
        runs.log_written({"b.txt": lambda: run.log_artifact(tmp_path / "b.txt")})


@pytest.mark.parametrize("error", [None, KeyError("mine"), KeyboardInterrupt()])
def test_a_store_that_dies_midway_hides_neither_success_nor_error(here, monkeypatch, caplog, error):
    def refuse(*arguments, **named):
        raise OSError("connection reset")

    with pytest.raises(type(error)) if error else nullcontext(), opened() as run:
        for call in ("log_batch", "set_terminated"):
            monkeypatch.setattr(run.client, call, refuse)
        if error:
            raise error
    (said,) = [r.getMessage() for r in caplog.records if r.name == "sparc3.base.runs"]
    assert f"run {run.id} is F" in said or f"run {run.id} is KILLED" in said
    assert said.endswith("did not take: connection reset")


def test_handlers_of_signals_are_put_back(here):
    before = signal.getsignal(signal.SIGTERM)
    with opened():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_is_an_error(here, value):
    with pytest.raises(ValueError, match="metric 'ppl' is"), opened() as run:
        run.log_metrics({"loss": 1.0, "ppl": value})
    assert recorded(run).info.status == "FAILED"
    assert recorded(run).data.metrics == {}


def test_artifacts_are_files_and_no_tensors(here, tmp_path):
    with opened() as run:
        with pytest.raises(InputError, match=r"gone\.csv: file not found"):
            run.log_artifact(tmp_path / "gone.csv")
        with pytest.raises(ValueError, match="kept by DVC"):
            run.log_artifact(tmp_path / "scores.safetensors")


def test_a_table_is_replaced_and_holds_no_secret(here, monkeypatch):
    with opened() as run:
        run.log_table("texts.json", ["prompt", "score"], [["old", 1.0], ["older", 0.5]])
        run.log_table("texts.json", ["prompt", "score"], [["né | x", 0.25]])
        monkeypatch.setenv("HF_TOKEN", "hf_neverToBeSeenAnywhere")
        with pytest.raises(InputError, match=r"^more\.json: holds a token"):
            run.log_table("more.json", ["a"], [["x hf_neverToBeSeenAnywhere y"]])
    table = run.client.load_table(run.experiment, "texts.json", [run.id])
    assert table[["prompt", "score"]].values.tolist() == [["né | x", 0.25]]
    assert [each.path for each in run.client.list_artifacts(run.id)] == ["texts.json"]


def test_many_and_long_values_fit_and_stay_distinct(here):
    many = {f"key.{i}": i for i in range(250)}
    long = {"a": "x" * 20_000, "b": "x" * 20_001}
    with opened(params=many | long, tags=long) as run:
        run.log_metrics({key: float(value) for key, value in many.items()})
    data = recorded(run).data
    assert {key: int(data.params[key]) for key in many} == many
    assert data.metrics == many
    for logged in (data.params, data.tags):
        assert logged["a"].startswith("xxx")
        assert logged["a"] != logged["b"]
        assert "20000 characters" in logged["a"]
        assert len(logged["a"]) <= 6000


SECRET = "hf_neverToBeSeenAnywhere"
GIVEN = {  # where a secret is given: variables of the environment, and lines of .env
    "environment": ({"HF_TOKEN": SECRET}, ""),
    "another variable": ({"my_api_key": SECRET}, ""),
    ".env": ({}, f"# mine\nexport HF_TOKEN='{SECRET}'  # of the hub\n"),
    "another variable of .env": ({}, f'WANDB_API_KEY="{SECRET}"\n'),
    "password of an address": ({"REGISTRY": f"https://me:{SECRET}@runs.example/x"}, ""),
    "token of an address": ({"REGISTRY": f"https://runs.example/?x=1&token={SECRET}"}, ""),
    "user of an address": ({}, f"PIP_INDEX_URL=https://{SECRET}@pip.example/simple\n"),
}


@pytest.mark.parametrize(("variables", "lines"), GIVEN.values(), ids=list(GIVEN))
def test_secrets_reach_neither_the_database_nor_the_artifacts(
    here, tmp_path, monkeypatch, variables, lines
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.sqlite_uri(here / "mlflow.db"))
    monkeypatch.setattr(sys, "argv", ["sparc3", SECRET])
    write_text(tmp_path / ".env", lines)
    write_text(tmp_path / "completions.jsonl", f"... {SECRET} ...")
    with pytest.raises(InputError, match="holds a token"), opened() as run:
        run.log_artifact(tmp_path / "completions.jsonl")
    with (
        pytest.raises(RuntimeError),
        opened(params={"url": f"x?{SECRET}"}, tags={"t": SECRET}) as run,
    ):
        run.set_tags({"u": f"bearer {SECRET}"})
        raise RuntimeError(f"401 for https://hub?key={SECRET}")
    data = recorded(run).data
    assert data.params["url"] == "x?***"
    assert data.tags["sparc3.error"] == "RuntimeError: 401 for https://hub?key=***"
    files = [here / "mlflow.db", *(p for p in (here / "mlruns").rglob("*") if p.is_file())]
    assert len(files) > 1
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize(("variables", "lines"), GIVEN.values(), ids=list(GIVEN))
def test_error_messages_hold_no_secrets(tmp_path, monkeypatch, capsys, variables, lines):
    from sparc3.__main__ import main

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / ".env", lines)
    error = OSError(f"\n401 for {SECRET}\nand more")
    assert first_line(error) == "401 for ***"
    assert "(OSError: 401 for ***); " in hub_reason(error)
    write_text(tmp_path / "params.yaml", f"{SECRET}: 1\n")
    assert main(["report"]) == 2
    printed = capsys.readouterr().err
    assert "***" in printed
    assert SECRET not in printed


def test_what_is_masked_is_a_secret_and_no_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        monkeypatch.delenv(name)
    assert secrets() == []
    variables = {
        "HF_TOKEN": "1",  # a switch
        "NAME": "no secret at all",
        "DATABASE": "postgresql://research:p%40ss@host/runs",  # short, and escaped
        "TRUSTED": "postgresql://research@host/runs",
        "DOCS": "see http://[ and ://",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    text = "1 research in postgresql://research:p%40ss@host/runs of research:p@ss@host"
    assert masked(text) == "1 research in postgresql://***host/runs of ***host"
    monkeypatch.setenv("A_SECRET", "abcdefgh")
    monkeypatch.setenv("B_SECRET", "abcdefghijkl")  # holds the other
    assert masked("abcdefghijkl abcdefgh") == "*** ***"
    (tmp_path / ".env").write_bytes(b"HF_TOKEN=\xff\n")
    with pytest.raises(InputError, match=r"^\.env: not UTF-8"):
        secrets()


def test_flatten():
    nested = {"a": {"b": {"c": 1}, "d": [1, {"e": 2}]}, "f": None, "g": {}, "h": True}
    flat = {"a.b.c": "1", "a.d": '[1, {"e": 2}]', "f": "null", "g": "{}", "h": "true"}
    assert runs.flatten(nested) == flat
    assert runs.flatten(runs.flatten(nested)) == flat


# Nesting


def test_a_stage_of_main_is_nested_and_one_started_alone_is_that_run(here, monkeypatch):
    with opened("main") as outer:
        monkeypatch.setenv("MLFLOW_RUN_ID", outer.id)
        handed = runs.hand_down(os.environ)
    assert "MLFLOW_RUN_ID" not in handed
    monkeypatch.delenv("MLFLOW_RUN_ID")
    monkeypatch.setenv("SPARC3_PARENT_RUN_ID", handed["SPARC3_PARENT_RUN_ID"])
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another one")  # the parent's counts
    with opened("prepare") as inner:
        pass
    assert recorded(inner).data.tags["mlflow.parentRunId"] == outer.id
    assert recorded(inner).info.experiment_id == outer.experiment

    monkeypatch.delenv("SPARC3_PARENT_RUN_ID")
    monkeypatch.setenv("MLFLOW_RUN_ID", inner.id)
    with opened("select", params={"k": 3}) as same:
        pass
    assert same.id == inner.id
    assert recorded(inner).info.run_name == "select"
    assert recorded(inner).data.params == {"k": "3"}

    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(InputError, match=r"^MLFLOW_RUN_ID: 0+ is not a run of"), opened():
        pass


def test_mlflow_run_opens_the_stages_run_and_is_the_parent_of_mains(project):
    entry = (
        "import os, subprocess; from sparc3.base.runs import hand_down; "
        "env = hand_down(os.environ); "
        "subprocess.run(['python', 'stage.py', 'inner', '0'], env=env, check=True)"
    )
    write_text(
        project / "MLproject",
        "name: sparc3\nentry_points:\n"
        '  alone: {command: "python stage.py alone 0"}\n'
        f'  main: {{command: "python -c \\"{entry}\\""}}\n',
    )
    write_text(
        project / "both.py",
        "import mlflow\n"
        + "".join(
            f"mlflow.run('.', {name!r}, env_manager='local')\n" for name in ("alone", "main")
        ),
    )
    before = {r.info.run_id for r in all_runs(project, "sparc3")}
    call(project, sys.executable, "both.py")
    runs = [r for r in all_runs(project, "sparc3") if r.info.run_id not in before]
    assert {r.info.status for r in runs} == {"FINISHED"}
    alone = [r for r in runs if r.data.tags.get("sparc3.stage") == "alone"]
    (main,) = [r for r in runs if r.data.tags.get("mlflow.project.entryPoint") == "main"]
    (inner,) = [r for r in runs if r.data.tags.get("sparc3.stage") == "inner"]
    assert [r.data.tags["mlflow.project.entryPoint"] for r in alone] == ["alone"]
    assert inner.data.tags["mlflow.parentRunId"] == main.info.run_id
    assert len(runs) == 3


def test_an_experiment_in_dvcs_temporary_copy_is_kept(project, tmp_path):
    call(tmp_path, "git", "clone", "-q", str(project), "work")
    work = tmp_path / "work"
    call(work, "git", "remote", "remove", "origin")  # DVC reads only ASCII addresses of remotes
    (work / "mlflow.db").write_bytes((project / "mlflow.db").read_bytes())
    call(work, "dvc", "init", "-q")
    write_text(
        work / "dvc.yaml",
        "stages:\n  select:\n    cmd: python stage.py select 0 && cp note.txt out.txt\n"
        "    params: [k]\n    outs: [out.txt]\n",
    )
    write_text(work / ".gitignore", "/mlflow.db*\n/mlruns/\nnote.txt\n/out.txt\n")
    commit(work)
    identity = {
        f"GIT_{role}_{key}": "a@b" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")
    }
    call(
        work,
        "dvc",
        "exp",
        "run",
        "--temp",
        "--name",
        "rusty-fern",
        "-S",
        "k=2",
        MLFLOW_EXPERIMENT_NAME="temp",
        **identity,
    )
    (run,) = all_runs(work, "temp")
    assert run.info.status == "FINISHED"
    assert run.data.tags["sparc3.dvc_experiment"] == "rusty-fern"
    assert run.data.tags["sparc3.dirty"] == "true"  # params.yaml is not the commit's
    assert not list((work / ".dvc/tmp/exps/standalone").glob("*/stage.py")), "the copy is gone"
    kept = work / "mlruns" / "temp" / run.info.run_id / "artifacts" / "note.txt"
    assert kept.read_text() == "select"


def test_dvcs_site_cache_is_the_owners_alone_unless_another_is_named(tmp_path, monkeypatch):
    """DVC makes it below /var/tmp for all to write, and loads what it finds there by pickle."""
    monkeypatch.chdir(tmp_path)
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"]):
        call(tmp_path, *command)
    (tmp_path / "data").write_text("a")
    mask = os.umask(0)
    try:
        given = store.private({"PATH": ""})
        assert given == {"PATH": "", "DVC_SITE_CACHE_DIR": str(tmp_path / ".dvc/tmp/site")}
        call(tmp_path, "dvc", "add", "-q", "data", **given | {"PATH": os.environ["PATH"]})
        assert (tmp_path / ".dvc/tmp/site/repo").is_dir()
        assert (tmp_path / ".dvc/tmp/site").stat().st_mode & 0o777 == 0o700
        (tmp_path / ".dvc/tmp/site").chmod(0o777)  # as DVC itself would have made it
        copy = tmp_path / ".dvc/tmp/exps/standalone/a"
        copy.mkdir(parents=True)
        monkeypatch.chdir(copy)
        assert store.private({}) == {"DVC_SITE_CACHE_DIR": str(tmp_path / ".dvc/tmp/site")}
        assert (tmp_path / ".dvc/tmp/site").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(mask)
    named = {"DVC_SITE_CACHE_DIR": "/elsewhere"}
    assert store.private(named) == named


# The comparison


def rows(tmp_path, reduction=-20.0):
    circuit = tmp_path / "circuit.csv"
    write_text(circuit, f"layer,neuron,score,scale\n0,1,{reduction},0\n")
    prompts = tmp_path / "prompts.jsonl"
    write_text(prompts, "{}\n")

    def row(name, value, artifacts=()):
        behaviour, method = name.split("/")
        return comparison.Entry(
            f"{behaviour}, {method}",
            {"reduction": value},
            {"behaviour": behaviour, "verdict": "reduced"},
            note="**reduced**",
            artifacts=artifacts,
            stages=[f"evaluate@{behaviour}"],
            datasets=[runs.Dataset(prompts, "behaviour")],
        )

    values = {"toxicity/lrp": reduction, "toxicity/random": 1.0, "race/lrp": -2.0}
    return {
        name: row(name, value, [circuit] if name == "toxicity/lrp" else [])
        for name, value in values.items()
    }


def compare(rows, state, params, products):
    whole = comparison.Entry("tiny", {"toxicity/reduction": 1.0}, {}, "**all**", "bars.png")
    with opened("report") as report:
        parent = comparison.pipeline_run(report, state, params, whole, rows, products)
    return report, parent


def test_one_run_per_state_with_a_row_per_cell_however_often(here, tmp_path, request):
    with opened("evaluate", {"behaviour": "toxicity"}) as maker:
        maker.set_product("p1")
    with opened("evaluate", {"behaviour": "toxicity"}) as other:
        other.set_product("p2")
    with pytest.raises(KeyError), opened("evaluate", {"behaviour": "toxicity"}) as failed:
        failed.set_product("p1")
        raise KeyError
    products = {"evaluate@toxicity": "p1", "evaluate@race": "never made here"}
    params = {"select": {"num_neurons": 60}}

    report, parent = compare(rows(tmp_path), "s1", params, products)
    again, same = compare(rows(tmp_path, reduction=-21.0), "s1", params, products)
    assert same == parent

    runs = {r.info.run_id: r for r in all_runs(here, request.node.name)}
    cells = {
        r.data.tags["sparc3.row"]: r
        for r in runs.values()
        if r.data.tags.get("sparc3.row", "all") != "all"
    }
    assert sorted(cells) == ["race/lrp", "toxicity/lrp", "toxicity/random"]
    assert len(runs) == 3 + 2 + 1 + 3  # evaluate, report, parent, rows
    for name, cell in cells.items():
        assert cell.info.status == "FINISHED"
        assert cell.data.tags["mlflow.parentRunId"] == parent
        assert cell.info.run_name == name.replace("/", ", ")
        assert cell.data.params == {"select.num_neurons": "60"}
        assert cell.data.tags["verdict"] == "reduced"
        assert cell.data.tags["mlflow.note.content"] == "**reduced**"
        assert cell.inputs is not None
        assert [
            (d.dataset.name, d.dataset.digest, d.tags[0].value) for d in cell.inputs.dataset_inputs
        ] == [("prompts", digest(tmp_path / "prompts.jsonl")[:32], "behaviour")]  # logged twice
    # The latest is on top of the table.
    assert sorted(cells, key=lambda name: -cells[name].info.start_time) == list(rows(tmp_path))
    lrp = cells["toxicity/lrp"]
    assert lrp.data.metrics == {"reduction": -21.0}
    assert lrp.data.tags["stage.evaluate.toxicity"] == maker.id
    assert "stage.evaluate.race" not in cells["race/lrp"].data.tags
    artifact = maker.client.download_artifacts(lrp.info.run_id, "circuit.csv")
    assert "-21.0" in Path(artifact).read_text()
    # A value that did not change has one entry in the history, one that did has two.
    history = [
        len(maker.client.get_metric_history(cells[c].info.run_id, "reduction")) for c in cells
    ]
    assert dict(zip(cells, history, strict=True)) == {
        "toxicity/lrp": 2,
        "toxicity/random": 1,
        "race/lrp": 1,
    }

    top = runs[parent]
    assert top.info.status == "FINISHED"
    assert top.data.params == {"select.num_neurons": "60"}
    assert top.data.metrics == {"toxicity/reduction": 1.0}
    assert re.fullmatch(r"tiny, \d{4}-\d\d-\d\d \d\d:\d\d", str(top.info.run_name))
    assert {r.data.tags["pipeline"] for r in (top, *cells.values())} == {top.info.run_name}
    figure = f"![](get-artifact?path=bars.png&run_uuid={parent})"
    assert top.data.tags["mlflow.note.content"] == f"**all**\n\n{figure}"
    nested = {i for i, r in runs.items() if r.data.tags.get("mlflow.parentRunId") == parent}
    assert nested == {maker.id, report.id, again.id, *(c.info.run_id for c in cells.values())}

    # Another state: its own parent and rows; a stage run reused from the first stays where it was.
    _, second = compare(rows(tmp_path), "s2", {"select": {"num_neurons": 25}}, products)
    assert second != parent
    assert len(all_runs(here, request.node.name)) == len(runs) + 1 + 1 + 3
    assert recorded(maker).data.tags["mlflow.parentRunId"] == parent
    assert maker.client.get_run(second).data.tags["stage.evaluate.toxicity"] == maker.id


def test_under_main_its_own_run_is_the_parent_of_the_rows(here, tmp_path, monkeypatch):
    with opened("main") as main:
        monkeypatch.setenv("SPARC3_PARENT_RUN_ID", main.id)
        _, parent = compare(rows(tmp_path), "s", {"k": 1}, {})
        assert recorded(main).info.status == "RUNNING"
    assert parent == main.id
    assert recorded(main).data.metrics == {"toxicity/reduction": 1.0}
    monkeypatch.delenv("SPARC3_PARENT_RUN_ID")
    _, found = compare(rows(tmp_path), "s", {"k": 1}, {})
    assert found == main.id


def test_a_comparison_that_breaks_off_is_not_left_running(here, tmp_path, request, monkeypatch):
    broken = rows(tmp_path)
    broken["race/random"] = comparison.Entry("race, random", {"reduction": float("nan")}, {})
    monkeypatch.setenv("DVC_EXP_NAME", "rusty-fern")
    with pytest.raises(ValueError, match="reduction"):
        compare(broken, "s", {"k": 1}, {})
    status = {str(r.info.run_name): r.info.status for r in all_runs(here, request.node.name)}
    assert status == {
        "report": "FAILED",
        "rusty-fern": "FAILED",
        "race, random": "FAILED",
        "toxicity, lrp": "FINISHED",
        "toxicity, random": "FINISHED",
        "race, lrp": "FINISHED",
    }
    _, parent = compare(rows(tmp_path), "s", {"k": 1}, {})
    by_id = {r.info.run_id: r.info.status for r in all_runs(here, request.node.name)}
    assert by_id[parent] == "FINISHED"


def test_a_change_that_git_cannot_tell_by_its_time_is_dirt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "params.yaml"
    file.write_text("k: 1\n")
    os.utime(file, (1e9, 1e9))
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.invalid")
    for command in (
        ["init", "-q"],
        ["config", "core.checkStat", "minimal"],
        ["add", "-A"],
        [*identity, "commit", "-qm", "x"],
    ):
        call(tmp_path, "git", *command)
    assert runs.source()["sparc3.dirty"] == "false"
    file.write_text("k: 2\n")
    os.utime(file, (1e9, 1e9))
    said = subprocess.run(["git", "status", "--porcelain"], capture_output=True, check=True)
    assert not said.stdout  # git's own answer
    assert runs.source()["sparc3.dirty"] == "true"
