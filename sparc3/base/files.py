"""Files in and out: every write is atomic, every read names the file it could not use."""

import csv
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sparc3.base.errors import InputError

Array = np.ndarray
_MISSING = "file not found; run the stage that writes it (dvc repro)"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it there only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: Path) -> str:
    """The file's text as it is: line breaks, too, are not translated."""
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        raise InputError(f"{path}: {_MISSING}") from None
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
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"{path}: line {number} is not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}: line {number} is no JSON object; expected one a line")
            rows.append(row)
    return rows


def write_csv(path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    """One header line and one line per row; `columns` holds even when there are no rows."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows as strings, byte for byte, also with line breaks in quotes; the caller converts.

    InputError, naming the line: quotes that do not match, another number of fields than the header.
    """
    reader = csv.reader(
        io.StringIO(read_text(path).removeprefix("\ufeff"), newline=""), strict=True
    )
    rows: list[dict[str, str]] = []
    try:
        header = next(reader, [])
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
        temporary.write_bytes(blob)


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """All tensors of a safetensors file and its metadata."""
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


def digest_text(text: str) -> str:
    """sha256 of UTF-8 text, hexadecimal: the identity of a prompt and of a group."""
    return hashlib.sha256(text.encode()).hexdigest()
