"""Every family's table row: the neurons are where the table says, in the right orientation."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sparc3.base.errors import InputError
from sparc3.base.params import Model
from sparc3.model import families, loading

ROOT = Path(__file__).parent.parent
PLAIN = ("opt", "gpt2", "gpt_neox", "starcoder2")
FAMILIES = pytest.mark.parametrize("family", tiny.CONFIGS)


def test_tiny_models_cover_the_table():
    assert set(tiny.CONFIGS) == set(families.FAMILIES)


def test_the_page_of_models_has_every_family():
    page = (ROOT / "docs/models.md").read_text()
    assert set(re.findall(r"^\| [^|]+ \| `(\w+)` \|", page, re.M)) == {
        "model_type",  # the column's title
        *families.FAMILIES,
    }


@FAMILIES
def test_shapes(family):
    model = tiny.model(family)
    assert families.num_layers(model) == tiny.LAYERS
    assert families.width(model) == tiny.WIDTH
    for mlp in families.mlps(model):
        assert families.incoming(mlp.up).shape == (tiny.WIDTH, tiny.HIDDEN)
        assert families.outgoing(mlp.down).shape == (tiny.HIDDEN, tiny.WIDTH)
        assert (mlp.gate is None) == (family in PLAIN)
        if mlp.gate is not None:
            assert families.incoming(mlp.gate).shape == (tiny.WIDTH, tiny.HIDDEN)
    path = families.FAMILIES[family].layers
    assert list(model.get_submodule(path).children()) == families.layers(model)


@FAMILIES
def test_weight_views_are_what_the_modules_compute(family):
    for mlp in families.mlps(tiny.model(family)):
        x, h = torch.randn(5, tiny.HIDDEN), torch.randn(5, tiny.WIDTH)
        for part in (mlp.up, mlp.gate or mlp.up):
            zero = families.bias(part)
            found = part.module(x)[:, part.of] - (0 if zero is None else zero)
            torch.testing.assert_close(found, x @ families.incoming(part).T)
        zero = mlp.down(torch.zeros_like(h))
        torch.testing.assert_close(mlp.down(h) - zero, h @ families.outgoing(mlp.down).T)


@FAMILIES
def test_removing_neurons_is_zeroing_their_coordinates(family):
    """Zero the column of `down`, the rows of `up` and `gate`, or h itself: the same logits."""
    ids = torch.tensor(tiny.sequences([9]))
    layer, neurons = 1, [2, 5, 11]

    ablated = tiny.model(family)
    down = families.mlps(ablated)[layer].down

    def zero(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        keep = torch.ones(tiny.WIDTH)
        keep[neurons] = 0
        return (args[0] * keep,)

    down.register_forward_pre_hook(zero)

    column, everything = tiny.model(family), tiny.model(family)
    for model in (column, everything):
        families.outgoing(families.mlps(model)[layer].down)[:, neurons] = 0
    mlp = families.mlps(everything)[layer]
    for part in (mlp.up, mlp.gate):
        if part is not None:
            families.incoming(part)[neurons] = 0
            bias = families.bias(part)
            if bias is not None:
                bias[neurons] = 0

    expected = ablated(ids).logits
    torch.testing.assert_close(column(ids).logits, expected)
    torch.testing.assert_close(everything(ids).logits, expected)
    assert not torch.allclose(tiny.model(family)(ids).logits, expected, atol=1e-4)


@FAMILIES
def test_body_and_logits_are_the_models_own(family):
    model = tiny.model(family)
    ids = torch.tensor(tiny.sequences([9, 9]))
    hidden = families.body(model)(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(families.logits(model, hidden), model(ids).logits)
    torch.testing.assert_close(families.logits(model, hidden[:, -1]), model(ids).logits[:, -1])


def test_logits_apply_the_soft_cap():
    model = tiny.model("gemma3_text")
    model.config.final_logit_softcapping = 0.5
    ids = torch.tensor(tiny.sequences([9]))
    hidden = families.body(model)(input_ids=ids, use_cache=False).last_hidden_state
    logits = families.logits(model, hidden)
    torch.testing.assert_close(logits, model(ids).logits)
    assert logits.abs().max() <= 0.5


@FAMILIES
def test_load_from_a_folder(family, tmp_path):
    saved = tiny.model(family)
    saved.save_pretrained(tmp_path)
    ids = torch.tensor(tiny.sequences([9]))

    model = loading.load(Model(path=str(tmp_path)))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == ("eager" if family == "gemma2" else "sdpa")
    torch.testing.assert_close(model(ids).logits, saved(ids).logits)

    half = loading.load(Model(path=str(tmp_path), dtype="bfloat16"))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def untied(folder: Path) -> dict[str, torch.Tensor]:
    """A model with a head of its own, saved; its weights, to be damaged and saved again."""
    config = tiny.CONFIGS["llama"]()
    config.tie_word_embeddings = False
    LlamaForCausalLM(config).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"},
            r"lm_head\.weight is missing; get",
        ),
        (
            lambda w: {k: v for k, v in w.items() if ".layers.1." not in k},
            r"model\.layers\.1\.input_layernorm\.weight and 8 more are missing; get",
        ),
        (
            lambda w: {f"module.{k}": v for k, v in w.items()},
            r"lm_head\.weight and 29 more are missing; module\.lm_head\.weight and 29 more are not",
        ),
        (
            lambda w: w | {"model.norm.weight": torch.ones(3)},
            r"model\.norm\.weight is of another shape; get",
        ),
        (
            lambda w: w | {"model.layers.3.mlp.up_proj.weight": torch.ones(24, 16)},
            r"model\.layers\.3\.mlp\.up_proj\.weight is not the model's; get",
        ),
    ],
)
def test_weights_that_are_not_the_configurations_are_refused_by_name(damage, message, tmp_path):
    weights = untied(tmp_path)
    loading.load(Model(path=str(tmp_path)))
    save_file(damage(weights), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=message) as caught:
        loading.load(Model(path=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_configuration_deeper_than_the_file_is_refused(tmp_path):
    tiny.model("gpt2").save_pretrained(tmp_path)
    change_config(tmp_path, n_layer=4)
    with pytest.raises(InputError, match=r"transformer\.h\.3\.attn\.c_attn\.bias and 11 more"):
        loading.load(Model(path=str(tmp_path)))


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_body_alone_with_a_tied_head_is_the_whole_model(family, tmp_path):
    """GPT-2's own checkpoint is such a one: its names lack the prefix, and it has no head."""
    model = tiny.model(family)
    families.body(model).save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    ids = torch.tensor(tiny.sequences([9]))
    change_config(tmp_path, architectures=None)
    torch.testing.assert_close(
        loading.load(Model(path=str(tmp_path)))(ids).logits, model(ids).logits
    )


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("switch", "value"),
    [("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False)],
)
def test_a_switch_that_sdpa_does_not_know_is_refused_by_name(switch, value, dtype, tmp_path):
    """transformers 4's does not, that of 5 does: there the logits are the same, and it is taken."""
    tiny.model("gpt2").save_pretrained(tmp_path)
    loading.load(Model(path=str(tmp_path), dtype=dtype))
    change_config(tmp_path, **{switch: value})
    ids = torch.tensor(tiny.sequences([9]))
    eager, sdpa = (
        GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation=kind)(ids).logits
        for kind in ("eager", "sdpa")
    )
    if torch.allclose(eager, sdpa, atol=1e-4):
        assert int(transformers.__version__[0]) >= 5
        loading.load(Model(path=str(tmp_path), dtype=dtype))
        return
    with pytest.raises(InputError, match=rf"\(eager\), by {switch}: {value} in config"):
        loading.load(Model(path=str(tmp_path), dtype=dtype))


@FAMILIES
def test_logits_of_our_path_that_are_not_the_models_are_refused(family, monkeypatch, tmp_path):
    """Whatever the reason: attention, another scale of the logits, a layer that is left out."""
    tiny.model(family).save_pretrained(tmp_path)
    own = families.logits
    monkeypatch.setattr(loading, "logits", lambda model, hidden: own(model, hidden) * 1.01)
    with pytest.raises(InputError, match=f"by its model_type {family} in config"):
        loading.load(Model(path=str(tmp_path)))


def test_the_check_of_attention_reads_past_a_small_window(tmp_path, monkeypatch):
    model = tiny.model("mistral")
    assert model.config.sliding_window < loading.SHORT
    model.save_pretrained(tmp_path)
    lengths = []
    own = loading.attention
    monkeypatch.setattr(loading, "attention", lambda ids: lengths.append(ids.shape[1]) or own(ids))
    loading.load(Model(path=str(tmp_path)))
    assert lengths == [model.config.sliding_window + 8]


@pytest.mark.parametrize("read", [loading.load, loading.tokenizer])
def test_code_of_the_folder_is_refused_and_nothing_is_asked(read, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    code = {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", None]}
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps({"model_type": "own", "auto_map": code}))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(InputError, match=r"model\.path: .*config\.json: family 'own' is not known"):
        read(Model(path=str(tmp_path)))


@pytest.mark.parametrize(("family", "warned"), [("llama", False), ("mistral", True)])
def test_only_a_mistral_is_said_to_split_text_wrongly(family, warned, tmp_path, caplog):
    """transformers says so of every large tokenizer that it wrote itself."""
    words = {f"w{place}": place for place in range(100_001)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), unk_token="w0"
    ).save_pretrained(tmp_path)
    changed = {"vocab_size": len(words), "transformers_version": "4.57.6"}
    config = tiny.model(family).config.to_dict() | changed
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    transformers.utils.logging.enable_propagation()
    try:
        assert loading.tokenizer(Model(path=str(tmp_path)))("w7 w9").input_ids == [7, 9]
    finally:
        transformers.utils.logging.disable_propagation()
    assert ("incorrect regex" in caplog.text) == warned


def test_a_card_that_is_not_there_is_said(tmp_path, monkeypatch):
    tiny.model("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(InputError, match=f"model.device is {device}, and torch finds no such"):
            loading.load(Model(path=str(tmp_path), device=device))


def test_tied_embeddings_stay_tied(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path)
    model = loading.load(Model(path=str(tmp_path)))
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    known = "gpt_neox, granite, llama, mistral"
    with pytest.raises(InputError, match=rf"/config\.json: family 'bert' is not known.*{known}"):
        loading.load(Model(path=str(tmp_path)))


READ = pytest.mark.parametrize("read", [loading.load, loading.tokenizer])


@READ
def test_a_folder_without_a_model_is_refused_in_one_line(read, tmp_path):
    with pytest.raises(InputError, match=r"model\.path: cannot load") as caught:
        read(Model(path=str(tmp_path)))
    assert "\n" not in str(caught.value)


@READ
@pytest.mark.parametrize("path", ["modles/smollm2-135m", "gpt2", "owner/name"])
def test_a_path_that_is_no_folder_is_refused_before_transformers_is_asked(read, path, monkeypatch):
    for part in (loading.AutoTokenizer, loading.AutoModelForCausalLM):
        monkeypatch.setattr(part, "from_pretrained", lambda *_, **__: pytest.fail("it was asked"))
    with pytest.raises(
        InputError, match=f"model.path: {path} is no folder; run .* fetch"
    ) as caught:
        read(Model(path=path))
    assert "\n" not in str(caught.value)


def test_weights_that_are_pickled_are_refused(tmp_path):
    saved = tiny.model("llama")
    saved.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"model\.path: cannot load .*safetensors"):
        loading.load(Model(path=str(tmp_path)))


@FAMILIES
def test_the_context_is_that_of_the_config_and_of_its_file(family, tmp_path):
    config = tiny.CONFIGS[family]()
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert families.context(config.to_dict()) == families.context(written) == 64
    assert config.max_position_embeddings == 64


def test_a_model_without_a_table_of_positions_reads_any_length():
    assert families.context({"model_type": "bloom"}) == math.inf


@pytest.mark.parametrize(
    ("template", "front"), [("$A", []), ("<s> $A", [0]), ("<s> $A </s>", [0]), ("$A </s>", [])]
)
def test_a_text_begins_as_its_tokenizer_says_and_is_left_open(template, front):
    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    assert loading.encode(tokenizer, ["a b", "", "b"]) == [[*front, 2, 3], front, [*front, 3]]


def test_the_embedded_model_reads_texts_as_they_are(fetched: Path):
    """Its GGUF says add_bos_token: false, which transformers does not read."""
    tokenizer = loading.tokenizer(Model(path=str(fetched / "models/smollm2-135m")))
    texts = ["The three-age system", "1"]
    assert loading.encode(tokenizer, texts) == tokenizer(texts).input_ids
    assert [tokenizer.decode(ids) for ids in tokenizer(texts).input_ids] == texts


def test_the_embedded_models_files_agree_and_need_no_class_of_a_version(fetched: Path):
    """transformers 5.9 rebuilds a LlamaTokenizer without the spaces, and reads tokenizer.json alone
    under this name; the ids that end and begin are those of config.json.
    """
    folder = fetched / "models/smollm2-135m"
    names = ("config", "generation_config", "tokenizer_config", "special_tokens_map")
    config, generation, settings, special = (
        json.loads((folder / f"{name}.json").read_text()) for name in names
    )
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in settings
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for role in ("bos", "eos", "pad"):
        token = settings[f"{role}_token"]
        assert token == special[f"{role}_token"]
        ids = {config[f"{role}_token_id"], generation[f"{role}_token_id"]}
        assert ids == {backend.token_to_id(token)}
    texts = ["The three-age system", " two  spaces\n", "Größe 🎉", "<|im_start|>user"]
    loaded = loading.tokenizer(Model(path=str(folder)))
    assert loaded(texts).input_ids == [encoded.ids for encoded in backend.encode_batch(texts)]
    assert [backend.decode(loaded(text).input_ids, False) for text in texts] == texts


@pytest.mark.parametrize("rows", [1, 37, 512])
def test_float32_products_are_of_float32(rows):
    """Whatever kernel `load` prefers: bfloat16 or TF32 would err 100 times as much."""
    loading.prefer_onednn()
    torch.manual_seed(0)
    x, w = torch.randn(rows, 576), torch.randn(1536, 576)
    exact = x.double() @ w.double().T
    error = (torch.nn.functional.linear(x, w).double() - exact).abs().max().item()
    assert error < 576 * 2**-24 * exact.abs().max().item()
    rounded = torch.nn.functional.linear(x.bfloat16(), w.bfloat16()).double()
    assert (rounded - exact).abs().max().item() > 20 * error


@pytest.fixture
def switch():
    """The process-wide setting of float32 products, at another value until the test is over."""
    mkldnn: Any = torch.backends.mkldnn
    matmul = mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    yield matmul
    matmul.fp32_precision = before


def in_float32(a, b):
    return (a.double() @ b.double()).to(a.dtype)


def in_bfloat16(a, b):
    return (a.bfloat16() @ b.bfloat16()).to(a.dtype) if a.dtype == torch.float32 else a @ b


@pytest.mark.parametrize(("product", "after"), [(in_float32, "bf16"), (in_bfloat16, "ieee")])
def test_onednn_is_preferred_where_its_products_are_of_float32(product, after, switch, monkeypatch):
    """And elsewhere the switch stays as it was."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"})
    used = []
    monkeypatch.setattr(
        torch, "mm", lambda a, b: used.append(switch.fp32_precision) or product(a, b)
    )
    state = torch.get_rng_state()
    loading.prefer_onednn()
    assert switch.fp32_precision == after
    assert set(used) == {"bf16"}
    assert torch.equal(torch.get_rng_state(), state)


def test_onednn_is_not_asked_on_other_processors(switch, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64"})
    loading.prefer_onednn()
    assert switch.fp32_precision == "ieee"


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (torch.float32, "leave the prompt out"),
        (torch.bfloat16, "use model.dtype float32, or leave the prompt out"),
        (torch.float16, "use model.dtype float32 or bfloat16, or leave the prompt out"),
    ],
)
def test_the_remedy_for_values_that_are_not_finite_is_another_dtype(dtype, advice):
    assert loading.not_finite(tiny.model("llama", dtype)) == advice


def test_the_tables_are_read_without_torch():
    code = (
        "from sparc3.measure.scorers import SCORERS; from sparc3.model.families import FAMILIES; "
        "from sparc3.relevance.contrasts import CONTRASTS; "
        "from sparc3.relevance.scores import SCORES, TARGETS; "
        "assert all((SCORERS, FAMILIES, CONTRASTS, SCORES, TARGETS)); import sys; "
        "print([m for m in ('torch', 'transformers', 'lxt') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
