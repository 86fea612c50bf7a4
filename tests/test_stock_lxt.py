"""Against lxt's own patches of the families that it knows, all of which need transformers 4."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tiny
import torch
from lxt.efficient import monkey_patch
from test_lrp import neuron_gradient
from torch import nn
from transformers.models.llama import modeling_llama

from sparc3.relevance.lrp import RULE_SETS, attnlrp

STOCK = ["llama", "qwen2", "qwen3", "gemma3_text", "gpt2"]


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


@pytest.mark.parametrize("family", STOCK)
def test_the_lean_mlp_gives_what_lxts_own_gives(family):
    model = tiny.model(family)
    ids = torch.tensor(tiny.sequences([9]))
    with stock_lxt(importlib.import_module(type(model).__module__)):
        expected = neuron_gradient(model, ids)
    with attnlrp(model):
        found = neuron_gradient(model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", STOCK)
def test_cp_lrp_is_lxts_own(family, monkeypatch):
    model = tiny.model(family)
    ids, module = torch.tensor(tiny.sequences([9])), importlib.import_module(type(model).__module__)
    patches = importlib.import_module(f"lxt.efficient.models.{family.removesuffix('_text')}").cp_LRP
    with attnlrp(model, RULE_SETS["cp-lrp"]):
        found = neuron_gradient(model, ids)
    # lxt changes the functions of attention in a dictionary that all families share.
    monkeypatch.setattr(module, "ALL_ATTENTION_FUNCTIONS", {**module.ALL_ATTENTION_FUNCTIONS})
    with stock_lxt(module, patches):
        expected = neuron_gradient(model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_foreign_patches_are_refused_and_left_as_they_were():
    model = tiny.model("llama")
    original = modeling_llama.LlamaRMSNorm.forward
    with stock_lxt(modeling_llama):
        patched = modeling_llama.LlamaRMSNorm.forward
        assert patched is not original
        with pytest.raises(RuntimeError, match="patched outside"), attnlrp(model):
            pass
        assert modeling_llama.LlamaRMSNorm.forward is patched
    assert modeling_llama.LlamaRMSNorm.forward is original
