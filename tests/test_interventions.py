"""Interventions: every formula beside a plain one, on models of every family."""

import numpy as np
import pytest
import tiny
import torch

from sparc3.base.errors import InputError
from sparc3.circuits.circuit import INTACT
from sparc3.circuits.intervention import (
    FORMS,
    Intervention,
    as_tokens,
    read_intervention,
    write_intervention,
)
from sparc3.circuits.interventions import (
    LEARNERS,
    activation_addition,
    aura,
    directional_ablation,
    linear_act,
    mean_act,
    set_difference,
)
from sparc3.circuits.responses import Prompts, blocks, fitted, projections
from sparc3.measure import generate, likelihood
from sparc3.measure.generate import Sampling
from sparc3.measure.likelihood import Window
from sparc3.model import families

FAMILIES = pytest.mark.parametrize("family", tiny.CONFIGS)
RNG = np.random.default_rng(0)
TEXTS = tiny.sequences([9, 5, 12, 7])
NAMES = ["a", "b", "c", "d"]
PROMPTS = Prompts(
    tiny.sequences([6, 9, 4, 7, 8], seed=1), tiny.sequences([5, 8, 7, 9], seed=2), [7, 11, 3]
)


def nll(model, edit):
    (found,) = likelihood.token_nll(model, [edit], TEXTS, NAMES)
    return np.concatenate(found)


@torch.no_grad()
def outputs(model, text, site):
    """What a module gives for one text, (token, coordinate)."""
    kept = []

    def keep(module, args, output):
        kept.append(output[0] if isinstance(output, tuple) else output)

    hook = model.get_submodule(site).register_forward_hook(keep)
    model(torch.tensor([text]))
    hook.remove()
    return kept[0].reshape(len(text), -1).numpy()


# --- formulas --------------------------------------------------------------------------------


def test_aura_dampens_by_the_auroc_of_each_coordinate() -> None:
    behaviour, reference = RNG.normal(size=(7, 5)).round(1), RNG.normal(size=(9, 5)).round(1)
    found = aura.dampening(behaviour, reference)
    for at in range(5):
        wins = [(b > r) + (b == r) / 2 for b in behaviour[:, at] for r in reference[:, at]]
        auroc = sum(wins) / len(wins)
        expected = 1 - 2 * (auroc - 0.5) if auroc > 0.5 else 1
        assert found["scale"][at] == pytest.approx(expected)
    assert not found["shift"].any()


def test_mean_act_shifts_by_the_difference_of_means_what_varies() -> None:
    behaviour, reference = RNG.normal(1, 1, (7, 4)), RNG.normal(3, 1, (6, 4))
    reference[:, 2] = 5.0
    found = mean_act.shift(behaviour, reference)
    expected = [
        0 if at == 2 else sum(reference[:, at]) / 6 - sum(behaviour[:, at]) / 7 for at in range(4)
    ]
    np.testing.assert_allclose(found["shift"], expected, rtol=1e-5)
    assert (found["scale"] == 1).all()


def test_linear_act_is_the_line_through_sorted_pairs() -> None:
    behaviour, reference = RNG.normal(size=(6, 3)), RNG.normal(2, 3, size=(8, 3))
    found = linear_act.line(behaviour, reference)
    for at in range(3):
        x, y = sorted(behaviour[:, at]), sorted(reference[:6, at])
        slope, intercept = np.polyfit(x, y, 1)
        assert found["scale"][at] == pytest.approx(slope, rel=1e-5)
        assert found["shift"][at] == pytest.approx(intercept, rel=1e-5)
        assert (found["low"][at], found["high"][at]) == pytest.approx((x[0], x[-1]), rel=1e-6)


def test_linear_act_recovers_an_affine_map() -> None:
    x = RNG.normal(size=(20, 2))
    found = linear_act.line(x, 3 * x[RNG.permutation(20)] - 1)
    np.testing.assert_allclose(found["scale"], 3, rtol=1e-5)
    np.testing.assert_allclose(found["shift"], -1, rtol=1e-4)


def test_a_direction_is_of_unit_length_and_from_the_reference_to_the_behaviour() -> None:
    behaviour, reference = RNG.normal(size=(7, 4)), RNG.normal(size=(6, 4))
    along = directional_ablation.direction(behaviour, reference)["direction"]
    assert np.linalg.norm(along) == pytest.approx(1)
    difference = behaviour.mean(0) - reference.mean(0)
    assert along @ difference == pytest.approx(np.linalg.norm(difference), rel=1e-5)
    shift = activation_addition.difference(behaviour, reference)["shift"]
    np.testing.assert_allclose(shift, -difference, rtol=1e-5)


def test_set_difference_is_important_for_one_and_not_for_the_other() -> None:
    one, other = torch.tensor([[9.0, 8, 1], [7, 2, 3]]), torch.tensor([[9.0, 1, 2], [8, 3, 4]])
    assert set_difference.difference(one, other, 0.5).tolist() == [1]  # {0, 1, 3} - {0, 3, 5}
    assert set_difference.difference(one, one, 0.5).tolist() == []


@FAMILIES
def test_snip_is_weight_times_gradient_of_every_text(family) -> None:
    model = tiny.model(family)
    sites, texts = projections(model)[:2], TEXTS[:2]
    found = set_difference.importance(model, texts, sites)
    for site, values in zip(sites, found, strict=True):
        weight = model.get_submodule(site).get_parameter("weight")
        expected = torch.zeros_like(weight)
        for text in texts:
            weight.requires_grad_(True)
            log_p = model(torch.tensor([text])).logits[0, :-1].log_softmax(-1)
            loss = -log_p[torch.arange(len(text) - 1), torch.tensor(text[1:])].mean()
            (gradient,) = torch.autograd.grad(loss, weight)
            weight.requires_grad_(False)
            expected += (weight * gradient).abs() / 2
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-7)
    assert not any(parameter.requires_grad for parameter in model.parameters())


# --- learning --------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("pool", ["mean", "max", "last"])
def test_what_is_pooled_is_every_prompts_own(family, pool) -> None:
    model, given = tiny.model(family), {}

    def fit(behaviour, reference):
        given[len(given)] = np.concatenate([behaviour, reference])
        return {}

    sites = [projections(model)[-1], blocks(model)[-1]]
    fitted(model, PROMPTS, sites, pool, fit)
    of = {"mean": np.mean, "max": np.max, "last": lambda values, _: values[-1]}[pool]
    for place, site in enumerate(sites):
        texts = (*PROMPTS.behaviour, *PROMPTS.reference)
        expected = [of(outputs(model, text, site), 0) for text in texts]
        np.testing.assert_allclose(given[place], expected, rtol=1e-3, atol=1e-5)


def test_acts_maps_are_fitted_after_those_before_them_act() -> None:
    """With all maps in place at full strength, the behaviour's means are those of the reference."""
    model = tiny.model("llama")
    (learnt,) = mean_act.learn(model, PROMPTS)
    site = projections(model)[-1]
    moved = learnt.arrays[f"{site}/shift"]

    def mean(texts):
        return np.mean([outputs(model, text, site).mean(0) for text in texts], 0)

    earlier = {k: v for k, v in learnt.arrays.items() if k.rpartition("/")[0] != site}
    with Intervention("transport", earlier).on(model):
        expected = mean(PROMPTS.reference) - mean(PROMPTS.behaviour)
    np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-5)
    assert np.abs(moved - (mean(PROMPTS.reference) - mean(PROMPTS.behaviour))).max() > 1e-3


# --- acting ----------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("kind", LEARNERS)
def test_strength_0_changes_nothing_and_all_is_put_back(family, kind) -> None:
    model = tiny.model(family)
    before = nll(model, INTACT)
    every = LEARNERS[kind](model, PROMPTS)
    for learnt in every:
        none = Intervention(learnt.form, learnt.arrays, 0.0)
        np.testing.assert_allclose(nll(model, none), before, atol=1e-6)
    learnt = every[-1]
    if kind != "set-difference":  # of so few weights a share may be none
        assert np.abs(nll(model, learnt) - before).max() > 1e-4
    with pytest.raises(ZeroDivisionError), learnt.on(model):
        _ = 1 / 0
    assert nll(model, INTACT).tolist() == before.tolist()


@FAMILIES
def test_dampening_outputs_is_scaling_their_rows_of_the_weights(family) -> None:
    model, other = tiny.model(family), tiny.model(family)
    arrays = fitted(model, PROMPTS, projections(model), "max", aura.dampening)
    for name, array in arrays.items():
        site, _, kind = name.rpartition("/")
        if kind == "scale":
            module = other.get_submodule(site)
            families.incoming(families.Rows(module, slice(None))).mul_(
                torch.from_numpy(array)[:, None]
            )
            bias = dict(module.named_parameters()).get("bias")
            if bias is not None:
                bias.mul_(torch.from_numpy(array))
    found = nll(model, Intervention("transport", arrays))
    np.testing.assert_allclose(found, nll(other, INTACT), rtol=1e-4, atol=1e-5)


def test_transport_is_a_mix_within_the_range_that_was_seen() -> None:
    y = torch.tensor([[0.5, 3.0], [-2.0, 1.0]])
    arrays = {"scale": [2.0, 0.0], "shift": [1.0, 5.0], "low": [-1.0, 0.0], "high": [1.0, 2.0]}
    model, site = tiny.model("llama"), "lm_head"
    given = {f"{site}/{name}": np.array(values, np.float32) for name, values in arrays.items()}
    module = model.lm_head
    module.forward = lambda x: x
    with Intervention("transport", given, 0.5).on(model):
        found = module(y)
    assert found.tolist() == [[0.5 + 0.5 * (2 * 0.5 + 1 - 0.5), 3.0], [-2.0, 1 + 0.5 * (5 - 1)]]


@FAMILIES
def test_directional_ablation_leaves_nothing_of_the_direction(family) -> None:
    model = tiny.model(family)
    learnt = directional_ablation.learn(model, PROMPTS)[0]
    along = next(iter(learnt.arrays.values()))
    with learnt.on(model):
        for site in directional_ablation.stream(model):
            assert np.abs(outputs(model, TEXTS[0], site) @ along).max() < 1e-4
    assert np.abs(outputs(model, TEXTS[0], blocks(model)[-1]) @ along).max() > 1e-2


def test_a_mask_zeroes_single_weights() -> None:
    model, site = tiny.model("llama"), projections(tiny.model("llama"))[0]
    weight = model.get_submodule(site).get_parameter("weight")
    before = weight.clone()
    with Intervention("mask", {site: np.array([3, 17])}, 0.5).on(model):
        assert weight.view(-1)[[3, 17]].tolist() == (before.view(-1)[[3, 17]] / 2).tolist()
        assert (weight != before).sum() == 2
    assert (weight == before).all()


# --- a prompt --------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("front", [0, 1])
def test_a_prompt_is_the_texts_behind_it(family, front) -> None:
    """Likelihoods, windows, packed pairs and completions are those of longer texts."""
    model, said = tiny.model(family), [7, 11, 3]
    arrays = {"tokens": as_tokens(said), "front": np.array([front])}
    prompt = Intervention("prefix", arrays)
    longer = [[*text[:front], *said, *text[front:]] for text in TEXTS]
    (whole,) = likelihood.token_nll(model, [INTACT], longer, NAMES)
    expected = [each[len(said) :] for each in whole]
    for found in likelihood.token_nll(model, [prompt], TEXTS, NAMES, 40):
        np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=2e-5)
    ((_, *_), scored) = likelihood.window_scores(
        model, [INTACT, prompt], TEXTS, NAMES, Window(20, 20), 40
    )
    for nll_kl, plain in zip(scored, expected, strict=True):
        np.testing.assert_allclose(nll_kl[0, 1:], plain, atol=2e-5)
        assert nll_kl[1, 1:].max() > 1e-4
    sampling = Sampling(3, new_tokens=5, temperature=1.0, top_p=0.9, seed=0)
    (ours,) = generate.complete(model, [prompt], TEXTS, NAMES, sampling)
    (theirs,) = generate.complete(model, [INTACT], longer, NAMES, sampling)
    assert ours == theirs


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2"])
def test_a_prompt_before_packed_pairs(family) -> None:
    model, said = tiny.model(family), [7, 11, 3]
    prompt = Intervention("prefix", {"tokens": as_tokens(said), "front": np.array([1])})
    pair = [[5, 9, 8, 4], [5, 9, 6, 7, 3]]
    longer = [[5, *said, *text[1:]] for text in pair]
    ((ours,),) = likelihood.continuation_nll(model, [prompt], [pair], ["a"])
    ((theirs,),) = likelihood.continuation_nll(model, [INTACT], [longer], ["a"])
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other[len(said) :], atol=2e-5)


def test_a_prompt_beyond_the_context_is_refused() -> None:
    prompt = Intervention("prefix", {"tokens": as_tokens([3] * 60), "front": np.array([0])})
    with pytest.raises(InputError, match="a text of 12 tokens and a prompt of 60 are longer"):
        likelihood.token_nll(tiny.model("llama"), [prompt], TEXTS, NAMES)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_completion_behind_a_prompt_stays_within_the_context(family) -> None:
    prompt = Intervention("prefix", {"tokens": as_tokens([3] * 45), "front": np.array([0])})
    sampling = Sampling(1, new_tokens=20, temperature=1.0, top_p=1.0, seed=0)
    with pytest.raises(InputError, match="a prompt of 45 tokens, a text and its completion exceed"):
        generate.complete(tiny.model(family), [prompt], [TEXTS[0][:10]], NAMES[:1], sampling)
    few = sampling._replace(new_tokens=5)
    assert generate.complete(tiny.model(family), [prompt], [TEXTS[0][:10]], NAMES[:1], few)


# --- among circuits, and in a file -----------------------------------------------------------


def test_interventions_and_circuits_are_read_and_complete_as_each_alone() -> None:
    model = tiny.model("llama")
    (act,) = mean_act.learn(model, PROMPTS)
    ban = Intervention("ban", {"tokens": as_tokens([5, 6])}, 3.0)
    edits = [tiny.circuit(1), act, INTACT, ban]
    sampling = Sampling(3, new_tokens=5, temperature=1.0, top_p=0.9, seed=0)
    several = likelihood.window_scores(model, edits, TEXTS, NAMES, Window(20, 20))
    written = generate.complete(model, edits, TEXTS, NAMES, sampling)
    for edit, scores, texts in zip(edits, several, written, strict=True):
        (alone,) = likelihood.window_scores(model, [edit], TEXTS, NAMES, Window(20, 20))
        np.testing.assert_allclose(np.concatenate(scores, 1), np.concatenate(alone, 1), atol=1e-6)
        assert [texts] == generate.complete(model, [edit], TEXTS, NAMES, sampling)
    (banned,) = likelihood.token_nll(model, [ban], TEXTS, NAMES)
    np.testing.assert_allclose(
        np.concatenate([nll[1:] for nll, _ in several[3]]), np.concatenate(banned), atol=1e-6
    )


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_file_gives_back_what_was_written(kind, tmp_path) -> None:
    learnt = LEARNERS[kind](tiny.model("llama"), PROMPTS)[-1]
    half = Intervention(learnt.form, learnt.arrays, 0.3)
    write_intervention(tmp_path / "x.safetensors", half)
    again = read_intervention(tmp_path / "x.safetensors")
    assert (again.form, again.strength) == (half.form, 0.3)
    assert again.form in FORMS
    assert again.arrays.keys() == half.arrays.keys()
    for name, array in half.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)


def test_what_is_no_intervention_or_of_another_model_is_refused(tmp_path) -> None:
    from sparc3.base.files import write_tensors

    write_tensors(tmp_path / "x.safetensors", {"a": np.ones(2)})
    with pytest.raises(InputError, match="not an intervention; expected a form"):
        read_intervention(tmp_path / "x.safetensors")
    (act,) = mean_act.learn(tiny.model("llama"), PROMPTS)
    with (
        pytest.raises(InputError, match=r"the model has no module model\.layers\.0\.mlp"),
        act.on(tiny.model("gpt2")),
    ):
        pass
