"""Convert: a GGUF file to a Hugging Face folder, tensor by tensor, so that any size fits.

transformers can read GGUF itself, but holds the whole model in float32 while it does. Its tables of
names and of layouts are used here, one tensor at a time: in memory are one shard of the result and
one tensor in float32. The same bytes on every run and machine.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sparc3.base.errors import InputError
from sparc3.base.files import read_json, write_json, write_text
from sparc3.base.secrets import first_line

SHARD = 2**30  # bytes of weights in one file, at most (or a single tensor)


def convert(gguf: Path, folder: Path, dtype: str = "float32", shard: int = SHARD) -> None:
    """Weights dequantised to `dtype` as safetensors, configuration and tokenizer.

    `folder` may exist; it should be empty. InputError: no GGUF of a family that is known, or one
    whose tensors are not those of the model that its header describes.
    """
    import torch  # here, so that a fetch with nothing to do takes a second
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from sparc3.model.families import family
    from sparc3.model.loading import DTYPES, LOCAL

    if not gguf.is_file():
        raise InputError(f"{gguf}: file not found; give the path of a GGUF file")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, **LOCAL}
    try:
        config = AutoConfig.from_pretrained(**source)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{gguf}: not a GGUF file that transformers reads ({first_line(error)})"
        ) from None
    family(config.model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    folder.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(gguf)
    _write_weights(gguf, reader, model, folder, shard)
    model.config.architectures, model.config.dtype = [type(model).__name__], DTYPES[dtype]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    _write_tokenizer(AutoTokenizer.from_pretrained(**source), reader, folder)


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

    known = [tensor for tensor in reader.tensors if tensor.name in names]
    return {names[tensor.name]: partial(values, tensor) for tensor in known}


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
