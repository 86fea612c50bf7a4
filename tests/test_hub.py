"""A model out of the hub's own protocol, spoken by a server of the test on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from safetensors.numpy import save

from sparc3.base.artifacts import model_digest
from sparc3.base.errors import InputError
from sparc3.stages.fetch import pin_text

FILES = {
    "config.json": b'{"model_type": "llama", "max_position_embeddings": 64}',
    "model.safetensors": save({"weight": np.ones(2, np.float32)}),
    "README.md": b"---\nlicense: mit\n---\n",
}
CIRCUIT = b"layer,neuron,score,scale\n1,7,-0.5,0.0\n"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_" + "s3cret" * 5


class Hub(BaseHTTPRequestHandler):
    """Two repositories: team/open, and team/gated for whoever sends the token.

    A file whose name is in `lacking` cannot be had; `sent` are those that were.
    """

    lacking: ClassVar[set[str]] = set()
    sent: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        gated = self.path.removeprefix("/api/models").startswith("/team/gated")
        if gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, body)
        elif self.path.endswith("/revision/none"):
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        elif "/team/none" in self.path:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        elif self.path.startswith("/api/models/"):
            found = {"id": "team/x", "sha": COMMIT, "siblings": [{"rfilename": f} for f in FILES]}
            self.send(200, json.dumps(found).encode(), {"Content-Type": "application/json"}, body)
        else:
            name = self.path.rpartition("/")[2]
            if name in self.lacking:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
                return
            content = {**FILES, "circuit.csv": CIRCUIT}[name]
            if body:
                self.sent.append(name)
            self.send(200, content, {"ETag": f'"{len(content)}"', "X-Repo-Commit": COMMIT}, body)

    def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def fetch(
    hub: str, folder: Path, repository: str, token: str | None
) -> subprocess.CompletedProcess[str]:
    return python(
        hub,
        folder,
        "from pathlib import Path; from sparc3.stages.fetch import hub_model\n"
        f"hub_model({repository!r}, {COMMIT!r}, Path('model'))",
        token,
    )


def python(
    hub: str, folder: Path, code: str, token: str | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    environment |= {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(folder / "cache"),
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    if token:
        environment["HF_TOKEN"] = token
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_an_open_model_needs_no_token(hub: str, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path, "team/open", None)
    assert done.returncode == 0, done.stderr
    assert {f: (tmp_path / "model" / f).read_bytes() for f in FILES} == FILES


def test_a_gated_model_takes_the_token_of_the_environment_or_of_env(
    hub: str, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text(f"HF_TOKEN={TOKEN}\n")
    done = fetch(hub, tmp_path, "team/gated", None)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "config.json").is_file()


@pytest.mark.parametrize("token", [None, "hf_" + "wrong" * 6])
def test_without_access_there_is_one_clear_line_and_no_token_in_it(
    hub: str, tmp_path: Path, token: str | None
) -> None:
    done = fetch(hub, tmp_path, "team/gated", token)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0
    assert f"params: model.path: team/gated at {COMMIT} cannot be had" in last
    assert ("HF_TOKEN was given" if token else "no HF_TOKEN was given") in last
    assert token is None or token not in done.stdout + done.stderr


RUN = """
from dataclasses import replace
from pathlib import Path
from sparc3.base.params import Fetch
from sparc3.stages import fetch
from sparc3.stages.checks import load
params = load(Path({params!r}))
model = replace(params.model, path="models/team/open@{revision}")
fetch.run(replace(params, fetch=Fetch(model=None), model=model))
"""


def test_a_download_that_failed_goes_on_and_another_commit_is_not_taken_for_it(
    hub: str, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("a")
    (tmp_path / "data.dvc").write_text(pin_text(tmp_path / "data", own=True))
    params = str(Path(__file__).parent.parent / "params.yaml")
    code = RUN.format(params=params, revision=COMMIT)
    Hub.lacking = {"model.safetensors"}
    try:
        done = python(hub, tmp_path, code)
    finally:
        Hub.lacking = set()
    assert "model.path: team/open at" in done.stderr.strip().splitlines()[-1]
    folder = tmp_path / "models" / "team" / f"open@{COMMIT}"
    assert not folder.exists()

    Hub.sent.clear()
    done = python(hub, tmp_path, code)
    assert done.returncode == 0, done.stderr
    assert Hub.sent == ["model.safetensors"]
    assert {path.name for path in folder.iterdir()} == {*FILES, "sparc3-origin.json"}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    note = json.loads((folder / "sparc3-origin.json").read_text())
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    assert note == {"repository": "team/open", "revision": COMMIT, "sha256": sums}

    done = python("http://127.0.0.1:9", tmp_path, code)  # it is there: no hub is asked
    assert done.returncode == 0, done.stderr
    (folder / "config.json").write_text("{}")
    done = python(hub, tmp_path, code)
    last = done.stderr.strip().splitlines()[-1]
    assert f"models/team/open@{COMMIT}/config.json differs; move the folder away" in last


FIND = "from sparc3.stages.fetch import commit_of; print(commit_of({!r}, {!r}))"


def test_a_branch_is_a_commit_before_it_is_written_down(hub: str, tmp_path: Path) -> None:
    assert python(hub, tmp_path, FIND.format("team/open", "main")).stdout.strip() == COMMIT
    refused = {
        ("team/gated", None): "team/gated at main cannot be had (GatedRepoError: 401",
        ("team/open", "none"): "team/open at none cannot be had (RevisionNotFoundError: 404",
        ("team/none", None): "team/none at main cannot be had (RepositoryNotFoundError: 404",
    }
    for (repository, revision), expected in refused.items():
        done = python(hub, tmp_path, FIND.format(repository, revision))
        last = done.stderr.strip().splitlines()[-1]
        assert f"InputError: --model {expected}" in last
        assert "no HF_TOKEN was given; check name, revision and network" in last


def test_a_model_of_the_hub_has_a_digest_like_any_other(hub: str, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^params: model\.path: team/open is no folder; .* fetch$"
    ):
        model_digest(Path("team/open"))
    fetch(hub, tmp_path, "team/open", None)
    folder = tmp_path / "model"
    before = model_digest(folder)
    (folder / ".cache").mkdir(exist_ok=True)  # the client's notes are no part of it
    (folder / ".cache" / "note").write_text("x")
    (folder / ".gitattributes").write_text("x")
    assert model_digest(folder) == before
    digests = {before}
    for name in ("config.json", "model.safetensors", "tokenizer.model", "merges.txt"):
        (folder / name).write_text("another")
        digests.add(model_digest(folder))
    assert len(digests) == 5


def test_a_circuit_is_loaded_by_its_name_and_commit(hub: str, tmp_path: Path) -> None:
    code = (
        "from sparc3.circuits.circuit import Circuit\nprint(*Circuit.load('team/{}@main').rows())"
    )
    done = python(hub, tmp_path, code.format("open"))
    assert done.stdout == "(1, 7, -0.5, 0.0)\n", done.stderr
    done = python(hub, tmp_path, code.format("gated"))
    last = done.stderr.strip().splitlines()[-1]
    assert "InputError: team/gated@main: no file, and on the hub no circuit.csv" in last
