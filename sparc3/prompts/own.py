"""Files of one's own prompts as rows, each of which is checked: the first that will not do is an
error that names file and row, and never shows a text.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparc3.base.errors import InputError
from sparc3.base.files import digest, digest_text, digests, read_csv, read_jsonl
from sparc3.base.params import SPLITS, Columns, PromptSet
from sparc3.prompts.row import Row

HOME = Path("prompts")
PLACES = (HOME, Path("data"))  # whose changes the pipeline sees
FORMATS = (".jsonl", ".csv", ".parquet")


def rows(spec: PromptSet) -> list[Row]:
    """The rows of the file that is the set's source. A group is what its column says, in whatever
    file, else the text; of a private set it is a digest. InputError: a file that cannot be read, a
    column that is not there, a value that is empty, no text or no split, the text of another row.
    """
    path, columns = Path(spec.source), spec.columns or Columns(text="text")
    made: list[Row] = []
    first: dict[str, int] = {}
    splits: dict[str, str] = {}
    for number, item in enumerate(_items(path), start=1):
        row = _row(f"{path}: row {number}", spec, columns, item)
        again = first.setdefault("\n".join(map(str.strip, row.pair or (row.text,))), number)
        if again != number:
            raise InputError(f"{row.place} has the text of row {again}; keep one of them")
        if row.split is not None and splits.setdefault(row.group, row.split) != row.split:
            problem = f"puts its group into {row.split}, an earlier row into {splits[row.group]}"
            raise InputError(f"{row.place} {problem}; a group is in one split only")
        made.append(row)
    if not made:
        raise InputError(f"{path} has no rows; expected a prompt in each")
    return made


def _row(place: str, spec: PromptSet, columns: Columns, item: Mapping[str, Any]) -> Row:
    def value(name: str, number: bool = False) -> str:
        if name not in item:
            there = ", ".join(map(str, item)).encode(errors="backslashreplace").decode()
            raise InputError(f"{place} has no column {name!r}; it has {there}: set columns")
        given = str(item[name]) if number and type(item[name]) is int else item[name]
        if not isinstance(given, str):
            kind = "null" if given is None else type(given).__name__
            raise InputError(f"{place}: {name!r} is no text, but {kind}")
        if not given.strip():
            raise InputError(f"{place}: {name!r} is empty; fill it in, or remove the row")
        if re.search("[\ud800-\udfff]", given):
            raise InputError(f"{place}: {name!r} has half a surrogate pair; write it anew")
        return given

    pair = None
    if columns.pair is not None:
        one, other = map(value, columns.pair)
        if one.strip() == other.strip():
            raise InputError(f"{place}: {columns.pair[0]!r} and {columns.pair[1]!r} are equal")
        pair = one, other
    text = value(columns.text) if columns.text else pair[0] if pair else ""
    split = value(columns.split) if columns.split else None
    if split not in (None, *SPLITS):
        raise InputError(f"{place}: {columns.split!r} is none of {', '.join(SPLITS)}")
    group = value(columns.group, number=True) if columns.group else None
    if group is None or spec.private:  # a pair in both orders is of one group
        group = digest_text(group or "\n".join(sorted(map(str.strip, pair or (text,)))))[:16]
    unrelated = value(columns.unrelated) if columns.unrelated else None
    if unrelated is not None and unrelated.strip() in map(str.strip, pair or ()):
        raise InputError(f"{place}: {columns.unrelated!r} is one of the pair")
    return Row(
        source=spec.source,
        group=f"own/{group}",
        stratum="",
        text=text,
        pair=pair,
        unrelated=unrelated,
        label=value(columns.label, number=True) if columns.label else "",
        split=split,
        place=place,
    )


def _items(path: Path) -> list[dict[str, Any]]:
    """A file's rows, as they are written."""
    if not path.exists():
        raise InputError(f"{path}: file not found; put your prompts there")
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    if path.suffix == ".csv":
        return list(read_csv(path))
    from pyarrow import ArrowException

    try:
        if path.is_dir():
            from datasets import Dataset, load_from_disk

            loaded = load_from_disk(path)
            if not isinstance(loaded, Dataset):
                parts = ", ".join(map(str, loaded))
                raise InputError(f"{path} holds the parts {parts}; name the folder of one")
            return loaded.to_list()
        from pyarrow.parquet import read_table

        return read_table(path).to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        kind = "folder that datasets saved" if path.is_dir() else "Parquet file"
        raise InputError(f"{path}: not a {kind} ({type(error).__name__})") from None


def sha256(source: str) -> str:
    """Digest of a file, or of all files of a folder."""
    path = Path(source)
    return digest_text(repr(digests(path))) if path.is_dir() else digest(path)
