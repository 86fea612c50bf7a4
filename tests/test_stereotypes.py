"""Stereotype measures against the published definition, by hand and re-implemented naively."""

import numpy as np
import pytest

from sparc3.base.errors import InputError
from sparc3.measure.stereotypes import (
    COLUMNS,
    icat,
    pairs,
    per_term,
    preference,
    stereoset,
    triples,
)

# Two terms, three items and one. (stereotype, anti, unrelated), by hand:
#   chess  1: S > A, S > U, A > U      2: A > S, S > U, A > U      3: S > A, S > U, U > A
#   nurse  4: S > A, U > S, U > A
# chess: SS 2/3, LMS 5/6; nurse: SS 1, LMS 0. SS 83.33, LMS 41.67, ICAT 41.67 * 16.67 / 50 = 13.89
ITEMS = np.array([[-1.0, -2, -3], [-2, -1, -3], [-1, -3, -2], [-2, -3, -1]])
TERMS = ["chess", "chess", "chess", "nurse"]


def published(items, terms):
    """SS, LMS, ICAT by counting, term by term, without ties."""
    counts = {}
    for (stereotype, anti, unrelated), term in zip(items, terms, strict=True):
        count = counts.setdefault(term, {"pro": 0, "related": 0, "total": 0})
        count["pro"] += int(stereotype > anti)
        count["related"] += int(stereotype > unrelated) + int(anti > unrelated)
        count["total"] += 1
    ss = np.mean([100 * c["pro"] / c["total"] for c in counts.values()])
    lms = np.mean([100 * c["related"] / (2 * c["total"]) for c in counts.values()])
    return ss, lms, lms * min(ss, 100 - ss) / 50


def test_hand_computed_example():
    names, table = per_term(*ITEMS.T, terms=TERMS)
    assert names == ["chess", "nurse"]
    np.testing.assert_allclose(table, [[200 / 3, 500 / 6, 2 / 3], [100, 0, 1]])
    result = stereoset(table)
    assert result["ss"] == pytest.approx(250 / 3)
    assert result["lms"] == pytest.approx(125 / 3)
    assert result["icat"] == pytest.approx(125 / 9)
    assert result["margin"] == pytest.approx(5 / 6)


@pytest.mark.parametrize("seed", range(5))
def test_equals_counting(seed):
    rng = np.random.default_rng(seed)
    items = rng.normal(size=(60, 3))
    terms = [f"term {i}" for i in rng.integers(7, size=60)]
    result = stereoset(per_term(*items.T, terms=terms)[1])
    expected = published(items, terms)
    np.testing.assert_allclose([result[k] for k in ("ss", "lms", "icat")], expected)


def test_terms_weigh_equally_however_many_items_they_have():
    items = np.concatenate([np.repeat([[-1.0, -2, -3]], 99, axis=0), [[-2.0, -1, -3]]])
    table = per_term(*items.T, terms=["many"] * 99 + ["one"])[1]
    assert stereoset(table)["ss"] == 50


def test_anchors_of_icat():
    assert icat(50, 100) == 100  # ideal model
    assert icat(100, 100) == icat(0, 100) == 0  # always, and never, the stereotype
    assert icat(50, 50) == 50  # random model
    np.testing.assert_allclose(icat(np.array([40.0, 60]), np.array([90.0, 90])), [72, 72])


def test_swapping_the_texts_mirrors_ss_and_margin_and_keeps_the_rest():
    rng = np.random.default_rng(0)
    items = rng.normal(size=(40, 3)).round()  # rounded: some tie
    terms = [str(i) for i in rng.integers(5, size=40)]
    assert (items[:, 0] == items[:, 1]).any()
    one = stereoset(per_term(items[:, 0], items[:, 1], items[:, 2], terms)[1])
    other = stereoset(per_term(items[:, 1], items[:, 0], items[:, 2], terms)[1])
    assert one["ss"] == pytest.approx(100 - other["ss"])
    assert one["margin"] == pytest.approx(-other["margin"])
    assert one["lms"] == pytest.approx(other["lms"])
    assert one["icat"] == pytest.approx(other["icat"])


def test_ties_count_half():
    np.testing.assert_array_equal(preference(np.array([2.0, 1, 0]), np.ones(3)), [100, 50, 0])
    result = stereoset(per_term(*np.zeros((3, 4)), terms=list("aabb"))[1])
    assert result == {"ss": 50, "lms": 50, "icat": 50, "margin": 0}


def test_resampled_tables_give_what_each_gives_alone():
    rng = np.random.default_rng(1)
    terms = [str(i) for i in rng.integers(6, size=30)]
    table = per_term(*rng.normal(size=(3, 30)), terms=terms)[1]
    rows = rng.integers(len(table), size=(20, len(table)))
    together, apart = stereoset(table[rows]), [stereoset(table[r]) for r in rows]
    for name in ("ss", "lms", "icat", "margin"):
        np.testing.assert_allclose(together[name], [a[name] for a in apart])
    np.testing.assert_array_equal(pairs(table[rows])["ss"], together["ss"])


def test_items_without_an_unrelated_text_enter_ss_alone():
    unrelated = np.array([np.nan, -3, -2, np.nan])
    names, table = per_term(ITEMS[:, 0], ITEMS[:, 1], unrelated, TERMS)
    ss, lms, _ = (table[:, i] for i in range(len(COLUMNS)))
    np.testing.assert_allclose(ss, [200 / 3, 100])
    np.testing.assert_allclose(lms, [75, np.nan])  # items 2 and 3: three of four
    assert pairs(table)["ss"] == pytest.approx(250 / 3)
    kept, complete = triples(names, table)
    assert kept == ["chess"]
    assert stereoset(complete)["lms"] == 75
    with pytest.raises(InputError, match="unrelated"):
        stereoset(table)


@pytest.mark.parametrize(
    ("items", "terms", "message"),
    [
        (np.zeros((0, 3)), [], "no item"),
        (np.zeros((2, 3)), ["a"], "one of each"),
        (np.array([[0.0, 0, 0], [np.nan, 0, 0]]), ["a", "b"], r"item 1 \(b\)"),
        (np.array([[0.0, -np.inf, 0]]), ["a"], r"item 0 \(a\)"),
        (np.array([[0.0, 0, -np.inf]]), ["a"], r"item 0 \(a\)"),
    ],
)
def test_bad_input_is_named(items, terms, message):
    with pytest.raises(InputError, match=message):
        per_term(*items.T, terms=terms)
