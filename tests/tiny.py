"""Tiny random models of every family, built from configs: float32, frozen, eval mode."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)

from sparc3.circuits.circuit import Circuit
from sparc3.model.families import attention_kind

torch.set_num_threads(1)  # products this small only lose by threads

LAYERS, HIDDEN, WIDTH, VOCABULARY = 3, 16, 24, 50

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GATED: dict[str, Any] = {
    **_COMMON,
    "intermediate_size": WIDTH,
    "num_key_value_heads": 2,
}  # grouped queries

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_GATED, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_GATED, sliding_window=5),
    "qwen2": lambda: Qwen2Config(**_GATED),
    "qwen3": lambda: Qwen3Config(**_GATED, head_dim=8),
    "gemma3_text": lambda: Gemma3TextConfig(
        **_GATED,
        head_dim=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gemma2": lambda: Gemma2Config(
        **_GATED, head_dim=8, sliding_window=5, query_pre_attn_scalar=8,
        final_logit_softcapping=30.0, attn_logit_softcapping=5.0,
    ),
    "olmo2": lambda: Olmo2Config(**_GATED),
    "granite": lambda: GraniteConfig(
        **_GATED, embedding_multiplier=3.0, attention_multiplier=0.4, residual_multiplier=0.5,
        logits_scaling=2.0, mlp_bias=True,
    ),
    "cohere": lambda: CohereConfig(**_GATED, logit_scale=0.5, use_qk_norm=True),
    "phi3": lambda: Phi3Config(**_GATED, pad_token_id=0, sliding_window=5),
    "starcoder2": lambda: Starcoder2Config(**_GATED, sliding_window=5),
    "gpt_neox": lambda: GPTNeoXConfig(**_COMMON, intermediate_size=WIDTH),
    "opt": lambda: OPTConfig(
        **_COMMON, ffn_dim=WIDTH, word_embed_proj_dim=HIDDEN, dropout=0.1, pad_token_id=1
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_inner=WIDTH,
        n_positions=64,
    ),
}  # fmt: skip

# One of each kind, for what depends on no more than that: a window, a cap and eager attention, one
# module for two projections, scaled logits, plain MLPs with and without biases.
KINDS = ("llama", "mistral", "gemma2", "gemma3_text", "phi3", "granite", "opt", "gpt2", "gpt_neox")


def model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model with weights, biases and norms all random, so that no term is zero by accident."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    kind = attention_kind(config.to_dict())
    built = AutoModelForCausalLM.from_config(config, attn_implementation=kind)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            spread = 0.3 if parameter.dim() > 1 else 0.2
            parameter.normal_(0, spread)
            if "norm" in name or "ln_" in name:
                parameter.add_(0 if family.startswith("gemma") or "bias" in name else 1)
    built.tie_weights()
    return built.to(dtype).eval().requires_grad_(False)


def sequences(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random token ids of the given lengths."""
    torch.manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,)).tolist() for length in lengths]


def circuit(*layers: int, scale: float = 0.0) -> Circuit:
    """Every second neuron of each of `layers`: enough to be felt."""
    neurons = np.arange(0, WIDTH, 2)
    count = len(layers) * len(neurons)
    return Circuit(
        np.repeat(np.array(layers, np.int64), len(neurons)),
        np.tile(neurons, len(layers)),
        -np.linspace(1, 0.1, count),
        np.full(count, scale),
    )
