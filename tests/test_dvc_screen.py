"""What DVC shows of a run fits a screen: in a terminal of 100 columns, with its own pager."""

import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import termios
from pathlib import Path

import faults
import pytest
from faults import environment

from sparc3.base.files import read_json, write_json

LINES, COLUMNS = 40, 100
PATIENCE = 60.0  # seconds for output to come
STYLE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]")
COMMIT = ("-c", "user.name=t", "-c", "user.email=t@example.invalid", "commit", "-qm", "x")
METRICS = ("perplexity", "reduction.toxicity", "reduction.gender", "reduction.race")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's pipeline, params and metrics, in git, with one metric changed since."""
    folder = tmp_path_factory.mktemp("screen")
    for name in ("dvc.yaml", "dvc.lock", "params.yaml", "metrics/summary.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(faults.whole.ROOT / name, folder / name)
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], ["git", "add", "-A"]):
        subprocess.run(command, cwd=folder, env=environment(), check=True)
    subprocess.run(["git", *COMMIT], cwd=folder, env=environment(), check=True)
    summary = read_json(folder / "metrics/summary.json")
    write_json(folder / "metrics/summary.json", summary | {"perplexity": 9.5})
    return folder


def screen(folder: Path, *command: str) -> list[str]:
    """What a command, or the pager that it starts, has printed when it waits or has ended."""
    number, terminal = pty.fork()
    if not number:
        os.chdir(folder)
        os.execvpe(command[0], command, environment(TERM="xterm", LESS="", PAGER="less"))
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    printed = b""
    while b"(END)" not in printed and select.select([terminal], [], [], PATIENCE)[0]:
        try:
            printed += os.read(terminal, 65536)
        except OSError:  # the end of a pseudo-terminal, on Linux
            break
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    os.close(terminal)
    lines = STYLE.sub("", printed.decode()).replace("\r", "").split("\n")
    return [line for line in lines if line.strip()]


@pytest.mark.parametrize("command", ["metrics show", "metrics diff", "exp show"])
def test_the_screen_has_every_metric(folder: Path, command: str) -> None:
    shown = screen(folder, "dvc", *command.split())
    wanted = ["perplexity"] if command == "metrics diff" else METRICS
    for name in wanted:
        assert any(name in line for line in shown), shown
    # The pager ends a line that goes on to the right, to what params have, with a mark.
    assert all(len(line.rstrip()) <= COLUMNS for line in shown), shown
    assert len(shown) < LINES
