"""Sampling against transformers, exact probabilities and the obvious loop without a cache."""

import itertools
import random
from collections import Counter
from operator import itemgetter
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from scipy import stats
from transformers import TopPLogitsWarper

from sparc3.base.errors import InputError
from sparc3.circuits.ablate import pruned
from sparc3.circuits.circuit import INTACT
from sparc3.measure import generate
from sparc3.measure.generate import Sampling, draw, quality, repeated
from sparc3.model import families

FAMILIES = pytest.mark.parametrize("family", tiny.KINDS)
SETTINGS = {"new_tokens": 8, "temperature": 0.8, "top_p": 0.9, "seed": 0}


def complete(model, prompts, keys, completions, *, batch=200, progress=None, **settings):
    """Completions of the model as it is."""
    sampling = Sampling(completions, **settings)
    (found,) = generate.complete(model, [INTACT], prompts, keys, sampling, batch, progress)
    return found


def prompts_and_keys(lengths):
    return tiny.sequences(lengths), [f"prompt {n}" for n in range(len(lengths))]


def end_at(model, tokens):
    model.generation_config.eos_token_id = tokens
    return model


def endless(family):
    return end_at(tiny.model(family), None)


@pytest.fixture
def llama():
    return endless("llama")


@torch.no_grad()
def one_at_a_time(model, prompts, keys, completions, new_tokens, temperature, top_p, seed):
    """No cache, no batch: the whole sequence is read again for every token."""
    drawn = []
    for prompt, key in zip(prompts, keys, strict=True):
        drawn.append([])
        for number in range(completions):
            tokens, stream = [], torch.tensor([generate._stream(seed, key, number)])
            for position in range(new_tokens):
                logits = model(torch.tensor([[*prompt, *tokens]])).logits[:, -1].clone()
                at = generate._hash(stream, torch.tensor([position]))
                tokens.append(draw(logits, at, temperature, top_p).item())
            drawn[-1].append(tokens)
    return drawn


def differing(one, other):
    """Share of completions that are not the same."""
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(a != b for a, b in pairs) / len(pairs)


@FAMILIES
@pytest.mark.parametrize("lengths", [[3, 3, 3], [4, 9, 5, 7]])
def test_batched_completions_equal_the_plain_loop(family, lengths):
    model = endless(family)
    prompts, keys = prompts_and_keys(lengths)
    found = complete(model, prompts, keys, completions=3, **SETTINGS)
    assert found == one_at_a_time(model, prompts, keys, completions=3, **SETTINGS)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batch_size_and_order_do_not_decide(llama, batch):
    prompts, keys = prompts_and_keys([5, 5, 6, 12, 5, 7, 7, 9, 20, 6])
    expected = complete(llama, prompts, keys, completions=12, **SETTINGS)
    found = complete(llama, prompts[::-1], keys[::-1], completions=12, batch=batch, **SETTINGS)
    assert differing(found[::-1], expected) <= 0.01


@FAMILIES
@pytest.mark.parametrize("batch", [5, 64])
def test_circuits_that_share_batches_draw_as_each_alone(family, batch):
    model = endless(family)
    prompts, keys = prompts_and_keys([5, 5, 8, 12])
    circuits = [tiny.circuit(0, 2), INTACT, tiny.circuit(1, scale=0.3), tiny.circuit(1)]
    done = []
    sampling = Sampling(6, **SETTINGS)
    several = generate.complete(model, circuits, prompts, keys, sampling, batch, done.append)
    assert sum(done) == len(circuits) * len(prompts)
    for circuit, found in zip(circuits, several, strict=True):
        with pruned(model, circuit):
            alone = complete(model, prompts, keys, 6, **SETTINGS)
        assert differing(found, alone) <= 0.01
    for a, b in itertools.combinations(several, 2):
        assert differing(a, b) > 0.05


def test_streams_are_of_seed_key_completion_and_position(llama):
    prompts, keys = prompts_and_keys([5, 5])
    more = complete(llama, prompts, keys, completions=6, **SETTINGS)
    assert complete(llama, prompts, keys, completions=6, **SETTINGS) == more
    fewer = complete(llama, prompts, keys, completions=4, **SETTINGS)
    assert fewer == [row[:4] for row in more]
    shorter = complete(llama, prompts, keys, completions=6, **{**SETTINGS, "new_tokens": 3})
    assert shorter == [[tokens[:3] for tokens in row] for row in more]
    other_seed = complete(llama, prompts, keys, completions=6, **{**SETTINGS, "seed": 1})
    other_keys = complete(llama, prompts, ["a", "b"], completions=6, **SETTINGS)
    assert differing(other_seed, more) > 0.9
    assert differing(other_keys, more) > 0.9
    assert len({tuple(tokens) for tokens in more[0]}) > 3


def test_a_prompt_is_read_once_for_all_its_completions(llama):
    shapes = []
    families.body(llama).register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    prompts, keys = prompts_and_keys([6, 8, 6])
    complete(llama, prompts, keys, completions=5, **SETTINGS)
    # The longer prompt is one row beside the completions of the others, until it is read too.
    assert shapes == [(3, 6), *[(11, 1)] * 2, *[(15, 1)] * 5, *[(5, 1)] * 2]


def test_progress_counts_prompts(llama):
    done = []
    prompts, keys = prompts_and_keys([3, 4, 5, 6])
    complete(llama, prompts, keys, completions=5, batch=7, progress=done.append, **SETTINGS)
    assert sum(done) == 4


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.9), (0.6, 0.8), (1.0, 1.0)])
def test_same_distribution_as_transformers(llama, temperature, top_p):
    samples = 3000
    prompt = tiny.sequences([4])[0]
    ours = complete(
        llama,
        [prompt],
        ["a"],
        samples,
        new_tokens=2,
        temperature=temperature,
        top_p=top_p,
        seed=3,
        batch=3000,
    )[0]
    torch.manual_seed(0)
    ids = torch.tensor([prompt])
    theirs = llama.generate(
        inputs=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        max_new_tokens=2,
        num_return_sequences=samples,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        pad_token_id=0,
    )[:, 4:].tolist()
    for kind in (itemgetter(0), itemgetter(1), tuple):
        counts = [Counter(kind(tokens) for tokens in drawn) for drawn in (ours, theirs)]
        table = np.array([[side[cell] for cell in counts[0] | counts[1]] for side in counts])
        rare = table.sum(0) < 20
        table = np.column_stack([table[:, ~rare], table[:, rare].sum(1)])
        table = table[:, table.sum(0) > 0]
        assert table.shape[1] > 3
        tested: Any = stats.chi2_contingency(table)
        assert tested.pvalue > 0.001


def warped(logits, temperature, top_p):
    """Probabilities after transformers' own warper."""
    no_ids = torch.LongTensor([[0]])
    scores = TopPLogitsWarper(top_p)(no_ids, logits[None].double() / temperature)
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize("nucleus", [2, 256])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_warped_probabilities(nucleus, top_p, temperature, monkeypatch):
    monkeypatch.setattr(generate, "NUCLEUS", nucleus)
    torch.manual_seed(1)
    logits = torch.randn(60) * 1.5
    expected = warped(logits, temperature, top_p)
    samples = 20_000
    rows = logits.expand(samples, -1).clone()
    drawn = draw(rows, torch.arange(samples) * 7919, temperature, top_p)
    counts = np.bincount(drawn.numpy(), minlength=60)
    assert not counts[expected == 0].any()
    common = expected * samples >= 20
    assert counts[common].all()
    if common.sum() > 1:
        observed = np.append(counts[common], counts[~common].sum())
        wanted = np.append(expected[common], expected[~common].sum()) * samples
        kept = wanted > 0
        assert stats.chisquare(observed[kept], wanted[kept]).pvalue > 0.001


def test_low_temperature_is_greedy(llama):
    prompts, keys = prompts_and_keys([5, 6])
    found = complete(llama, prompts, keys, 3, new_tokens=4, temperature=1e-4, top_p=1.0, seed=0)
    for row, prompt in zip(found, prompts, strict=True):
        greedy = []
        for _ in range(4):
            greedy.append(int(llama(torch.tensor([prompt + greedy])).logits[0, -1].argmax()))
        assert row == [greedy] * 3


def test_two_models_that_differ_little_draw_mostly_the_same():
    """The Gumbel-max coupling: P(both draw i) = 1 / sum_j max(p_j / p_i, q_j / q_i)."""
    torch.manual_seed(2)
    before = torch.randn(40)
    after = before + 0.3 * torch.randn(40)
    p, q = before.softmax(0), after.softmax(0)
    both = sum(1 / torch.maximum(p / p[i], q / q[i]).sum().item() for i in range(40))
    samples = 20_000
    streams = torch.arange(samples) * 104_729
    pair = [draw(x.expand(samples, -1).clone(), streams, 1.0, 1.0) for x in (before, after)]
    agree = (pair[0] == pair[1]).double().mean().item()
    assert agree == pytest.approx(both, abs=4 * (both * (1 - both) / samples) ** 0.5)
    assert agree > 5 * (p * q).sum().item()  # what independent draws would give


def splitmix(state, count):
    """The published generator, in unbounded integers."""
    mask, out = 2**64 - 1, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


@pytest.mark.parametrize("state", [0, 1, 2**63 - 1, 2**63, 2**64 - 5])
def test_noise_is_splitmix64_entered_anywhere(state):
    signed = state - 2**64 if state >= 2**63 else state
    found = generate._hash(torch.tensor(signed), torch.arange(9)).tolist()
    assert [bits % 2**64 for bits in found] == splitmix(state, 9)


def test_noise_is_standard_gumbel_and_uncorrelated():
    noise = generate._gumbel(torch.arange(400), torch.arange(500).expand(400, -1)).double()
    assert noise.isfinite().all()
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 0.001
    for one, other in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1])):
        pair = torch.stack([one.flatten(), other.flatten()])
        assert abs(torch.corrcoef(pair)[0, 1]) < 4 / one.numel() ** 0.5


@pytest.mark.parametrize("stops", [7, [7, 8, 9], [5]])
def test_a_completion_ends_before_the_end_of_sequence(stops, llama):
    prompts, keys = prompts_and_keys([5, 6, 6, 9])
    settings = {**SETTINGS, "temperature": 1.5, "top_p": 1.0, "new_tokens": 20}
    endless_ones = complete(llama, prompts, keys, completions=20, **settings)
    ended = complete(end_at(llama, stops), prompts, keys, completions=20, **settings)
    known = {stops} if isinstance(stops, int) else set(stops)

    def cut(tokens):
        return tokens[: next((i for i, t in enumerate(tokens) if t in known), None)]

    expected = [[cut(tokens) for tokens in row] for row in endless_ones]
    assert differing(ended, expected) <= 0.01
    lengths = {len(tokens) for row in ended for tokens in row}
    assert min(lengths) < 10 < max(lengths)


def test_a_first_token_that_ends_leaves_an_empty_completion(llama):
    end_at(llama, list(range(tiny.VOCABULARY)))
    prompts, keys = prompts_and_keys([5])
    assert complete(llama, prompts, keys, completions=2, **SETTINGS) == [[[], []]]


def test_short_prompts_may_end_before_long_ones_begin(llama):
    end_at(llama, list(range(tiny.VOCABULARY)))
    prompts, keys = prompts_and_keys([4, 8])
    found = complete(llama, prompts, keys, 2, new_tokens=40, temperature=1.0, top_p=0.9, seed=0)
    assert found == [[[], []], [[], []]]


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"new_tokens": 60}, "prompt a has 5 tokens, expected 1 to 4: the model's context"),
        ({"prompts": [[]]}, "prompt a has 0 tokens, expected 1 to 56"),
    ],
)
def test_bad_input_is_named(llama, changed, match):
    prompts, keys = tiny.sequences([5]), ["a"]
    given = {"prompts": prompts, "keys": keys, "completions": 2, **SETTINGS, **changed}
    with pytest.raises(InputError, match=match):
        complete(llama, **given)


def test_the_last_position_of_the_context_is_used(llama):
    prompts, keys = prompts_and_keys([60])
    found = complete(llama, prompts, keys, 2, new_tokens=4, temperature=1.0, top_p=0.9, seed=0)
    assert [len(tokens) for tokens in found[0]] == [4, 4]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_logits_that_are_not_finite_name_the_prompt_and_what_helps(value, dtype, top_p):
    model = end_at(tiny.model("qwen2", dtype), None)
    model.get_parameter("model.embed_tokens.weight")[4] = (
        value  # not tied: only one prompt meets it
    )
    prompts, settings = [[5, 6, 7], [5, 4, 7], [8, 9]], {**SETTINGS, "top_p": top_p}
    with pytest.raises(InputError, match="prompt bad: logits are not finite") as caught:
        complete(model, prompts, ["a", "bad", "c"], 2, **{**settings, "new_tokens": 1})
    assert ("float32" in str(caught.value)) == (dtype != torch.float32)


@pytest.mark.parametrize(
    ("tokens", "distinct_1", "distinct_2", "repetition", "degenerate"),
    [
        ([], 0, 0, 0, True),
        ([5], 1, 0, 0, False),
        ([5, 5, 5], 1 / 3, 1 / 2, 0, False),
        ([5, 5, 5, 5], 1 / 4, 1 / 3, 1, True),
        ([5, 6, 5, 6, 5], 2 / 5, 2 / 4, 1, True),
        ([5, 6, 7, 5, 6, 7], 3 / 6, 3 / 5, 0, False),
        ([1, 2, 3, 4, 9, 9, 9, 9, 9], 5 / 9, 5 / 8, 5 / 9, True),
        ([1, 2, 3, 4, 5, 9, 9, 9, 9, 9], 6 / 10, 6 / 9, 5 / 10, False),
        (list(range(20)), 1, 1, 0, False),
    ],
)
def test_quality(tokens, distinct_1, distinct_2, repetition, degenerate):
    assert quality(tokens) == {
        "length": len(tokens),
        "distinct_1": pytest.approx(distinct_1),
        "distinct_2": pytest.approx(distinct_2),
        "repetition": pytest.approx(repetition),
        "rep_4": repeated(tokens),
        "degenerate": degenerate,
    }


@pytest.mark.parametrize("seed", range(4))
def test_repeated_counts_the_grams_that_were_there_before(seed):
    items = random.Random(seed).choices("ab", k=12)
    for n in (1, 2, 4, 12, 13):
        grams = ["".join(items[i : i + n]) for i in range(12 - n + 1)]
        again = sum(gram in grams[:i] for i, gram in enumerate(grams))
        assert repeated(items, n) == pytest.approx(again / len(grams) if grams else 0)


def test_repeated_of_a_loop_and_of_nothing_new():
    assert repeated([1, 2, 3] * 9) == pytest.approx(1 - 3 / 24)
    assert repeated(range(30)) == repeated([]) == repeated([7, 7, 7]) == 0
