"""Where each family of models keeps its MLP neurons.

A **neuron** is one coordinate of the vector that enters an MLP's output projection, in gated
(LLaMA) and plain (GPT-2) MLPs alike. A new family is one row of FAMILIES and, for relevance, one
row of `sparc3.relevance.lrp.RULES`. Importing this takes neither torch nor transformers.
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
    """Attribute paths of one model family: within the model, and within one layer."""

    body: str  # the transformer without the language-modelling head
    layers: str
    up: str
    gate: str | None  # None: plain MLP
    down: str


_LLAMA = Family("model", "model.layers", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")
FAMILIES: dict[str, Family] = {  # by config.model_type
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3_text": _LLAMA,
    "opt": Family("model", "model.decoder.layers", "fc1", None, "fc2"),
    "gpt2": Family("transformer", "transformer.h", "mlp.c_fc", None, "mlp.c_proj"),
}


EVERY_WEIGHT: dict[str, Any] = {  # no code, no pickle, no made-up weight without a word
    "trust_remote_code": False,
    "use_safetensors": True,
    "output_loading_info": True,
    "ignore_mismatched_sizes": True,
}
for noise in ("modeling_utils", "integrations.tensor_parallel"):  # `require_weights` tells
    logging.getLogger(f"transformers.{noise}").setLevel(logging.ERROR)


class MLP(NamedTuple):
    """The projections of one layer's MLP; `down` is the output projection."""

    up: nn.Module
    gate: nn.Module | None
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
        "of another shape": sorted(found["mismatched_keys"]),
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


def neurons(config: Mapping[str, Any]) -> tuple[int, int]:
    """Layers and neurons of each, of a model's config.json."""
    layers = config.get("num_hidden_layers") or config["n_layer"]
    width = config.get("intermediate_size") or config.get("ffn_dim") or config.get("n_inner")
    return layers, width or 4 * (config.get("hidden_size") or config["n_embd"])


def body(model: PreTrainedModel) -> nn.Module:
    """The transformer: ids or embeddings to the last hidden state."""
    return model.get_submodule(family(model.config.model_type).body)


def logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (..., vocabulary) of the body's last hidden state (..., hidden), any positions."""
    values = cast("nn.Module", model.get_output_embeddings())(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return values if cap is None else (values / cap).tanh() * cap


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer's blocks, in order."""
    return list(model.get_submodule(family(model.config.model_type).layers).children())


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """What the last layer's output passes on its way to the logits, if there is one."""
    above = model.get_submodule(family(model.config.model_type).layers.rpartition(".")[0])
    norms = [each for each in above.children() if "Norm" in type(each).__name__]
    return norms[-1] if norms else None


def mlps(model: PreTrainedModel) -> list[MLP]:
    """The MLP projections of every layer, in order."""
    names = family(model.config.model_type)
    return [
        MLP(
            up=layer.get_submodule(names.up),
            gate=None if names.gate is None else layer.get_submodule(names.gate),
            down=layer.get_submodule(names.down),
        )
        for layer in layers(model)
    ]


def incoming(projection: nn.Module) -> Tensor:
    """Weight of `up` or `gate` as a (neuron, input) view, whichever way the module stores it."""
    return _out_in(projection)


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
