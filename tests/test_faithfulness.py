"""True effects against the plainest way, and agreement against scipy and closed forms."""

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import tiny
import torch
from scipy import stats
from transformers import PreTrainedModel

from sparc3.circuits.ablate import prune_weights
from sparc3.circuits.circuit import Circuit
from sparc3.measure import faithfulness
from sparc3.measure.faithfulness import agreement, area, batch_of, by_depth, strata
from sparc3.model import families
from sparc3.relevance.attribution import Prompt, score
from sparc3.relevance.scores import Target

FAMILIES = pytest.mark.parametrize("family", tiny.CONFIGS)
TARGETS: list[Target] = ["likelihood", "max-logit", "contrast-logit"]


def texts() -> list[Prompt]:
    return [Prompt(f"p{i}", (s,)) for i, s in enumerate(tiny.sequences([7, 9, 5]))]


def pairs() -> list[Prompt]:
    found = tiny.sequences([7, 9, 6, 6])
    return [Prompt(f"p{i}", (found[2 * i], found[2 * i + 1])) for i in range(2)]


def naive(model: PreTrainedModel, prompt: Prompt, target: Target) -> float:
    values = []
    for sequence in prompt.sequences:
        logits = model(torch.tensor([sequence])).logits[0].double()
        log_p = logits.log_softmax(-1)
        mean = np.mean([float(log_p[t - 1, sequence[t]]) for t in range(1, len(sequence))])
        last = {"max-logit": 0.0, "contrast-logit": float(logits[-1].mean())}
        values.append(float(logits[-1].max()) - last[target] if target in last else mean)
    return values[0] - values[1] if target == "pair" else values[0]


def lost(
    model: PreTrainedModel, prompts: Sequence[Prompt], target: Target, circuit: Circuit
) -> list[float]:
    """Fall of y for each prompt without the circuit, by a pruned copy."""
    without = copy.deepcopy(model)
    prune_weights(without, circuit)
    return [naive(model, p, target) - naive(without, p, target) for p in prompts]


@FAMILIES
def test_each_neurons_effect_is_that_of_a_model_without_it(family: str) -> None:
    model = tiny.model(family)
    neurons = np.array([0, 5, 23, 24, 30, 50, 71])  # of all three layers, several of one
    of_pairs: list[Target] = ["pair"]
    for prompts, targets in ((texts(), TARGETS), (pairs(), of_pairs)):
        batches = [batch_of(model, prompts, target) for target in targets]
        counted: list[int] = []
        found = faithfulness.alone(model, batches, neurons, 60, counted.append)
        assert sum(counted) == len(neurons) < sum(counted) + len(counted)
        for target, effects in zip(targets, found, strict=True):
            assert effects.shape == (len(neurons), len(prompts))
            for i, effect in zip(neurons.tolist(), effects, strict=True):
                expected = lost(model, prompts, target, faithfulness.single(*divmod(i, tiny.WIDTH)))
                np.testing.assert_allclose(effect, expected, rtol=1e-3, atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_circuits_effects_are_those_of_models_without_them() -> None:
    model, prompts = tiny.model("gpt2"), texts()
    circuits = [faithfulness.removed(np.array(ids), tiny.WIDTH) for ids in ([3, 40], [70, 50])]
    found = faithfulness.together(model, batch_of(model, prompts, "likelihood"), circuits)
    expected = [lost(model, prompts, "likelihood", circuit) for circuit in circuits]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_small_neurons_do_what_the_gradient_says() -> None:
    """To first order: the smaller they are, the closer; and LRP's rules say something else."""
    model = tiny.model("llama")
    for mlp in families.mlps(model):
        mlp.down.get_parameter("weight").mul_(1e-2)
    (found,) = score(model, [texts()], ["gradient", "lrp"], target="likelihood")
    neurons = np.arange(tiny.LAYERS * tiny.WIDTH)
    (effects,) = faithfulness.alone(model, [batch_of(model, texts(), "likelihood")], neurons, 200)
    gradient, lrp = (values.mean(0).ravel() for values in found.values())
    assert np.corrcoef(gradient, effects.mean(1))[0, 1] > 0.999
    assert np.corrcoef(lrp, effects.mean(1))[0, 1] < 0.99


# --- sampling and agreement ------------------------------------------------------------------


def test_the_sample_holds_every_layer_and_the_top_of_every_score() -> None:
    rng = np.random.default_rng(0)
    scores = {name: rng.standard_normal((6, 256)) for name in ("a", "b")}
    ids = strata(scores, 96, seed=1)
    assert len(set(ids.tolist())) == 96
    assert (np.bincount(ids // 256) == 16).all()
    for values in scores.values():
        for layer in range(6):
            order = np.argsort(-np.abs(values[layer]))
            rank = {int(i): n for n, i in enumerate(order)}
            ranks = np.array([rank[int(i) % 256] for i in ids if i // 256 == layer])
            assert (ranks < 4).sum() >= 2  # of 16 draws, two from the top 64th by this score
            assert (ranks >= 64).sum() >= 2
    assert np.array_equal(strata(scores, 96, seed=1), ids)
    assert not np.array_equal(strata(scores, 96, seed=2), ids)
    assert len(strata(scores, 10**6, seed=1)) == 6 * 256  # no more than there are


def test_agreement_of_a_perfect_a_reversed_and_an_idle_score() -> None:
    effect = np.random.default_rng(0).standard_normal(200)
    perfect, reverse = agreement(2 * effect, effect, 200), agreement(-effect, effect, 200)
    for name in ("pearson", "spearman", "sign", "precision", "size"):
        assert perfect[name].value == pytest.approx(1)
    assert reverse["pearson"].value == reverse["spearman"].value == pytest.approx(-1)
    assert reverse["sign"].value == reverse["precision"].value == 0
    idle = agreement(np.random.default_rng(1).standard_normal(200), effect, 1000)
    assert all(idle[name].low < 0 < idle[name].high for name in ("pearson", "spearman"))
    assert idle["sign"].low < 0.5 < idle["sign"].high


def test_agreement_is_scipys_and_a_count() -> None:
    rng = np.random.default_rng(2)
    effect = rng.standard_normal(150)
    given = effect + rng.standard_normal(150)
    found = agreement(given, effect, 2000)
    assert found["pearson"].value == pytest.approx(stats.pearsonr(given, effect)[0])
    assert found["spearman"].value == pytest.approx(stats.spearmanr(given, effect)[0])
    sizes = stats.spearmanr(np.abs(given), np.abs(effect))[0]
    assert found["size"].value == pytest.approx(sizes)
    first, best = (set(np.argsort(-values)[:15].tolist()) for values in (given, effect))
    assert found["precision"].value == pytest.approx(len(first & best) / 15)
    assert found["sign"].value == pytest.approx(np.mean(given * effect > 0))
    interval = stats.pearsonr(given, effect).confidence_interval()  # by Fisher's transformation
    assert found["pearson"].low == pytest.approx(interval.low, abs=0.05)
    assert found["pearson"].high == pytest.approx(interval.high, abs=0.05)


def test_thirds_of_depth_hold_their_own_layers() -> None:
    layer = np.repeat(np.arange(9), 10)
    effect = np.random.default_rng(3).standard_normal(90)
    given = np.where(layer < 3, -effect, effect)
    found = by_depth(given, effect, layer, 9, 200)
    early, middle, late = (found[part]["spearman"].value for part in ("early", "middle", "late"))
    assert (early, middle, late) == pytest.approx((-1, 1, 1))
    assert 0 < found["all"]["spearman"].value < 1


def test_the_area_is_a_mean_over_log_sizes_of_most_minus_least() -> None:
    flat = {"most": np.full((3, 8), 2.0), "least": np.full((3, 8), -1.0)}
    assert area(flat, [1, 10, 1000], 200).value == pytest.approx(3)
    rising = {"most": np.array([[0.0], [1.0], [3.0]]) + np.zeros(8), "least": np.zeros((3, 8))}
    # Trapezoids: 0.5 over one decade, 2 over two of them.
    assert area(rising, [1, 10, 1000], 200).value == pytest.approx((0.5 + 2 * 2) / 3)


def test_curves_remove_the_highest_and_the_lowest_scores_first() -> None:
    model, prompts = tiny.model("llama"), texts()
    values = np.random.default_rng(4).standard_normal((tiny.LAYERS, tiny.WIDTH))
    batch = batch_of(model, prompts, "likelihood")
    found = faithfulness.curves(model, batch, {"x": values}, [1, 4])["x"]
    order = np.argsort(-values.ravel())
    for way, ids in (("most", order), ("least", order[::-1])):
        for k, fall in zip((1, 4), found[way], strict=True):
            circuit = faithfulness.removed(ids[:k], tiny.WIDTH)
            expected = lost(model, prompts, "likelihood", circuit)
            np.testing.assert_allclose(fall, expected, rtol=1e-3, atol=1e-5)
