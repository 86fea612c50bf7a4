"""A circuit as an adapter: what plain peft makes of the folder, against the model pruned here."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from torch import Tensor
from transformers import PreTrainedModel

from sparc3.base.errors import InputError
from sparc3.base.files import read_json, write_json
from sparc3.circuits import adapter
from sparc3.circuits.ablate import pruned
from sparc3.circuits.adapter import CONFIG, WEIGHTS, read_adapter
from sparc3.circuits.circuit import INTACT, Circuit
from sparc3.model.families import width

IDS = torch.tensor(tiny.sequences([12, 12]))
# 0.25 is a power of two, so scaling activations rounds as scaling weights does.
ONE = replace(tiny.circuit(0, 2), scales=np.tile([0.0, 0.25], 12))
OTHER = tiny.circuit(1, 2, scale=0.5)


def write_adapter(
    folder: Path, circuit: Circuit, model: PreTrainedModel, base: str, revision: str | None = None
) -> None:
    kind = model.config.model_type
    adapter.write_adapter(folder, circuit, kind, width(model), base, revision)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def without(model: PreTrainedModel, *circuits: Circuit) -> Tensor:
    """Logits of the model in memory without some circuits, one within the other."""
    if not circuits:
        return logits(model)
    with pruned(model, circuits[0]):
        return without(model, *circuits[1:])


@pytest.fixture(params=tiny.CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_peft_gives_the_logits_of_the_model_in_memory(family: str, tmp_path: Path) -> None:
    """Loaded, switched off, and merged: bit for bit."""
    base = tiny.model(family)
    intact, expected = logits(base), without(base, ONE)
    assert (intact - expected).abs().max() > 1e-2
    write_adapter(tmp_path, ONE, base, "a/base")
    edited = PeftModel.from_pretrained(tiny.model(family), str(tmp_path))
    assert torch.equal(logits(edited), expected)
    with edited.disable_adapter():
        assert torch.equal(logits(edited), intact)
    assert torch.equal(logits(edited.merge_and_unload()), expected)


def test_two_adapters_multiply(family: str, tmp_path: Path) -> None:
    base = tiny.model(family)
    for name, circuit in (("one", ONE), ("other", OTHER)):
        write_adapter(tmp_path / name, circuit, base, "a/base")
    both: Any = PeftModel.from_pretrained(tiny.model(family), str(tmp_path / "one"), "one")
    both.load_adapter(str(tmp_path / "other"), "other")
    expected = without(base, ONE | OTHER)
    torch.testing.assert_close(expected, without(base, ONE, OTHER))
    both.base_model.set_adapter(["one", "other"])
    assert torch.equal(logits(both), expected)
    both.base_model.set_adapter("other")
    assert torch.equal(logits(both), without(base, OTHER))


def test_in_bfloat16_it_is_the_same_up_to_rounding(family: str, tmp_path: Path) -> None:
    base = tiny.model(family, torch.bfloat16)
    circuit = replace(ONE, scales=np.tile([0.0, 0.3], 12))
    write_adapter(tmp_path, circuit, base, "a/base")
    edited = PeftModel.from_pretrained(tiny.model(family, torch.bfloat16), str(tmp_path))
    expected, found = without(base, circuit).float(), logits(edited).float()
    assert (found - expected).norm() < 2**-6 * expected.norm()
    assert (logits(base).float() - expected).norm() > 2**-3 * expected.norm()


def test_unmerging_does_not_bring_a_pruned_neuron_back(tmp_path: Path) -> None:
    """What the card says of peft; should it change, the card may, too."""
    base = tiny.model("llama")
    write_adapter(tmp_path, tiny.circuit(1), base, "a/base")
    edited: Any = PeftModel.from_pretrained(base, str(tmp_path))
    edited.merge_adapter()
    with pytest.warns(UserWarning, match="inaccurate"):
        edited.unmerge_adapter()
    assert not torch.allclose(logits(edited), logits(tiny.model("llama")))


def test_the_files_hold_the_layers_of_the_circuit_alone(family: str, tmp_path: Path) -> None:
    base = tiny.model(family)
    write_adapter(tmp_path, ONE, base, "owner/name", "0123abc")
    config, tensors = read_json(tmp_path / CONFIG), load_file(tmp_path / WEIGHTS)
    assert {each.shape for each in tensors.values()} == {(1, width(base))}
    assert len(tensors) == len(config["target_modules"]) == 2
    modules = dict(base.named_modules())
    assert all(name in modules for name in config["target_modules"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "0123abc")
    projections = [type(modules[name]).__name__ for name in config["target_modules"]]
    assert config["fan_in_fan_out"] == (projections[0] == "Conv1D")


def test_what_is_written_is_read(family: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, ONE, tiny.model(family), "a/base")
    found = {row[:2]: row[3] for row in read_adapter(tmp_path).rows()}
    assert found == {row[:2]: row[3] for row in ONE.rows()}
    assert {row[:2]: row[3] for row in Circuit.load(tmp_path).rows()} == found


def test_what_cannot_be_a_circuit_is_refused(tmp_path: Path) -> None:
    model = tiny.model("llama")
    with pytest.raises(InputError, match="no neuron"):
        write_adapter(tmp_path, INTACT, model, "a/base")
    beyond = Circuit(np.array([3]), np.array([0]), np.zeros(1), np.zeros(1))
    with pytest.raises(InputError, match="layers 0 to 2"):
        beyond.save_adapter(tmp_path, model)
    assert list(tmp_path.iterdir()) == []
    write_adapter(tmp_path, replace(ONE, scales=ONE.scales + 2), model, "a/base")
    with pytest.raises(InputError, match="not from 0"):
        read_adapter(tmp_path)
    write_json(tmp_path / CONFIG, {"peft_type": "LORA"})
    with pytest.raises(InputError, match=r"'LORA'; a circuit is an IA3 adapter"):
        read_adapter(tmp_path)
