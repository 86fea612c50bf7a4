import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from sparc3.base.errors import InputError
from sparc3.base.params import Model
from sparc3.circuits.circuit import INTACT
from sparc3.measure.measures import (
    Items,
    Likelihood,
    Texts,
    joined,
    joined_likelihood,
    likelihood,
    mean_nll,
    nll_shift,
    perplexity,
    perplexity_error,
    perplexity_percent,
    preferences,
    windowed_likelihood,
)
from sparc3.model import loading

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
    (found,) = likelihood(model, [INTACT], texts, 16)
    assert found.nll == pytest.approx([naive(model, t) for t in texts.tokens], rel=1e-4)
    assert found.tokens.tolist() == [6, 2, 11, 1]
    total = sum(naive(model, t) for t in texts.tokens)
    assert mean_nll(found) == pytest.approx(total / 20, rel=1e-4)
    assert perplexity(found) == pytest.approx(math.exp(total / 20), rel=1e-4)


def test_the_shift_is_the_rise_beyond_general_text() -> None:
    def of(*nll: float) -> Likelihood:
        return Likelihood(np.array(nll), np.array([10, 30]))

    before, after = (of(20, 60), of(10, 30)), (of(30, 70), of(14, 34))
    assert nll_shift(before, after) == pytest.approx((100 - 80) / 40 - (48 - 40) / 40)
    assert nll_shift(before, before) == 0


def test_a_text_that_fits_the_window_is_read_whole() -> None:
    model = tiny.model("llama")
    texts = sample([9, 4])
    (whole,) = likelihood(model, [INTACT], texts, 64)
    (windowed,) = windowed_likelihood(model, [INTACT], texts, 16, 8, 64)
    assert windowed.nll == pytest.approx(whole.nll, rel=1e-4)
    (long,) = windowed_likelihood(model, [INTACT], sample([40, 9]), 16, 8, 64)
    assert long.tokens.tolist() == [39, 8]


@pytest.mark.parametrize("stride", [8, 16])
def test_the_pieces_of_a_joined_text_share_out_its_likelihood(stride: int) -> None:
    model = tiny.model("llama")
    pieces = sample([9, 1, 30, 17])
    whole = Texts(["a"], ["a"], [[token for piece in pieces.tokens for token in piece]])
    (found,) = joined_likelihood(model, [INTACT], pieces, 16, stride, 64)
    (expected,) = windowed_likelihood(model, [INTACT], whole, 16, stride, 64)
    assert found.nll.sum() == pytest.approx(expected.nll.sum())
    assert found.tokens.sum() == expected.tokens.sum()
    if stride == 8:
        assert found.tokens.tolist() == [8, 1, 30, 17]
        assert found.nll[0] == pytest.approx(naive(model, pieces.tokens[0]), rel=1e-4)


def test_texts_are_joined_by_two_newlines_and_tokenised_as_one(fetched: Path) -> None:
    tokenizer: Any = loading.tokenizer(Model(path=str(fetched / "models/smollm2-135m")))
    articles = [" = One = \n\n It is cold .\n", " = Two = \n\n Gr\u00fc\u00dfe \u2603 .\n", "end"]
    rows = [{"id": n, "group": n, "text": t} for n, t in zip("abc", articles, strict=True)]
    found = joined(rows, tokenizer)
    whole = tokenizer("\n\n".join(articles), add_special_tokens=False).input_ids
    assert [token for piece in found.tokens for token in piece] == whole
    pieces = tokenizer.batch_decode(found.tokens, clean_up_tokenization_spaces=False)
    assert pieces == [
        f"{articles[0]}\n\n",
        f"{articles[1]}\n\n",
        "end",
    ]
    assert found.ids == list("abc")


def test_preferences_are_means_per_token_and_nan_without_an_unrelated_text() -> None:
    model = tiny.model("llama")
    three = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 6, 7, 8]]
    two = [[9, 8, 7], [9, 8, 6]]
    both = Items(["a", "b"], ["g", "g"], [three, two])
    (found,) = preferences(model, [INTACT], both, 64)
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
