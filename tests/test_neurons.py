"""What neurons do, against computations by hand on tiny models."""

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from small import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sparc3.circuits.circuit import Circuit
from sparc3.measure import neurons
from sparc3.model import families

CIRCUIT = Circuit(
    np.array([2, 0, 2]), np.array([5, 3, 7]), np.array([-3.0, -2.0, -1.0]), np.zeros(3)
)


def heard(model: PreTrainedModel, layer: int, ids: list[int]) -> torch.Tensor:
    """What enters a layer's output projection, (token, neuron)."""
    kept: list[torch.Tensor] = []
    down = families.mlps(model)[layer].down
    hook = down.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    hook.remove()
    return kept[0].reshape(len(ids), -1)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_push_is_the_column_through_norm_and_unembedding(family: str) -> None:
    """Added to a hidden state that is scaled to nothing else, the logits rise by as much."""
    model: Any = tiny.model(family)
    for layer, neuron, *_ in CIRCUIT.rows():
        down = families.mlps(model)[layer].down
        weight = down.get_parameter("weight").detach().double()
        column = weight[neuron] if family == "gpt2" else weight[:, neuron]
        if "LayerNorm" in type(families.final_norm(model)).__name__:  # centres; its bias is no push
            column = column - column.mean()
        column = column / column.pow(2).mean().sqrt()
        norm = families.final_norm(model)
        assert norm is not None
        scale = norm.get_parameter("weight").detach().double()
        column = column * (1 + scale if family.startswith("gemma") else scale)
        head = model.get_output_embeddings().weight.double()
        found = neurons.push(model, layer, neuron).double()
        torch.testing.assert_close(found, head @ column, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_peaks_are_the_largest_activations_after_the_first_token(family: str) -> None:
    model = tiny.model(family)
    tokens = tiny.sequences([6, 9, 20, 19, 4])  # two of which share a batch
    values, places = neurons.peaks(model, CIRCUIT, tokens)
    for row, ids in enumerate(tokens):
        for column, (layer, neuron, *_) in enumerate(CIRCUIT.rows()):
            h = heard(model, layer, ids)[:, neuron].tolist()
            best = max(range(1, len(ids)), key=lambda t: abs(h[t]))
            assert places[row, column] == best
            assert values[row, column] == pytest.approx(h[best], rel=1e-4)
    assert not any(mlp.down._forward_pre_hooks for mlp in families.mlps(model))


def test_neurons_are_described_by_tokens_and_texts(tmp_path) -> None:
    write_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = {"rude": ["w5 w6 w7", "w9 w9"], "plain": ["w5 w6 w7", "w8 w4 w3 w2", "", "w6"]}
    found = neurons.describe(model, tokenizer, CIRCUIT, texts)
    assert [(row["layer"], row["neuron"], row["score"]) for row in found] == [
        row[:3] for row in CIRCUIT.rows()
    ]
    for row in found:
        pushes = neurons.push(model, row["layer"], row["neuron"]).tolist()
        order = sorted(range(len(pushes)), key=lambda token: -pushes[token])
        assert row["promotes"] == [f"w{token}" for token in order[: neurons.TOKENS]]
        assert row["demotes"] == [f"w{token}" for token in order[::-1][: neurons.TOKENS]]
        sizes = [abs(text["activation"]) for text in row["texts"]]
        assert sizes == sorted(sizes, reverse=True)
        assert len(row["texts"]) == neurons.TEXTS
        for text in row["texts"]:
            parts = [text[key] for key in ("before", "token", "after") if text[key]]
            assert " ".join(parts) in texts[text["set"]][:2]  # the others are too short
