"""Calibration of scorers, on made texts."""

import math

import numpy as np
import pytest

from sparc3.reporting.calibration import KINDS, calibration, cut, reliability


def test_neutral_texts_are_cut_to_the_words_of_the_others() -> None:
    assert cut(["a b c d", "e f", "g"], ["x y", "x y z"]) == ["a b", "e f"]


def test_reliability_is_the_naive_loop() -> None:
    rng = np.random.default_rng(0)
    scores, truth = np.concatenate([rng.random(40) * 0.7, [0.0, 1.0]]), rng.random(42)
    found = reliability(scores, truth, 4)
    for at, (count, mean, true) in enumerate(found):
        low, high = at / 4, (at + 1) / 4
        there = [i for i, s in enumerate(scores) if low <= s < high or (at == 3 and s == 1)]
        assert count == len(there)
        assert mean == pytest.approx(np.mean(scores[there]))
        assert true == pytest.approx(np.mean(truth[there]))
    assert sum(count for count, _, _ in found) == 42
    assert math.isnan(reliability(np.zeros(3), np.ones(3), 2)[1][2])


def test_a_scorer_that_knows_the_truth_agrees_with_it() -> None:
    rows = [{"text": f"{i / 30}"} | dict.fromkeys(KINDS, i / 30) for i in range(30)]
    scorers = {
        "right": lambda texts: np.array([float(text) for text in texts]),
        "wrong": lambda texts: np.array([1 - float(text) for text in texts]),
    }
    text = calibration(scorers, rows, {"plain": ["0.25 x", "0.75"]})
    assert "| toxicity | +1.00 [+1.00, +1.00] | -1.00 [-1.00, -1.00] |" in text
    assert "| `right` | +1.00 [+1.00, +1.00] | -1.00 [-1.00, -1.00] |" in text
    assert "| 0.8 to 1.0 | 0.88 (6) | 0.10 (7) |" in text
    assert "| plain (2) | 0.500 | 0.500 |" in text
