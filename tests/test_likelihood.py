"""Likelihoods against the obvious way: one sequence at a time, all logits, log_softmax."""

import itertools

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from sparc3.base.errors import InputError
from sparc3.circuits.ablate import pruned
from sparc3.circuits.circuit import INTACT
from sparc3.measure import likelihood
from sparc3.measure.likelihood import Window, sentence_scores
from sparc3.model import families, loading

FAMILIES = pytest.mark.parametrize("family", tiny.KINDS)
LENGTHS = [9, 1, 2, 33, 7, 8, 8, 3, 20, 12, 11]


def named(given):
    return [str(place) for place in range(len(given))]


def token_nll(model, given, *args, **kwargs):
    """Of the model as it is; so are the two below."""
    (found,) = likelihood.token_nll(model, [INTACT], given, named(given), *args, **kwargs)
    return found


def continuation_nll(model, given, *args, **kwargs):
    (found,) = likelihood.continuation_nll(model, [INTACT], given, named(given), *args, **kwargs)
    return found


def window_nll(model, given, *args, **kwargs):
    (found,) = likelihood.window_scores(model, [INTACT], given, named(given), *args, **kwargs)
    return [nll for nll, _ in found]


def divergences(model, circuits, sequences, batch_tokens=4096, progress=None):
    """By circuit, KL at each position of whole sequences."""
    given = circuits, sequences, named(sequences), Window(64, 64), batch_tokens, progress
    return [[kl[1:] for _, kl in each] for each in likelihood.window_scores(model, *given)]


@torch.no_grad()
def naive_nll(model, tokens):
    log_p = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    return np.array([-log_p[i, token].item() for i, token in enumerate(tokens[1:])])


def assert_equal(found, expected, tolerance=2e-5):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, atol=tolerance, rtol=tolerance)


@pytest.fixture
def llama():
    return tiny.model("llama")


@FAMILIES
@pytest.mark.parametrize("short", [0, 64])
def test_token_nll_equals_the_naive_way(family, short, monkeypatch):
    monkeypatch.setattr(loading, "SHORT", short)  # either attention kernel
    model = tiny.model(family)
    sequences = tiny.sequences(LENGTHS)
    assert_equal(token_nll(model, sequences), [naive_nll(model, s) for s in sequences])


def test_bfloat16_is_summed_in_float32():
    model = tiny.model("llama", torch.bfloat16)
    sequences = tiny.sequences([12, 5])
    assert_equal(token_nll(model, sequences), [naive_nll(model, s) for s in sequences], 0.05)


def test_soft_capped_logits():
    model = AutoModelForCausalLM.from_config(
        Gemma3TextConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=24,
            final_logit_softcapping=0.1,
        )
    ).eval()
    model.get_output_embeddings().weight.data.normal_(0, 1)
    sequences = tiny.sequences([12, 5])
    found = token_nll(model, sequences)
    assert_equal(found, [naive_nll(model, s) for s in sequences])
    # Logits within ±0.1 keep every token within 0.2 of the uniform distribution.
    assert all((abs(nll - np.log(50)) <= 0.2).all() for nll in found)


@pytest.mark.parametrize("batch_tokens", [1, 16, 40, 10_000])
def test_batches_and_chunks_change_nothing(llama, batch_tokens, monkeypatch):
    sequences = tiny.sequences(LENGTHS)
    expected = [naive_nll(llama, s) for s in sequences]
    monkeypatch.setattr(likelihood, "CHUNK", 5)
    done = []
    found = token_nll(llama, sequences, batch_tokens=batch_tokens, progress=done.append)
    assert_equal(found, expected)
    assert sum(done) == len(sequences)


@FAMILIES
@pytest.mark.parametrize("batch_tokens", [16, 10_000])
def test_without_each_circuit_as_within_pruned(family, batch_tokens):
    """To the bit: below a circuit's first layer the same kernels see the same numbers."""
    model = tiny.model(family)
    circuits = [tiny.circuit(layer) for layer in (1, 0, 2)]
    circuits = [circuits[0], INTACT, *circuits, tiny.circuit(2, scale=0.4), INTACT]
    sequences = [s for s in tiny.sequences(LENGTHS) if len(s) > 1]
    done = []
    found = likelihood.token_nll(
        model, circuits, sequences, named(sequences), batch_tokens, done.append
    )
    assert sum(done) == len(circuits) * len(sequences)
    for circuit, nlls in zip(circuits, found, strict=True):
        with pruned(model, circuit):
            for one, other in zip(nlls, token_nll(model, sequences, batch_tokens), strict=True):
                assert one.tolist() == other.tolist()
    levels = {tuple(np.concatenate(nlls)) for nlls in found}
    assert len(levels) == 5  # two are there twice


@pytest.mark.parametrize("kind", ["continuation_nll", "window_scores"])
def test_continuations_and_windows_without_each_circuit(llama, kind):
    circuits = [INTACT, tiny.circuit(2), tiny.circuit(0)]
    texts = tiny.sequences([12, 20])
    given = [[texts[0], texts[0][:4] + texts[1]]] if kind == "continuation_nll" else texts
    settings = {} if kind == "continuation_nll" else {"window": Window(9, 4)}
    several = getattr(likelihood, kind)(llama, circuits, given, named(given), **settings)
    for circuit, one in zip(circuits, several, strict=True):
        with pruned(llama, circuit):
            (alone,) = getattr(likelihood, kind)(llama, [INTACT], given, named(given), **settings)
        if kind == "continuation_nll":
            one, alone = one[0], alone[0]
        else:
            one, alone = ([nll for nll, _ in each] for each in (one, alone))
        np.testing.assert_array_equal(np.concatenate(one), np.concatenate(alone))


@torch.no_grad()
def naive_divergence(model, circuit, tokens):
    """Full softmaxes in float64, one sequence at a time."""
    ids = torch.tensor([tokens])
    p = model(ids).logits[0, :-1].double().softmax(-1)
    with pruned(model, circuit):
        q = model(ids).logits[0, :-1].double().softmax(-1)
    return (p * (p / q).log()).sum(-1).numpy()


@FAMILIES
@pytest.mark.parametrize(("batch_tokens", "chunk"), [(40, 5), (10_000, 256)])
def test_divergence_equals_the_naive_way(family, batch_tokens, chunk, monkeypatch):
    monkeypatch.setattr(likelihood, "CHUNK", chunk)
    model = tiny.model(family)
    circuits = [tiny.circuit(1), INTACT, tiny.circuit(0, 2), tiny.circuit(2, scale=0.9)]
    sequences, done = tiny.sequences([n for n in LENGTHS if n > 1]), []
    found = divergences(model, circuits, sequences, batch_tokens, done.append)
    assert sum(done) == len(circuits) * len(sequences)
    for circuit, by_sequence in zip(circuits, found, strict=True):
        naive = [naive_divergence(model, circuit, tokens) for tokens in sequences]
        assert_equal(by_sequence, naive)
        every = np.concatenate(by_sequence)
        if circuit is INTACT:
            assert every.tolist() == [0] * len(every)
        else:
            assert every.min() > -1e-6
            assert every.mean() > 1e-4


def test_divergence_falls_with_the_square_of_a_small_change(llama):
    """And is no smaller than the bound of Pinsker on what any one token's probability moved."""
    sequences = tiny.sequences([30, 20])
    circuits = [tiny.circuit(1, scale=1 - step) for step in (0.1, 0.2)]
    small, twice = (np.concatenate(each) for each in divergences(llama, circuits, sequences))
    assert twice.mean() == pytest.approx(4 * small.mean(), rel=0.15)
    whole, without = (
        np.exp(-np.concatenate(each))
        for each in likelihood.token_nll(llama, [INTACT, circuits[1]], sequences, ["a", "b"])
    )
    assert (twice >= 2 * (whole - without) ** 2 - 1e-6).all()


def fed_shapes(model):
    """The shape of every batch of token ids that the model reads from now on."""
    shapes = []
    families.body(model).register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    return shapes


def test_little_padding_and_no_batch_beyond_the_limit(llama):
    lengths = np.random.default_rng(0).integers(2, 60, 300).tolist()
    shapes = fed_shapes(llama)
    token_nll(llama, tiny.sequences(lengths), batch_tokens=400)
    cells = [rows * width for rows, width in shapes]
    assert max(cells) <= 400
    assert sum(lengths) >= 0.9 * sum(cells)
    assert sum(rows for rows, _ in shapes) == len(lengths)


def test_logits_exist_for_one_chunk_at_a_time(llama, monkeypatch):
    monkeypatch.setattr(likelihood, "CHUNK", 16)
    positions = []
    llama.get_output_embeddings().register_forward_hook(
        lambda module, args, logits: positions.append(logits.numel() // tiny.VOCABULARY)
    )
    token_nll(llama, tiny.sequences([30] * 10))
    assert max(positions) == 16
    assert sum(positions) == 10 * 29


GROUPS = {
    "shared prefix": [[5, 6, 7, 8, 9], [5, 6, 10, 8], [5, 6, 11, 12, 13]],
    "nothing shared": [[5, 6, 7], [8, 6, 7, 9]],
    "first token shared": [[5, 6, 7], [5, 8]],
    "identical": [[5, 6, 7, 8], [5, 6, 7, 8]],
    "one begins the other": [[5, 6, 7], [5, 6, 7, 8, 9]],
    "alone": [[5, 6, 7, 8]],
    "single tokens": [[5], [6]],
    "a single token begins the other": [[5], [5, 6]],
}


@FAMILIES
@pytest.mark.parametrize("short", [0, 64])
def test_continuations_equal_separate_sequences(family, short, monkeypatch):
    monkeypatch.setattr(loading, "SHORT", short)
    model = tiny.model(family)
    groups = list(GROUPS.values())
    found = continuation_nll(model, groups)
    for one, group in zip(found, groups, strict=True):
        assert_equal(one, [naive_nll(model, s) if len(s) > 1 else [] for s in group])


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen3"])
def test_long_continuations_in_mixed_batches(family):
    model = tiny.model(family)
    base = tiny.sequences([30] * 12, seed=1)
    groups = [
        [[*base[i][:shared], *base[j][: tail + j]] for j in range(3)]
        for i, shared, tail in zip(range(12), range(0, 24, 2), itertools.cycle([3, 9]))
    ]
    found = continuation_nll(model, groups, batch_tokens=150)
    for one, group in zip(found, groups, strict=True):
        assert_equal(one, [naive_nll(model, s) for s in group])


def test_a_common_prefix_is_read_once(llama):
    shapes = fed_shapes(llama)
    prefix = tiny.sequences([20])[0]
    continuation_nll(llama, [[[*prefix, 3], [*prefix, 4], [*prefix, 5, 6]]])
    assert shapes == [(1, 24)]


def test_a_sliding_window_is_not_stretched_over_the_row():
    model = tiny.model("mistral")  # window of 5
    assert_equal(token_nll(model, [[5, 6, 7, 8, 9, 10]]), [naive_nll(model, [5, 6, 7, 8, 9, 10])])
    with pytest.raises(InputError, match="6 tokens, expected 1 to 5"):
        continuation_nll(model, [[[5, 6, 7, 8, 9, 10]]])


def test_sentence_scores_are_means_of_log_p():
    scores = sentence_scores([np.array([1, 2, 6], np.float32), np.array([0.5], np.float32)], "a")
    assert scores.tolist() == [-3, -0.5]
    with pytest.raises(InputError, match="prompt a has a sequence of 1 token"):
        sentence_scores([np.ones(2), np.ones(0)], "a")


@torch.no_grad()
def guide_nll(model, tokens, window, stride):
    """The loop of the guide, with labels masked by -100: nats and counts for each window."""
    previous, rows = 0, []
    for begin in range(0, len(tokens), stride):
        end = min(begin + window, len(tokens))
        ids = torch.tensor([tokens[begin:end]])
        labels = ids.clone()
        labels[:, : -(end - previous)] = -100
        count = int((labels[:, 1:] != -100).sum())
        if count:
            rows.append((model(ids, labels=labels).loss.item() * count, count))
        previous = end
        if end == len(tokens):
            break
    return rows


WINDOWS = [(16, 4), (16, 5), (16, 16), (7, 1), (40, 13), (2, 1)]


@pytest.mark.parametrize(("window", "stride"), WINDOWS)
@pytest.mark.parametrize("batch_tokens", [1, 64])
def test_windows_as_in_the_guide(llama, window, stride, batch_tokens):
    texts = tiny.sequences([61, 2, 16, 17, 33])
    found = window_nll(llama, texts, Window(window, stride), batch_tokens)
    for text, nll in zip(texts, found, strict=True):
        rows = guide_nll(llama, text, window, stride)
        assert nll.shape == (len(text),)
        assert np.isfinite(nll).sum() == sum(count for _, count in rows)
        scored = nll[np.isfinite(nll)]
        parts = np.split(scored, np.cumsum([count for _, count in rows])[:-1])
        np.testing.assert_allclose([p.sum() for p in parts], [n for n, _ in rows], rtol=1e-5)
        if stride < window:
            assert np.flatnonzero(np.isnan(nll)).tolist() == [0]


def test_a_window_as_long_as_the_text_is_the_plain_likelihood(llama):
    texts = tiny.sequences([30, 12])
    found = window_nll(llama, texts, Window(30, 10))
    for nll, plain in zip(found, token_nll(llama, texts), strict=True):
        np.testing.assert_allclose(nll[1:], plain, rtol=1e-5)


def test_stride_equal_to_window_gives_independent_chunks(llama):
    text = tiny.sequences([43])[0]
    (found,) = window_nll(llama, [text], Window(10, 10))
    for begin in range(0, 43, 10):
        (chunk,) = token_nll(llama, [text[begin : begin + 10]])
        np.testing.assert_allclose(found[begin + 1 : begin + 10], chunk, rtol=1e-5)
        assert np.isnan(found[begin])


def test_a_uniform_model_gives_every_token_the_log_of_the_vocabulary(llama):
    llama.get_output_embeddings().weight.zero_()
    for nll in window_nll(llama, tiny.sequences([20, 5]), Window(8, 3)):
        assert nll[1:] == pytest.approx(np.log(tiny.VOCABULARY), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: token_nll(m, [[5], []]), "prompt 1 has 0 tokens, expected 1 to 64"),
        (lambda m: token_nll(m, [[5] * 65]), "prompt 0 has 65 tokens, expected 1 to 64"),
        (lambda m: continuation_nll(m, [[[5], []]]), "0 tokens"),
        (
            lambda m: window_nll(m, [[5, 6], [5]], Window(8, 4)),
            "prompt 1 has 1 tokens, .* at least 2",
        ),
        (lambda m: window_nll(m, [[5, 6]], Window(65, 5)), "window 65: expected 2 to 64"),
        (lambda m: window_nll(m, [[5, 6]], Window(1, 1)), "window 1: expected 2 to 64"),
    ],
)
def test_bad_input_is_named(llama, call, match):
    with pytest.raises(InputError, match=match):
        call(llama)


GIVEN = {  # a message's first words, for prompts named a and b of which b is bad
    "token_nll": ([[5], []], "prompt b has 0 tokens"),
    "continuation_nll": ([[[5]], [[5], []]], "prompt b has 0 tokens"),
    "window_scores": ([[5, 6], [5]], "prompt b has 1 tokens"),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_messages_name_the_prompts_id(llama, kind):
    given, match = GIVEN[kind]
    settings = {"window": Window(8, 4)} if kind == "window_scores" else {}
    with pytest.raises(InputError, match=match):
        getattr(likelihood, kind)(llama, [INTACT], given, ["a", "b"], **settings)


@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_not_finite_name_the_prompt_and_what_helps(kind, dtype):
    model = tiny.model("qwen2", dtype)  # its embeddings are not tied: one prompt meets the bad row
    model.get_parameter("model.embed_tokens.weight")[4] = torch.nan
    texts = [[5, 6, 7], [5, 4, 7], [8, 9]]
    given = [[text] for text in texts] if kind == "continuation_nll" else texts
    settings = {"window": Window(8, 4)} if kind == "window_scores" else {}
    with pytest.raises(InputError, match="prompt bad: logits are not finite") as caught:
        getattr(likelihood, kind)(model, [INTACT], given, names=["a", "bad", "c"], **settings)
    assert ("float32" in str(caught.value)) == (dtype != torch.float32)


def test_nothing_to_score(llama):
    assert token_nll(llama, []) == []
    assert [len(nll) for nll in token_nll(llama, [[5]])] == [0]
    assert continuation_nll(llama, []) == []
