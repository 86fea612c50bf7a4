"""Each contrast against loops, scipy or a closed form."""

import numpy as np
import pytest
from scipy.stats import ttest_ind

from sparc3.base.errors import InputError
from sparc3.relevance.contrasts import (
    CONTRASTS,
    auroc,
    mean_difference,
    reference_only,
    reversed_difference,
    t,
)


def scores(prompts: int, seed: int, ties: bool = False) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(prompts, 2, 7))
    return (values.round() if ties else values).astype(np.float32)


def test_mean_difference_is_the_difference_of_plain_sums():
    reference, behaviour = scores(5, 0), scores(3, 1)
    expected = sum(reference[i] for i in range(5)) / 5 - sum(behaviour[i] for i in range(3)) / 3
    np.testing.assert_allclose(mean_difference(reference, behaviour), expected, atol=1e-6)


def test_mean_difference_averages_seeds_first_when_their_counts_are_equal():
    seeds = [scores(4, seed) for seed in (2, 3, 4)]
    behaviour = scores(3, 1)
    expected = np.mean([s.mean(0) for s in seeds], axis=0) - behaviour.mean(0)
    np.testing.assert_allclose(
        mean_difference(np.concatenate(seeds), behaviour), expected, atol=1e-6
    )


def test_mean_difference_of_many_prompts_does_not_lose_digits():
    reference = np.full((100_000, 1, 1), 0.1, np.float32)
    assert mean_difference(reference, np.full((3, 1, 1), 0.1, np.float32)).item() == 0


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_counts_the_pairs_that_the_behaviour_wins(ties):
    reference, behaviour = scores(9, 0, ties), scores(6, 1, ties)
    for layer in range(2):
        for neuron in range(7):
            wins = [
                1.0 if b > r else 0.5 if b == r else 0.0
                for r in reference[:, layer, neuron]
                for b in behaviour[:, layer, neuron]
            ]
            expected = 0.5 - np.mean(wins)
            assert auroc(reference, behaviour)[layer, neuron] == pytest.approx(expected, abs=1e-6)


def test_auroc_has_its_extremes_where_the_sets_separate():
    low, high = scores(4, 0), scores(4, 0) + 100
    assert (auroc(low, high) == -0.5).all()
    assert (auroc(high, low) == 0.5).all()
    assert (auroc(np.zeros_like(low), np.zeros_like(low)) == 0).all()


def test_t_is_welchs():
    reference, behaviour = scores(9, 0), 3 * scores(6, 1) + 1
    expected = np.asarray(ttest_ind(reference, behaviour, equal_var=False))[0]
    np.testing.assert_allclose(t(reference, behaviour), expected, rtol=1e-5)


def test_t_of_constants_is_zero():
    reference, behaviour = scores(9, 0), scores(6, 1)
    reference[:, 0, 0], behaviour[:, 0, 0] = 0.1, 0.7
    values = t(reference, behaviour)
    assert values[0, 0] == 0
    assert np.isfinite(values).all()


CONTROLS = {"reversed-difference", "reference-only"}


@pytest.mark.parametrize("name", sorted(CONTRASTS.keys() - CONTROLS))
def test_every_contrast_is_most_negative_for_the_neuron_of_the_behaviour(name):
    reference, behaviour = scores(30, 0), scores(30, 1)
    behaviour[:, 1, 4] += 5
    values = CONTRASTS[name](reference, behaviour)
    assert values.dtype == np.float32
    assert np.unravel_index(values.argmin(), values.shape) == (1, 4)


def test_controls_look_elsewhere():
    reference, behaviour = scores(30, 0), scores(30, 1)
    values = reversed_difference(reference, behaviour)
    assert np.array_equal(values, -mean_difference(reference, behaviour))
    reference[:, 0, 3] -= 5  # the sign does not matter, and the behaviour is not looked at
    values = reference_only(reference, behaviour)
    assert np.unravel_index(values.argmin(), values.shape) == (0, 3)
    np.testing.assert_allclose(values, -sum(abs(r) for r in reference) / 30, rtol=1e-5)


@pytest.mark.parametrize("name", CONTRASTS)
def test_unlike_and_empty_sets_are_refused(name):
    with pytest.raises(InputError, match="must be"):
        CONTRASTS[name](scores(3, 0), scores(3, 1)[:, :, :5])
    with pytest.raises(InputError, match="0 prompts in the behaviour"):
        CONTRASTS[name](scores(3, 0), scores(3, 1)[:0])


def test_t_needs_two_prompts():
    with pytest.raises(InputError, match="1 prompts in the reference; it needs 2"):
        t(scores(1, 0), scores(3, 1))
