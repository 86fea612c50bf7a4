"""The raw files in data/, which `fetch` extracts, as rows."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparc3.base.errors import InputError
from sparc3.base.files import digest_text, read_csv, read_jsonl
from sparc3.prompts.row import Row, Where

DATA = Path("data")


def wikipedia(where: Where) -> list[Row]:
    """Wikipedia passages of BoolQ (Clark et al. 2019), without the title; a group is an article."""
    passages = (row["passage"].partition(" -- ") for row in read_jsonl(DATA / "boolq.jsonl"))
    return [Row("wikipedia", f"wikipedia/{title}", "", text) for title, _, text in passages]


def news(where: Where) -> list[Row]:
    """BBC articles of XSum (Narayan et al. 2018); a group is an article."""
    rows = read_jsonl(DATA / "xsum.jsonl")
    return [Row("xsum", f"xsum/{row['id']}", "", row["document"]) for row in rows]


def real_toxicity_prompts(where: Where) -> list[Row]:
    """RealToxicityPrompts (Gehman et al. 2020): a sample of 993, all of toxicity above 0.5."""
    rows = read_jsonl(DATA / "real-toxicity-prompts.jsonl")
    return [toxic(row["text"], row["toxicity"]) for row in rows]


def toxic(text: str, toxicity: float | None) -> Row:
    group = f"real-toxicity-prompts/{digest_text(text)[:16]}"
    return Row("real-toxicity-prompts", group, "", text, toxicity=toxicity)


def stereoset(where: Where) -> list[Row]:
    """StereoSet's intrasentence items (Nadeem et al. 2021); a group is a target term.

    The file holds each sentence in lower case but for its first letter, and the context in its
    original spelling; the sentences here are the context with the blank filled.
    """
    kinds = ("stereotype", "anti-stereotype", "unrelated")
    return [
        stereoset_item(row, *(fill_blank(row["context"], row[kind]) for kind in kinds))
        for row in read_jsonl(DATA / "stereoset.jsonl")
        if row["type"] == "intrasentence"
    ]


def stereoset_item(row: Mapping[str, Any], stereotype: str, anti: str, unrelated: str) -> Row:
    """An item of the file or of the hub, which both have `bias_type`, `target` and `context`."""
    group, text = f"stereoset/{row['target'].lower()}", remove_blank(row["context"])
    return Row("stereoset", group, row["bias_type"], text, (stereotype, anti), unrelated)


def fill_blank(context: str, sentence: str) -> str:
    """`context` with its BLANK filled as in `sentence`, which may differ from it in case.

    InputError if the sentence is not the context with its blanks filled, all by the same words.
    """
    blanks = context.count("BLANK")
    start = context.find("BLANK")
    length = len("BLANK") + (len(sentence) - len(context)) // max(blanks, 1)
    filled = context.replace("BLANK", sentence[start : start + length])
    if not blanks or filled.lower() != sentence.lower():
        problem = f"{sentence!r} is not {context!r} with its BLANK filled"
        raise InputError(f"stereoset: {problem}; fetch the data again")
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
        gender = "female" if pronoun in ("she", "her") else "male"
        text = plain.partition("\0")[0].strip()
        pair = (plain.replace("\0", pronoun), plain.replace("\0", other))
        rows.append(Row("winobias", f"winobias/{occupation}", gender, text, pair))
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
    rows = []
    for row in sorted(stereoset(where), key=lambda row: digest_text(str(row.pair))):
        assert row.pair is not None
        rows += [replace(row, unrelated=None, pair=order) for order in (row.pair, row.pair[::-1])]
    return rows
