"""AttnLRP: values unchanged, patches undone, and where relevance goes, to the last term.

Relevance is conserved but for two things, both accounted for here: biases keep their share, and
attention loses half of what enters it from above and gains what its softmax, which is not
homogeneous, makes of it (Achtibat et al. 2024, section 3.3).
"""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tiny
import torch
from accelerate import dispatch_model
from lxt.efficient import monkey_patch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama

from sparc3.base.errors import InputError
from sparc3.model import families
from sparc3.relevance import lrp
from sparc3.relevance.lrp import attnlrp

FAMILIES = pytest.mark.parametrize("family", tiny.CONFIGS)


def modeling(model):
    """The transformers module that defines the model, and calls attention."""
    return importlib.import_module(type(model).__module__)


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


def attributes(family):
    return {target: dict(vars(target)) for target in lrp.RULES[family]}


@FAMILIES
def test_every_patch_is_undone_also_after_an_error(family):
    model = tiny.model(family)
    before, relu = attributes(family), dict(vars(nn.ReLU))
    with pytest.raises(ZeroDivisionError), attnlrp(model):
        assert all(dict(vars(target)) != before[target] for target in before)
        raise ZeroDivisionError
    assert attributes(family) == before
    assert dict(vars(nn.ReLU)) == relu


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


def test_foreign_patches_are_refused_and_left_as_they_were():
    model = tiny.model("llama")
    original = modeling_llama.LlamaRMSNorm.forward
    with stock_lxt(modeling_llama):
        patched = modeling_llama.LlamaRMSNorm.forward
        assert patched is not original
        with (
            warnings.catch_warnings(),
            pytest.raises(RuntimeError, match="patched outside"),
        ):
            warnings.simplefilter("ignore")  # lxt's own warning about the same
            with attnlrp(model):
                pass
        assert modeling_llama.LlamaRMSNorm.forward is patched
    assert modeling_llama.LlamaRMSNorm.forward is original


def test_an_unknown_family_is_refused():
    model = tiny.model("llama")
    model.config.model_type = "mamba"
    with (
        pytest.raises(InputError, match="'mamba' is not known; choose one of: gemma"),
        attnlrp(model),
    ):
        pass


@contextmanager
def stock_lxt(module, patches=None) -> Iterator[None]:
    """lxt's own patches of a transformers module, undone by hand."""
    targets = [module, nn.Dropout, nn.LayerNorm, *vars(module).values()]
    targets = [t for t in targets if isinstance(t, type(nn) | type)]
    before = [(t, dict(vars(t))) for t in targets]
    monkey_patch(module, patches)
    try:
        yield
    finally:
        for target, kept in before:
            for name, value in kept.items():
                if vars(target).get(name) is not value:
                    setattr(target, name, value)


STOCK = ["llama", "qwen2", "qwen3", "gemma3_text", "gpt2"]


@pytest.mark.parametrize("family", STOCK)
def test_the_lean_mlp_gives_what_lxts_own_gives(family):
    model = tiny.model(family)
    ids = torch.tensor(tiny.sequences([9]))
    with stock_lxt(modeling(model)):
        expected = neuron_gradient(model, ids)
    with attnlrp(model):
        found = neuron_gradient(model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", STOCK)
def test_cp_lrp_is_lxts_own(family, monkeypatch):
    model = tiny.model(family)
    ids, module = torch.tensor(tiny.sequences([9])), modeling(model)
    patches = importlib.import_module(f"lxt.efficient.models.{family.removesuffix('_text')}").cp_LRP
    with attnlrp(model, lrp.RULE_SETS["cp-lrp"]):
        found = neuron_gradient(model, ids)
    # lxt changes the functions of attention in a dictionary that all families share.
    monkeypatch.setattr(module, "ALL_ATTENTION_FUNCTIONS", {**module.ALL_ATTENTION_FUNCTIONS})
    with stock_lxt(module, patches):
        expected = neuron_gradient(model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


NO_RULE = lrp.Rules(norm=False, activation=False, gate=(1, 1), queries=1, values=1)


@FAMILIES
def test_without_a_rule_relevance_is_the_gradient_and_every_rule_changes_it(family):
    model = tiny.model(family)
    ids = torch.tensor(tiny.sequences([9]))
    expected = neuron_gradient(model, ids)
    idle = {"activation"} if family == "opt" else set()  # ReLU's slope is f(x) / x
    if families.mlps(model)[0].gate is None:
        idle.add("gate")
    for name in NO_RULE._fields[:5]:
        with attnlrp(model, NO_RULE._replace(**{name: getattr(lrp.ATTNLRP, name)})):
            found = neuron_gradient(model, ids)
        assert torch.allclose(found, expected, rtol=1e-3) == (name in idle), name
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
    biases = [p.requires_grad_() for name, p in model.named_parameters() if name.endswith("bias")]
    first = model.get_submodule(families.family(model.config.model_type).layers)[0]
    inputs: list[Tensor] = []

    def start(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        inputs.append(x if x.requires_grad else x.requires_grad_())

    handle = first.register_forward_pre_hook(start, with_kwargs=True)
    with attnlrp(model), recording_attention(model) as attentions:
        y = model(ids).logits[0, -1].max()
    handle.remove()
    tensors = [*inputs, *biases, *(t for a in attentions for t in a)]
    gradients = torch.autograd.grad(y, tensors, allow_unused=True)
    relevance = [
        0.0 if g is None else (t * g).sum().item() for t, g in zip(tensors, gradients, strict=True)
    ]
    start_of_attention = len(inputs) + len(biases)
    lost = sum(
        output - query - key - value
        for query, key, value, output in zip(
            *(relevance[start_of_attention + i :: 4] for i in range(4)), strict=True
        )
    )
    assert len(attentions) == tiny.LAYERS
    assert abs(lost) > 0.01  # else this would be no test of attention
    total = sum(relevance[:start_of_attention]) + lost
    assert total == pytest.approx(y.item(), rel=1e-4, abs=1e-4)


@contextmanager
def recording_attention(model) -> Iterator[list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """(query, key, value, output) of every attention call, within `attnlrp`."""
    module = modeling(model)
    found = []
    inner = module.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def record(owner, query, key, value, *args, **kwargs):
        query, key, value = query * 1, key * 1, value * 1  # so that each has a gradient of its own
        output, weights = inner(owner, query, key, value, *args, **kwargs)
        found.append((query, key, value, output))
        return output, weights

    module.ALL_ATTENTION_FUNCTIONS["sdpa"] = record
    try:
        yield found
    finally:
        module.ALL_ATTENTION_FUNCTIONS["sdpa"] = inner


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
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
    module = modeling(model)
    owner = next(m for n, m in model.named_modules() if n.endswith(("self_attn", ".attn")))
    groups = getattr(owner, "num_key_value_groups", 1)
    torch.manual_seed(1)
    query = torch.randn(1, 4, 6, 8).requires_grad_()
    key, value = (torch.randn(1, 4 // groups, 6, 8).requires_grad_() for _ in range(2))
    with attnlrp(model):
        output, _ = module.ALL_ATTENTION_FUNCTIONS["sdpa"](
            owner, query, key, value, None, scaling=0.4
        )
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
