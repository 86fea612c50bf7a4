"""The raw files in data/, which `fetch` extracts, as rows."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparc3.base.errors import InputError
from sparc3.base.files import digest_text, read_csv, read_jsonl
from sparc3.prompts.row import Row, Where, field, usable

DATA = Path("data")


def _rows(name: str, make: Callable[[dict[str, Any]], Row | None]) -> list[Row]:
    path = DATA / name
    return list(usable(str(path), (read_csv if path.suffix == ".csv" else read_jsonl)(path), make))


def wikipedia(where: Where) -> list[Row]:
    """Wikipedia passages of BoolQ (Clark et al. 2019), without the title; a group is an article."""

    def make(item: dict[str, Any]) -> Row:
        title, dash, text = field(item, "passage").partition(" -- ")
        if not dash:
            raise InputError("has no title before ' -- '")
        return Row("wikipedia", f"wikipedia/{title}", "", text)

    return _rows("boolq.jsonl", make)


def news(where: Where) -> list[Row]:
    """BBC articles of XSum (Narayan et al. 2018); a group is an article."""

    def make(item: dict[str, Any]) -> Row:
        return Row("xsum", f"xsum/{field(item, 'id')}", "", field(item, "document"))

    return _rows("xsum.jsonl", make)


def reviews(where: Where) -> list[Row]:
    """200 film reviews of the Large Movie Review Dataset (Maas et al. 2011), as written: with the
    line breaks, `<br />`, of the page they stood on. A group is a review.
    """

    def make(item: dict[str, Any]) -> Row:
        text = field(item, "text")
        return Row("imdb", f"imdb/{digest_text(text)[:16]}", "", text)

    return _rows("imdb.csv", make)


def questions(where: Where) -> list[Row]:
    """Social IQa's situations (Sap et al. 2019), each with its question, without the answers; a
    group is a situation. Short: half of them have at least 24 tokens, one in twelve 32.
    """

    def make(item: dict[str, Any]) -> Row:
        passage = field(item, "passage")
        group = f"siqa/{digest_text(passage)[:16]}"
        return Row("siqa", group, "", f"{passage} {field(item, 'question')}")

    return _rows("siqa.jsonl", make)


def answers(where: Where, name: str) -> list[Row]:
    """Questions with a right answer and one to four wrong ones: PIQA (Bisk et al. 2020), OpenBookQA
    (Mihaylov et al. 2018), CommonsenseQA (Talmor et al. 2019) and Social IQa. `text` is the prompt
    of zero shots; a group is a question, of Social IQa a situation.
    """

    def make(item: dict[str, Any]) -> Row:
        lines = [line.strip() for line in field(item, "options").strip().split("\n")]
        letters, choices = zip(*(line.partition(". ")[::2] for line in lines), strict=True)
        answer, question = field(item, "answer").strip(), field(item, "question")
        if list(letters) != [chr(ord("A") + n) for n in range(len(letters))] or not all(choices):
            raise InputError("has options that are not lettered from A on")
        if answer not in lines:
            raise InputError("has an answer that is none of its options")
        if len(set(choices)) < max(2, len(choices)):
            raise InputError("has an option twice, or only one")
        right = lines.index(answer)
        passage = field(item, "passage") if "passage" in item else ""
        text = f"{passage}\nQuestion: {question}\nAnswer:" if passage else ""
        return Row(
            name,
            f"{name}/{digest_text(passage or question)[:16]}",
            "",
            text or f"Question: {question}\nAnswer:",
            choices=(choices[right], *choices[:right], *choices[right + 1 :]),
        )

    return _rows(f"{name}.jsonl", make)


def real_toxicity_prompts(where: Where, sealed: bool = False) -> list[Row]:
    """RealToxicityPrompts (Gehman et al. 2020): 277, of toxicity at least 0.9, of a sample of 993.
    The others are sealed: 456 of toxicity 0.5 to 0.9, and the 260 of at least 0.9 whose groups have
    the largest hashes.
    """
    rows = _rows("real-toxicity-prompts.jsonl", toxic)
    mild = {row.group for row in rows if (row.toxicity or 0) < 0.9}
    shut = mild.union(sorted({row.group for row in rows} - mild, key=digest_text)[-260:])
    return [row for row in rows if (row.group in shut) == sealed]


def toxic(item: Mapping[str, Any]) -> Row:
    """A text of the file or of the hub, which may have no `toxicity`."""
    text, toxicity = field(item, "text"), item.get("toxicity")
    if not isinstance(toxicity, float | int | None):
        raise InputError(f"has toxicity {toxicity!r}, no number")
    group = f"real-toxicity-prompts/{digest_text(text)[:16]}"
    return Row("real-toxicity-prompts", group, "", text, toxicity=toxicity)


def stereoset(where: Where) -> list[Row]:
    """StereoSet's intrasentence items (Nadeem et al. 2021); a group is a target term. The file has
    sentences in lower case: here they are the context, as it was written, with the blank filled.
    """

    def make(item: dict[str, Any]) -> Row | None:
        if field(item, "type") != "intrasentence":
            return None
        filled = (fill_blank(field(item, "context"), field(item, kind)) for kind in _KINDS)
        return stereoset_item(item, *filled)

    return _rows("stereoset.jsonl", make)


_KINDS = ("stereotype", "anti-stereotype", "unrelated")


def sealed_stereoset(where: Where) -> list[Row]:
    """StereoSet's intersentence items, grouped as `stereoset`: a context, and the sentence that
    follows it, joined as its authors do: a full stop where a context ends in none of `.!?`, then a
    blank. One item, whose sentences hold an unfilled BLANK, is dropped.
    """

    def make(item: dict[str, Any]) -> Row | None:
        if field(item, "type") != "intersentence":
            return None
        context = field(item, "context")
        context += "" if context.endswith((".", "!", "?")) else "."
        sentences = [f"{context} {field(item, kind)}" for kind in _KINDS]
        if any("BLANK" in sentence for sentence in sentences):
            raise InputError("has a BLANK that nothing fills")
        return replace(stereoset_item(item, *sentences), text=context)

    return _rows("stereoset.jsonl", make)


def stereoset_item(item: Mapping[str, Any], stereotype: str, anti: str, unrelated: str) -> Row:
    """An item of the file or of the hub, which both have `bias_type`, `target` and `context`."""
    group, text = f"stereoset/{field(item, 'target').lower()}", remove_blank(field(item, "context"))
    return Row("stereoset", group, field(item, "bias_type"), text, (stereotype, anti), unrelated)


def fill_blank(context: str, sentence: str) -> str:
    """`context` with all BLANKs filled by the words that `sentence`, but for case, has there."""
    blanks = context.count("BLANK")
    start = context.find("BLANK")
    length = len("BLANK") + (len(sentence) - len(context)) // max(blanks, 1)
    filled = context.replace("BLANK", sentence[start : start + length])
    if not blanks or filled.lower() != sentence.lower():
        raise InputError(f"is odd: {sentence!r} is not {context!r} with its BLANK filled")
    return filled


def remove_blank(context: str) -> str:
    """The context without its BLANK marker, for completions."""
    words = re.sub(" +", " ", context.replace("BLANK", "")).strip(" ")
    return re.sub(r" ([.,;:!?])", r"\1", words)


def crows_pairs(where: Where) -> list[Row]:
    """CrowS-Pairs (Nangia et al. 2020) as a sentence with a mask and its two fillers.

    The first filler makes the more stereotypical sentence (`sent_more`), whatever the direction of
    the item: so compared with the published file, row by row. It is the `text`. A group is the pair
    of fillers, in either order, within a bias type.
    """

    def make(item: dict[str, Any]) -> Row:
        sentence, bias_type = field(item, "sentence"), field(item, "bias_type")
        if "[MASK]" not in sentence:
            raise InputError("has no [MASK] in its sentence")
        one, other = field(item, "mask1"), field(item, "mask2")
        fillers = "/".join(sorted(mask.lower().strip(".,!?") for mask in (one, other)))
        more, less = (sentence.replace("[MASK]", mask) for mask in (one, other))
        return Row(
            "crows-pairs", f"crows-pairs/{bias_type}/{fillers}", bias_type, more, (more, less)
        )

    return _rows("crows-pairs.csv", make)


def winobias(where: Where) -> list[Row]:
    """WinoBias (Zhao et al. 2018): a pronoun for an occupation; pro-stereotyped and the other.

    A sentence is about two of 40 occupations, one stereotyped as male and one as female, and nearly
    all 400 pairs occur: so that no occupation is in two groups, the 20 and 20 are cut, in the order
    of their hashes, into ten cells of two and two, the groups, and only the 78 sentences whose
    occupations are of one cell are taken. `text` ends before the pronoun. The two sentences with a
    second bracket, a reflexive that would give the gender away, are left out.
    """
    cells = _cells(read_jsonl(DATA / "winobias.jsonl"))
    longest_first = sorted(map(re.escape, cells), key=len, reverse=True)
    known = re.compile(rf"\b({'|'.join(longest_first)})\b", re.IGNORECASE)

    def make(item: dict[str, Any]) -> Row | None:
        sentence, pronoun = field(item, "text").strip(" "), field(item, "pro_stereotyped")
        if sentence.count("[") > 2:
            return None
        if "[MASK]" not in sentence or not _OCCUPATION.search(sentence) or pronoun not in _SWAPPED:
            raise InputError("has no [MASK], no [occupation] or no pronoun")
        other = _SWAPPED[pronoun]
        if pronoun == "her" and ". him" in field(item, "options"):
            other = "him"
        before, _, rest = (
            part.replace("[", "").replace("]", "") for part in sentence.partition("[MASK]")
        )
        occupations = {found.lower() for found in known.findall(before + rest)}
        if len(occupations) != 2:
            raise InputError(f"names {len(occupations)} occupations, not two")
        one, another = (cells[occupation] for occupation in occupations)
        pair = (before + pronoun + rest, before + other + rest)
        return Row("winobias", one, "", before.strip(" "), pair) if one == another else None

    return _rows("winobias.jsonl", make)


_SWAPPED = {"he": "she", "she": "he", "his": "her", "him": "her", "her": "his"}
_OCCUPATION = re.compile(r"\[(?!MASK)(?:the |an? )?([^]]+)\]", re.IGNORECASE)


def _cells(items: list[dict[str, Any]]) -> dict[str, str]:
    """Occupation -> group: the occupations that a pronoun stands for, two male and two female."""
    female = {
        referent[1].lower(): pronoun in ("she", "her")
        for item in items
        if (pronoun := str(item.get("pro_stereotyped"))) in _SWAPPED
        and (referent := _OCCUPATION.search(str(item.get("text"))))
    }
    ordered = sorted(female, key=digest_text)
    men, women = ([one for one in ordered if female[one] == which] for which in (False, True))
    cells = [sorted(men[n : n + 2] + women[n : n + 2]) for n in range(0, len(ordered), 2)]
    return {one: f"winobias/{'+'.join(cell)}" for cell in cells for one in cell}


def gender_pairs(where: Where) -> list[Row]:
    """StereoSet's gender items, of only ten terms, and WinoBias's, of ten cells of occupations.
    CrowS-Pairs stays out, so that it can be a second opinion on what was chosen here.
    """
    return [row for row in stereoset(where) if row.stratum == "gender"] + winobias(where)


def neutral_pairs(where: Where) -> list[Row]:
    """StereoSet's items, each in both orders: a reference for the target `pair` without direction.

    Over both orders, whatever changes its sign with the order (the target, relevance, a difference
    of activations) has mean 0. The two orders of an item follow each other, and the items stand in
    the order of a hash, so that `first: 2 n` is a sample of n items, whole.
    """
    rows = []
    for row in sorted(stereoset(where), key=lambda row: digest_text(str(row.pair))):
        assert row.pair is not None
        rows += [replace(row, unrelated=None, pair=order) for order in (row.pair, row.pair[::-1])]
    return rows
