"""Load a language model and its tokenizer; texts as tokens, begun as the model was trained."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

from sparc3.base import params
from sparc3.base.errors import InputError
from sparc3.model.families import family

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
NAME = "name a folder with config.json, safetensors and tokenizer.json"
ROUNDED = 2**-16  # relative error of a product: 2^-22 in float32, 2^-11 in TF32, 2^-8 in bfloat16
SHORT = 64  # tokens up to which a CPU's flash attention takes longer than the plain one


def load(spec: params.Model, device: str | None = None) -> PreTrainedModel:
    """Load a causal language model for inspection: eval mode, frozen parameters, sdpa attention.

    `device`, a torch device or "auto" to spread the layers over all devices, goes before that of
    `spec`. Nothing is asked of the hub, and no code or pickle of the folder is run.

    InputError: unknown family, or nothing that transformers can load at `spec.path`.
    """
    prefer_onednn()
    device = device or spec.device
    with _reading(spec.path) as folder:
        config = AutoConfig.from_pretrained(folder, **LOCAL)
        family(config.model_type)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            **LOCAL,
            config=config,
            use_safetensors=True,
            dtype=DTYPES[spec.dtype],
            attn_implementation="sdpa",
            device_map="auto" if device == "auto" else None,
        )
    model = cast(PreTrainedModel, model)
    if device != "auto":
        nn.Module.to(model, torch.device(device))
    return model.eval().requires_grad_(False)


def tokenizer(spec: params.Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer. InputError: nothing that transformers can load at `spec.path`."""
    with _reading(spec.path) as folder:
        return AutoTokenizer.from_pretrained(folder, **LOCAL)


@contextmanager
def _reading(path: str) -> Iterator[str]:
    """The model's folder; within, what transformers says of it becomes one line."""
    if not Path(path).is_dir():
        raise InputError(f"model.path: {path} is no folder; run python -m sparc3 fetch, or {NAME}")
    try:
        yield path
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"model.path: cannot load {path} ({reason}); {NAME}") from None


def prefer_onednn() -> None:
    """Have float32 products on an x86 processor made by oneDNN, which is faster than MKL on few
    rows, where it makes them in float32.

    The setting's own meaning is that products may be of bfloat16. Some processors then make them
    so, of float32 matrices too: one product shows it, and there the setting stays as it was.
    """
    if torch.cpu.get_capabilities().get("architecture") != "x86_64":
        return
    matmul = cast(Any, torch.backends.mkldnn).matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 256, generator=draw), torch.randn(256, 256, generator=draw)
    exact = torch.mm(a.double(), b.double())
    error = (torch.mm(a, b).double() - exact).norm() / exact.norm()
    if error > ROUNDED:
        matmul.fp32_precision = before


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
    whole = tokenizer("".join(pieces), add_special_tokens=False, return_offsets_mapping=True)
    begins = [begin for begin, _ in whole.offset_mapping]
    ends = [bisect_left(begins, end) for end in accumulate(map(len, pieces))]
    ids = [whole.input_ids[begin:end] for begin, end in pairwise([0, *ends])]
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


def not_finite(model: PreTrainedModel) -> str:
    """What to do about logits or scores that are not finite, which depends on the model's dtype."""
    wider = {
        torch.float16: "use model.dtype float32 or bfloat16, or ",
        torch.bfloat16: "use model.dtype float32, or ",
    }
    return f"{wider.get(model.dtype, '')}leave the prompt out"


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: the device of the input embeddings."""
    return model.get_input_embeddings().get_parameter("weight").device
