"""Files in and out: every write is atomic, every read names the file it could not use."""

import csv
import fcntl
import glob
import hashlib
import io
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sparc3.base.errors import InputError
from sparc3.base.parallel import began

log = logging.getLogger(__name__)
Array = np.ndarray
_listeners: list[Callable[[Path], object]] = []
_MISSING = "file not found; run the stage that writes it (dvc repro)"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """InputError where the system, or safetensors for it, has something against what is written:
    a full disk, no right to write, ...
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        remedy = "make room, or get the right to write there, and run again"
        raise InputError(f"{path}: cannot be written ({reason}); {remedy}") from error


@contextmanager
def replacing(path: Path, folder: bool = False) -> Iterator[Path]:
    """Yield a temporary file (or folder) beside `path`; move it there only if the block succeeds.

    Its name has the process's number: what killed processes of this host left beside goes.
    InputError: as `writing`.
    """
    begin = f".{path.name}.{socket.gethostname()}."
    temporary = path.with_name(f"{begin}{os.getpid()}.{token_hex(4)}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{glob.escape(begin)}*"):
            if began(int(left.name.removeprefix(begin).partition(".")[0])) is None:
                _remove(left)
        temporary.mkdir() if folder else temporary.touch(exist_ok=False)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            _remove(temporary)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def usual_rights(folder: Path) -> None:
    """Files get the rights of new ones: safetensors gives its own to the owner alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


@contextmanager
def locked(path: Path, waiting: str | None = None) -> Iterator[None]:
    """Exclusive among processes that lock this file, which says whose turn it is and stays.

    The system frees it when the process ends, however that ends. Who has to wait says so, as
    `waiting`, and for whom.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            if waiting is not None:
                log.info("%s: waiting for %s, which does the same", waiting, stream.read())
            fcntl.flock(stream, fcntl.LOCK_EX)
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        yield


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def told(listener: Callable[[Path], object]) -> Iterator[None]:
    """Within the block `listener` is told every file that is about to be read here."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def _tell(path: Path) -> None:
    for listener in _listeners:
        listener(path)


def read_text(path: Path) -> str:
    """The file's text as it is: line breaks, too, are not translated."""
    _tell(path)
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        raise InputError(f"{path}: {_MISSING}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; expected a file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from None


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, its lines ended by newlines."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_json(path: Path, value: object) -> None:
    """Sorted keys and a final newline; NaN and infinity are refused (ValueError)."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Objects, one a line; only a newline ends a line: U+2028 and the like may stand in a text."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip(" \t\r"):
            try:
                row = json.loads(line, object_pairs_hook=_once)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}: line {number} is not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}: line {number} is no JSON object; expected one a line")
            rows.append(row)
    return rows


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError for a key that is there twice, of which one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def write_csv(path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    """One header line and one line per row; `columns` holds even when there are no rows."""
    # A return is not quoted by itself, and would end the line for whoever reads it.
    returns = any("\r" in value for row in rows for value in row.values() if isinstance(value, str))
    quoting = csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n", quoting=quoting)
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows as strings, byte for byte, also with line breaks in quotes; the caller converts.

    InputError, naming the line: quotes that do not match, another number of fields than the header,
    a column that is there twice.
    """
    reader = csv.reader(
        io.StringIO(read_text(path).removeprefix("\ufeff"), newline=""), strict=True
    )
    rows: list[dict[str, str]] = []
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            again = next(name for name in header if header.count(name) > 1)
            raise csv.Error(f"its header has {again!r} twice")
        for row in filter(None, reader):
            if len(row) != len(header):
                raise csv.Error(f"{len(row)} fields; its header has {len(header)}")
            rows.append(dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num} is not valid CSV ({error})") from None
    return rows


def write_tensors(
    path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> None:
    """Safetensors; a non-finite value is refused (InputError) and nothing is written."""
    for name, tensor in tensors.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise InputError(f"{path}: tensor {name!r} holds non-finite values; not written")
    contiguous = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
    blob = save(contiguous, metadata=dict(metadata) if metadata else None)
    with replacing(path) as temporary:
        temporary.write_bytes(_ordered(blob))


def _ordered(blob: bytes) -> bytes:
    """Safetensors with its metadata in alphabetical order: the library's is another each time."""
    end = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return blob[:8] + text.ljust(end - 8) + blob[end:]


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """All tensors of a safetensors file and its metadata."""
    _tell(path)
    try:
        with safe_open(path, framework="numpy") as stream:
            names = stream.keys()  # not a mapping: it cannot be iterated itself
            return {name: stream.get_tensor(name) for name in names}, stream.metadata() or {}
    except FileNotFoundError:
        raise InputError(f"{path}: {_MISSING}") from None
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from None


def digest(path: Path, algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a file's bytes."""
    if not path.is_file():
        raise InputError(f"{path}: file not found")
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by its name there, sorted; of hidden ones too."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest(path) for path in files}


def digest_text(text: str) -> str:
    """sha256 of UTF-8 text, hexadecimal: the identity of a prompt and of a group."""
    return hashlib.sha256(text.encode()).hexdigest()
