"""A checkpoint: a model's folder, seen through before anything of it is loaded.

Importing this takes neither torch nor transformers.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tokenizers import Tokenizer

from sparc3.base.errors import InputError
from sparc3.base.secrets import first_line
from sparc3.model.families import context, family

POINTER = b"version https://git-lfs.github.com/"
NAME = "name a folder with config.json, safetensors and tokenizer.json"
AGAIN = "get it again"
PLAIN = "name the model that it was made from, in float32, bfloat16 or float16"
FLOATING = ("F64", "F32", "F16", "BF16")
WEIGHTS = "model.safetensors"
TERMS = ("LICEN[CS]E*", "NOTICE*", "*TERMS*", "USE_POLICY*")  # files that go where weights go
ORIGIN = "sparc3-origin.json"  # in the folder of a model that was given: what it was made from


def refusal(key: str, path: object, reason: str, remedy: str = NAME) -> InputError:
    """What is wrong with a model's folder, which `key` of params names."""
    return InputError(f"{key}: cannot load {path} ({reason}); {remedy}")


def here(path: str) -> str:
    """`path`, which is model.path; InputError unless it is a folder."""
    if not Path(path).is_dir():
        raise InputError(f"model.path: {path} is no folder; run python -m sparc3 fetch, or {NAME}")
    return path


@contextmanager
def reading(key: str, path: str, remedy: str = NAME) -> Iterator[Path]:
    """The folder of a model; within, whatever a library says of it becomes one line.

    Only what libraries make of the files goes there. InputError: also a Git LFS pointer in place
    of a file.
    """
    for file in sorted(Path(path).glob("*")):
        if file.is_file() and file.open("rb").read(len(POINTER)) == POINTER:
            reason = f"{file.name} is a Git LFS pointer and not the file"
            raise refusal(key, path, reason, f"run git lfs pull there, or {AGAIN}")
    try:
        yield Path(path)
    except InputError:
        raise
    except Exception as error:  # tokenizers has no narrower one; transformers has any
        raise refusal(key, path, f"{type(error).__name__}: {first_line(error)}", remedy) from error


def require_whole(key: str, path: str) -> dict[str, Any]:
    """config.json of a folder that has all weights, as whole safetensors of floating point.

    InputError, naming the file: one that is missing, pickled, cut short or longer than it says;
    quantised weights.
    """
    with reading(key, path, f"{AGAIN}, or {NAME}") as folder:
        config = _config(key, folder)
        names = [WEIGHTS]
        if not (folder / WEIGHTS).exists():
            index = folder / f"{WEIGHTS}.index.json"
            if not index.exists():
                pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt*")])
                other = f", but {pickled[0].name}, and no pickle is loaded" if pickled else ""
                remedy = "save it by save_pretrained, or take a commit that has safetensors"
                raise refusal(key, path, f"no safetensors{other}", remedy)
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        for name in names:
            if not (folder / name).exists():
                raise refusal(key, path, f"{name} is missing, which its index names", AGAIN)
            _require_floating(key, folder / name)
    return config


def language_model(key: str, path: str) -> dict[str, Any]:
    """config.json of a known family's language model, for inspection.

    InputError, naming the file and its key: of another family, a mixture of experts, within a model
    of more than texts, without its context, quantised.
    """
    with reading(key, path) as folder:
        config = _config(key, folder)
    inner = config.get("text_config")
    if isinstance(inner, dict):
        kind = f"{config.get('model_type')!r} around a language model, {inner.get('model_type')!r}"
        remedy = "name a folder of the language model alone"
        raise refusal(key, path, f"config.json is of {kind}", remedy)
    for name, value in config.items():
        if "experts" in name and isinstance(value, int) and value > 1:
            reason = f"it is a mixture of experts: config.json has {name}: {value}"
            remedy = "name a dense model: neurons that only some texts pass are not handled yet"
            raise refusal(key, path, reason, remedy)
    family(config.get("model_type"), f"{key}: {path}/config.json")
    longest = context(config)
    if not isinstance(longest, int) or longest < 2:
        reason = "config.json has no number max_position_embeddings"
        raise refusal(key, path, reason, "add the longest text, in tokens, that it was trained on")
    return config


def require_vocabulary(key: str, path: str, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """InputError if a text may have a token that the model has no embedding of.

    Gemma 3 has one for images, which no text has: added tokens do not count.
    """
    added = tokenizer.get_added_tokens_decoder()
    last = max((i for i in tokenizer.get_vocab(False).values() if i not in added), default=0)
    if last >= config.get("vocab_size", last + 1):
        reason = f"its tokenizer has a token {last}, and vocab_size is {config['vocab_size']}"
        raise refusal(key, path, reason, "get tokenizer and weights from one place")


def front(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What a tokenizer puts before a text."""
    tokenizer.no_padding()
    plain, whole = (tokenizer.encode("1", add_special_tokens=each).ids for each in (False, True))
    places = range(len(whole) - len(plain) + 1)
    return tuple(whole[: next(n for n in places if whole[n : n + len(plain)] == plain)])


def _config(key: str, folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.exists():
        raise refusal(key, folder, "no config.json")
    config = json.loads(file.read_bytes())
    if not isinstance(config, dict):
        raise refusal(key, folder, "config.json is no JSON object", AGAIN)
    for name in ("quantization_config", "compression_config"):
        if config.get(name):
            raise refusal(key, folder, f"it is quantised: config.json has {name}", PLAIN)
    return config


def _require_floating(key: str, file: Path) -> None:
    """InputError for a damaged file of safetensors, or one with weights that are no floats."""
    with reading(key, str(file), AGAIN), safe_open(file, framework="numpy") as stream:
        kinds = {name: stream.get_slice(name).get_dtype() for name in stream.keys()}  # noqa: SIM118
    for name, kind in kinds.items():
        if "weight" in name and kind not in FLOATING:
            raise refusal(key, file, f"it is quantised: {name} is of type {kind}", PLAIN)
