"""Blocks: a set's groups in one each, which circuits may see which, and leaks between them."""

from pathlib import Path

import numpy as np
import pytest

from sparc3.base import artifacts
from sparc3.base.errors import InputError
from sparc3.base.files import write_jsonl
from sparc3.base.params import FIRST, PromptSet, shares_of
from sparc3.circuits.circuit import refuse_leak
from sparc3.measure.instrument import Reading, joined
from sparc3.measure.instruments import pairs
from sparc3.prompts.row import Row
from sparc3.prompts.sampling import splits

BLOCKED = PromptSet(source="stereoset", target="pair", count=40, blocks=12)
NAMES = [f"block-{n}" for n in range(13)]  # more than ten: their order is of numbers, not of words


def rows_of(groups: int, strata: tuple[str, ...] = ("",)) -> list[Row]:
    return [
        Row("made", f"made/{stratum}{group}", stratum, f"{group} {member}")
        for stratum in strata
        for group in range(groups)
        for member in range(2)
    ]


def write(folder: Path, blocks: list[str]) -> list[dict[str, str]]:
    rows = [
        {"id": f"{block}-{n}", "group": f"{block}-{n % 2}", "split": block}
        for block in blocks
        for n in range(3)
    ]
    write_jsonl(artifacts.prompts_path("bias"), rows)
    return rows


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_group_is_in_one_block_and_every_stratum_in_all() -> None:
    shares = shares_of(BLOCKED, {"attribute": 1.0, "tune": 0.0, "test": 0.0})
    assert list(shares) == NAMES
    assert sum(shares.values()) == pytest.approx(1)
    rows = rows_of(60, ("men", "women"))
    split_of = splits("prompt_sets.bias", rows, shares, rows)
    assert split_of.keys() == {row.group for row in rows}  # one for each
    for stratum in ("men", "women"):
        found = [split_of[group] for group in {r.group for r in rows if r.stratum == stratum}]
        assert set(found) == set(NAMES)
        assert abs(found.count("block-0") - 60 * FIRST) < 1
        for block in NAMES[1:]:
            assert abs(found.count(block) - 60 * (1 - FIRST) / 12) < 1


def test_a_set_without_blocks_has_the_shares_of_all() -> None:
    shares = {"attribute": 0.5, "tune": 0.2, "test": 0.3}
    assert shares_of(PromptSet(source="wikipedia", target="likelihood", count=9), shares) == shares


def test_a_block_is_tested_without_what_was_chosen_on_it(project: Path) -> None:
    rows = write(project, NAMES)
    assert artifacts.read_prompts("bias", "attribute") == rows
    assert artifacts.read_prompts("bias", "test") == [r for r in rows if r["split"] != "block-0"]
    assert artifacts.blocks("bias") == ["", *NAMES[1:]]
    assert list(artifacts.held_out("bias")) == NAMES[1:]
    for number, block in enumerate(NAMES[1:], start=1):
        tested = [row for row in rows if row["split"] == block]
        assert artifacts.held_out("bias")[block] == tested
        known = [row for row in rows if row["split"] in NAMES[:number]]
        assert artifacts.seen("bias", block) == known
        assert {row["group"] for row in known}.isdisjoint(row["group"] for row in tested)
    assert artifacts.seen("bias", "") == rows


def test_a_set_without_blocks_is_held_out_as_one(project: Path) -> None:
    rows = write(project, ["attribute", "tune", "test"])
    assert artifacts.blocks("bias") == [""]
    assert artifacts.held_out("bias") == {"": rows[6:]}
    assert artifacts.seen("bias", "") == rows[:3]


def test_circuits_of_a_block_lie_apart() -> None:
    whole, block = (artifacts.circuit_path("bias", "lrp", b) for b in ("", "block-2"))
    assert whole == artifacts.OUTPUTS / "circuits" / "bias" / "lrp.csv"
    assert block == artifacts.OUTPUTS / "circuits" / "bias" / "block-2" / "lrp.csv"


def test_a_leak_is_refused_block_by_block(project: Path) -> None:
    write(project, NAMES)
    for number, block in enumerate(NAMES[1:], start=1):
        known = artifacts.seen("bias", block)
        about = {"chosen_on": {"bias": [r["id"] for r in known]}, "groups": []}
        by_group = {"chosen_on": {"bias": []}, "groups": sorted({r["group"] for r in known})}
        for later, tested in artifacts.held_out("bias").items():
            for each in (about, by_group):
                if NAMES.index(later) >= number:
                    refuse_leak(tested, each, block)
                else:
                    with pytest.raises(InputError, match=f"first: {later}-0"):
                        refuse_leak(tested, each, block)


def test_parts_that_are_joined_are_one_reading() -> None:
    rng = np.random.default_rng(0)
    log_p = rng.standard_normal((9, 3))
    terms = [f"{part}-{n % 2}" for part in range(3) for n in range(3)]
    parts = [pairs.reading(log_p[i : i + 3], terms[i : i + 3]) for i in (0, 3, 6)]
    one, found = pairs.reading(log_p, terms), joined(parts)
    assert found.groups == one.groups
    for name, values in one.columns.items():
        np.testing.assert_array_equal(found.columns[name], values)
    for name, values in one.prompts.items():
        np.testing.assert_array_equal(found.prompts[name], values)
    assert pairs.levels(found) == pytest.approx(pairs.levels(one))
    assert joined(parts[:1]) is parts[0]


def test_completions_that_are_joined_keep_their_order_and_no_groups_stay_none() -> None:
    parts = [Reading({"x": np.array([n])}, None, {}, [{"text": str(n)}]) for n in range(3)]
    found = joined(parts)
    assert found.groups is None
    assert [row["text"] for row in found.written] == ["0", "1", "2"]
    assert found.columns["x"].tolist() == [0, 1, 2]
