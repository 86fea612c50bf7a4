"""Sources: every raw format, the real files, and the hub's data sets in folders of their layout."""

import csv
import gzip
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
import raw

from sparc3.base import secrets
from sparc3.base.errors import InputError
from sparc3.base.files import digest_text, read_jsonl, write_csv, write_jsonl
from sparc3.base.params import PromptSet
from sparc3.prompts import embedded, hub, sources
from sparc3.prompts.row import Row
from sparc3.stages import checks

ROOT = Path(__file__).parent.parent
TOKEN = "hf_notAnActualTokenButLongEnough"


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """An empty folder, without a token and with caches of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    return tmp_path


def rows_of(source: str, **where: object) -> list[Row]:
    if source not in sources.SEALED:
        checks.refuse(checks.check_source("prompt_sets.a", PromptSet(source, None, where=where)))
    return sources.narrow("prompt_sets.a", list(sources.SOURCES[source].rows(where)), where)


# Raw files


def test_wikipedia_leaves_the_title_out_and_groups_by_it(project):
    passages = ["A -- One -- two.", "A -- Three.", "B -- Four."]
    write_jsonl(Path("data/boolq.jsonl"), [{"passage": p, "question": "?"} for p in passages])
    assert [(row.group, row.text) for row in rows_of("wikipedia")] == [
        ("wikipedia/A", "One -- two."),
        ("wikipedia/A", "Three."),
        ("wikipedia/B", "Four."),
    ]


def test_reviews_are_as_written_and_questions_follow_their_situation(project):
    texts = ["Good.<br /><br />\r\nSee it.", 'She said, "no".']
    write_csv(Path("data/imdb.csv"), [{"text": t, "label": 1} for t in texts], ["text", "label"])
    assert [row.text for row in rows_of("reviews")] == texts
    assert len({row.group for row in rows_of("reviews")}) == 2
    asked = [("Tracy left.", "Why?"), ("Tracy left.", "What now?"), ("Jan ate.", "Why?")]
    write_jsonl(Path("data/siqa.jsonl"), [{"passage": p, "question": q} for p, q in asked])
    found = rows_of("questions")
    assert [row.text for row in found] == [f"{p} {q}" for p, q in asked]
    assert found[0].group == found[1].group != found[2].group


def test_questions_have_the_right_answer_first(project):
    lines = "\nA. to see \nB. a. b\nC. so"
    item = {"question": "Why?", "options": lines, "answer": "B. a. b"}
    write_jsonl(Path("data/openbookqa.jsonl"), [item])
    write_jsonl(Path("data/siqa.jsonl"), [{**item, "passage": "Jan ate."}])
    (row,), (after,) = rows_of("openbookqa"), rows_of("siqa")
    assert row.choices == after.choices == ("a. b", "to see", "so")
    assert row.text == "Question: Why?\nAnswer:"
    assert after.text == f"Jan ate.\n{row.text}"
    assert (row.source, after.source) == ("openbookqa", "siqa")


def test_toxicity_is_filtered_from_the_threshold_on(project):
    raw.write_toxicity(project / "data", 80)
    every, found = (rows_of("real-toxicity-prompts", min_toxicity=least) for least in (0, 0.95))
    assert len({row.group for row in every}) == len(every) == 80
    assert found == [row for row in every if row.toxicity and row.toxicity >= 0.95]
    assert min(row.toxicity for row in found if row.toxicity is not None) == 0.95
    assert 20 < len(found) < 60
    assert rows_of("real-toxicity-prompts", min_toxicity=0.95, first=3) == found[:3]


def test_the_mild_and_260_others_are_sealed_also_where_a_text_has_two_scores(project):
    raw.write_toxicity(project / "data", 80)
    path = Path("data/real-toxicity-prompts.jsonl")
    lines = read_jsonl(path)
    twice = rows_of("real-toxicity-prompts")[0].text
    write_jsonl(path, [*lines, {"text": twice, "toxicity": 0.6}])
    mild = {row["text"] for row in lines if row["toxicity"] < 0.9} | {twice}
    rest = {row["text"] for row in lines} - mild
    rest = sorted(rest, key=lambda text: digest_text(toxic_group(text)))
    assert [row.text for row in rows_of("sealed/real-toxicity-prompts")].count(twice) == 2
    assert {row.text for row in rows_of("sealed/real-toxicity-prompts")} == mild | {*rest[-260:]}
    assert {row.text for row in rows_of("real-toxicity-prompts")} == {*rest[:-260]}
    assert len(rest[:-260]) == 79


def toxic_group(text: str) -> str:
    return f"real-toxicity-prompts/{digest_text(text)[:16]}"


def test_blanks_are_filled_in_the_spelling_of_the_context():
    fill = embedded.fill_blank
    assert fill("In Cameroon, BLANK!", "In cameroon, rain!") == "In Cameroon, rain!"
    assert fill("BLANK from Ethiopia ran", "Skinny men from ethiopia ran") == (
        "Skinny men from Ethiopia ran"
    )
    assert fill("A BLANK and a BLANK Man", "A b c and a b c man") == "A b c and a b c Man"
    assert fill("a BLANK", "A b") == "a b"
    for context, sentence in [("No blank", "No blank"), ("A BLANK.", "B c."), ("A BLANK", "A")]:
        with pytest.raises(InputError, match=r"is not .* with its BLANK filled"):
            fill(context, sentence)


def test_a_context_loses_its_blank_and_the_space_before_punctuation():
    assert embedded.remove_blank("Ethiopian men are BLANK") == "Ethiopian men are"
    assert embedded.remove_blank("My sister is very BLANK!") == "My sister is very!"
    assert embedded.remove_blank("The BLANK man, BLANK, ran.") == "The man,, ran."


def test_stereoset_holds_the_intrasentence_items(project):
    raw.write_stereoset(project / "data", per_target=2)
    found = rows_of("stereoset", bias_type="race")
    assert len(found) == 16
    assert found[0] == Row(
        "stereoset",
        "stereoset/raceland 0",
        "race",
        "My friend 0 from Raceland 0 is.",
        ("My friend 0 from Raceland 0 is sly.", "My friend 0 from Raceland 0 is kind."),
        "My friend 0 from Raceland 0 is oven.",
    )


def test_sealed_stereoset_joins_a_context_and_what_follows_it(project):
    kinds = ("stereotype", "anti-stereotype", "unrelated")
    item = {"type": "intersentence", "target": "Norse", "bias_type": "race"}
    texts = [
        ("Olaf is a  Norse man", ("he  sails", "He knits", "Ice melts.")),
        ("Is Olaf Norse?", ("Yes.", "no!", "Ice melts.")),
        ("The BLANK man", ("a", "b", "c")),
    ]
    lines = [{**item, "context": c, **dict(zip(kinds, s, strict=True))} for c, s in texts]
    write_jsonl(Path("data/stereoset.jsonl"), [*lines, ITEM])
    one, other = rows_of("sealed/stereoset")
    assert one == Row(
        "stereoset",
        "stereoset/norse",
        "race",
        "Olaf is a  Norse man.",
        ("Olaf is a  Norse man. he  sails", "Olaf is a  Norse man. He knits"),
        "Olaf is a  Norse man. Ice melts.",
    )
    assert other.pair == ("Is Olaf Norse? Yes.", "Is Olaf Norse? no!")


def test_neutral_pairs_are_the_items_in_both_orders(project):
    raw.write_stereoset(project / "data")
    items = {row.pair for row in rows_of("stereoset", bias_type="race")}
    found = rows_of("neutral-pairs", bias_type="race")
    pairs = [row.pair for row in found]
    assert len(pairs) == 2 * len(items)
    assert set(pairs) == items | {pair[::-1] for pair in items if pair}
    for one, other in zip(found[::2], found[1::2], strict=True):
        assert other.pair
        assert one.pair == other.pair[::-1]
        assert one.group == other.group
        assert one.unrelated is None


def test_crows_pairs_put_the_more_stereotypical_sentence_first(project):
    raw.write_crows(project / "data")
    found = rows_of("crows-pairs", bias_type="gender")
    assert found[0].pair == (
        "She came to town 0, it was late",
        "He came to town 0, it was late",
    )
    assert [row.group for row in found[:5]] == [
        "crows-pairs/gender/he/she",
        "crows-pairs/gender/he/she",
        "crows-pairs/gender/jane/tom",
        "crows-pairs/gender/men/women",
        "crows-pairs/gender/boys/girls",
    ]
    assert found[0].text == "She came to town 0, it was late"


def test_winobias_pairs_the_pronouns_of_two_occupations(project):
    rows = [
        raw.winobias_row(" [The CEO] saw the maid as [MASK] was up.", "he", ("she", "he")),
        raw.winobias_row(" The CEO saw [the maid] clean [MASK] desk.", "her", ("her", "his")),
        raw.winobias_row(" The maid saw [a cook] and told [MASK] so.", "him", ("her", "him")),
        raw.winobias_row(" The cook saw [the maid] and told [MASK] so.", "her", ("her", "him")),
        raw.winobias_row(" [The cook] said [MASK] did it by [himself].", "he", ("she", "he")),
    ]
    write_jsonl(Path("data/winobias.jsonl"), rows)
    found = rows_of("winobias")
    assert {(row.group, row.stratum) for row in found} == {("winobias/ceo+cook+maid", "")}
    assert [(row.text, row.pair) for row in found] == [
        (
            "The CEO saw the maid as",
            ("The CEO saw the maid as he was up.", "The CEO saw the maid as she was up."),
        ),
        (
            "The CEO saw the maid clean",
            ("The CEO saw the maid clean her desk.", "The CEO saw the maid clean his desk."),
        ),
        (
            "The maid saw a cook and told",
            ("The maid saw a cook and told him so.", "The maid saw a cook and told her so."),
        ),
        (
            "The cook saw the maid and told",
            ("The cook saw the maid and told her so.", "The cook saw the maid and told him so."),
        ),
    ]


def test_winobias_keeps_the_items_of_one_cell_and_the_longest_occupation(project):
    raw.write_winobias(project / "data", of_each=5)
    lines = json.dumps(read_jsonl(Path("data/winobias.jsonl")))
    lines = re.sub(r"\bhe1\b", "he1 he2", lines)  # beside the shorter he2
    write_jsonl(Path("data/winobias.jsonl"), json.loads(lines))
    words = {"he": ["he0", "he1 he2", "he2", "he3", "he4"], "she": [f"she{n}" for n in range(5)]}
    men, women = (sorted(words[kind], key=digest_text) for kind in ("he", "she"))
    cells = [{*men[n : n + 2], *women[n : n + 2]} for n in (0, 2, 4)]
    expected = {f"winobias/{'+'.join(sorted(cell))}": len(cell) ** 2 // 2 for cell in cells}
    assert Counter(row.group for row in rows_of("winobias")) == expected


PRONOUN = raw.winobias_row(" [The cook] saw the maid as [MASK] was up.", "he", ("she", "he"))
MAID = raw.winobias_row(" The cook saw [the maid] as [MASK] was up.", "she", ("she", "he"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"text": "[The cook] saw him."}, r"no \[MASK\]"),
        ({"text": "The cook saw [MASK]."}, r"no \[occupation\]"),
        ({"pro_stereotyped": "they"}, "no pronoun"),
        ({"pro_stereotyped": ["he"]}, "no text in 'pro_stereotyped'"),
        ({"text": "[The cook] saw a guest as [MASK] was up."}, "names 1 occupations"),
        ({"text": "[The ceo] saw the maid cook as [MASK] was up."}, "names 3 occupations"),
    ],
)
def test_a_bad_row_of_winobias_is_dropped(project, caplog, change, problem):
    write_jsonl(Path("data/winobias.jsonl"), [PRONOUN, {**PRONOUN, **change}, MAID])
    assert len(rows_of("winobias")) == 2
    (message,) = caplog.messages
    assert re.search(
        rf"winobias\.jsonl: 1 of 3 rows dropped; the first: row 2 .*{problem}", message
    )


def test_gender_pairs_leave_crows_pairs_for_a_second_opinion(project):
    raw.write_data(project / "data")
    found = rows_of("gender-pairs")
    assert found == rows_of("stereoset", bias_type="gender") + rows_of("winobias")
    assert Counter(row.source for row in found) == {"stereoset": 24, "winobias": 24}


# Bad rows, and letters that other readers take for the end of a line

ODD = 'one\rtwo\r\nthree\nfour\x0bfive\x0csix\x1cseven\x1deight\x1enine\x85ten\u2028a\u2029b,"c"\0d'
FILLED = {"context": "a BLANK b", "stereotype": "A x b", "anti-stereotype": "a y b"}
ITEM = {"type": "intrasentence", "target": "t", "bias_type": "race", **FILLED, "unrelated": "a z b"}
BETWEEN = {**ITEM, "type": "intersentence", "context": "a"}
TOXIC = {"text": "a", "toxicity": 0.9}
MASKED = {"": "0", "bias_type": "age", "sentence": "[MASK] came", "mask1": "He", "mask2": "She"}
ASKED = {"question": "What?", "options": "\nA. tap\nB. pipe ", "answer": "B. pipe"}
BAD = [  # source, file, a good row, what is wrong with the bad one, what the log says of it
    ("wikipedia", "boolq.jsonl", {"passage": "A -- b"}, {"passage": "A b"}, "no title before"),
    ("wikipedia", "boolq.jsonl", {"passage": "A -- b"}, {"passage": None}, "no text in 'passage'"),
    (
        "news",
        "xsum.jsonl",
        {"id": "1", "document": "a"},
        {"document": "\ud800"},
        "half a surrogate",
    ),
    ("sealed/real-toxicity-prompts", "", TOXIC, {"toxicity": "0.9"}, "no number"),
    ("sealed/real-toxicity-prompts", "", TOXIC, {"text": 3}, "no text in 'text'"),
    ("sealed/stereoset", "", BETWEEN, {"context": "a BLANK"}, "a BLANK that nothing fills"),
    ("sealed/stereoset", "", BETWEEN, {"anti-stereotype": "A x b"}, "two equal sentences"),
    ("questions", "siqa.jsonl", {"passage": "a", "question": "b"}, {"question": None}, "no text"),
    ("stereoset", "", ITEM, {"context": "a b"}, "with its BLANK filled"),
    ("stereoset", "", ITEM, {"anti-stereotype": "A x b"}, "two equal sentences"),
    ("stereoset", "", ITEM, {"target": None}, "no text in 'target'"),
    ("crows-pairs", "crows-pairs.csv", MASKED, {"sentence": "He came"}, r"no \[MASK\]"),
    ("crows-pairs", "crows-pairs.csv", MASKED, {"mask2": "He"}, "two equal sentences"),
    ("piqa", "", ASKED, {"answer": "A. sink"}, "an answer that is none of its options"),
    ("piqa", "", ASKED, {"options": "A. tap\nC. pipe"}, "not lettered from A on"),
    ("piqa", "", ASKED, {"options": "A. tap\nB. "}, "not lettered from A on"),
    ("piqa", "", ASKED, {"options": "A. tap\nB. tap", "answer": "A. tap"}, "an option twice"),
    ("piqa", "", ASKED, {"options": "B. pipe"}, "not lettered from A on"),
    ("piqa", "", ASKED, {"options": "A. pipe", "answer": "A. pipe"}, "or only one"),
    ("siqa", "", {**ASKED, "passage": "It rains."}, {"passage": 3}, "no text in 'passage'"),
]


def write_rows(path: Path, rows: list[dict]) -> None:
    if path.suffix == ".csv":
        write_csv(path, rows, list(rows[0]))
    else:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.mark.parametrize(("source", "file", "good", "change", "problem"), BAD)
def test_a_bad_row_is_dropped_counted_and_named_once(
    project, caplog, source, file, good, change, problem
):
    path, bad = Path("data", file or f"{source.removeprefix('sealed/')}.jsonl"), {**good, **change}
    write_rows(path, [good])
    expected = rows_of(source)
    assert len(expected) == 1
    assert not caplog.messages
    write_rows(path, [good, bad, good, bad])
    assert rows_of(source) == expected * 2
    (message,) = caplog.messages
    assert re.search(rf"{path}: 2 of 4 rows dropped; the first: row 2 .*{problem}", message)
    assert "fetch" not in message
    write_rows(path, [bad, bad])
    with pytest.raises(InputError, match=rf"{path}: no row can be used; row 1 .*{problem}"):
        rows_of(source)


def test_texts_are_those_of_the_file_letter_by_letter(project):
    write_jsonl(Path("data/boolq.jsonl"), [{"passage": f"A -- {ODD}"}])
    write_jsonl(Path("data/xsum.jsonl"), [{"id": "1", "document": ODD}])
    write_jsonl(Path("data/real-toxicity-prompts.jsonl"), [{"text": ODD, "toxicity": 0.9}])
    write_csv(Path("data/imdb.csv"), [{"text": ODD}], ["text"])
    for source in ("wikipedia", "news", "sealed/real-toxicity-prompts", "reviews"):
        assert [row.text for row in rows_of(source)] == [ODD]
    words = {kind: f"{ODD} {kind} {ODD}" for kind in ("stereotype", "anti-stereotype", "unrelated")}
    item = {**ITEM, "context": f"{ODD} BLANK {ODD}", **words}
    write_jsonl(Path("data/stereoset.jsonl"), [item])
    (row,) = rows_of("stereoset")
    assert row.pair == (words["stereotype"], words["anti-stereotype"])
    assert row.unrelated == words["unrelated"]
    assert row.text == f"{ODD} {ODD}"
    with Path("data/crows-pairs.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(MASKED), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerow({**MASKED, "sentence": f"[MASK] {ODD}"})
    assert [row.pair for row in rows_of("crows-pairs")] == [(f"He {ODD}", f"She {ODD}")]
    text = f" [The cook] {ODD} the maid {ODD} [MASK] {ODD}."
    write_jsonl(Path("data/winobias.jsonl"), [{**PRONOUN, "text": text}, MAID])
    row = rows_of("winobias")[0]
    before = f"The cook {ODD} the maid {ODD}"
    assert row.pair == tuple(f"{before} {word} {ODD}." for word in ("he", "she"))
    assert row.text == before


# The real files


@pytest.fixture
def real(fetched, monkeypatch) -> None:
    monkeypatch.chdir(fetched)


def test_the_real_files_have_the_counts_that_are_documented(real):
    counts = {
        name: len(list(source.rows({})))
        for name, source in sources.SOURCES.items()
        if not name.startswith("hub/")
    }
    assert counts == {
        "wikipedia": 15942,
        "news": 1000,
        "reviews": 200,
        "questions": 1954,
        "piqa": 1500,
        "openbookqa": 500,
        "commonsenseqa": 1191,
        "siqa": 1949,
        "real-toxicity-prompts": 277,
        "sealed/real-toxicity-prompts": 716,
        "sealed/stereoset": 2122,
        "stereoset": 2106,
        "neutral-pairs": 4212,
        "crows-pairs": 1018,
        "winobias": 78,
        "gender-pairs": 255 + 78,
    }
    assert len({row.text for row in rows_of("wikipedia")}) == 12266
    assert len(rows_of("real-toxicity-prompts", min_toxicity=0.9)) == 277
    assert len(rows_of("sealed/real-toxicity-prompts", min_toxicity=0.9)) == 260
    terms = {
        b: rows_of("stereoset", bias_type=b) for b in ("race", "profession", "gender", "religion")
    }
    assert {b: len(rows) for b, rows in terms.items()} == {
        "race": 962,
        "profession": 810,
        "gender": 255,
        "religion": 79,
    }
    assert {b: len({row.group for row in rows}) for b, rows in terms.items()} == {
        "race": 36,
        "profession": 30,
        "gender": 10,
        "religion": 3,
    }


def test_no_real_occupation_is_in_two_groups(real):
    """Whatever its role: searched for as a word, in every sentence."""
    lines = [row["text"].lower() for row in read_jsonl(Path("data/winobias.jsonl"))]
    brackets = {re.split(r"[][]", line)[1] for line in lines if "[mask]" not in line[:9]}
    occupations = {text.removeprefix("the ") for text in brackets if text.startswith("the ")}
    assert len(occupations) == 40
    found = rows_of("winobias")
    groups: dict[str, set[str]] = {occupation: set() for occupation in occupations}
    for row in found:
        assert row.pair
        words = f" {re.sub('[^a-z]+', ' ', row.pair[0].lower())} "
        for occupation in occupations:
            if f" {occupation} " in words:
                groups[occupation].add(row.group)
    assert all(len(group) == 1 for group in groups.values())
    sizes = Counter(row.group for row in found)
    assert sorted(sizes.values()) == [6, 7, 7, 8, 8, 8, 8, 8, 8, 10]
    for group in sizes:
        named = group.removeprefix("winobias/").split("+")
        assert len(named) == 4
        assert all(groups[occupation] == {group} for occupation in named)


def test_no_row_that_is_sealed_is_in_another_source(real):
    """Compared by digest: a sealed text is never printed."""
    assert sources.SEALED == ("sealed/real-toxicity-prompts", "sealed/stereoset")
    digests = {
        name: {digest_text(str(row.pair or row.text)) for row in source.rows({})}
        for name, source in sources.SOURCES.items()
        if not name.startswith("hub/")
    }
    opened = set().union(*(found for name, found in digests.items() if name not in sources.SEALED))
    assert [len(digests[name] & opened) for name in sources.SEALED] == [0, 0]
    between = rows_of("sealed/stereoset")
    assert {(r.group, r.stratum) for r in between} == {
        (r.group, r.stratum) for r in rows_of("stereoset")
    }
    bad = [n for n, r in enumerate(between) if not str(r.pair and r.pair[0]).startswith(r.text)]
    bad += [n for n, r in enumerate(between) if "BLANK" in f"{r.pair}{r.unrelated}"]
    assert not bad


def test_no_marker_is_left_in_a_real_sentence(real):
    for name in ("stereoset", "crows-pairs", "winobias", "wikipedia"):
        for row in rows_of(name):
            for text in (row.text, *(row.pair or ()), row.unrelated or ""):
                assert "BLANK" not in text
                assert "MASK" not in text
                assert "\0" not in text
    assert all(row.pair and row.pair[0] != row.pair[1] for row in rows_of("gender-pairs"))


# The hub's data sets, in folders that are laid out as they are


def test_toxicity_from_the_hub(project):
    rows = [
        {
            "filename": f"{n}.txt",
            "begin": 0,
            "end": 9,
            "challenging": False,
            "prompt": {"text": f"you {n}", "toxicity": toxicity, "insult": 0.5},
            "continuation": {"text": "so", "toxicity": 0.1, "insult": 0.5},
        }
        for n, toxicity in enumerate([0.1, None, 0.95, 0.9])
    ]
    raw.write_toxicity(project / "data")
    write_jsonl(Path("data/hub/prompts.jsonl"), rows)
    (project / "data" / "hub" / "README.md").write_text(
        raw.card({"default": ("train", "prompts.jsonl")})
    )
    found = rows_of("hub/real-toxicity-prompts", path="data/hub", min_toxicity=0.9)
    assert [(row.text, row.toxicity) for row in found] == [("you 2", 0.95), ("you 3", 0.9)]
    assert len(rows_of("hub/real-toxicity-prompts", path="data/hub")) == 4


def test_what_is_sealed_is_not_taken_from_the_hub_either(project):
    raw.write_toxicity(project / "data", 80)
    lines = [{"prompt": row} for row in read_jsonl(Path("data/real-toxicity-prompts.jsonl"))]
    write_jsonl(Path("data/hub/prompts.jsonl"), lines)
    (project / "data" / "hub" / "README.md").write_text(
        raw.card({"default": ("train", "prompts.jsonl")})
    )
    found = rows_of("hub/real-toxicity-prompts", path="data/hub")
    assert found == rows_of("real-toxicity-prompts")  # and one group, whichever the source
    assert len(found) == 80


def test_stereoset_from_the_hub_is_the_raw_one_in_its_own_order(project):
    raw.write_stereoset(project / "data")
    kinds = ("unrelated", "stereotype", "anti-stereotype")
    items = [r for r in read_jsonl(Path("data/stereoset.jsonl")) if r["type"] == "intrasentence"]
    table = pd.DataFrame(
        {
            "id": [str(n) for n in range(len(items))],
            "target": [item["target"] for item in items],
            "bias_type": [item["bias_type"] for item in items],
            "context": [item["context"] for item in items],
            "sentences": [
                {
                    "sentence": [embedded.fill_blank(item["context"], item[k]) for k in kinds],
                    "id": list("abc"),
                    "gold_label": [2, 1, 0],
                }
                for item in items
            ],
        }
    )
    (project / "data" / "hub" / "intrasentence").mkdir(parents=True)
    table.to_parquet(
        project / "data" / "hub" / "intrasentence" / "validation-00000-of-00001.parquet"
    )
    files = {"intrasentence": ("validation", "intrasentence/validation-*")}
    (project / "data" / "hub" / "README.md").write_text(raw.card(files))
    found = rows_of("hub/stereoset", path="data/hub", bias_type="race")
    assert found == rows_of("stereoset", bias_type="race")


def test_wikitext_articles_join_to_the_text_that_perplexity_is_computed_on(project):
    lines = ["", " = One = \n", "", " Some text . \n", " = = Part = = \n", " More . \n", "", ""]
    lines += [" = Two = \n", "", " Other text . \n", " = 1 m / s = \n", " = National record \n", ""]
    (project / "data" / "hub" / "wikitext-2-raw-v1").mkdir(parents=True)
    pd.DataFrame({"text": lines}).to_parquet(
        project / "data" / "hub" / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet"
    )
    files = {"wikitext-2-raw-v1": ("test", "wikitext-2-raw-v1/test-*")}
    (project / "data" / "hub" / "README.md").write_text(raw.card(files))
    found = rows_of("hub/wikitext-2", path="data/hub")
    assert "\n\n".join(row.text for row in found) == "\n\n".join(lines)
    assert [row.text.strip().partition("\n")[0] for row in found] == [
        "= One = ",
        "= Two = ",
    ]
    assert len({row.group for row in found}) == len(found)


def test_elicitation_prompts_are_chosen_by_class(project):
    rows = [
        {"text": "The nurse was very", "class": "stereotype_gender"},
        {"text": "The Swede was very", "class": "stereotype_race"},
        {"text": "My girlfriend is", "class": "stereotype_gender"},
    ]
    write_csv(Path("data/hub/train.csv"), rows, ["text", "class"])
    found = rows_of("hub/stereotype-elicitation", path="data/hub", bias_type="gender")
    assert [row.text for row in found] == ["The nurse was very", "My girlfriend is"]
    assert (
        len(rows_of("hub/stereotype-elicitation", path="data/hub", bias_type="gender", first=1))
        == 1
    )


def test_c4_is_streamed_in_an_order_that_the_seed_decides(project):
    raw.write_c4(project / "data" / "hub", 100)
    where = {"path": "data/hub"}
    streams = {n: [r.text for r in hub.hub_c4(where, seed)] for n, seed in enumerate([0, 0, 1])}
    assert streams[0] == streams[1]
    assert streams[0] != streams[2]
    assert sorted(streams[0]) == sorted(streams[2])
    first = next(hub.hub_c4(where, 0))
    assert first.group.startswith("c4/https://example.org/")


def test_bad_rows_of_the_hub_are_dropped_counted_and_named_once(project, caplog):
    sentences = {"sentence": ["a", "b", "c"], "gold_label": [0, 1, 2]}
    item = {"target": "t", "bias_type": "race", "context": "BLANK", "sentences": sentences}
    bad = {**item, "sentences": {"sentence": ["a", "b"], "gold_label": [0, 1]}}
    (project / "data" / "hub" / "intrasentence").mkdir(parents=True)
    pd.DataFrame([item, bad]).to_parquet(
        project / "data" / "hub" / "intrasentence" / "validation-00000-of-00001.parquet"
    )
    files = {"intrasentence": ("validation", "intrasentence/validation-*")}
    (project / "data" / "hub" / "README.md").write_text(raw.card(files))
    caplog.clear()
    assert [row.pair for row in rows_of("hub/stereoset", path="data/hub")] == [("b", "a")]
    mine = [record.getMessage() for record in caplog.records if record.name.startswith("sparc3")]
    assert mine == ["prepare: data/hub: 1 of 2 rows dropped; the first: row 2 has no text in 2"]


def test_bad_rows_of_a_stream_are_counted_as_far_as_it_was_read(project, caplog):
    (project / "data" / "hub" / "en").mkdir(parents=True)
    rows = [{"text": "a", "url": "u"}, {"text": None, "url": "v"}, {"text": "b", "url": "w"}]
    write_jsonl(project / "data" / "hub" / "en" / "c4-train.00000-of-00001.json", rows)
    (project / "data" / "hub" / "README.md").write_text(
        raw.card({"en": ("train", "en/c4-train.*.json")})
    )
    assert {row.text for row in hub.hub_c4({"path": "data/hub"}, 0)} == {"a", "b"}
    mine = [record.getMessage() for record in caplog.records if record.name.startswith("sparc3")]
    assert len(mine) == 1
    assert "1 of 3 rows dropped" in mine[0]


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl", "train.parquet"])
def test_texts_of_a_folder_are_those_of_its_file(project, name):
    texts = [ODD.replace("\0", ""), "NA", "null", " a ", "1"]
    table = pd.DataFrame({"text": texts, "class": "stereotype_gender"})
    Path("data/hub").mkdir()
    if name.endswith("csv"):
        with Path("data/hub", name).open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, quoting=csv.QUOTE_ALL)
            writer.writerows([list(table), *table.to_numpy().tolist()])
    elif name.endswith("jsonl"):
        write_jsonl(Path("data/hub", name), table.to_dict("records"))
    else:
        table.to_parquet(Path("data/hub", name))
    found = [row.text for row in rows_of("hub/stereotype-elicitation", path="data/hub")]
    assert found == [
        text for text in texts if text not in (["NA", "null"] if "csv" in name else [])
    ]


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl", "train.jsonl.gz", "train.parquet"])
def test_a_folder_is_read_as_it_is_now_not_as_it_was(project, name):
    """Also where the file's size and date are kept, by which a cache takes it for the same."""
    path = Path("data/hub", name)
    path.parent.mkdir()
    for word in ("old", "new", "end"):
        rows = [{"text": f"The nurse is {word}", "class": "stereotype_gender"}]
        if name.endswith("csv"):
            write_csv(path, rows, ["text", "class"])
        elif name.endswith("parquet"):
            pd.DataFrame(rows).to_parquet(path)
        else:
            line = f"{json.dumps(rows[0])}\n".encode()
            path.write_bytes(gzip.compress(line) if name.endswith("gz") else line)
        os.utime(path, (1e9, 1e9))
        found = rows_of("hub/stereotype-elicitation", path="data/hub")
        assert [row.text for row in found] == [f"The nurse is {word}"]


def test_a_stream_is_read_as_it_is_now(project):
    path = Path("data/hub/en/c4-train.00000-of-00001.json.gz")
    path.parent.mkdir(parents=True)
    Path("data/hub/README.md").write_text(raw.card({"en": ("train", "en/c4-train.*.json.gz")}))
    for word in ("old", "new"):
        path.write_bytes(gzip.compress(f'{{"text": "{word}", "url": "u"}}\n'.encode()))
        os.utime(path, (1e9, 1e9))
        assert [row.text for row in hub.hub_c4({"path": "data/hub"}, 0)] == [word]


@pytest.mark.parametrize("line", ['{"text": "a", "class": ', '{"text": "\\ud800", "class": "b"}'])
def test_a_broken_folder_is_one_clear_line(project, line):
    Path("data/hub").mkdir()
    Path("data/hub/train.jsonl").write_text('{"text": "a", "class": "b"}\n' + line + "\n")
    with pytest.raises(InputError, match="hub") as caught:
        rows_of("hub/stereotype-elicitation", path="data/hub")
    assert "\n" not in str(caught.value)


# The token


def test_the_token_is_read_from_the_environment_then_from_the_file(project, monkeypatch):
    assert secrets.hub_token() is None
    Path(".env").write_text(f"# mine\nOTHER=1\nexport HF_TOKEN='{TOKEN}'\n")
    assert secrets.hub_token() == TOKEN
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert secrets.hub_token() == "hf_other"
    monkeypatch.delenv("HF_TOKEN")
    Path(".env").write_text("HF_TOKEN=\n")
    assert secrets.hub_token() is None


@pytest.mark.parametrize("bad", [f"{TOKEN} x", f"{TOKEN}\x07", f"{TOKEN}é"])
def test_what_cannot_be_a_token_is_refused_unseen(project, monkeypatch, bad):
    monkeypatch.setenv("HF_TOKEN", bad)
    with pytest.raises(InputError, match=r"^HF_TOKEN: not a token") as raised:
        secrets.hub_token()
    assert TOKEN not in str(raised.value)


class Hub(BaseHTTPRequestHandler):
    """A hub that refuses every request as the real one does, and shows what it was given."""

    status, code, message = 401, "RepoNotFound", "Repository not found"

    def do_GET(self) -> None:
        given = self.headers.get("Authorization", "nothing")
        body = json.dumps({"error": f"{self.message}; you sent {given}"}).encode()
        self.send_response(self.status)
        self.send_header("X-Error-Code", self.code)
        self.send_header("X-Error-Message", f"{self.message}; you sent {given}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def refusing_hub(status: int, code: str) -> Iterator[str]:
    """Its address."""
    handler = type("Refusing", (Hub,), {"status": status, "code": code})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


LOADING = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
from sparc3.base.errors import InputError
from sparc3.prompts import hub
try:
    next(hub.hub_c4({"revision": "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"}, 0))
except InputError as error:
    print("InputError:", error)
    sys.exit(2)
"""


@pytest.mark.parametrize(
    ("status", "code", "token"),
    [(401, "RepoNotFound", None), (403, "GatedRepo", TOKEN)],
)
def test_a_refusal_is_one_clear_line_that_does_not_show_the_token(project, status, code, token):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(project / "home")}
    if token:
        environment["HF_TOKEN"] = token
    with refusing_hub(status, code) as address:
        done = subprocess.run(
            [sys.executable, "-c", LOADING],
            env={**environment, "HF_ENDPOINT": address},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
    assert done.returncode == 2, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("InputError: "))
    assert "allenai/c4 at revision 1588ec45" in line
    assert ("; HF_TOKEN was given;" if token else "; no HF_TOKEN was given;") in line
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize("given", [True, False])
def test_what_is_no_data_set_is_one_clear_line(project, monkeypatch, given):
    (project / "data" / "hub").mkdir()
    (project / "data" / "hub" / "README.md").write_text("nothing here\n")
    if given:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(
        InputError, match=r"cannot read data set data/hub .*HF_TOKEN was given;"
    ) as found:
        rows_of("hub/stereoset", path="data/hub")
    assert "\n" not in str(found.value)
    assert TOKEN not in str(found.value)
