"""Conversion of GGUF, tensor by tensor, against transformers' own reading of the same file."""

import json
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
from transformers import AutoModelForCausalLM, LlamaForCausalLM

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
    assert loading < 1.2 * 2 * parameters
