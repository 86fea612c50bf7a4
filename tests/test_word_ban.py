"""The word ban: its words, and likelihoods against logits shifted by hand."""

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparc3.circuits.ablate import pruned
from sparc3.circuits.circuit import INTACT
from sparc3.circuits.intervention import Intervention, as_tokens
from sparc3.measure import generate, likelihood
from sparc3.measure.generate import Sampling
from sparc3.measure.likelihood import Window
from sparc3.measure.word_ban import bad_tokens

FAMILIES = pytest.mark.parametrize("family", tiny.KINDS)
BANNED = [7, 3, 41]
GIVEN = tiny.sequences([9, 2, 17, 5])
NAMES = ["a", "b", "c", "d"]


WORDS = ("dam", "n", "hell", "o", "fool", "ish", "nice", "day", "is", "it")


def spelling():
    """A tokenizer that reads a word as the first pieces of WORDS that fit."""
    vocabulary = {word: number for number, word in enumerate(("[unk]", *WORDS))}
    pieces = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="[unk]"))
    pieces.normalizer = normalizers.Strip()
    pieces.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(WORDS)), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=pieces)


def score(texts):
    return np.array([float(text in ("damn", "hell", "foolish")) for text in texts])


def test_the_last_tokens_of_bad_words_come_by_frequency():
    """`hell` also ends nothing else; `n` ends `damn`; `ish`, of `foolish`, comes once."""
    texts = ["damn damn, it is hell!", "hello fool", "a foolish day", "damn nice"]
    found = bad_tokens(texts, spelling(), score)
    assert [("[unk]", *WORDS)[token] for token in found] == ["n", "hell", "ish"]


def test_a_token_that_ends_good_words_more_often_is_left_out():
    texts = ["damn nn nn nn", "hell"]
    found = bad_tokens(texts, spelling(), score)
    assert [("[unk]", *WORDS)[token] for token in found] == ["hell"]


def test_no_bad_word_no_token():
    assert bad_tokens(["a nice day"], spelling(), score) == []


def as_logits(model, embedded):
    """What the model makes of its output embedding's values: Granite divides, Gemma 2 caps."""
    if model.config.model_type == "granite":
        return embedded / model.config.logits_scaling
    if model.config.model_type == "gemma2":
        cap = model.config.final_logit_softcapping
        return cap * torch.tanh(embedded / cap)
    return embedded


def as_embedded(model, logits):
    """`as_logits` undone."""
    if model.config.model_type == "granite":
        return logits * model.config.logits_scaling
    if model.config.model_type == "gemma2":
        cap = model.config.final_logit_softcapping
        return cap * torch.atanh(logits / cap)
    return logits


@torch.no_grad()
def shifted_nll(model, tokens, bias):
    before = as_embedded(model, model(torch.tensor([tokens])).logits[0].double())
    for token in BANNED:
        before[:, token] = before[:, token] - bias
    log_p = as_logits(model, before).log_softmax(-1)
    return np.array([-log_p[i, token].item() for i, token in enumerate(tokens[1:])])


def ban(bias, tokens=BANNED):
    return Intervention("ban", {"tokens": as_tokens(tokens)}, bias)


def banned(model, tokens, bias):
    return ban(bias, tokens).on(model)


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
def test_texts_read_under_several_bans_are_those_of_shifted_logits(family):
    """The head runs once for all bans, of which none may see another's."""
    model = tiny.model(family)
    edits = [ban(2.5), INTACT, ban(-1.0)]
    every = likelihood.window_scores(model, edits, GIVEN, NAMES, Window(20, 20))
    for bias, scores in zip((2.5, 0, -1.0), every, strict=True):
        expected = [shifted_nll(model, tokens, bias) for tokens in GIVEN]
        found = np.concatenate([nll[1:] for nll, _ in scores])
        np.testing.assert_allclose(found, np.concatenate(expected), atol=2e-5)
        with banned(model, BANNED, bias):
            (alone,) = likelihood.window_scores(model, [INTACT], GIVEN, NAMES, Window(20, 20))
        assert found.tolist() == np.concatenate([nll[1:] for nll, _ in alone]).tolist()


@FAMILIES
def test_the_models_own_forward_is_lowered(family):
    model, ids = tiny.model(family), torch.tensor([GIVEN[0]])
    with torch.no_grad():
        expected = as_embedded(model, model(ids).logits)
        expected[..., BANNED] -= 3
        with banned(model, BANNED, 3):
            found = model(ids).logits
    torch.testing.assert_close(found, as_logits(model, expected), atol=2e-5, rtol=0)


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
