"""Load a language model and its tokenizer; where each family keeps its MLP neurons.

A **neuron** is one coordinate of the vector that enters an MLP's output projection, in gated
(LLaMA) and plain (GPT-2) MLPs alike. A new family is one row of FAMILIES and, for relevance, one
row of `sparc3.lrp.RULES`.
"""

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from sparc3.errors import InputError


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

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


SHORT = 64  # tokens up to which a CPU's flash attention takes longer than the plain one


class MLP(NamedTuple):
    """The projections of one layer's MLP; `down` is the output projection."""

    up: nn.Module
    gate: nn.Module | None
    down: nn.Module


def family(model_type: str) -> Family:
    """The row of FAMILIES; InputError for an unknown family."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"model: family {model_type!r} is not known; choose one of: {known}")
    return FAMILIES[model_type]


def load(
    path: str, revision: str | None = None, dtype: str = "float32", device: str = "cpu"
) -> PreTrainedModel:
    """Load a causal language model for inspection: eval mode, frozen parameters, sdpa attention.

    `path` is a local folder or owner/name on the hub, `revision` a commit on the hub. `dtype` is
    one of DTYPES. `device` is a torch device, or "auto" to spread the layers over all devices.

    InputError: unknown dtype or family, or nothing that transformers can load at `path`.
    """
    prefer_onednn()
    if dtype not in DTYPES:
        raise InputError(f"model.dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
        family(config.model_type)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            config=config,
            dtype=DTYPES[dtype],
            attn_implementation="sdpa",
            device_map="auto" if device == "auto" else None,
        )
    except (OSError, ValueError) as error:
        raise _cannot_load(path, revision, error) from None
    model = cast(PreTrainedModel, model)
    if device != "auto":
        nn.Module.to(model, torch.device(device))
    return model.eval().requires_grad_(False)


def prefer_onednn() -> None:
    """Have float32 products on an x86 processor made by oneDNN, which is faster than MKL on few
    rows, where it makes them in float32.

    The setting's own meaning is that products may be of bfloat16. Of float32 matrices oneDNN makes
    such products with AMX, so there nothing is set.
    """
    known = torch.cpu.get_capabilities()
    rounds = known.get("amx_tile") or known.get("avx10_2")
    if known.get("architecture") == "x86_64" and not rounds:
        cast(Any, torch.backends.mkldnn).matmul.fp32_precision = "bf16"


def tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise _cannot_load(path, revision, error) from None


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, begun as the model was trained to read texts, and left open.

    LLaMA 3, Mistral, Gemma and OPT were trained with a token in front (<bos>), SmolLM2, Qwen and
    GPT-2 without: their tokenizers know. Gemma 3 270M without it has a perplexity of 110 instead
    of 17.
    """
    before = front(tokenizer)
    plain = tokenizer(list(texts), add_special_tokens=False).input_ids
    return [[*before, *ids] for ids in plain]


def encode_pieces(tokenizer: Any, pieces: Sequence[str]) -> list[list[int]]:
    """Token ids of the pieces of one text, which is tokenised as a whole, as `encode` does.

    A token belongs to the piece that its first character is in.
    """
    found = tokenizer("".join(pieces), add_special_tokens=False, return_offsets_mapping=True)
    begins = [begin for begin, _ in found.offset_mapping]
    ends = [bisect_left(begins, end) for end in accumulate(map(len, pieces))]
    ids = [found.input_ids[begin:end] for begin, end in pairwise([0, *ends])]
    return [[*front(tokenizer), *ids[0]], *ids[1:]]


@cache
def front(tokenizer: Any) -> tuple[int, ...]:
    """What a tokenizer puts before a text."""
    plain, whole = (
        tokenizer(["1"], add_special_tokens=special).input_ids[0] for special in (False, True)
    )
    places = range(len(whole) - len(plain) + 1)
    return tuple(whole[: next(n for n in places if whole[n : n + len(plain)] == plain)])


def body(model: PreTrainedModel) -> nn.Module:
    """The transformer: ids or embeddings to the last hidden state."""
    return model.get_submodule(family(model.config.model_type).body)


def attention(ids: Tensor) -> AbstractContextManager[object]:
    """Within it attention uses the kernel that is faster for a batch of token ids."""
    plain = ids.device.type == "cpu" and ids.shape[1] <= SHORT
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (..., vocabulary) of the body's last hidden state (..., hidden), any positions."""
    values = cast(nn.Module, model.get_output_embeddings())(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return values if cap is None else torch.tanh(values / cap) * cap


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer's blocks, in order."""
    return list(model.get_submodule(family(model.config.model_type).layers).children())


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
    return _linear_weight(projection)


def outgoing(projection: nn.Module) -> Tensor:
    """Weight of `down` as an (output, neuron) view, whichever way the module stores it."""
    return _linear_weight(projection)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: the device of the input embeddings."""
    return model.get_input_embeddings().get_parameter("weight").device


def num_layers(model: PreTrainedModel) -> int:
    return len(mlps(model))


def width(model: PreTrainedModel) -> int:
    """Neurons per layer (the same in every layer of the known families)."""
    return outgoing(mlps(model)[0].down).shape[1]


def _linear_weight(projection: nn.Module) -> Tensor:
    weight = projection.get_parameter("weight")
    return weight.T if isinstance(projection, Conv1D) else weight  # Conv1D stores (in, out)


def _cannot_load(path: str, revision: str | None, error: Exception) -> InputError:
    reason = str(error).strip().split("\n")[0]
    where = "the folder" if Path(path).is_dir() else "the hub"
    at = "" if revision is None else f" at revision {revision}"
    return InputError(
        f"model.path: cannot load {path}{at} from {where} ({reason}); "
        "give a folder with config.json and safetensors, or owner/name on the hub"
    )
