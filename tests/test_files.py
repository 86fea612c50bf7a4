"""Readers of texts: what a file says comes back letter by letter, or is refused by line.

Writers: the whole file or nothing, with the user's rights, and one line where it cannot be.
"""

import csv
import errno
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sparc3.base import params
from sparc3.base.errors import InputError
from sparc3.base.files import (
    locked,
    read_csv,
    read_jsonl,
    read_tensors,
    read_text,
    replacing,
    usual_rights,
    write_csv,
    write_json,
    write_jsonl,
    write_tensors,
    write_text,
)

# Whatever str.splitlines, universal newlines or the csv module may take for the end of a line.
BREAKS = ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
ODD = [
    *BREAKS,
    '"',
    '""',
    ",",
    "'",
    "\\",
    "\t",
    " ",
    "\0",
    "\ufeff",
    "\u200b",
    "é",
    "e\u0301",
    "😀",
]

VALID = [chr(n) for n in [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]]


def test_every_line_separator_is_among_the_breaks():
    letters = map(chr, range(sys.maxunicode + 1))
    split = {letter for letter in letters if len(f"a{letter}b".splitlines()) == 2}
    assert split == {letter for letter in BREAKS if len(letter) == 1}
    assert {unicodedata.category(letter) for letter in split} == {"Cc", "Zl", "Zp"}


def texts(seed: int, number: int = 40) -> list[str]:
    """Random texts of odd pieces, of words and of any letters that UTF-8 can hold."""
    draw = random.Random(seed)

    def piece() -> str:
        return draw.choice([draw.choice(ODD), "word", draw.choice(VALID)])

    return ["".join(piece() for _ in range(draw.randint(0, 12))) for _ in range(number)] + ODD


@pytest.mark.parametrize("seed", range(20))
def test_a_text_comes_back_as_it_was_written(tmp_path: Path, seed: int):
    for text in texts(seed):
        write_text(tmp_path / "text", text)
        assert read_text(tmp_path / "text") == text


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("terminator", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_csv_of_others_comes_back_as_it_was_written(
    tmp_path: Path, seed: int, terminator: str, mark: str
):
    rows = [{"id": str(n), "text": text} for n, text in enumerate(texts(seed))]
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as stream:
        stream.write(mark)
        writer = csv.DictWriter(
            stream, ["id", "text"], lineterminator=terminator, quoting=csv.QUOTE_ALL
        )
        writer.writeheader()
        writer.writerows(rows)
    assert read_csv(tmp_path / "a.csv") == rows


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("terminator", ["\n", "\r\n", "\n\n"])
def test_the_jsonl_of_others_comes_back_as_it_was_written(
    tmp_path: Path, seed: int, ascii_only: bool, terminator: str
):
    rows = [{"text": text} for text in texts(seed)]
    lines = [json.dumps(row, ensure_ascii=ascii_only) + terminator for row in rows]
    (tmp_path / "a.jsonl").write_bytes("".join(lines).encode())
    assert read_jsonl(tmp_path / "a.jsonl") == rows


@pytest.mark.parametrize("seed", range(20))
def test_own_jsonl_comes_back(tmp_path: Path, seed: int):
    rows = [{"text": text, text: seed} for text in texts(seed)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_jsonl(tmp_path / "a.jsonl") == rows


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a,b\n1,2\n3\n", "line 3 .*1 fields; its header has 2"),
        ("a,b\n1,2\n\n3,4,5\n", "line 4 .*3 fields; its header has 2"),
        ('a,b\n1,"2', "line 2 .*unexpected end of data"),
        ('a,b\n1,"2"x\n', "line 2 .*expected after"),
        ("a,b\n1,2\rx\n", "line 2|line 3"),
        ("a,b,a\n1,2,3\n", "line 1 .*its header has 'a' twice"),
    ],
)
def test_a_broken_csv_is_refused_by_line(tmp_path: Path, text: str, problem: str):
    (tmp_path / "a.csv").write_bytes(text.encode())
    with pytest.raises(InputError, match=rf"a\.csv: {problem}") as caught:
        read_csv(tmp_path / "a.csv")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '["a"]',
        '"a"',
        "3",
        "[" * 100_000,
        "\u2028",
        '{"a": 1, "a": 2}',
        f'{{"a": {"9" * 5000}}}',
    ],
)
def test_a_broken_jsonl_is_refused_by_line(tmp_path: Path, line: str):
    (tmp_path / "a.jsonl").write_bytes(f'{{"a": 1}}\n\n{line}\n'.encode())
    with pytest.raises(InputError, match=r"a\.jsonl: line 3 is") as caught:
        read_jsonl(tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value)


def test_what_is_no_utf_8_is_refused(tmp_path: Path):
    for read in (read_csv, read_jsonl, read_text):
        (tmp_path / "a").write_bytes(b"a,b\n\xff,\xed\xa0\x80\n")
        with pytest.raises(InputError, match="a: not UTF-8 text"):
            read(tmp_path / "a")


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path):
    for read in (read_csv, read_jsonl, read_text, params.read):
        with pytest.raises(InputError, match=r"^/.* is a folder; expected a file$"):
            read(tmp_path)


def test_half_a_surrogate_pair_is_not_half_written(tmp_path: Path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "old"}])
    with pytest.raises(UnicodeEncodeError):
        write_jsonl(tmp_path / "a.jsonl", [{"text": "\ud800"}])
    assert read_jsonl(tmp_path / "a.jsonl") == [{"text": "old"}]
    assert len(list(tmp_path.iterdir())) == 1


# Writing


@contextmanager
def umask(mask: int):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_equal_tensors_are_equal_bytes(tmp_path: Path):
    tensors = {"ü": np.arange(3, dtype=np.float32), "b": np.zeros((0, 2), np.float64)}
    about = {f"name {n}": f'ä "{n}"' for n in range(8)}
    written = set()
    for n in range(8):
        write_tensors(tmp_path / f"{n}.safetensors", tensors, about)
        written.add((tmp_path / f"{n}.safetensors").read_bytes())
    assert len(written) == 1
    found, metadata = read_tensors(tmp_path / "0.safetensors")
    assert metadata == about
    assert {n: a.tolist() for n, a in found.items()} == {n: a.tolist() for n, a in tensors.items()}


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o077])
def test_files_have_the_rights_that_the_umask_leaves(tmp_path: Path, mask: int):
    with umask(mask):
        write_text(tmp_path / "new" / "a.txt", "a")
        write_csv(tmp_path / "a.csv", [], ["a"])
        write_tensors(tmp_path / "a.safetensors", {"a": np.zeros(2, np.float32)})
        with replacing(tmp_path / "folder", folder=True) as folder:
            save_file({"a": np.zeros(2, np.float32)}, folder / "deep.safetensors")
            usual_rights(folder)
        (tmp_path / "plain").touch()
    found = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    for path, mode in found.items():
        assert mode == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_what_a_killed_process_left_goes_with_the_next_write_and_no_other_does(tmp_path: Path):
    path = tmp_path / "a[1].txt"  # a pattern, were it not quoted
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from sparc3.base.files import replacing\n"
        f"for folder in (False, True):\n with replacing(Path({str(path)!r}), folder) as made:\n"
        "  (made / 'deep' if folder else made).write_text('half')\n"
        "  if folder == (sys.argv[1] == 'folder'): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for kind in ("file", "folder"):
        done = subprocess.run([sys.executable, "-c", code, kind], check=False)
        assert done.returncode == -signal.SIGKILL
        path.unlink(missing_ok=True)
    kinds = [left.is_dir() for left in tmp_path.iterdir()]
    assert sorted(kinds) == [True], "the folder's writer took the killed file's away"
    host = socket.gethostname()
    others = {
        f".{path.name}.{host}.{os.getppid()}.0": "of a process that is alive",
        f".{path.name}.elsewhere.1.0": "of another host",
        f".b.txt.{host}.4194305.0": "of another file",  # above the largest number of a process
    }
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    write_text(path, "whole")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {path.name: "whole", **others}


def test_threads_that_write_one_file_do_not_mix(tmp_path: Path):
    texts = [letter * 200_000 for letter in "abcd"]
    threads = [
        threading.Thread(target=lambda t=text: [write_text(tmp_path / "a", t) for _ in range(20)])
        for text in texts
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "a").exists():
            assert (tmp_path / "a").read_text() in texts
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@contextmanager
def largest_file(size: int):
    """Within the block the system refuses longer files, as it refuses all on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_without_room_is_one_line_and_leaves_the_old_file(tmp_path: Path):
    writers = {
        "a.txt": lambda path, n: write_text(path, "a" * n),
        "a.json": lambda path, n: write_json(path, ["a" * n]),
        "a.jsonl": lambda path, n: write_jsonl(path, [{"a": "a" * n}]),
        "a.csv": lambda path, n: write_csv(path, [{"a": "a" * n}], ["a"]),
        "a.safetensors": lambda path, n: write_tensors(path, {"a": np.zeros(n, np.float32)}),
    }
    for name, write in writers.items():
        write(tmp_path / name, 1)
        old = (tmp_path / name).read_bytes()
        with largest_file(8192), pytest.raises(InputError, match=r": cannot be written") as caught:
            write(tmp_path / name, 100_000)
        message = f"{tmp_path / name}: cannot be written ({os.strerror(errno.EFBIG)}); make room"
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)
        assert (tmp_path / name).read_bytes() == old
    assert {p.name for p in tmp_path.iterdir()} == set(writers)


@pytest.mark.parametrize("name", ["file/a.txt", "folder"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, name: str):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(InputError, match=rf"{name}: cannot be written \([^\n]*\); [^\n]*$"):
        write_text(tmp_path / name, "a")
    assert {p.name for p in tmp_path.iterdir()} == {"file", "folder"}


# Locks


def hold(path: Path, order: Any, name: str, seconds: float) -> None:
    with locked(path, name):
        order.append(f"{name} in")
        time.sleep(seconds)
        order.append(f"{name} out")


def test_of_processes_that_lock_a_file_one_goes_on_and_others_say_for_whom_they_wait(
    tmp_path: Path, caplog
):
    path, fork = tmp_path / "deep" / "a.lock", multiprocessing.get_context("fork")
    with fork.Manager() as manager:
        order = manager.list()
        first = fork.Process(target=hold, args=(path, order, "first", 1.0))
        first.start()
        while not order:
            time.sleep(0.01)
        caplog.set_level(logging.INFO, "sparc3")
        hold(path, order, "second", 0.0)
        first.join()
        assert list(order) == ["first in", "first out", "second in", "second out"]
    said = f"second: waiting for process {first.pid} on {socket.gethostname()}, which does the same"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_a_lock_ends_with_its_process(tmp_path: Path, caplog):
    fork = multiprocessing.get_context("fork")
    order = fork.Manager().list()
    killed = fork.Process(target=hold, args=(tmp_path / "a.lock", order, "killed", 600.0))
    killed.start()
    while not order:
        time.sleep(0.01)
    killed.kill()
    killed.join()
    caplog.set_level(logging.INFO, "sparc3")
    hold(tmp_path / "a.lock", order, "next", 0.0)
    assert not caplog.records
