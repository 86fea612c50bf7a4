"""Where each family of models keeps its MLP neurons.

A **neuron** is one coordinate of the vector that enters an MLP's output projection, in gated
(LLaMA) and plain (GPT-2) MLPs alike. A new family is one row of FAMILIES: the rest of a model is
found by its structure. Importing this takes neither torch nor transformers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from sparc3.base.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class Family(NamedTuple):
    """Paths, within one layer, of a family's projections, and of its layers, by which adapters and
    interventions name modules. With `gate` the same as `up` one module computes both, the gate's
    neurons first.
    """

    up: str
    gate: str | None  # None: plain MLP
    down: str
    layers: str = "model.layers"


_LLAMA = Family("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")
FAMILIES: dict[str, Family] = {  # by config.model_type
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "olmo2": _LLAMA,
    "granite": _LLAMA,
    "cohere": _LLAMA,
    "phi3": Family("mlp.gate_up_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    "opt": Family("fc1", None, "fc2", "model.decoder.layers"),
    "gpt2": Family("mlp.c_fc", None, "mlp.c_proj", "transformer.h"),
    "starcoder2": Family("mlp.c_fc", None, "mlp.c_proj"),
    "gpt_neox": Family("mlp.dense_h_to_4h", None, "mlp.dense_4h_to_h", "gpt_neox.layers"),  # Pythia
}


EVERY_WEIGHT: dict[str, Any] = {  # no code, no pickle, no made-up weight without a word
    "trust_remote_code": False,
    "use_safetensors": True,
    "output_loading_info": True,
    "ignore_mismatched_sizes": True,
}
for noise in (  # `require_weights` tells
    "modeling_utils",
    "integrations.tensor_parallel",
    "distributed.tensor_parallel",  # of transformers 5
    "utils.loading_report",
):
    logging.getLogger(f"transformers.{noise}").setLevel(logging.ERROR)


class Rows(NamedTuple):
    """The rows of a projection's weight, and of its output, that belong to `up` or to `gate`: all
    of them, or half of a module that computes both.
    """

    module: nn.Module
    of: slice


class MLP(NamedTuple):
    """The projections of one layer's MLP; `down` is the output projection."""

    up: Rows
    gate: Rows | None
    down: nn.Module


def family(model_type: Any, where: str = "model") -> Family:
    """The row of FAMILIES; InputError, which begins with `where`, for an unknown family."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"{where}: family {model_type!r} is not known; choose one of: {known}")
    return FAMILIES[model_type]


def require_weights(where: str, found: Mapping[str, Any]) -> None:
    """InputError unless a checkpoint's weights are the model's: transformers makes up the others.

    `found` is what `from_pretrained` with EVERY_WEIGHT gives beside the model.
    """
    kinds = {
        "missing": sorted(found["missing_keys"]),
        # of transformers 5 with both shapes
        "of another shape": sorted(
            key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]
        ),
        "not the model's": sorted(found["unexpected_keys"]),
    }
    odd = [
        f"{names[0]} {f'and {len(names) - 1} more are' if names[1:] else 'is'} {kind}"
        for kind, names in kinds.items()
        if names
    ]
    if odd:
        raise InputError(
            f"{where}: weights and config.json are of different models: {'; '.join(odd)}; "
            "get both again from one place"
        )


def context(config: Mapping[str, Any]) -> float:
    """Longest sequence in tokens, of a model's config.json or `config.to_dict()`; infinite for a
    model without a table of positions.
    """
    return config.get("max_position_embeddings") or config.get("n_positions") or math.inf


def attention_kind(config: Mapping[str, Any]) -> str:
    """transformers' name of the attention that is used: eager for Gemma 2, whose attention scores
    are capped, which sdpa does not know.
    """
    return "eager" if config.get("model_type") == "gemma2" else "sdpa"


def neurons(config: Mapping[str, Any]) -> tuple[int, int]:
    """Layers and neurons of each, of a model's config.json."""
    layers = config.get("num_hidden_layers") or config["n_layer"]
    width = config.get("intermediate_size") or config.get("ffn_dim") or config.get("n_inner")
    return layers, width or 4 * (config.get("hidden_size") or config["n_embd"])


def body(model: PreTrainedModel) -> nn.Module:
    """The transformer: ids or embeddings to the last hidden state."""
    return next(model.children())  # the head comes after it


def logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (..., vocabulary) of the body's last hidden state (..., hidden), any positions."""
    return capped(model, head(model)(hidden))


def head(model: PreTrainedModel) -> nn.Module:
    """The output embedding: last hidden state to what logits are made of."""
    return cast("nn.Module", model.get_output_embeddings())


def capped(model: PreTrainedModel, values: Tensor) -> Tensor:
    """Logits from what left the head, scaled and capped where the family does that; else as is."""
    config = model.config
    scale = getattr(config, "logit_scale", 1) / getattr(config, "logits_scaling", 1)
    if scale != 1:
        values = values * scale
    cap = getattr(config, "final_logit_softcapping", None)
    return values if cap is None else (values / cap).tanh() * cap


def _blocks(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The body's list of blocks, which is the first that it has, and the module that holds it."""
    from torch import nn

    for above in body(model).modules():
        for each in above.children():
            if isinstance(each, nn.ModuleList):
                return each, above
    raise InputError(f"model: {type(model).__name__} has no list of layers")


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer's blocks, in order."""
    return list(_blocks(model)[0].children())


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """What the last layer's output passes on its way to the logits, if there is one."""
    norms = [each for each in _blocks(model)[1].children() if "Norm" in type(each).__name__]
    return norms[-1] if norms else None


def mlps(model: PreTrainedModel) -> list[MLP]:
    """The MLP projections of every layer, in order."""
    names = family(model.config.model_type)

    def of(layer: nn.Module) -> MLP:
        up, down = layer.get_submodule(names.up), layer.get_submodule(names.down)
        if names.gate is None:
            return MLP(Rows(up, slice(None)), None, down)
        if names.gate != names.up:
            gate = layer.get_submodule(names.gate)
            return MLP(Rows(up, slice(None)), Rows(gate, slice(None)), down)
        neurons = outgoing(down).shape[1]
        return MLP(Rows(up, slice(neurons, None)), Rows(up, slice(neurons)), down)

    return [of(layer) for layer in layers(model)]


def incoming(rows: Rows) -> Tensor:
    """Weight of `up` or `gate` as a (neuron, input) view, whichever way the module stores it."""
    return _out_in(rows.module)[rows.of]


def bias(rows: Rows) -> Tensor | None:
    """Bias of `up` or `gate`, a (neuron,) view, where it has one."""
    whole = dict(rows.module.named_parameters()).get("bias")
    return None if whole is None else whole[rows.of]


def outgoing(projection: nn.Module) -> Tensor:
    """Weight of `down` as an (output, neuron) view, whichever way the module stores it."""
    return _out_in(projection)


def num_layers(model: PreTrainedModel) -> int:
    """Layers, each of which has one MLP."""
    return len(mlps(model))


def width(model: PreTrainedModel) -> int:
    """Neurons per layer (the same in every layer of the known families)."""
    return outgoing(mlps(model)[0].down).shape[1]


def _out_in(projection: nn.Module) -> Tensor:
    from transformers.pytorch_utils import Conv1D

    weight = projection.get_parameter("weight")
    return weight.T if isinstance(projection, Conv1D) else weight  # Conv1D stores (in, out)
