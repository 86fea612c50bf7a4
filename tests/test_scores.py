"""Each score against the slow, obvious way: every weight's gradient, one prompt at a time."""

from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import tiny
import torch

from sparc3.base.errors import InputError
from sparc3.model import families
from sparc3.relevance import attribution, scores
from sparc3.relevance.attribution import FirstToken, Prompt, batches, score
from sparc3.relevance.lrp import RULE_SETS, attnlrp
from sparc3.relevance.scores import SCORES

FAMILIES = pytest.mark.parametrize("family", tiny.CONFIGS)
KINDS = pytest.mark.parametrize("family", tiny.KINDS)
GATED = [name for name in tiny.KINDS if families.FAMILIES[name].gate is not None]
LENGTHS = [7, 9, 8, 1, 12]


def prompts(lengths=LENGTHS, seed=0):
    return [Prompt(f"p{i}", (s,)) for i, s in enumerate(tiny.sequences(lengths, seed))]


def texts():
    """Prompts that the target `likelihood` can take: each has a token that is predicted."""
    return prompts([7, 9, 2, 12])


def pairs():
    found = tiny.sequences([7, 9, 8, 2, 6, 6])
    return [Prompt(f"p{i}", (found[2 * i], found[2 * i + 1])) for i in range(3)]


def scored(model, given, names, **options):
    """`score` of one shard: {name: (prompt, layer, neuron)}."""
    (found,) = score(model, [given], names, **options)
    return found


class Naive:
    """Autograd over all weights for one prompt: h, dy/dh, w * dy/dw of `up` and `gate` by layer."""

    def __init__(self, model, prompt, target, rules):
        model.requires_grad_(True).zero_grad()
        steps = []  # (layer, h) of each sequence and layer

        def keep(layer):
            def hook(_, args):
                args[0].retain_grad()
                steps.append((layer, args[0]))

            return hook

        mlps = families.mlps(model)
        handles = [
            mlp.down.register_forward_pre_hook(keep(layer)) for layer, mlp in enumerate(mlps)
        ]
        with rules:
            logits = [model(torch.tensor([s])).logits[0] for s in prompt.sequences]
        for handle in handles:
            handle.remove()
        self.y = self.target(target, prompt, logits)
        self.y.backward()

        def tokens(layer, what):  # one (token, neuron) per sequence
            return [what(h).reshape(-1, tiny.WIDTH) for at, h in steps if at == layer]

        layers = range(len(mlps))
        self.h = [tokens(layer, lambda h: h.detach()) for layer in layers]
        self.dh = [tokens(layer, lambda h: h.grad) for layer in layers]
        self.up = [self.weight_times_gradient(mlp.up) for mlp in mlps]
        self.gate = [self.weight_times_gradient(mlp.gate) for mlp in mlps if mlp.gate is not None]
        self.norm = [families.outgoing(mlp.down).detach().square().sum(0).sqrt() for mlp in mlps]
        model.requires_grad_(False)

    @staticmethod
    def target(name, prompt, logits):
        if name == "max-logit":
            return logits[0][-1].max()
        if name == "contrast-logit":
            return logits[0][-1].max() - logits[0][-1].sum() / tiny.VOCABULARY
        mean = []
        for sequence, rows in zip(prompt.sequences, logits, strict=True):
            terms = [
                rows[t - 1, sequence[t]] - rows[t - 1].exp().sum().log()
                for t in range(1, len(sequence))
            ]
            mean.append(sum(terms) / len(terms))
        return mean[0] - mean[1] if name == "pair" else mean[0]

    @staticmethod
    def weight_times_gradient(rows):
        weight = rows.module.weight
        product = (weight * weight.grad).detach()
        return (product.T if type(rows.module).__name__ == "Conv1D" else product)[rows.of]

    def score(self, name):
        """(layer, neuron)."""
        return torch.stack([self.of_layer(name, i) for i in range(len(self.h))]).numpy()

    def of_layer(self, name, i):
        if name == "lrp-abs":
            return torch.stack(self.up[i].abs().unbind(1)).sum(0)
        if name in ("lrp", "cp-lrp", "relp", "gradient"):
            pairs = zip(torch.cat(self.h[i]), torch.cat(self.dh[i]), strict=True)
            return torch.stack([h * dh for h, dh in pairs]).sum(0)
        reduce = {
            "activation": lambda h: torch.stack([token.abs() for token in h]).mean(0),
            "max-activation": lambda h: torch.tensor([max(column) for column in h.T.tolist()]),
            "wanda": lambda h: self.norm[i] * torch.stack([t * t for t in h]).sum(0).sqrt(),
        }[name]
        of_sequences = [reduce(h) for h in self.h[i]]
        return of_sequences[0] - of_sequences[1] if len(of_sequences) == 2 else of_sequences[0]


def rules_of(model, name):
    kind = SCORES[name].gradient
    return attnlrp(model, RULE_SETS[kind]) if kind in RULE_SETS else nullcontext()


ONE_PASS = [name for name, row in SCORES.items() if row.gradient != "path"]


@FAMILIES
@pytest.mark.parametrize("name", ONE_PASS)
def test_agrees_with_the_naive_way(family, name):
    model = tiny.model(family)
    given = prompts()
    found = scored(model, given, [name])[name]
    assert found.shape == (len(given), tiny.LAYERS, tiny.WIDTH)
    assert found.dtype == np.float32
    for prompt, values in zip(given, found, strict=True):
        rules = rules_of(model, name)
        expected = Naive(model, prompt, "max-logit", rules).score(name)
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)


@KINDS
@pytest.mark.parametrize("name", ONE_PASS)
@pytest.mark.parametrize(("target", "some"), [("pair", pairs), ("likelihood", texts)])
def test_agrees_with_the_naive_way_for_log_p(family, name, target, some, monkeypatch):
    monkeypatch.setattr(attribution, "POSITIONS_AT_ONCE", 4)  # several chunks, one of them not full
    model = tiny.model(family)
    found = scored(model, some(), [name], target=target)[name]
    for prompt, values in zip(some(), found, strict=True):
        rules = rules_of(model, name)
        expected = Naive(model, prompt, target, rules).score(name)
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-5)


TARGETS = {"max-logit": prompts, "contrast-logit": prompts, "likelihood": texts, "pair": pairs}


def test_every_target_is_tested():
    assert set(scores.TARGETS) == set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_explained_and_its_gradient_are_autograds(target, monkeypatch):
    monkeypatch.setattr(attribution, "POSITIONS_AT_ONCE", 4)
    model, given = tiny.model("gpt2"), TARGETS[target]()
    found = scored(model, given, ["gradient"], target=target)["gradient"]
    for prompt, values in zip(given, found, strict=True):
        naive = Naive(model, prompt, target, nullcontext())
        np.testing.assert_allclose(values, naive.score("gradient"), rtol=1e-3, atol=1e-5)
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in prompt.sequences], True)
        with torch.no_grad():
            hidden = families.body(model)(ids).last_hidden_state
        lengths = torch.tensor([len(s) for s in prompt.sequences])
        (y,) = attribution.explained(model, target, hidden, ids, lengths).tolist()
        assert y == pytest.approx(naive.y.item(), rel=1e-5)


@contextmanager
def scaled(model, layer, by):
    """Within the block the neurons of a layer are so many times what they are."""
    down = families.mlps(model)[layer].down
    handle = down.register_forward_pre_hook(lambda _, args: (args[0] * by,))
    yield
    handle.remove()


@pytest.mark.parametrize("target", ["likelihood", "pair"])  # logits have kinks on the way
@pytest.mark.parametrize("family", [k for k in tiny.KINDS if k not in ("gemma2", "gemma3_text")])
def test_integrated_gradients_are_complete(family, target, monkeypatch):
    """Of every layer they sum up to what is lost without its neurons (Sundararajan et al. 2017,
    axiom 1), and with more steps more exactly. Not in Gemma: a norm after its MLP makes all of
    the path but its very beginning alike.
    """
    model, given, errors = tiny.model(family), TARGETS[target]()[:3], {}
    for steps in (2, 24):
        row = SCORES["integrated-gradients"]._replace(steps=steps)
        monkeypatch.setitem(SCORES, "integrated-gradients", row)
        found = scored(model, given, ["integrated-gradients"], target=target)
        sums = found["integrated-gradients"].sum(2)
        for layer in range(tiny.LAYERS):
            for n, prompt in enumerate(given):
                whole = Naive(model, prompt, target, nullcontext()).y
                lost = whole - Naive(model, prompt, target, scaled(model, layer, 0)).y
                error = abs(sums[n, layer] - lost.item()) / max(abs(lost.item()), 0.1)
                errors.setdefault(steps, []).append(error)
    assert np.median(errors[24]) < 0.01
    assert np.mean(errors[24]) < np.mean(errors[2])


def test_integrated_gradients_of_one_step_are_the_gradient_halfway(monkeypatch):
    model, given = tiny.model("llama"), prompts([9])
    row = SCORES["integrated-gradients"]._replace(steps=1)
    monkeypatch.setitem(SCORES, "integrated-gradients", row)
    found = scored(model, given, ["integrated-gradients"])["integrated-gradients"]
    for layer in range(tiny.LAYERS):  # dh is at h, of which a half enters `down`
        halfway = Naive(model, given[0], "max-logit", scaled(model, layer, 0.5))
        expected = torch.cat(halfway.h[layer]) * torch.cat(halfway.dh[layer])
        np.testing.assert_allclose(
            found[0, layer], 2 * expected.sum(0).numpy(), rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("family", GATED)
@pytest.mark.parametrize("target", TARGETS)
def test_signed_row_sums_of_up_and_of_gate_are_each_half_of_lrp(family, target):
    model = tiny.model(family)
    for mlp in families.mlps(model):
        for part in (mlp.up, mlp.gate or mlp.up):
            bias = families.bias(part)
            if bias is not None:
                bias.zero_()  # it would have a share
    given = TARGETS[target]()
    found = scored(model, given, ["lrp"], target=target)["lrp"]
    for prompt, values in zip(given, found, strict=True):
        naive = Naive(model, prompt, target, attnlrp(model))
        for rows in (naive.up, naive.gate):
            half = torch.stack([row.sum(1) for row in rows]).numpy()
            np.testing.assert_allclose(half, values / 2, rtol=1e-3, atol=1e-5)


@KINDS
def test_lrp_abs_bounds_the_signed_sum_of_the_same_weights(family):
    """|sum_j w dy/dw| <= sum_j |w dy/dw|, and a single token of one sign would make them equal."""
    model = tiny.model(family)
    found = scored(model, prompts(), ["lrp-abs"])["lrp-abs"]
    for prompt, values in zip(prompts(), found, strict=True):
        signed = [row.sum(1) for row in Naive(model, prompt, "max-logit", attnlrp(model)).up]
        assert (values >= torch.stack(signed).abs().numpy() * (1 - 1e-5) - 1e-6).all()


def test_exchanging_a_pair_changes_the_sign():
    model = tiny.model("llama")
    signed = [name for name in SCORES if name != "lrp-abs"]
    one = scored(model, pairs(), signed, target="pair")
    swapped = [Prompt(p.id, p.sequences[::-1]) for p in pairs()]
    other = scored(model, swapped, signed, target="pair")
    for name, values in one.items():
        np.testing.assert_allclose(other[name], -values, rtol=1e-3, atol=1e-6)


def test_a_pair_of_equal_sentences_has_no_score():
    sentence = tiny.sequences([9])[0]
    given = [Prompt("p", (sentence, sentence))]
    found = scored(tiny.model("llama"), given, list(SCORES), target="pair")
    for values in found.values():
        np.testing.assert_allclose(values, 0, atol=1e-6)


@KINDS
@pytest.mark.parametrize("target", TARGETS)
def test_batches_and_padding_do_not_matter(family, target, monkeypatch):
    model = tiny.model(family)
    given = TARGETS[target]()
    names = list(SCORES)
    alone = scored(model, given, names, target=target, batch_tokens=1)
    monkeypatch.setattr(attribution, "batches", lambda lengths, _: [list(range(len(lengths)))])
    together = scored(model, given, names, target=target)
    for name in names:
        np.testing.assert_allclose(together[name], alone[name], rtol=1e-3, atol=1e-5)


@KINDS
def test_passes_shared_by_several_scores_change_none_of_them(family):
    model = tiny.model(family)
    runs = []
    families.body(model).register_forward_pre_hook(lambda *_: runs.append(1))
    given = prompts([8, 8])
    together = scored(model, given, list(SCORES))
    # By each set of rules, plain, and a path's trunk and layers; activations are read in the first.
    assert len(runs) == len(RULE_SETS) + 1 + 1 + tiny.LAYERS
    for name in SCORES:
        alone = scored(model, given, [name])[name]
        np.testing.assert_allclose(together[name], alone, rtol=1e-4, atol=1e-5)


def test_gradient_after_lrp_is_the_plain_gradient():
    model = tiny.model("llama")
    before = scored(model, prompts(), ["gradient"])["gradient"]
    relevance = scored(model, prompts(), ["lrp"])["lrp"]
    assert np.array_equal(scored(model, prompts(), ["gradient"])["gradient"], before)
    assert not np.allclose(relevance, before, rtol=0.1)


def test_random_weights_elsewhere_get_no_gradient_and_no_hooks_stay():
    model = tiny.model("llama")
    scored(model, prompts(), list(SCORES))
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@KINDS
def test_bfloat16_is_close_to_float32(family):
    exact = scored(tiny.model(family), prompts(), list(SCORES))
    rough = scored(tiny.model(family, torch.bfloat16), prompts(), list(SCORES))
    for name in SCORES:
        assert rough[name].dtype == np.float32
        agreement = [
            np.corrcoef(a.ravel(), b.ravel())[0, 1]
            for a, b in zip(rough[name], exact[name], strict=True)
        ]
        # The median: rounding may turn a ReLU on or off, and then one prompt is really different.
        assert np.median(agreement) > 0.995


def test_shards_come_in_order_and_do_not_depend_on_each_other():
    model = tiny.model("llama")
    given = prompts([5, 9, 7, 3, 8, 6, 4])
    shards = [given[:3], given[3:6], given[6:]]
    every = list(score(model, shards, ["lrp", "wanda"]))
    assert [len(shard["lrp"]) for shard in every] == [3, 3, 1]
    alone = scored(model, given, ["lrp"], batch_tokens=1)["lrp"]
    (resumed,) = score(model, [shards[1]], ["lrp", "wanda"])
    for name, values in resumed.items():
        assert np.array_equal(values, every[1][name])  # bit for bit
    joined = np.concatenate([shard["lrp"] for shard in every])
    np.testing.assert_allclose(joined, alone, rtol=1e-3, atol=1e-5)


def test_progress_counts_prompts():
    counts = []
    given = prompts()
    list(score(tiny.model("llama"), [given[:2], given[2:]], ["wanda"], progress=counts.append))
    assert sum(counts) == len(LENGTHS)


def test_batches_hold_every_prompt_once_within_both_limits():
    random = np.random.default_rng(0)
    for size in (1, 2):
        lengths = random.integers(2, 60, size=(300, size)).tolist()
        found = batches(lengths, batch_tokens=256)
        assert sorted(i for batch in found for i in batch) == list(range(300))
        for batch in found:
            if len(batch) > 1:
                longest = max(max(lengths[i]) for i in batch)
                padded = longest * size * len(batch)
                assert padded <= 256
                assert sum(sum(lengths[i]) for i in batch) > 0.9 * padded
        assert found == batches(lengths, batch_tokens=256)
    assert batches([[9]] * 8, batch_tokens=18) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert batches([[100], [100]], batch_tokens=50) == [[0], [1]]
    assert batches([], batch_tokens=50) == []


def small_device(model, tokens):
    """From now on more than `tokens` tokens at once are too many; the size of every try."""
    tries = []

    def refuse(_, args, kwargs):
        tries.append(kwargs["input_ids"].numel())
        if tries[-1] > tokens:
            raise torch.OutOfMemoryError("as a small device would")

    families.body(model).register_forward_pre_hook(refuse, with_kwargs=True)
    return tries


def test_out_of_memory_batches_the_rest_of_the_shard_once(caplog):
    model, names = tiny.model("llama"), ["lrp", "wanda"]
    given = prompts([8] * 12)
    expected = scored(model, given, names, batch_tokens=16)
    tries = small_device(model, 20)
    found = scored(model, given, names, batch_tokens=80)
    assert tries == [80, 40, *[16] * 6]  # halved down to 20 tokens, and never tried again
    for name in names:
        assert np.array_equal(found[name], expected[name])
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory: of 80 tokens in a batch, 20 fit"
    ]


def test_what_is_done_before_memory_runs_out_is_kept():
    """Short prompts come first: only the long ones are batched anew."""
    model = tiny.model("llama")
    given = prompts([2] * 5 + [30] * 4)
    done = []
    tries = small_device(model, 60)
    found = scored(model, given, ["lrp"], batch_tokens=120, progress=done.append)["lrp"]
    assert tries == [10, 120, 60, 60]
    assert done == [5, 2, 2]
    alone = scored(model, given, ["lrp"], batch_tokens=1)["lrp"]
    np.testing.assert_allclose(found, alone, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_shards_are_independent_where_memory_runs_out(target, caplog):
    """A later shard begins with the size asked for, and the size that fits is said once."""
    model = tiny.model("llama")
    sequences = tiny.sequences([8] * 20)
    given = [Prompt(f"p{i}", (s,)) for i, s in enumerate(sequences)]
    if target == "pair":
        given = [Prompt(f"p{i}", tuple(sequences[2 * i : 2 * i + 2])) for i in range(10)]
    shards = [given[:4], given[4:8], given[8:]]
    tries = small_device(model, 32)
    every = list(score(model, shards, ["lrp"], target=target, batch_tokens=64))
    assert len(caplog.records) == 1
    assert tries.count(32 if target != "pair" else 64) >= 2
    for shard, values in zip(shards, every, strict=True):
        (alone,) = score(model, [shard], ["lrp"], target=target, batch_tokens=64)
        assert np.array_equal(values["lrp"], alone["lrp"])


def test_out_of_memory_with_a_single_prompt_names_it():
    model = tiny.model("llama")
    small_device(model, 0)
    with pytest.raises(InputError, match="prompt p0: out of memory with this prompt alone"):
        scored(model, prompts([8] * 9), ["lrp"])


@pytest.mark.parametrize("name", SCORES)
def test_a_score_that_is_not_finite_names_the_prompt_and_is_never_replaced(name):
    model = tiny.model("qwen2")  # its embeddings are not tied: only one prompt meets the bad row
    given = [Prompt("good", ([5, 6, 7],)), Prompt("bad", ([5, 4, 7],)), Prompt("fine", ([8, 9],))]
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[4, 0] = torch.nan
    with pytest.raises(InputError, match=f"prompt bad: score {name} is not finite in layer 0"):
        scored(model, given, [name])


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (Prompt("a", ([5, 6],)), {"target": "pair"}, "prompt a: target pair takes 2 sequence"),
        (Prompt("a", ([5], [6])), {}, "prompt a: target max-logit takes 1 sequence"),
        (Prompt("a", ([],)), {}, "prompt a: 0 tokens; .* take 1 to 64"),
        (Prompt("a", ([5, 6], [7])), {"target": "pair"}, "prompt a: 1 tokens; .* take 2 to 64"),
        (Prompt("a", ([5],)), {"target": "likelihood"}, "prompt a: 1 tokens; .* take 2 to 64"),
        (Prompt("a", ([5] * 65,)), {}, "prompt a: 65 tokens"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(given, options, message):
    model = tiny.model("llama")
    families.body(model).register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(InputError, match=message):
        next(score(model, [[given]], ["lrp"], **options))


@pytest.mark.parametrize("target", ["max-logit", "pair"])
def test_the_first_token_is_told_and_may_be_left_out(target):
    """Of |h dy/dh| of every text, by the naive way; without it, the sum over the other tokens."""
    model, prompt = tiny.model("qwen3"), TARGETS[target]()[0]
    for name, rules in (("lrp", attnlrp(model)), ("gradient", nullcontext())):
        naive = Naive(model, prompt, target, rules)
        each = [  # by layer and sequence, (token, neuron)
            [h * dh for h, dh in zip(*pair, strict=True)]
            for pair in zip(naive.h, naive.dh, strict=True)
        ]
        there = sum(r[0].abs().sum().item() for layer in each for r in layer)
        everywhere = sum(r.abs().sum().item() for layer in each for r in layer)
        for kept in (True, False):
            first = FirstToken(kept)
            (found,) = score(model, [[prompt]], [name], target=target, first=first)
            assert first.sizes[name] == pytest.approx((there, everywhere), rel=1e-4)
            some = 0 if kept else 1
            expected = [torch.stack([r[some:].sum(0) for r in layer]).sum(0) for layer in each]
            torch.testing.assert_close(
                torch.from_numpy(found[name][0]), torch.stack(expected), rtol=1e-3, atol=1e-5
            )


def test_weights_leave_out_the_first_token_too_and_values_never():
    """|w dy/dw| of a text whose first token's gradient is nothing; activations are no relevance."""
    model, prompt = tiny.model("llama"), texts()[0]
    names = ["lrp-abs", "activation", "max-activation", "wanda"]
    whole, without = (
        next(score(model, [[prompt]], names, target="likelihood", first=FirstToken(kept)))
        for kept in (True, False)
    )
    for name in names[1:]:
        np.testing.assert_array_equal(without[name], whole[name])
    up = families.mlps(model)[0].up
    seen = {}
    hook = up.module.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
    with attnlrp(model):
        hidden = families.body(model)(
            inputs_embeds=model.get_input_embeddings()(torch.tensor(prompt.sequences))
            .detach()
            .requires_grad_()
        ).last_hidden_state
        y = Naive.target("likelihood", prompt, families.logits(model, hidden))
    hook.remove()
    (gradient,) = torch.autograd.grad(y, seen["out"])
    by_weight = gradient[0, 1:].T @ seen["x"][0, 1:] * families.incoming(up)
    expected = by_weight.abs().sum(1).detach().numpy()
    np.testing.assert_allclose(without["lrp-abs"][0, 0], expected, rtol=1e-3, atol=1e-6)
    assert not np.allclose(without["lrp-abs"], whole["lrp-abs"], rtol=0.01)
