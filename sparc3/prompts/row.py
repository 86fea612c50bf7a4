"""The one shape of a raw prompt, whatever it comes from."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sparc3.base.errors import InputError

Where = Mapping[str, Any]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """A raw prompt. `group` is what must not be in two splits, unique over all data sets; `stratum`
    is the part of the data set whose groups are shared out among the splits. `pair` is the
    preferred sentence (of a stereotype: the stereotype) and the other one; `text` is then what a
    completion starts from. `choices` are the answers to a question, the right one first. `toxicity`
    is Perspective's score, in [0, 1]. Of a file of one's own: `label` is what `where` asks for,
    `split` where the file puts it, `place` the file and row.
    """

    source: str
    group: str
    stratum: str
    text: str
    pair: tuple[str, str] | None = None
    unrelated: str | None = None
    choices: tuple[str, ...] = ()
    toxicity: float | None = None
    label: str = ""
    split: str | None = None
    place: str = ""


class Source(NamedTuple):
    """Rows before `where` narrows them, the keys it may have, and whether the rows are pairs, or
    questions with answers.

    The rows of a stream come one by one, in an order that a seed decides: `rows(where, seed)`.
    Those of a sealed source are in no other one, and no stage reads them: they are what a finished
    circuit is confirmed on.
    """

    rows: Callable[..., Iterable[Row]]
    where: tuple[str, ...] = ()
    paired: bool = False
    choices: bool = False
    stream: bool = False
    sealed: bool = False


def field(item: Mapping[Any, Any], key: Any) -> str:
    """A text of a data set's row; InputError if there is none, or one that UTF-8 cannot hold."""
    value = item.get(key)
    if not isinstance(value, str):
        raise InputError(f"has no text in {key!r}")
    if re.search("[\ud800-\udfff]", value):
        raise InputError(f"has half a surrogate pair in {key!r}")
    return value


def usable(
    name: str, items: Iterable[Mapping[str, Any]], make: Callable[[Any], Row | None]
) -> Iterator[Row]:
    """What `make` makes of the rows of a data set, but for None. A bad row, for which it raises
    InputError or makes two equal sentences, is dropped; the log says how many, and names the first.
    InputError if every row is bad.
    """
    problems: list[str] = []
    number = 0
    try:
        for number, item in enumerate(items, start=1):
            try:
                row = make(item)
                if row and row.pair and row.pair[0] == row.pair[1]:
                    raise InputError("makes two equal sentences")
            except InputError as error:
                problems.append(f"row {number} {error}")
            else:
                if row:
                    yield row
    finally:  # also where a stream is left early
        if problems:
            count = f"{len(problems)} of {number} rows dropped"
            log.warning("prepare: %s: %s; the first: %s", name, count, problems[0])
    if problems and len(problems) == number:
        raise InputError(f"{name}: no row can be used; {problems[0]}; choose another data set")
