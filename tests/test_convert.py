"""Conversion of GGUF, tensor by tensor, against transformers' own reading of the same file."""

import json
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_fetch import LLAMA, add_tokenizer, write_gguf
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sparc3.base.errors import InputError
from sparc3.base.params import Model
from sparc3.model import loading
from sparc3.model.gguf import convert

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(file, LlamaForCausalLM(LLAMA).eval())
    return file


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def test_the_weights_are_those_that_transformers_reads(path: Path, tmp_path: Path) -> None:
    convert(path, tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    found = weights(tmp_path)
    assert set(found) == set(expected.state_dict()) - {"lm_head.weight"}
    for name, values in found.items():
        assert torch.equal(values, expected.state_dict()[name])


@pytest.mark.parametrize("most", [1, 20_000, 10**9])
def test_shards_hold_every_tensor_once_and_load_as_one_model(
    path: Path, tmp_path: Path, most: int
) -> None:
    convert(path, tmp_path, "bfloat16", most)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (most == 10**9)
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {file.name for file in files}
        held = {file.name: load_file(file) for file in files}
        assert all(name in held[file] for name, file in index["weight_map"].items())
        assert sum(len(tensors) for tensors in held.values()) == len(index["weight_map"])
        sizes = [sum(t.nbytes for t in tensors.values()) for tensors in held.values()]
        assert sum(sizes) == index["metadata"]["total_size"]
        assert all(
            size <= most or len(tensors) == 1
            for size, tensors in zip(sizes, held.values(), strict=True)
        )
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = loading.load(Model(path=str(tmp_path), dtype="bfloat16"))
    expected = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16
    )
    for name, values in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], values)


def test_what_is_no_gguf_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    with pytest.raises(InputError, match=r"model\.gguf: file not found"):
        convert(file, tmp_path / "out")
    file.write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"model\.gguf: not a GGUF file") as caught:
        convert(file, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_gguf_without_a_tensor_is_refused(tmp_path: Path) -> None:
    file, model = tmp_path / "model.gguf", LlamaForCausalLM(LLAMA)
    delattr(model.get_submodule("model.layers.1.mlp"), "up_proj")
    write_gguf(file, model)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        convert(file, tmp_path / "out")


# --- what the header says ------------------------------------------------------------------------


def rewrite(path: Path, new: Path, keys: dict[str, object], tensors: dict[str, np.ndarray]) -> None:
    """A copy of a GGUF with other values of keys, keys and tensors more."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(new, "llama")
    types = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    values = {key: field.contents() for key, field in reader.fields.items()} | keys
    for key, value in values.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            getattr(writer, f"add_{types[type(value)]}")(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_3_divisors(base: float, size: int, factor: float) -> np.ndarray:
    """As llama.cpp's converter computes rope_freqs.weight, for 8192 tokens and factors 1 and 4."""
    divisors = []
    for n in range(0, size, 2):
        wavelength = 2 * np.pi * base ** (n / size)
        smooth = (8192 / wavelength - 1) / 3
        middle = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(1 if wavelength < 2048 else factor if wavelength > 8192 else middle)
    return np.array(divisors, np.float32)


LONG = 131072  # tokens: llama3 is a scaling of longer contexts than 8192
DIVISORS = {"rope_freqs.weight": llama_3_divisors(500_000.0, 8, 32.0)}
SCALED: list[tuple[dict, dict, dict]] = [  # rope_scaling, keys, tensors
    ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}, {}),
    ({"rope_type": "linear", "factor": 4.0}, {"factor": 4.0}, {}),
    ({"rope_type": "default"}, {"type": "none", "factor": 4.0}, {}),
    (
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {},
        DIVISORS,
    ),
]


def test_transformers_5_is_refused_with_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("sparc3.model.gguf.version", lambda name: "5.24.0")
    refusal = (
        r"transformers is 5\.24\.0: .* transformers 4\.57 \(make env\); the folder is read with"
    )
    with pytest.raises(InputError, match=refusal):
        convert(tmp_path / "model.gguf", tmp_path / "out")


def long_llama(rope_scaling: dict | None) -> LlamaForCausalLM:
    torch.manual_seed(0)
    changes = {"max_position_embeddings": LONG, "rope_theta": 500_000.0, "head_dim": 8}
    tree = LLAMA.to_dict() | changes | {"rope_scaling": rope_scaling}
    return LlamaForCausalLM(LlamaConfig.from_dict(tree)).eval()


@pytest.mark.parametrize(("scaling", "keys", "tensors"), SCALED)
def test_a_scaled_rope_is_the_model_s(
    tmp_path: Path, scaling: dict, keys: dict, tensors: dict
) -> None:
    write_gguf(tmp_path / "plain.gguf", long_llama(None))
    file = tmp_path / "model.gguf"
    header = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
    rewrite(tmp_path / "plain.gguf", file, header, tensors)
    convert(file, tmp_path / "out")
    converted = loading.load(Model(path=str(tmp_path / "out")))
    ids = torch.randint(300, (1, 60), generator=torch.Generator().manual_seed(1))
    places = {"position_ids": 900 * torch.arange(60)[None]}  # where wavelengths of 8192 tokens tell
    with torch.no_grad():
        expected = long_llama(scaling)(ids, **places).logits
        plain = long_llama(None)(ids, **places).logits
        assert torch.allclose(converted(ids, **places).logits, expected, atol=1e-4)
    assert torch.allclose(plain, expected, atol=1e-3) == (scaling["rope_type"] == "default")


WRONG = DIVISORS["rope_freqs.weight"] + np.array([0, 0, 0.01, 0], np.float32)


@pytest.mark.parametrize(
    ("keys", "tensors", "named"),
    [
        ({"llama.rope.scaling.type": "yarn"}, {}, "llama.rope.scaling.type = 'yarn'"),
        ({"llama.rope.scaling.attn_factor": 2.0}, {}, "llama.rope.scaling.attn_factor = 2.0"),
        ({"llama.rope.scale_linear": 4.0}, {}, "llama.rope.scale_linear = 4.0"),
        ({"llama.rope.dimension_count": 4}, {}, r"q_proj\.weight has shape \(32, 32\)"),
        ({"llama.attention.key_length": 4}, {}, "llama.attention.key_length = 4"),
        ({"llama.attention.sliding_window": 8}, {}, "llama.attention.sliding_window = 8"),
        ({"llama.expert_count": 8}, {}, "llama.expert_count = 8"),
        ({"llama.final_logit_softcapping": 30.0}, {}, "llama.final_logit_softcapping = 30.0"),
        ({"split.count": 2}, {}, "split.count = 2"),
        ({"adapter.lora.alpha": 2.0}, {}, "adapter.lora.alpha"),
        ({}, {"rope_freqs.weight": WRONG}, "tensor rope_freqs.weight"),
        ({"llama.rope.scaling.factor": 2.0}, DIVISORS, "tensor rope_freqs.weight"),
        ({}, {"blk.0.attn_q.bias": np.ones(32, np.float32)}, "tensor blk.0.attn_q.bias"),
        ({}, {"blk.2.attn_norm.weight": np.ones(32, np.float32)}, "tensor blk.2.attn_norm.weight"),
        ({}, {"rope_factors_long.weight": WRONG}, "tensor rope_factors_long.weight"),
    ],
)
def test_what_would_change_the_function_is_refused_by_name(
    tmp_path: Path, keys: dict, tensors: dict, named: str
) -> None:
    write_gguf(tmp_path / "plain.gguf", long_llama(None))
    file = tmp_path / "model.gguf"
    rewrite(tmp_path / "plain.gguf", file, keys, tensors)
    with pytest.raises(InputError, match=named) as caught:
        convert(file, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_what_changes_nothing_is_accepted(path: Path, tmp_path: Path) -> None:
    keys = {
        "general.license": "mit",
        "general.sampling.top_k": 5,
        "tokenizer.ggml.pre": "default",
        "quantize.imatrix.file": "x",
        "llama.rope.dimension_count": 8,
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 1.0,
    }
    rewrite(path, tmp_path / "model.gguf", keys, {})
    convert(path, tmp_path / "plain")
    convert(tmp_path / "model.gguf", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["rope_scaling"] is None
    assert all(
        torch.equal(values, weights(tmp_path / "plain")[name])
        for name, values in weights(tmp_path / "out").items()
    )


USUAL = {
    "context_length": 64,
    "embedding_length": 512,
    "block_count": 1,
    "feed_forward_length": 48,
    "head_count": 2,
    "head_count_kv": 1,
    "layer_norm_rms_eps": 1e-6,
    "rope_freq_base": 1e6,
}


def header(architecture: str, tmp_path: Path, **keys: object) -> str | None:
    """What is said of a header alone, of an architecture's usual keys and others; without a key
    that is None.
    """
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
    add_tokenizer(writer, 300)
    for key, value in {**USUAL, **keys}.items():
        if value is not None:
            getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    try:
        convert(tmp_path / "model.gguf", tmp_path / "out")
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "key", [key for key in USUAL if key not in ("head_count_kv", "rope_freq_base")]
)
def test_a_header_without_a_size_is_refused(key: str, tmp_path: Path) -> None:
    """Transformers would take its own: a context of 2048, 32 layers, ..."""
    said = header("llama", tmp_path, **{key: None}) or ""
    name = {"head_count": "attention.head_count", "layer_norm_rms_eps": "attention.layer_norm_rms_"}
    assert f"a header without llama.{name.get(key, key)}" in said


def test_the_headers_of_other_families(tmp_path: Path) -> None:
    sizes = {"key_length": 256, "value_length": 256}
    accepted = "tensor .* is missing"  # in a header alone: nothing else is wrong with it
    assert re.search(accepted, header("qwen2", tmp_path) or "")
    assert re.search(accepted, header("qwen2", tmp_path, rope_dimension_count=256) or "")
    assert "rope.dimension_count = 128" in (
        header("qwen2", tmp_path, rope_dimension_count=128) or ""
    )
    # transformers does not read the size of Qwen 3's heads, of which it takes 128 for granted.
    assert "qwen3.attention.key_length = 256" in (header("qwen3", tmp_path, **sizes) or "")
    assert re.search(accepted, header("qwen3", tmp_path, key_length=128) or "")
    assert re.search(accepted, header("gemma3", tmp_path, sliding_window=8, **sizes) or "")
    # Gemma 3's queries are scaled by 256 in transformers, whatever the heads: not so in the 27B.
    assert "gemma3.attention.key_length" in (header("gemma3", tmp_path, key_length=128) or "")
    capped = header("gemma3", tmp_path, final_logit_softcapping=30.0, **sizes)
    assert "gemma3.final_logit_softcapping" in (capped or "")


def test_a_truncated_gguf_is_refused_in_one_line(path: Path, tmp_path: Path) -> None:
    blob, file = path.read_bytes(), tmp_path / "model.gguf"
    lengths = np.random.default_rng(0).integers(0, len(blob) - 100, 12).tolist()
    for length in [0, 3, 20, 30, 60, 1000, 6000, *lengths]:
        file.write_bytes(blob[:length])
        with pytest.raises(InputError, match=r"model\.gguf: ") as caught:
            convert(file, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("begun", [None, False, True])
def test_the_tokenizer_is_the_headers(begun: bool | None, tmp_path: Path) -> None:
    """Of a class that no version of transformers builds anew, with the header's special tokens."""
    file, model = tmp_path / "model.gguf", LlamaForCausalLM(LLAMA)
    write_gguf(file, model, bos=1, eos=2, begun=begun)
    convert(file, tmp_path / "out")
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    config = json.loads((tmp_path / "out/config.json").read_text())
    tokenizer = loading.tokenizer(Model(path=str(tmp_path / "out")))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert loading.front(tokenizer) == (() if begun is False else (1,))
    backend = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert tokenizer("hello  hell").input_ids == backend.encode("hello  hell").ids
    assert "token_type_ids" not in tokenizer("hello")  # plain transformers would refuse them


# --- a large model -----------------------------------------------------------------------------

LAYERS, HIDDEN, INNER, VOCABULARY = 22, 2048, 8192, 32000
PEAK = """
import sys
from pathlib import Path
{work}
lines = Path("/proc/self/status").read_text().splitlines()
print([int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")][0])
"""


def write_large(path: Path) -> int:
    """A llama GGUF of 1.5 billion parameters in 4 bits, all of them zero; returns how many."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(16)
    writer.add_head_count_kv(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    add_tokenizer(writer, VOCABULARY)
    block = {f"attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
    block |= {"ffn_up": (INNER, HIDDEN), "ffn_gate": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
    shapes = {"token_embd": (VOCABULARY, HIDDEN)}
    shapes |= {f"blk.{n}.{name}": shape for n in range(LAYERS) for name, shape in block.items()}
    kind = gguf.GGMLQuantizationType.Q4_0
    for name, shape in shapes.items():
        stored = gguf.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor(f"{name}.weight", np.zeros(stored, np.uint8), raw_dtype=kind)
    norms = [f"blk.{n}.{part}" for n in range(LAYERS) for part in ("attn_norm", "ffn_norm")]
    norms.append("output_norm")
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sum(rows * columns for rows, columns in shapes.values()) + len(norms) * HIDDEN


def peak(work: str, *arguments: Path) -> int:
    """Bytes that a fresh process has held at most while it does the work (Linux)."""
    command = [sys.executable, "-c", PEAK.format(work=work), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_large_model_takes_little_more_memory_than_its_weights(tmp_path: Path) -> None:
    file, folder = tmp_path / "large.gguf", tmp_path / "large"
    parameters = write_large(file)
    assert parameters > 1.5e9
    converting = peak(
        "from sparc3.model.gguf import convert\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), 'bfloat16')",
        file,
        folder,
    )
    file.unlink()
    assert converting < 1.2 * 2 * parameters
    assert len(list(folder.glob("*.safetensors"))) > 1
    loading = peak(
        "from sparc3.base.params import Model\n"
        "from sparc3.model import loading\n"
        "model = loading.load(Model(path=sys.argv[1], dtype='bfloat16'))\n"
        f"assert sum(p.numel() for p in model.parameters()) == {parameters}",
        folder,
    )
    # The weights are all read once, by the check of attention; the process itself takes 0.9 GB.
    assert loading - peak("from sparc3.model import loading", folder) < 1.05 * 2 * parameters
