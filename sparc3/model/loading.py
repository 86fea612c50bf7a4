"""Load a language model and its tokenizer; texts as tokens, begun as the model was trained."""

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, cast

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

from sparc3.base.errors import InputError
from sparc3.model.families import family

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = 64  # tokens up to which a CPU's flash attention takes longer than the plain one


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


def attention(ids: Tensor) -> AbstractContextManager[object]:
    """Within it attention uses the kernel that is faster for a batch of token ids."""
    plain = ids.device.type == "cpu" and ids.shape[1] <= SHORT
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: the device of the input embeddings."""
    return model.get_input_embeddings().get_parameter("weight").device


def _cannot_load(path: str, revision: str | None, error: Exception) -> InputError:
    reason = str(error).strip().split("\n")[0]
    where = "the folder" if Path(path).is_dir() else "the hub"
    at = "" if revision is None else f" at revision {revision}"
    return InputError(
        f"model.path: cannot load {path}{at} from {where} ({reason}); "
        "give a folder with config.json and safetensors, or owner/name on the hub"
    )
