"""Where prompts come from: raw files in data/, and data sets on the hub, as rows of one shape.

A source is one entry of SOURCES (every row at once) or STREAMS (rows one by one, in an order that
a seed decides), and a `where` mapping from params.yaml narrows it. The raw files are those that
`sparc3.fetch` extracts.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

from sparc3.errors import InputError
from sparc3.files import digest_text, read_csv, read_jsonl, read_text

DATA = Path("data")
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
    """Rows before `where` narrows them, and the keys that `where` may have."""

    rows: Callable[[Where], list[Row]]
    where: tuple[str, ...]


def wikipedia(where: Where) -> list[Row]:
    """Wikipedia passages of BoolQ (Clark et al. 2019), without the title; a group is an article."""
    return [_passage(row["passage"]) for row in read_jsonl(DATA / "boolq.jsonl")]


def _passage(passage: str) -> Row:
    title, _, text = passage.partition(" -- ")
    return Row("wikipedia", f"wikipedia/{title}", "", text)


def news(where: Where) -> list[Row]:
    """BBC articles of XSum (Narayan et al. 2018); a group is an article."""
    rows = read_jsonl(DATA / "xsum.jsonl")
    return [Row("xsum", f"xsum/{row['id']}", "", row["document"]) for row in rows]


def real_toxicity_prompts(where: Where) -> list[Row]:
    """RealToxicityPrompts (Gehman et al. 2020): a sample of 993, all of toxicity above 0.5."""
    rows = read_jsonl(DATA / "real-toxicity-prompts.jsonl")
    return [_toxic(row["text"], row["toxicity"]) for row in rows]


def _toxic(text: str, toxicity: float | None) -> Row:
    group = f"real-toxicity-prompts/{digest_text(text)[:16]}"
    return Row("real-toxicity-prompts", group, "", text, toxicity=toxicity)


def stereoset(where: Where) -> list[Row]:
    """StereoSet's intrasentence items (Nadeem et al. 2021); a group is a target term.

    The file holds each sentence in lower case but for its first letter, and the context in its
    original spelling; the sentences here are the context with the blank filled.
    """
    return [
        _item(
            row["bias_type"],
            row["target"],
            row["context"],
            *(fill_blank(row["context"], row[k]) for k in _KINDS),
        )
        for row in read_jsonl(DATA / "stereoset.jsonl")
        if row["type"] == "intrasentence"
    ]


_KINDS = ("stereotype", "anti-stereotype", "unrelated")


def _item(
    bias_type: str, target: str, context: str, stereotype: str, anti: str, unrelated: str
) -> Row:
    return Row(
        "stereoset",
        f"stereoset/{target.lower()}",
        bias_type,
        remove_blank(context),
        (stereotype, anti),
        unrelated,
    )


def fill_blank(context: str, sentence: str) -> str:
    """`context` with its BLANK filled as in `sentence`, which may differ from it in case.

    InputError if the sentence is not the context with its blanks filled, all by the same words.
    """
    blanks = context.count("BLANK")
    start = context.find("BLANK")
    length = len("BLANK") + (len(sentence) - len(context)) // max(blanks, 1)
    filled = context.replace("BLANK", sentence[start : start + length])
    if not blanks or filled.lower() != sentence.lower():
        raise InputError(
            f"stereoset: {sentence!r} is not {context!r} with its BLANK filled; "
            "fetch the data again"
        )
    return filled


def remove_blank(context: str) -> str:
    """The context without its BLANK marker, for completions."""
    words = " ".join(context.replace("BLANK", "").split())
    return re.sub(r" ([.,;:!?])", r"\1", words)


def crows_pairs(where: Where) -> list[Row]:
    """CrowS-Pairs (Nangia et al. 2020) as a sentence with a mask and its two fillers.

    The first filler makes the sentence that the authors call more stereotypical (their
    `sent_more`), whatever the direction of the item: so compared with the published file, row by
    row. A group is the pair of fillers, in either order, within a bias type. `text` is the more
    stereotypical sentence.
    """
    rows = []
    for row in read_csv(DATA / "crows-pairs.csv"):
        more, less = (row["sentence"].replace("[MASK]", row[k]) for k in ("mask1", "mask2"))
        fillers = "/".join(sorted(row[k].lower().strip(".,!?") for k in ("mask1", "mask2")))
        group = f"crows-pairs/{row['bias_type']}/{fillers}"
        rows.append(Row("crows-pairs", group, row["bias_type"], more, (more, less)))
    return rows


def winobias(where: Where) -> list[Row]:
    """WinoBias (Zhao et al. 2018): a pronoun for an occupation; pro-stereotyped and the other.

    A group is the occupation that the pronoun stands for, a stratum the gender it is stereotyped
    as. `text` ends before the pronoun. The two sentences with a second bracket, a reflexive that
    would give the gender away, are left out.
    """
    rows = []
    for row in read_jsonl(DATA / "winobias.jsonl"):
        sentence, pronoun = row["text"].strip(), row["pro_stereotyped"]
        if sentence.count("[") != 2:
            continue
        _, _, after = sentence.replace("[MASK]", "").partition("[")
        occupation = after.partition("]")[0].lower().removeprefix("the ")
        other = _COUNTERPARTS[pronoun]
        if pronoun == "her" and ". him" in row["options"]:
            other = "him"
        plain = sentence.replace("[MASK]", "\0").replace("[", "").replace("]", "")
        rows.append(
            Row(
                "winobias",
                f"winobias/{occupation}",
                "female" if pronoun in ("she", "her") else "male",
                plain.partition("\0")[0].strip(),
                (plain.replace("\0", pronoun), plain.replace("\0", other)),
            )
        )
    return rows


_COUNTERPARTS = {"he": "she", "she": "he", "his": "her", "him": "her", "her": "his"}


def gender_pairs(where: Where) -> list[Row]:
    """StereoSet's gender items, of only ten terms, and WinoBias. CrowS-Pairs stays out, so that
    it can be a second opinion on what was chosen here.
    """
    return [row for row in stereoset(where) if row.stratum == "gender"] + winobias(where)


def neutral_pairs(where: Where) -> list[Row]:
    """StereoSet's items, each in both orders: a reference for the target `pair` without direction.

    The same kind of sentences and of difference between two of them as in a stereotype's items,
    but no side that is preferred: over both orders, whatever changes its sign with the order (the
    target, relevance, a difference of activations) has mean 0. The two orders of an item follow
    each other, and the items stand in the order of a hash, so that `first: 2 n`
    is a sample of n items, whole.
    """
    found = []
    for row in sorted(stereoset(where), key=lambda row: digest_text(str(row.pair))):
        assert row.pair is not None
        found += [replace(row, unrelated=None, pair=order) for order in (row.pair, row.pair[::-1])]
    return found


def hub_real_toxicity_prompts(where: Where) -> list[Row]:
    """All 99,442 RealToxicityPrompts; those that Perspective did not score have no toxicity."""
    rows = _load(where, "allenai/real-toxicity-prompts", None, "train")
    return [_toxic(row["prompt"]["text"], row["prompt"]["toxicity"]) for row in rows]


def hub_stereoset(where: Where) -> list[Row]:
    """StereoSet's intrasentence items as its authors put them on the hub."""
    found = []
    for row in _load(where, "McGill-NLP/stereoset", "intrasentence", "validation"):
        sentences = dict(
            zip(row["sentences"]["gold_label"], row["sentences"]["sentence"], strict=True)
        )
        # The labels of the hub's data set: 0 anti-stereotype, 1 stereotype, 2 unrelated.
        found.append(
            _item(
                row["bias_type"],
                row["target"],
                row["context"],
                sentences[1],
                sentences[0],
                sentences[2],
            )
        )
    return found


# Subtitles have more signs; within an article, some lines of a list of formulas look like a title,
# but have no blank lines around them.
_TITLE = re.compile(r" = [^=]+ = \n?")


def hub_wikitext_2(where: Where) -> list[Row]:
    """WikiText-2's raw test set (Merity et al. 2016), one row an article, in order.

    Joined by two newlines they are the text whose sliding-window perplexity is usually reported.
    """
    lines = [
        row["text"] for row in _load(where, "Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    ]
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
    path = "wu981526092/Stereotype-Elicitation-Prompt-Library"
    return [
        Row(
            "stereotype-elicitation",
            f"stereotype-elicitation/{digest_text(row['text'])[:16]}",
            row["class"].removeprefix("stereotype_"),
            row["text"],
        )
        for row in _load(where, path, None, "train")
    ]


def hub_c4(where: Where, seed: int) -> Iterator[Row]:
    """C4's English training texts (Raffel et al. 2020), streamed in an order decided by `seed`."""
    with _hub_errors(where, "allenai/c4"):
        stream = _load(where, "allenai/c4", "en", "train", streaming=True)
        for row in stream.shuffle(seed=seed, buffer_size=10_000):
            yield Row("c4", f"c4/{row['url']}", "", row["text"])


_HUB = ("path", "revision")

SOURCES = {
    "wikipedia": Source(wikipedia, ()),
    "news": Source(news, ()),
    "real-toxicity-prompts": Source(real_toxicity_prompts, ("min_toxicity", "first")),
    "stereoset": Source(stereoset, ("bias_type", "first")),
    "neutral-pairs": Source(neutral_pairs, ("bias_type", "first")),
    "crows-pairs": Source(crows_pairs, ("bias_type", "first")),
    "winobias": Source(winobias, ("first",)),
    "gender-pairs": Source(gender_pairs, ()),
    "hub/real-toxicity-prompts": Source(
        hub_real_toxicity_prompts, (*_HUB, "min_toxicity", "first")
    ),
    "hub/stereoset": Source(hub_stereoset, (*_HUB, "bias_type", "first")),
    "hub/wikitext-2": Source(hub_wikitext_2, (*_HUB, "first")),
    "hub/stereotype-elicitation": Source(hub_stereotype_elicitation, (*_HUB, "bias_type", "first")),
}

STREAMS = {"hub/c4": hub_c4}


def check(key: str, source: str, where: Where) -> None:
    """InputError, naming the params key below `key`, if there is no such source or `where` key."""
    if source in STREAMS:
        known = _HUB
    elif source in SOURCES:
        known = SOURCES[source].where
    else:
        raise InputError(
            f"params: {key}.source {source!r} is not known; choose one of "
            f"{', '.join([*SOURCES, *STREAMS])}"
        )
    for name, value in where.items():
        if name not in known:
            raise InputError(
                f"params: {key}.where.{name} is not known; "
                f"source {source!r} has {', '.join(known) or 'no keys'}"
            )
        if not _EXPECTED[name][1](value):
            raise InputError(
                f"params: {key}.where.{name} is {value!r}; expected {_EXPECTED[name][0]}"
            )
    if known[:2] == _HUB and "revision" not in where and not Path(where.get("path", "")).is_dir():
        raise InputError(
            f"params: {key}.where.revision is missing; pin the hub's data set by its commit"
        )


_EXPECTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "path": ("a local folder, or owner/name on the hub", lambda v: isinstance(v, str) and v != ""),
    "revision": ("a commit on the hub, as text", lambda v: isinstance(v, str) and v != ""),
    "bias_type": ("text", lambda v: isinstance(v, str)),
    "first": (
        "a whole number of at least 1",
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0,
    ),
    "min_toxicity": (
        "a number from 0 to 1",
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v <= 1,
    ),
}


def narrow(key: str, rows: list[Row], where: Where) -> list[Row]:
    """The rows that fit `where`, in their order; InputError for a bias type that is not there."""
    if "bias_type" in where:
        known = sorted({row.stratum for row in rows})
        if where["bias_type"] not in known:
            raise InputError(
                f"params: {key}.where.bias_type {where['bias_type']!r} is not in the data; "
                f"choose one of {', '.join(known)}"
            )
        rows = [row for row in rows if row.stratum == where["bias_type"]]
    if "min_toxicity" in where:
        least = where["min_toxicity"]
        rows = [row for row in rows if row.toxicity is not None and row.toxicity >= least]
    return rows[: where.get("first", len(rows))]


def hub_token() -> str | None:
    """HF_TOKEN of the environment, else of .env; None if neither has it.

    InputError, which does not show it, if it cannot be a token: sent to the hub it would come back
    in an error message.
    """
    token = os.environ.get("HF_TOKEN") or _from_env_file(Path(".env"))
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise InputError(
            "HF_TOKEN: not a token (it has spaces or unprintable letters); copy it again"
        )
    return token


def _from_env_file(path: Path) -> str | None:
    lines = read_text(path).splitlines() if path.is_file() else []
    for line in lines:
        name, _, value = line.strip().removeprefix("export ").partition("=")
        if name.strip() == "HF_TOKEN":
            return value.strip().strip("'\"") or None
    return None


def _load(where: Where, path: str, name: str | None, split: str, streaming: bool = False) -> Any:
    """A split of a data set: on the hub at the pinned revision, or a folder of the same layout."""
    import datasets  # here: it takes seconds, and the embedded sources do without it

    path = where.get("path", path)
    with _hub_errors(where, path):
        return datasets.load_dataset(
            path,
            name,
            split=split,
            revision=None if Path(path).is_dir() else where["revision"],
            streaming=streaming,
            token=hub_token(),
        )


@contextmanager
def _hub_errors(where: Where, path: str) -> Iterator[None]:
    """Any failure to read a data set as one line, without the token."""
    token = hub_token()
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        if token:
            reason = reason.replace(token, "***")
        given = "HF_TOKEN was given" if token else "no HF_TOKEN was given"
        at = f" at revision {where['revision']}" if "revision" in where else ""
        raise InputError(
            f"cannot read data set {path}{at} ({type(error).__name__}: {reason}); {given}; "
            "check the path, the revision, the network and, for a gated data set, the access"
        ) from None
