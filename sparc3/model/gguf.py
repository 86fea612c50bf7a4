"""Convert: a GGUF file to a Hugging Face folder, tensor by tensor, so that any size fits.

transformers can read GGUF itself, but holds the whole model in float32 while it does. Its tables of
names and of layouts are used here, one tensor at a time: in memory are one shard of the result and
one tensor in float32. The same bytes on every run and machine.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sparc3.base.errors import InputError
from sparc3.base.files import read_json, write_json, write_text
from sparc3.base.secrets import first_line

SHARD = 2**30  # bytes of weights in one file, at most (or a single tensor)


def convert(gguf: Path, folder: Path, dtype: str = "float32", shard: int = SHARD) -> None:
    """Weights dequantised to `dtype` as safetensors, configuration and tokenizer.

    `folder` may exist; it should be empty. InputError: transformers 5, no GGUF of a family that is
    known, one whose tensors are not those of the model that its header describes, or one with a key
    or a tensor that transformers' model has no place for.
    """
    import torch  # here, so that a fetch with nothing to do takes a second
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from sparc3.model.families import family
    from sparc3.model.loading import DTYPES, LOCAL

    if not gguf.is_file():
        raise InputError(f"{gguf}: file not found; give the path of a GGUF file")
    if int((found := version("transformers")).partition(".")[0]) > 4:
        problem = "its tables of GGUF are others than those that the conversion was checked with"
        remedy = "convert with transformers 4.57 (make env); the folder is read with either"
        raise InputError(f"{gguf}: transformers is {found}: {problem}; {remedy}")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, **LOCAL}
    try:
        config = AutoConfig.from_pretrained(**source)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise InputError(
            f"{gguf}: not a GGUF file that transformers reads ({first_line(error)})"
        ) from None
    family(config.model_type, str(gguf))
    reader = GGUFReader(gguf)
    _take_header(gguf, reader, config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(gguf, reader, model, folder, shard)
    model.config.architectures, model.config.dtype = [type(model).__name__], DTYPES[dtype]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    _write_tokenizer(AutoTokenizer.from_pretrained(**source), reader, folder)


# What a header says of the file and of the tokenizer; it does not change the model's function.
DESCRIPTION = ("GGUF.", "general.", "tokenizer.", "quantize.imatrix.")
# Keys that transformers does not read, and the value of its config with which they must agree.
AGREEING = {"rope.freq_base_swa": "rope_local_base_freq"} | dict.fromkeys(
    ("rope.dimension_count", "attention.key_length", "attention.value_length"), "head_dim"
)
# Without one of these transformers takes a number of its own.
NEEDED = (
    *("context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("attention.head_count", "attention.layer_norm_rms_epsilon"),
)
# What `_rope_scaling` reads, or what only kinds that it refuses depend on.
SCALING = {f"rope.scaling.{key}" for key in ("type", "factor", "original_context_length")}
FREQUENCIES = "rope_freqs.weight"  # by what llama.cpp divides the frequencies of LLaMA 3.1's RoPE
LLAMA_3 = {  # of every LLaMA from 3.1 on; `factor` is a model's own
    "rope_type": "llama3",
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def _refusal(gguf: Path, what: str) -> InputError:
    return InputError(
        f"{gguf}: {what} cannot be converted and may change what the model computes; "
        "fetch the model's safetensors from the hub instead"
    )


def _take_header(gguf: Path, reader: Any, config: Any) -> None:
    """Give the config its scaled RoPE; InputError for a key of the header that it ignores."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    values = {key: field.contents() for key, field in reader.fields.items()}
    architecture = values["general.architecture"]
    for name in NEEDED:
        if f"{architecture}.{name}" not in values:
            raise _refusal(gguf, f"a header without {architecture}.{name}")
    names = GGUF_CONFIG_MAPPING[architecture] | AGREEING
    made = {"head_dim": config.hidden_size // config.num_attention_heads, **config.to_dict()}
    for key, value in values.items():
        name = key.removeprefix(f"{architecture}.")
        understood = name in names and names[name] in made and made[names[name]] == value
        if not (understood or name in SCALING or key.startswith(DESCRIPTION)):
            raise _refusal(gguf, f"its header's {key} = {value!r:.40}")
    if made.get("query_pre_attn_scalar", made["head_dim"]) != made["head_dim"]:
        # Gemma 3's; transformers takes 256, which is in no header
        raise _refusal(gguf, f"its header's {architecture}.attention.key_length")
    kind = values.get(f"{architecture}.rope.scaling.type", "linear")
    factor = values.get(f"{architecture}.rope.scaling.factor", 1.0)
    if kind not in ("none", "linear"):
        raise _refusal(gguf, f"its header's {architecture}.rope.scaling.type = {kind!r}")
    if kind == "linear" and factor not in (0, 1):
        config.rope_scaling = {"rope_type": "linear", "factor": factor}
    for tensor in reader.tensors:
        if tensor.name == FREQUENCIES:
            _take_frequencies(gguf, tensor.data, config)


def _take_frequencies(gguf: Path, divisors: Any, config: Any) -> None:
    """Give the config LLaMA 3's scaled RoPE if it makes these divisors, else InputError."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain, _ = ROPE_INIT_FUNCTIONS["default"](config, "cpu")
    scaled = None
    if config.model_type == "llama" and config.rope_scaling is None:
        config.rope_scaling = {**LLAMA_3, "factor": float(divisors.max())}
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    if scaled is None or not np.allclose(plain / scaled, divisors, rtol=1e-4, atol=0):
        raise _refusal(gguf, f"its tensor {FREQUENCIES}")


def _write_tokenizer(tokenizer: Any, reader: Any, folder: Path) -> None:
    """The tokenizer with the header's special tokens, some of which transformers gets wrong."""
    from tokenizers import processors

    from sparc3.model.loading import front, save_tokenizer

    def header(name: str) -> Any:
        field = reader.fields.get(f"tokenizer.ggml.{name}")
        return None if field is None else field.contents()

    for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (number := header(f"{name}_token_id")) is not None:
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(int(number)))
    backend, wanted, begin = tokenizer.backend_tokenizer, header("add_bos_token"), front(tokenizer)
    if wanted is not None and not wanted and begin:
        backend.post_processor = None
    elif wanted and not begin and (bos := tokenizer.bos_token):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.bos_token_id)],
        )
    save_tokenizer(tokenizer, folder)


def _write_weights(gguf: Path, reader: Any, model: Any, folder: Path, shard: int) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    expected = dict(model.state_dict())
    for name in model._tied_weights_keys or [] if model.config.tie_word_embeddings else []:
        del expected[name]
    tensors = _tensors(gguf, reader, model)
    if odd := sorted(set(tensors) ^ set(expected)):
        raise InputError(
            f"{gguf}: tensor {odd[0]} is {'missing' if odd[0] in expected else 'none of its model'}"
            "; the file is incomplete, or of an architecture that is not known"
        )
    split = split_torch_state_dict_into_shards(
        {name: expected[name] for name in tensors}, max_shard_size=shard
    )
    for file, names in split.filename_to_tensors.items():
        held = {}
        for name in names:
            values, shape = tensors[name](), expected[name].shape
            if values.shape != shape:
                raise InputError(
                    f"{gguf}: tensor {name} has shape {tuple(values.shape)}; its header says "
                    f"{tuple(shape)}"
                )
            held[name] = values.to(expected[name].dtype).contiguous()
        save_file(held, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _tensors(gguf: Path, reader: Any, model: Any) -> dict[str, Callable[[], Any]]:
    """By their names in the model, in the file's order, what gives a tensor's float32 values."""
    import torch
    from gguf import dequantize
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
    )

    header = {**load_gguf_checkpoint(str(gguf)), "tensors": {}}  # GPT-2's processor puts one there
    architecture = str(reader.fields["general.architecture"].contents())
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=header["config"])
    names: Mapping[str, str] = get_gguf_hf_weights_map(model)

    def values(tensor: Any) -> Any:
        done = processor.process(
            weights=dequantize(tensor.data, tensor.tensor_type),
            name=tensor.name,
            tensor_key_mapping=names,
            parsed_parameters=header,
        )
        return torch.from_numpy(done.weights.copy())

    tensors = [tensor for tensor in reader.tensors if tensor.name != FREQUENCIES]
    for tensor in tensors:
        if tensor.name not in names:
            raise _refusal(gguf, f"its tensor {tensor.name}")
    return {names[tensor.name]: partial(values, tensor) for tensor in tensors}


def use_bpe_by_score(folder: Path) -> None:
    """Rewrite tokenizer.json, taken for a unigram model, as the byte-pair encoding that it is."""
    path = folder / "tokenizer.json"
    tree = read_json(path)
    tree["model"] = bpe_by_score(tree["model"]["vocab"])
    write_text(path, json.dumps(tree, ensure_ascii=False))


def bpe_by_score(pieces: list[tuple[str, float]]) -> dict[str, object]:
    """Byte-pair encoding from pieces with scores, as tokenizers stores it.

    SentencePiece's BPE merges the adjacent pair whose union has the highest score, so the merges
    are all ways to split a piece into two pieces, in the order of the pieces' scores.
    """
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    merges = []
    for piece, score in pieces:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((-score, ids[piece], ids[left], left, right))
    merges.sort()
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": ids,
        "merges": [[left, right] for *_, left, right in merges],
    }
