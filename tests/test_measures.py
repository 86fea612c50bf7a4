import math

import numpy as np
import pytest
import tiny
import torch

from sparc3.errors import InputError
from sparc3.measures import (
    Items,
    Likelihood,
    Texts,
    likelihood,
    mean_nll,
    perplexity,
    perplexity_error,
    perplexity_percent,
    preferences,
    windowed_likelihood,
)

RNG = np.random.default_rng(0)


def sample(lengths: list[int]) -> Texts:
    tokens = [RNG.integers(0, 50, n).tolist() for n in lengths]
    return Texts([str(i) for i in range(len(lengths))], ["g"] * len(lengths), tokens)


def naive(model: torch.nn.Module, tokens: list[int]) -> float:
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), -1)
    return -sum(log_p[i, t].item() for i, t in enumerate(tokens[1:]))


def test_likelihood_is_the_sum_over_tokens() -> None:
    model = tiny.model("llama")
    texts = sample([7, 3, 12, 2])
    found = likelihood(model, texts, 16)
    assert found.nll == pytest.approx([naive(model, t) for t in texts.tokens], rel=1e-4)
    assert found.tokens.tolist() == [6, 2, 11, 1]
    total = sum(naive(model, t) for t in texts.tokens)
    assert mean_nll(found) == pytest.approx(total / 20, rel=1e-4)
    assert perplexity(found) == pytest.approx(math.exp(total / 20), rel=1e-4)


def test_a_text_that_fits_the_window_is_read_whole() -> None:
    model = tiny.model("llama")
    texts = sample([9, 4])
    whole, windowed = likelihood(model, texts, 64), windowed_likelihood(model, texts, 16, 8, 64)
    assert windowed.nll == pytest.approx(whole.nll, rel=1e-4)
    long = windowed_likelihood(model, sample([40]), 16, 8, 64)
    assert len(long.nll) > 1
    assert long.tokens.sum() == 39


def test_preferences_are_means_per_token_and_nan_without_an_unrelated_text() -> None:
    model = tiny.model("llama")
    three = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 6, 7, 8]]
    two = [[9, 8, 7], [9, 8, 6]]
    found = preferences(model, Items(["a", "b"], ["g", "g"], [three, two]), 64)
    for row, sentences in zip(found, (three, two), strict=True):
        for value, tokens in zip(row, sentences, strict=False):
            assert value == pytest.approx(-naive(model, tokens) / (len(tokens) - 1), rel=1e-4)
    assert np.isnan(found[1, 2])


def test_the_error_of_perplexity_is_the_spread_over_samples_of_texts() -> None:
    """200 samples of 40 articles of 1 to 3 texts that rise and fall together."""
    estimates, errors = [], []
    for _ in range(200):
        groups = np.repeat(np.arange(40), RNG.integers(1, 4, 40))
        tokens = RNG.integers(20, 200, len(groups))
        rise = (0.01 + 0.05 * RNG.standard_normal(40)[groups]) * tokens
        before = Likelihood(3.0 * tokens, tokens)
        after = Likelihood(before.nll + rise, tokens)
        estimates.append(perplexity_percent(before, after))
        errors.append(perplexity_error(before, after, [str(g) for g in groups]))
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.15)


def test_the_error_of_perplexity_in_closed_form() -> None:
    """Equal texts: the standard error of a mean, times the slope of exp."""
    tokens = np.full(5, 10)
    rise = np.array([0.1, 0.3, -0.2, 0.4, 0.0])
    before = Likelihood(np.full(5, 30.0), tokens)
    after = Likelihood(before.nll + rise, tokens)
    expected = 100 * math.exp(0.012) * np.std(rise / 10, ddof=1) / math.sqrt(5)
    assert perplexity_error(before, after, list("abcde")) == pytest.approx(expected)
    assert perplexity_error(before, before, list("abcde")) == 0
    with pytest.raises(InputError, match=r"needs 2 groups of texts, not 1; raise sweep\.texts"):
        perplexity_error(before, after, ["a"] * 5)
