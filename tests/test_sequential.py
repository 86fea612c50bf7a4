"""Cross-fitting in sequential blocks, against folds and one split: errors and power, simulated.

A world is StereoSet's race in numbers: 36 terms of 10 to 40 items, a stereotype score whose change
strays by 7 points over terms of 25 items, and circuits that are chosen as the best of CANDIDATES on
the terms they are chosen on: they are overfitted, and those of two overlapping sets are mostly one.
"""

import numpy as np
import pytest

from sparc3.measure import inference

TERMS, CANDIDATES = 36, 60
TRAINING, BLOCKS = 12, 4  # terms that only train, and blocks of those that are tested
SPREAD, SHARED = 7.0, 0.3  # points; the share of variance that all circuits have in common
EFFECT = -5.0  # points, of the best candidate; the worst has none
ALL = np.arange(TERMS)


def worlds(count, effect, seed):
    """Changes of the score (world, term, candidate), in points: less is the wanted effect."""
    rng = np.random.default_rng(seed)
    spread = SPREAD * np.sqrt(25 / rng.integers(10, 41, (count, TERMS, 1)))
    own = rng.standard_normal((count, TERMS, CANDIDATES), np.float32)
    term = rng.standard_normal((count, TERMS, 1), np.float32)
    noise = spread * (np.sqrt(1 - SHARED) * own + np.sqrt(SHARED) * term)
    return noise + effect * np.linspace(0, 1, CANDIDATES)


def held_out(changes, parts):
    """Changes (world, tested term), each by the candidate that is best on the terms it is not
    tested on: `parts` are pairs of terms to choose on and terms to test.
    """
    found = []
    for chosen_on, tested in parts:
        best = changes[:, chosen_on].mean(1).argmin(1)
        found.append(changes[np.arange(len(changes)), :, best][:, tested])
    return np.concatenate(found, axis=1)


def folds(count):
    return [(np.setdiff1d(ALL, fold), fold) for fold in np.array_split(ALL, count)]


SEQUENTIAL = [(ALL[: b[0]], b) for b in np.array_split(ALL[TRAINING:], BLOCKS)]
SPLIT = [(ALL[:25], ALL[25:])]  # 50 % to attribute, 20 % to tune and 30 % to test


@pytest.fixture
def rejected(monkeypatch):
    """Share of worlds in which the package's test finds a change at 5 %."""

    def share(count, effect, parts, seed=0):
        found = []
        for number, changes in enumerate(held_out(worlds(count, effect, seed), parts)):
            monkeypatch.setattr(inference, "SEED", number)  # swaps of its own
            found.append(inference.paired_difference(0 * changes, changes, resamples=199).p <= 0.05)
        return np.mean(found)

    return share


def test_sequential_blocks_err_as_often_as_they_say(rejected):
    """Of 4,000 null worlds at exactly 5 %, all but one in 500 would show 4 % or more."""
    assert 0.04 <= rejected(4000, 0, SEQUENTIAL) <= 0.065


def test_so_does_one_split(rejected):
    assert 0.04 <= rejected(3000, 0, SPLIT) <= 0.06


def test_naive_folds_do_not(rejected):
    """Their circuits share training terms with each other and with the terms they are tested on."""
    assert rejected(2000, 0, folds(5)) > 0.08


def test_sequential_blocks_find_more_than_one_split(rejected):
    """Though the circuits of the first blocks are chosen on fewer terms, and are a little worse."""
    blocks, split = (rejected(1000, EFFECT, parts) for parts in (SEQUENTIAL, SPLIT))
    assert blocks > 0.65
    assert split < 0.5


@pytest.mark.parametrize("parts", [SEQUENTIAL, SPLIT, folds(5)])
def test_no_circuit_is_tested_on_what_it_was_chosen_on(parts):
    """In a world without any noise but one term's own, the term is not seen where it is tested."""
    for chosen_on, tested in parts:
        assert not set(chosen_on) & set(tested)
    every = np.concatenate([tested for _, tested in parts])
    assert len(set(every)) == len(every)
    for term in every:
        changes = np.zeros((1, TERMS, CANDIDATES))
        changes[0, term] = -np.arange(CANDIDATES)
        assert held_out(changes, parts)[0, every.tolist().index(term)] == 0
