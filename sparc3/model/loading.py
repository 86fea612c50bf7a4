"""Load a language model and its tokenizer; texts as tokens, begun as the model was trained."""

import math
import os
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from sparc3.base import params
from sparc3.base.errors import InputError
from sparc3.base.files import write_text
from sparc3.model import checkpoint
from sparc3.model.checkpoint import (
    here,
    language_model,
    reading,
    require_vocabulary,
    require_whole,
)
from sparc3.model.families import (
    EVERY_WEIGHT,
    attention_kind,
    body,
    context,
    logits,
    require_weights,
)

logging.disable_progress_bar()  # transformers 5 shows one for every model, however small
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
KEPT = (  # of a tokenizer's settings, those that its tokenizer.json leaves out
    "chat_template",
    "model_max_length",
    "model_input_names",
    "padding_side",
    "truncation_side",
    "clean_up_tokenization_spaces",
)
WIDER = {
    torch.float16: "use model.dtype float32 or bfloat16, or ",
    torch.bfloat16: "use model.dtype float32, or ",
}
ROUNDED = 2**-16  # relative error of a product: 2^-22 in float32, 2^-11 in TF32, 2^-8 in bfloat16
SHORT = 64  # tokens up to which a CPU's flash attention takes longer than the plain one


def load(spec: params.Model, device: str | None = None) -> PreTrainedModel:
    """Load a causal language model for inspection: eval mode, frozen parameters, sdpa attention
    (eager where `attention_kind` says so).

    From here on torch computes with `spec.threads` threads, whatever the environment says: sums
    are rounded otherwise with another number. None: as many as torch finds.

    `device`, a torch device or "auto" to spread the layers over all devices, goes before that of
    `spec`. Nothing is asked of the hub, and no code or pickle of the folder is run.

    InputError: unknown family, nothing that transformers can load at `spec.path`, weights that are
    not those of the configuration, more than the memory holds, or attention that is not what is
    computed here.
    """
    prefer_onednn()
    if spec.threads:
        torch.set_num_threads(spec.threads)
    device = device or spec.device
    config = language_model("model.path", here(spec.path))
    require_whole("model.path", spec.path)
    how: dict[str, Any] = {**EVERY_WEIGHT, "local_files_only": True, "dtype": DTYPES[spec.dtype]}
    how["attn_implementation"] = attention_kind(config)
    make: Any = AutoModelForCausalLM.from_pretrained
    with reading("model.path", spec.path) as folder:
        model: PreTrainedModel
        model, found = make(folder, device_map="meta", **how)  # of the files only what they hold
    require_weights(f"model.path: {spec.path}", found)
    _require_room(model, spec.path, device)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"model.device is {device}, and torch finds no such card; set it to cpu")
    model, _ = make(folder, device_map="auto" if device == "auto" else None, **how)
    if device != "auto":
        nn.Module.to(model, torch.device(device))
    model.eval().requires_grad_(False)
    _require_finite(model, spec.path)
    _require_attention(model, spec.path)
    return model


def memory(device: str) -> float:
    """Bytes that a model may take: what is free on a card, or on all of them for "auto"; without
    cards all of the machine's.
    """
    if torch.cuda.is_available() and device != "cpu":
        cards = range(torch.cuda.device_count()) if device == "auto" else [torch.device(device)]
        return sum(torch.cuda.mem_get_info(card)[0] for card in cards)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _require_room(model: PreTrainedModel, path: str, device: str) -> None:
    """InputError, with what would fit, for a model whose weights alone are larger than memory."""
    parameters, room = sum(p.numel() for p in model.parameters()), memory(device)
    size = model.dtype.itemsize
    if parameters * size <= room:
        return
    fitting = [
        f"model.dtype bfloat16, {2 * parameters / 1e9:.3g} GB" if 2 * parameters <= room else "",
        f"model.device auto over {math.ceil(parameters * size / room)} of these or more"
        if device.startswith("cuda")
        else "",
        f"a model of up to {room / size / 1e9:.2g} billion parameters",
    ]
    raise InputError(
        f"model.path: {path} takes {parameters * size / 1e9:.3g} GB in {model.dtype}, and "
        f"model.device {device} has {room / 1e9:.3g}; what would fit: "
        f"{', or '.join(filter(None, fitting))}"
    )


def _require_finite(model: PreTrainedModel, path: str) -> None:
    """InputError, with its name, for a weight that holds NaN or infinity."""
    for name, weight in model.named_parameters():
        if not weight.is_meta and not torch.stack(weight.aminmax()).isfinite().all():
            raise InputError(
                f"model.path: {path}: {name} holds values that are not finite; "
                f"{WIDER.get(model.dtype, '')}get the weights again"
            )


@torch.inference_mode()
def _require_attention(model: PreTrainedModel, path: str) -> None:
    """InputError unless a short text has the logits of eager attention, which knows all."""
    config, ids = model.config, short_text(model)
    with attention(ids):
        used = logits(model, body(model)(input_ids=ids, use_cache=False).last_hidden_state)
    model.set_attn_implementation("eager")
    eager = model(input_ids=ids, use_cache=False).logits
    model.set_attn_implementation(attention_kind(config.to_dict()))
    if not (eager.isfinite().all() and used.isfinite().all()):
        raise InputError(
            f"model.path: {path} gives a short text logits that are not finite; "
            f"{WIDER.get(model.dtype, '')}name another model"
        )
    used, eager = (values.float() - values.float().mean(-1, True) for values in (used, eager))
    if (used - eager).norm() > torch.finfo(model.dtype).eps ** 0.5 * eager.norm():
        usual = type(config)().to_dict()
        odd = [
            f"{key}: {value}"
            for key, value in config.to_dict().items()
            if "att" in key and isinstance(value, bool) and value != usual.get(key)
        ]
        raise InputError(
            f"model.path: {path} has other logits with the attention used here (sdpa) than with "
            f"its own (eager), by {', '.join(odd) or f'its model_type {config.model_type}'} in "
            "config.json, which sdpa does not know; take a model without"
        )


def short_text(model: PreTrainedModel) -> Tensor:
    """Token ids (1, token) to try a model with: longer than a small sliding window, or 8."""
    config = model.config
    window = getattr(config, "sliding_window", None) or 0
    length = int(min(window + 8, SHORT, context(config.to_dict())))
    return (torch.arange(1, length + 1) * 7919 % config.vocab_size)[None].to(input_device(model))


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer as tokenizer.json has it, with its special tokens, for transformers 4 and
    5, which calls its class by another name.
    """
    _of_file(tokenizer, tokenizer.backend_tokenizer).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    text = file.read_text(encoding="utf-8")
    write_text(file, text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))


def _of_file(like: Any, backend: Tokenizer) -> PreTrainedTokenizerFast:
    """`backend` with the special tokens and settings of another tokenizer.

    Under the name of another class, such as LlamaTokenizer, transformers 5 builds a tokenizer of
    its own from the vocabulary, which need not be this one: SmolLM2's lost every space.
    """
    kept = {name: getattr(like, name) for name in KEPT if getattr(like, name) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **like.special_tokens_map, **kept)


def tokenizer(spec: params.Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer. InputError: nothing that transformers can load at `spec.path`, or one
    with more tokens than the model.
    """
    config = language_model("model.path", here(spec.path))
    # Some of Mistral's split text wrongly, of which transformers warns for every large tokenizer.
    quiet = {} if "mistral" in config["model_type"] else {"fix_mistral_regex": False}
    with reading("model.path", spec.path) as folder:
        loaded = AutoTokenizer.from_pretrained(folder, **LOCAL, **quiet)
        file = folder / "tokenizer.json"
        if file.is_file() and type(loaded) is not PreTrainedTokenizerFast:
            loaded = _of_file(loaded, Tokenizer.from_file(str(file)))
        if isinstance(backend := getattr(loaded, "backend_tokenizer", None), Tokenizer):
            require_vocabulary("model.path", spec.path, backend, config)
        return loaded


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


def encode_sentences(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """As `encode`, with a token in front in any case, so that the first word of each is scored.

    Where the tokenizer puts none there, it is the one that stood between the documents a model was
    trained on: <|endoftext|> for GPT-2, Pythia, Qwen and SmolLM2, whose chat models call other
    tokens their first and last; else the tokenizer's first token, or last. InputError: it has none.
    """
    before = [] if front(tokenizer) else [between(tokenizer)]
    return [[*before, *ids] for ids in encode(tokenizer, texts)]


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
    return checkpoint.front(tokenizer.backend_tokenizer)


@cache
def between(tokenizer: Any) -> int:
    """The token that can stand before a sentence; InputError as in `encode_sentences`."""
    stood = tokenizer.get_vocab().get("<|endoftext|>")
    for token in (stood, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise InputError(
        "params: model.path: the tokenizer has no token to put in front of a sentence; give it a "
        "bos_token or an eos_token"
    )


def attention(ids: Tensor) -> AbstractContextManager[object]:
    """Within it attention uses the kernel that is faster for a batch of token ids."""
    plain = ids.device.type == "cpu" and ids.shape[1] <= SHORT
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def not_finite(model: PreTrainedModel) -> str:
    """What to do about logits or scores that are not finite, which depends on the model's dtype."""
    return f"{WIDER.get(model.dtype, '')}leave the prompt out"


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: the device of the input embeddings."""
    return model.get_input_embeddings().get_parameter("weight").device
