"""The one shape of a raw prompt, whatever it comes from."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Where = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One raw prompt.

    `group` is what must not be in two splits, unique over all data sets; `stratum` is the part of
    the data set whose groups are shared out among the splits. A paired row has `pair`: the
    preferred sentence (of a stereotype: the stereotype) and the other one; StereoSet's rows have
    an `unrelated` sentence too, and `text` is then what a completion starts from. `toxicity` is
    Perspective's score of the text, in [0, 1].
    """

    source: str
    group: str
    stratum: str
    text: str
    pair: tuple[str, str] | None = None
    unrelated: str | None = None
    toxicity: float | None = None


class Source(NamedTuple):
    """Rows before `where` narrows them, the keys it may have, and whether the rows are pairs.

    The rows of a stream come one by one, in an order that a seed decides: `rows(where, seed)`.
    """

    rows: Callable[..., Iterable[Row]]
    where: tuple[str, ...] = ()
    paired: bool = False
    stream: bool = False
