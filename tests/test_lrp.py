"""AttnLRP: values unchanged, patches undone, and where relevance goes, to the last term.

Relevance is conserved but for two things, both accounted for here: biases keep their share, and
attention loses half of what enters it from above and gains what its softmax, which is not
homogeneous, makes of it (Achtibat et al. 2024, section 3.3).
"""

import importlib
import sys
from typing import Any

import pytest
import tiny
import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparc3.base.errors import InputError
from sparc3.model import families
from sparc3.relevance import lrp
from sparc3.relevance.conservation import balance
from sparc3.relevance.lrp import attnlrp

FAMILIES = pytest.mark.parametrize("family", tiny.CONFIGS)


def attention_of(model):
    """The function that its layers call for attention."""
    kind = model.config._attn_implementation
    eager = importlib.import_module(type(model).__module__).eager_attention_forward
    return eager if kind == "eager" else ALL_ATTENTION_FUNCTIONS[kind]


def embeddings(model, ids):
    return model.get_input_embeddings()(ids).detach().requires_grad_()


def neuron_gradient(model, ids):
    """Gradient at the neurons of every layer, by retained gradients: (layer, token, neuron)."""
    kept = []
    handles = [
        mlp.down.register_forward_pre_hook(lambda _, args: kept.append(args[0]) or None)
        for mlp in families.mlps(model)
    ]
    embedded = embeddings(model, ids)
    y = model(inputs_embeds=embedded).logits[0, -1].max()
    for handle in handles:
        handle.remove()
    return torch.stack([g.view(-1, tiny.WIDTH) for g in torch.autograd.grad(y, kept)])


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_unchanged(family, dtype):
    model = tiny.model(family, dtype)
    ids = torch.tensor(tiny.sequences([9, 9]))
    plain = model(ids).logits
    with attnlrp(model):
        patched = model(ids).logits
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (0.05, 0.1)
    torch.testing.assert_close(patched, plain, rtol=rtol, atol=atol)


@FAMILIES
def test_gradients_are_changed_within_and_plain_again_after(family):
    model = tiny.model(family)
    ids = torch.tensor(tiny.sequences([9]))
    before = neuron_gradient(model, ids)
    with attnlrp(model):
        within = neuron_gradient(model, ids)
    assert not torch.allclose(within, before, rtol=0.01, atol=0.001)
    assert torch.equal(neuron_gradient(model, ids), before)


@FAMILIES
def test_every_patch_is_undone_also_after_an_error(family):
    model = tiny.model(family)
    targets = [target for target, _, _ in lrp.patches(model, lrp.ATTNLRP)]
    before = [(dict(vars(target)), attention_of(model)) for target in targets]
    with pytest.raises(ZeroDivisionError), attnlrp(model):
        assert all(
            dict(vars(target)) != attributes and attention_of(model) is not attention
            for target, (attributes, attention) in zip(targets, before, strict=True)
        )
        raise ZeroDivisionError
    assert [(dict(vars(target)), attention_of(model)) for target in targets] == before


def test_families_in_turn_do_not_disturb_each_other():
    ids = torch.tensor(tiny.sequences([9]))
    results = {}
    for family in [*tiny.CONFIGS, *tiny.CONFIGS]:
        model = tiny.model(family)
        with attnlrp(model):
            found = neuron_gradient(model, ids)
        assert torch.equal(results.setdefault(family, found), found)


def test_nesting_is_refused_and_leaves_the_outer_block_working():
    model = tiny.model("llama")
    ids = torch.tensor(tiny.sequences([9]))
    with attnlrp(model):
        expected = neuron_gradient(model, ids)
        with pytest.raises(RuntimeError, match="already active"), attnlrp(model):
            pass
        assert torch.equal(neuron_gradient(model, ids), expected)


def test_an_unknown_family_is_refused():
    model = tiny.model("llama")
    model.config.model_type = "mamba"
    with (
        pytest.raises(InputError, match="'mamba' is not known; choose one of: cohere, gemma"),
        attnlrp(model),
    ):
        pass


class Squared(nn.Module):
    def forward(self, x):
        return x * x


def test_a_type_of_layer_without_a_rule_is_refused_by_name():
    model = tiny.model("llama")
    layer: Any = families.layers(model)[1]
    layer.mlp.act_fn = Squared()
    refusal = r"type Squared \(layers\.1\.mlp\.act_fn\) in a model of family llama; take gradient"
    with pytest.raises(InputError, match=refusal), attnlrp(model):
        pass


def test_lxt_is_used_without_the_models_that_it_imports():
    """Which need torchvision and transformers 4; who imports all of lxt gets it as it is."""
    assert "lxt.efficient.patches" in sys.modules
    assert not {"lxt.efficient.models", "lxt.efficient.models.bert"} & set(vars(lrp._patches))
    assert lrp._lxt_patches() is lrp._patches


NO_RULE = lrp.Rules(norm=False, activation=False, gate=(1, 1), queries=1, values=1)


@FAMILIES
def test_without_a_rule_relevance_is_the_gradient_and_every_rule_changes_it(family):
    model = tiny.model(family)
    ids = torch.tensor(tiny.sequences([9]))
    expected = neuron_gradient(model, ids)
    same = set() if families.mlps(model)[0].gate is not None else {"gate"}
    if getattr(model.config, "activation_function", "") == "relu":
        same.add("activation")  # f(z) / z is its gradient
    for name in NO_RULE._fields[:5]:
        with attnlrp(model, NO_RULE._replace(**{name: getattr(lrp.ATTNLRP, name)})):
            found = neuron_gradient(model, ids)
        assert torch.allclose(found, expected, rtol=1e-3) == (name in same), name
    with attnlrp(model, NO_RULE):
        found = neuron_gradient(model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_new", "silu", "gelu_pytorch_tanh"])
def test_identity_rule_conserves_at_every_activation(name):
    z = torch.randn(200).requires_grad_()
    h = lrp._Activation.apply(ACT2FN[name], z)
    torch.testing.assert_close(h, ACT2FN[name](z))
    received = torch.randn(200)
    (gradient,) = torch.autograd.grad(h, z, received)
    torch.testing.assert_close(z * gradient, h * received)


def test_gate_gives_each_factor_half():
    g, u = (torch.randn(200).requires_grad_() for _ in range(2))
    silu = nn.functional.silu
    h = lrp._Gate.apply(silu, g, u)
    torch.testing.assert_close(h, silu(g) * u)
    received = torch.randn(200)
    of_g, of_u = torch.autograd.grad(h, (g, u), received)
    torch.testing.assert_close(g * of_g, h * received / 2)
    torch.testing.assert_close(u * of_u, h * received / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gate_at_zero_is_finite(dtype):
    g = torch.tensor([0.0, -0.0, 6e-8], dtype=dtype).requires_grad_()
    u = torch.ones(3, dtype=dtype).requires_grad_()
    h = lrp._Gate.apply(nn.functional.silu, g, u)
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(h.sum(), (g, u)))


def test_relu_needs_no_other_rule_than_its_gradient():
    z = torch.randn(200).requires_grad_()
    rule = torch.autograd.grad(lrp._Activation.apply(torch.relu, z).sum(), z)[0]
    torch.testing.assert_close(rule, torch.autograd.grad(torch.relu(z).sum(), z)[0])


def test_opt_with_another_activation_is_patched_too():
    model = tiny.model("opt")
    ids = torch.tensor(tiny.sequences([9]))
    for layer in model.get_submodule("model.decoder.layers").children():
        layer.activation_fn = ACT2FN["gelu"]
    assert_balance(model, ids)


def test_opt_350m_normalises_after_the_block_and_projects_its_embeddings():
    config = tiny.CONFIGS["opt"]()
    config.do_layer_norm_before, config.word_embed_proj_dim = False, 8
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for parameter in model.requires_grad_(False).parameters():
        parameter.normal_(0, 0.3)
    assert_balance(model, torch.tensor(tiny.sequences([9])))


# Where relevance goes


@FAMILIES
def test_relevance_is_conserved_but_for_biases_and_softmax(family):
    assert_balance(tiny.model(family), torch.tensor(tiny.sequences([9])))


def assert_balance(model, ids):
    """y = R(input of the first layer) + R(biases) + what attention keeps."""
    found = balance(model, ids)
    assert len(found.attention) == tiny.LAYERS
    assert abs(sum(found.attention)) > 0.01  # else this would be no test of attention
    assert found.error < 1e-5
    if not getattr(model.config, "final_logit_softcapping", None):
        assert found.explained == pytest.approx(model(ids).logits[0, -1].max().item(), rel=1e-4)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_relevance_is_out_of_balance_without_a_rule(monkeypatch):
    """So that a rule that is missing does not go unseen: here that of the norms, of the product."""
    ids = torch.tensor(tiny.sequences([9]))
    assert balance(tiny.model("llama"), ids).error < 1e-5
    own = lrp.patches
    for left_out in ("rsqrt", "forward", "eager_attention_forward"):
        monkeypatch.setattr(
            lrp, "patches", lambda *args, out=left_out: [r for r in own(*args) if r[1] != out]
        )
        broken = balance(tiny.model("llama"), ids).error > 1e-3
        assert broken == (left_out != "eager_attention_forward")  # which sdpa does not call


@pytest.mark.parametrize(
    "family", [name for name, row in families.FAMILIES.items() if row.gate and name != "gemma2"]
)
def test_without_attention_and_biases_relevance_is_exactly_conserved(family):
    """With output projections of zero, all of the logit is found again at the embeddings."""
    model = tiny.model(family)
    for name, parameter in model.named_parameters():
        if "o_proj" in name or name.endswith("bias"):
            parameter.zero_()
    embedded = embeddings(model, torch.tensor(tiny.sequences([9])))
    with attnlrp(model):
        y = model(inputs_embeds=embedded).logits[0, -1].max()
    (gradient,) = torch.autograd.grad(y, embedded)
    assert (embedded * gradient).sum().item() == pytest.approx(y.item(), rel=1e-4)
    # and the plain gradient does not do that
    y = model(inputs_embeds=embedded).logits[0, -1].max()
    (gradient,) = torch.autograd.grad(y, embedded)
    assert (embedded * gradient).sum().item() != pytest.approx(y.item(), rel=0.05)


@FAMILIES
def test_attention_follows_the_rules_written_out(family):
    """Uniform rule for both products, gradient through the softmax: explicit loops over formulas.

    With output O = A V, A = softmax(S), S = Q K': half of R(O) goes to V and half to A; A's half
    passes the softmax by its gradient; half of R(S) goes to Q and half to K.
    """
    model = tiny.model(family)
    names = ("self_attn", ".attn", ".attention")
    owner = next(m for n, m in model.named_modules() if n.endswith(names))
    groups = getattr(owner, "num_key_value_groups", 1)
    torch.manual_seed(1)
    query = torch.randn(1, 4, 6, 8).requires_grad_()
    key, value = (torch.randn(1, 4 // groups, 6, 8).requires_grad_() for _ in range(2))
    causal = torch.full((6, 6), -torch.inf).triu(1)[None, None]
    with attnlrp(model):
        output, _ = attention_of(model)(owner, query, key, value, causal, scaling=0.4)
    received = torch.randn_like(output)
    found = torch.autograd.grad(output, (query, key, value), received)

    delta = received.transpose(1, 2)
    k, v = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = (query @ k.transpose(2, 3) * 0.4).masked_fill(
        ~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf
    )
    a = scores.softmax(-1)
    torch.testing.assert_close(output.transpose(1, 2), a @ v)
    of_v = (a.transpose(2, 3) @ delta) / 2
    of_a = (delta @ v.transpose(2, 3)) / 2
    of_s = a * (of_a - (a * of_a).sum(-1, keepdim=True))
    of_q = 0.4 * (of_s @ k) / 2
    of_k = 0.4 * (of_s.transpose(2, 3) @ query) / 2
    per_group = (1, 4 // groups, groups, 6, 8)
    expected = (of_q, of_k.view(per_group).sum(2), of_v.view(per_group).sum(2))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@FAMILIES
def test_mlp_neurons_hold_the_mlps_share(family):
    """sum_i h_i dy/dh_i = <output of `down` without its bias, dy/d that output>, per token."""
    model = tiny.model(family)
    seen: dict[str, list[Tensor]] = {"h": [], "output": []}

    def see(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen["h"].append(args[0])
        seen["output"].append(output)

    for mlp in families.mlps(model):
        mlp.down.register_forward_hook(see)
    with attnlrp(model):
        y = model(inputs_embeds=embeddings(model, torch.tensor(tiny.sequences([9])))).logits
    of_h = torch.autograd.grad(y[0, -1].max(), seen["h"], retain_graph=True)
    of_output = torch.autograd.grad(y[0, -1].max(), seen["output"])
    for layer, mlp in enumerate(families.mlps(model)):
        bias = dict(mlp.down.named_parameters()).get("bias", torch.zeros(()))
        share = ((seen["output"][layer] - bias) * of_output[layer]).sum(-1)
        torch.testing.assert_close((seen["h"][layer] * of_h[layer]).sum(-1), share)


@FAMILIES
def test_a_model_spread_by_accelerate_gets_the_same_relevance(family):
    """accelerate keeps each module's unpatched forward; the patches must reach it all the same."""
    ids = torch.tensor(tiny.sequences([9]))
    model = tiny.model(family)
    plain = neuron_gradient(model, ids)
    with attnlrp(model):
        expected = neuron_gradient(model, ids)
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert any("_old_forward" in vars(m) for m in model.modules())
    with attnlrp(model):
        assert torch.equal(neuron_gradient(model, ids), expected)
    assert torch.equal(neuron_gradient(model, ids), plain)
