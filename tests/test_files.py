"""Readers of texts: what a file says comes back letter by letter, or is refused by line."""

import csv
import json
import random
import sys
import unicodedata
from pathlib import Path

import pytest

from sparc3.base.errors import InputError
from sparc3.base.files import read_csv, read_jsonl, read_text, write_jsonl, write_text

# Whatever str.splitlines, universal newlines or the csv module may take for the end of a line.
BREAKS = ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
ODD = [
    *BREAKS,
    '"',
    '""',
    ",",
    "'",
    "\\",
    "\t",
    " ",
    "\0",
    "\ufeff",
    "\u200b",
    "é",
    "e\u0301",
    "😀",
]

VALID = [chr(n) for n in [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]]


def test_every_line_separator_is_among_the_breaks():
    letters = map(chr, range(sys.maxunicode + 1))
    split = {letter for letter in letters if len(f"a{letter}b".splitlines()) == 2}
    assert split == {letter for letter in BREAKS if len(letter) == 1}
    assert {unicodedata.category(letter) for letter in split} == {"Cc", "Zl", "Zp"}


def texts(seed: int, number: int = 40) -> list[str]:
    """Random texts of odd pieces, of words and of any letters that UTF-8 can hold."""
    draw = random.Random(seed)

    def piece() -> str:
        return draw.choice([draw.choice(ODD), "word", draw.choice(VALID)])

    return ["".join(piece() for _ in range(draw.randint(0, 12))) for _ in range(number)] + ODD


@pytest.mark.parametrize("seed", range(20))
def test_a_text_comes_back_as_it_was_written(tmp_path: Path, seed: int):
    for text in texts(seed):
        write_text(tmp_path / "text", text)
        assert read_text(tmp_path / "text") == text


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("terminator", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_csv_of_others_comes_back_as_it_was_written(
    tmp_path: Path, seed: int, terminator: str, mark: str
):
    rows = [{"id": str(n), "text": text} for n, text in enumerate(texts(seed))]
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as stream:
        stream.write(mark)
        writer = csv.DictWriter(
            stream, ["id", "text"], lineterminator=terminator, quoting=csv.QUOTE_ALL
        )
        writer.writeheader()
        writer.writerows(rows)
    assert read_csv(tmp_path / "a.csv") == rows


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("terminator", ["\n", "\r\n", "\n\n"])
def test_the_jsonl_of_others_comes_back_as_it_was_written(
    tmp_path: Path, seed: int, ascii_only: bool, terminator: str
):
    rows = [{"text": text} for text in texts(seed)]
    lines = [json.dumps(row, ensure_ascii=ascii_only) + terminator for row in rows]
    (tmp_path / "a.jsonl").write_bytes("".join(lines).encode())
    assert read_jsonl(tmp_path / "a.jsonl") == rows


@pytest.mark.parametrize("seed", range(20))
def test_own_jsonl_comes_back(tmp_path: Path, seed: int):
    rows = [{"text": text, text: seed} for text in texts(seed)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_jsonl(tmp_path / "a.jsonl") == rows


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a,b\n1,2\n3\n", "line 3 .*1 fields; its header has 2"),
        ("a,b\n1,2\n\n3,4,5\n", "line 4 .*3 fields; its header has 2"),
        ('a,b\n1,"2', "line 2 .*unexpected end of data"),
        ('a,b\n1,"2"x\n', "line 2 .*expected after"),
        ("a,b\n1,2\rx\n", "line 2|line 3"),
    ],
)
def test_a_broken_csv_is_refused_by_line(tmp_path: Path, text: str, problem: str):
    (tmp_path / "a.csv").write_bytes(text.encode())
    with pytest.raises(InputError, match=rf"a\.csv: {problem}") as caught:
        read_csv(tmp_path / "a.csv")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["{", '["a"]', '"a"', "3", "[" * 100_000, "\u2028"])
def test_a_broken_jsonl_is_refused_by_line(tmp_path: Path, line: str):
    (tmp_path / "a.jsonl").write_bytes(f'{{"a": 1}}\n\n{line}\n'.encode())
    with pytest.raises(InputError, match=r"a\.jsonl: line 3 is") as caught:
        read_jsonl(tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value)


def test_what_is_no_utf_8_is_refused(tmp_path: Path):
    for read in (read_csv, read_jsonl, read_text):
        (tmp_path / "a").write_bytes(b"a,b\n\xff,\xed\xa0\x80\n")
        with pytest.raises(InputError, match="a: not UTF-8 text"):
            read(tmp_path / "a")


def test_half_a_surrogate_pair_is_not_half_written(tmp_path: Path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "old"}])
    with pytest.raises(UnicodeEncodeError):
        write_jsonl(tmp_path / "a.jsonl", [{"text": "\ud800"}])
    assert read_jsonl(tmp_path / "a.jsonl") == [{"text": "old"}]
    assert len(list(tmp_path.iterdir())) == 1
