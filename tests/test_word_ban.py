"""The word ban against a naive z score and against logits shifted by hand."""

import math

import numpy as np
import pytest
import tiny
import torch

from sparc3.circuits.ablate import pruned
from sparc3.circuits.circuit import INTACT
from sparc3.measure import generate, likelihood
from sparc3.measure.generate import Sampling
from sparc3.measure.word_ban import banned, typical_tokens

FAMILIES = pytest.mark.parametrize("family", tiny.CONFIGS)
BANNED = [7, 3, 41]
GIVEN = tiny.sequences([9, 2, 17, 5])
NAMES = ["a", "b", "c", "d"]


def naive_z(token, behaviour, reference):
    """Of Monroe et al. (2008), with log odds written out as odds within each set's posterior."""
    both = [*behaviour, *reference]
    prior = sum(text.count(token) for text in both)
    odds, variance = [], 0
    for texts in (behaviour, reference):
        posterior = prior + sum(text.count(token) for text in texts)
        total = sum(map(len, both)) + sum(map(len, texts))
        share = posterior / total
        odds.append(share / (1 - share))
        variance += 1 / posterior
    return math.log(odds[0] / odds[1]) / math.sqrt(variance)


@pytest.mark.parametrize("seed", range(5))
def test_tokens_are_ranked_by_the_naive_z(seed):
    rng = np.random.default_rng(seed)
    behaviour = [(rng.zipf(1.5, 12) % 30).tolist() for _ in range(8)]
    reference = [(rng.zipf(1.5, 20) % 40 + 3).tolist() for _ in range(9)]
    tokens = {token for text in (*behaviour, *reference) for token in text}
    z = {token: naive_z(token, behaviour, reference) for token in tokens}
    expected = [t for t in sorted(z, key=lambda t: (-round(z[t], 9), t)) if z[t] > 1e-12]
    assert len(expected) > 3
    assert typical_tokens(behaviour, reference, 1000) == expected
    assert typical_tokens(behaviour, reference, 3) == expected[:3]
    assert typical_tokens(behaviour[::-1], reference[::-1], 1000) == expected


def test_equal_tokens_come_in_the_order_of_their_ids():
    assert typical_tokens([[9, 2, 5], [5]], [[1, 1, 1, 1]], 9) == [5, 2, 9]


def test_more_of_the_same_share_is_more_typical():
    """A word seen ten times and never elsewhere stands above one seen once."""
    assert typical_tokens([[1] * 10 + [2] + [3] * 20], [[3] * 31], 9) == [1, 2]


@pytest.mark.parametrize(
    ("behaviour", "reference"),
    [([], []), ([], [[1]]), ([[1, 2]], []), ([[5, 5]], [[5]]), ([[1, 2]], [[2, 1], [1, 2]])],
)
def test_nothing_is_typical(behaviour, reference):
    assert typical_tokens(behaviour, reference, 9) == []


@torch.no_grad()
def shifted_nll(model, tokens, bias):
    logits = model(torch.tensor([tokens])).logits[0].double()
    for token in BANNED:
        logits[:, token] = logits[:, token] - bias
    log_p = logits.log_softmax(-1)
    return np.array([-log_p[i, token].item() for i, token in enumerate(tokens[1:])])


def token_nll(model, circuit=INTACT):
    return likelihood.token_nll(model, [circuit], GIVEN, NAMES)[0]


@FAMILIES
@pytest.mark.parametrize("bias", [2.5, -1.0])
def test_likelihoods_are_those_of_shifted_logits(family, bias):
    model = tiny.model(family)
    expected = [shifted_nll(model, tokens, bias) for tokens in GIVEN]
    with banned(model, BANNED, bias) as same:
        assert same is model
        found = token_nll(model)
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=2e-5)
    assert any(token in BANNED for tokens in GIVEN for token in tokens[1:])


@FAMILIES
def test_the_models_own_forward_is_lowered(family):
    model, ids = tiny.model(family), torch.tensor([GIVEN[0]])
    with torch.no_grad():
        before = model(ids).logits
        with banned(model, BANNED, 3):
            change = model(ids).logits - before
    expected = torch.zeros(tiny.VOCABULARY)
    expected[BANNED] = -3
    torch.testing.assert_close(change, expected.expand_as(change), atol=1e-5, rtol=0)


def endless(model):
    model.generation_config.eos_token_id = None
    return model


@FAMILIES
def test_a_huge_bias_bans(family):
    model = endless(tiny.model(family))
    prompts = tiny.sequences([4, 9, 5])

    def drawn():
        sampling = Sampling(20, new_tokens=8, temperature=1.0, top_p=1.0, seed=0)
        (found,) = generate.complete(model, [INTACT], prompts, ["x", "y", "z"], sampling)
        return {token for texts in found for text in texts for token in text}

    assert drawn() & set(BANNED)
    with banned(model, BANNED, 1e4):
        assert not drawn() & set(BANNED)


@FAMILIES
def test_all_is_put_back_also_after_an_exception(family):
    model = tiny.model(family)
    before = np.concatenate(token_nll(model))
    with banned(model, BANNED, 2):
        pass
    assert np.concatenate(token_nll(model)).tolist() == before.tolist()
    with pytest.raises(ZeroDivisionError), banned(model, BANNED, 2):
        token_nll(model)
        _ = 1 / 0
    assert np.concatenate(token_nll(model)).tolist() == before.tolist()


def test_bans_add_up_among_themselves_and_with_a_circuit():
    model, circuit = tiny.model("llama"), tiny.circuit(1)
    with pruned(model, circuit):
        expected = [shifted_nll(model, tokens, 3) for tokens in GIVEN]
    with banned(model, BANNED, 1), banned(model, BANNED, 2):
        found = token_nll(model, circuit)
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=2e-5)


def test_no_token_bans_nothing():
    model = tiny.model("llama")
    before = np.concatenate(token_nll(model))
    with banned(model, [], 5):
        assert np.concatenate(token_nll(model)).tolist() == before.tolist()
