"""Every family with odd settings, through `check`; what is wrong, it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import small
import tiny
import torch
from test_lrp import Squared
from transformers import AutoModelForCausalLM, PretrainedConfig

from sparc3.__main__ import main
from sparc3.base.errors import InputError
from sparc3.base.params import Model
from sparc3.commands import check
from sparc3.model import families, loading

# Wherever a family's config has them; all have no token for padding.
ODD: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY + 14,  # padded beyond the tokenizer
    "head_dim": 6,  # of a hidden size of 16 and 4 heads
    "sliding_window": 3,
    "use_sliding_window": True,
    "attention_bias": True,
    "mlp_bias": True,
    "use_bias": False,
    "use_qk_norm": False,
    "use_parallel_residual": False,
    "attn_logit_softcapping": None,
    "pad_token_id": None,
}


def odd(family: str) -> PretrainedConfig:
    config = tiny.CONFIGS[family]()
    for key, value in ODD.items():
        if hasattr(config, key) and not (key == "pad_token_id" and family == "opt"):
            setattr(config, key, value)
    config.tie_word_embeddings = not config.tie_word_embeddings
    return type(config)(**config.to_diff_dict())


def write(folder: Path, family: str, dtype: torch.dtype) -> None:
    """A model with those settings, in several files, and its tokenizer."""
    small.write_model(folder, family)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    config = odd(family)
    model: Any = AutoModelForCausalLM.from_config(config)
    for parameter in model.requires_grad_(False).parameters():
        parameter.normal_(0, 0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size="4KB")
    assert (folder / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_family_with_odd_settings_can_be_trusted(family, dtype, tmp_path, capsys):
    write(tmp_path, family, loading.DTYPES[dtype])
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["vocab_size"] == tiny.VOCABULARY + 14
    check.run(tmp_path, dtype)
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line[:6] for line in lines] == ["OK    "] * 4
    assert f"{tiny.LAYERS} layers x {tiny.WIDTH} neurons in torch.{dtype}" in lines[0]
    assert last == "The numbers can be trusted."


def test_what_is_wrong_is_said_and_what_can_be_trusted_all_the_same(tmp_path, monkeypatch, capsys):
    """An activation that no rule knows: nothing but LRP depends on it."""
    small.write_model(tmp_path)
    own = loading.load

    def with_squares(spec: Model) -> Any:
        model: Any = own(spec)
        for layer in families.layers(model):
            layer.mlp.act_fn = Squared()  # pyright: ignore[reportAttributeAccessIssue]
        return model

    monkeypatch.setattr(loading, "load", with_squares)
    assert main(["check", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert (
        "WRONG rules of relevance: lrp: no rule for a layer of type Squared (layers.0" in said.out
    )
    assert "OK    pruning" in said.out
    assert said.err.endswith("cannot be trusted; all that does without lrp and lrp-abs can\n")


def test_an_mlp_unlike_the_others_is_named():
    model = tiny.model("llama")
    families.mlps(model)[2].down.weight = torch.nn.Parameter(torch.zeros(16, 20))
    with pytest.raises(InputError, match="layer 2 has an MLP unlike that of layer 0"):
        check.structure(model)


def test_relevance_that_is_lost_and_pruning_that_changes_nothing_are_seen(monkeypatch):
    model = tiny.model("llama")
    monkeypatch.setattr(check, "_tolerance", lambda model: 1e-12)
    with pytest.raises(InputError, match="of it is lost; take gradient"):
        check.conserved(model)
    for mlp in families.mlps(model):
        families.outgoing(mlp.down).zero_()
    with pytest.raises(InputError, match="it changes no logits"):
        check.removed(model)
