"""Data sets on the hub, at a pinned commit, or folders of the same layout, as rows."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from sparc3.base.errors import InputError
from sparc3.base.files import digest_text
from sparc3.base.secrets import hub_reason, hub_token
from sparc3.prompts.embedded import real_toxicity_prompts, stereoset_item, toxic
from sparc3.prompts.row import Row, Where, field, usable


def hub_real_toxicity_prompts(where: Where) -> list[Row]:
    """The 99,442 RealToxicityPrompts but for the sealed ones of data/; some have no toxicity."""
    sealed = {row.group for row in real_toxicity_prompts({}, sealed=True)}

    def make(item: dict[str, Any]) -> Row | None:
        row = toxic(item.get("prompt") or {})
        return None if row.group in sealed else row

    return _rows(where, ("allenai/real-toxicity-prompts", None, "train"), make)


def hub_stereoset(where: Where) -> list[Row]:
    """StereoSet's intrasentence items as its authors put them on the hub."""

    def make(item: dict[str, Any]) -> Row:
        sentences = item.get("sentences") or {}
        labels = sentences.get("gold_label", ())
        labelled = dict(zip(labels, sentences.get("sentence", ()), strict=False))
        # The labels of the hub's data set: 0 anti-stereotype, 1 stereotype, 2 unrelated.
        return stereoset_item(item, *(field(labelled, label) for label in (1, 0, 2)))

    return _rows(where, ("McGill-NLP/stereoset", "intrasentence", "validation"), make)


# Subtitles have more signs; within an article, some lines of a list of formulas look like a title,
# but have no blank lines around them.
_TITLE = re.compile(r" = [^=]+ = \n?")


def hub_wikitext_2(where: Where) -> list[Row]:
    """WikiText-2's raw test set (Merity et al. 2016), one row an article, in order; joined by two
    newlines they are the text whose sliding-window perplexity is usually reported.
    """

    def make(item: dict[str, Any]) -> Row:
        return Row("wikitext-2", "", "", field(item, "text"))

    rows = _rows(where, ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"), make)
    lines = [row.text for row in rows]
    blank = [not line.strip() for line in ["", *lines, ""]]
    titles = [
        blank[n] and blank[n + 2] and _TITLE.fullmatch(line) is not None
        for n, line in enumerate(lines)
    ]
    numbers = [max(1, n) for n in accumulate(map(int, titles))]  # what precedes the first is its
    articles = groupby(zip(numbers, lines, strict=True), key=lambda item: item[0])
    texts = ["\n\n".join(line for _, line in article) for _, article in articles]
    return [Row("wikitext-2", f"wikitext-2/{i}", "", text) for i, text in enumerate(texts)]


def hub_stereotype_elicitation(where: Where) -> list[Row]:
    """The stereotype-elicitation prompt library of MGS (Wu et al. 2024); strata are its classes."""

    def make(item: dict[str, Any]) -> Row:
        text, stratum = field(item, "text"), field(item, "class").removeprefix("stereotype_")
        group = f"stereotype-elicitation/{digest_text(text)[:16]}"
        return Row("stereotype-elicitation", group, stratum, text)

    return _rows(where, ("wu981526092/Stereotype-Elicitation-Prompt-Library", None, "train"), make)


def hub_c4(where: Where, seed: int) -> Iterator[Row]:
    """C4's English training texts (Raffel et al. 2020), streamed in an order decided by `seed`."""

    def make(item: dict[str, Any]) -> Row:
        return Row("c4", f"c4/{field(item, 'url')}", "", field(item, "text"))

    path = where.get("path", "allenai/c4")
    with _hub_errors(where, path):
        stream = _load(where, (path, "en", "train"), streaming=True)
        yield from usable(path, stream.shuffle(seed=seed, buffer_size=10_000), make)


PIN = ("path", "revision")  # the keys of `where` that every source here has
Split = tuple[str, str | None, str]  # a data set's path on the hub, its configuration, its split


def _rows(where: Where, of: Split, make: Callable[[dict[str, Any]], Row | None]) -> list[Row]:
    return list(usable(where.get("path", of[0]), _load(where, of), make))


def _load(where: Where, of: Split, streaming: bool = False) -> Any:
    """Rows on the hub at the pinned revision, or of a folder of the same layout, as it is now: what
    a cache holds of it may be older, and not seen to be by a file's date.
    """
    import datasets  # here: it takes seconds, and the embedded sources do without it

    path, name, split = where.get("path", of[0]), *of[1:]
    local = Path(path).is_dir()
    with _hub_errors(where, path):
        return datasets.load_dataset(
            path,
            name,
            split=split,
            revision=None if local else where["revision"],
            download_mode="force_redownload" if local else None,
            streaming=streaming,
            token=hub_token(),
        )


@contextmanager
def _hub_errors(where: Where, path: str) -> Iterator[None]:
    """Any failure to read a data set as one line, without the token."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, DatasetsError) as error:
        at = f" at revision {where['revision']}" if "revision" in where else ""
        raise InputError(
            f"cannot read data set {path}{at} {hub_reason(error)}; check the path, the "
            "revision, the network and, for a gated data set, the access"
        ) from None
