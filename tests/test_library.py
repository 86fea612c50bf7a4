"""The library: what `import sparc3` gives, against the stages' functions and naive sums."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparc3
from sparc3.circuits.choose import choose, protected

ROOT = Path(__file__).parent.parent
TEXTS = [f"w{i} w{i + 5} w{2 * i + 3} w{i + 9} w7" for i in range(8)]
GENERAL = [f"w{3 * i + 4} w{i + 11} w{i + 3} w{i + 20}" for i in range(9)]
PAIRS = [(f"w5 w{i + 6} w9", f"w5 w{i + 30} w9") for i in range(8)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A model and tokenizer as transformers loads them: weights that take gradients."""
    folder = tmp_path_factory.mktemp("library")
    small.write_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, eos_token="w1")
    return AutoModelForCausalLM.from_pretrained(folder), tokenizer


def python(code: str, **variables: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_importing_is_cheap_and_names_come_when_asked_for() -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'mlflow'} & set(sys.modules)"
    assert python(f"import sys, sparc3; print({heavy} or 'none', 'score' in sparc3.__all__)") == (
        "none True"
    )
    assert all(getattr(sparc3, name) is not None for name in sparc3.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sparc3.nothing  # pyright: ignore[reportAttributeAccessIssue]


def test_the_whole_way_without_mlflow_dvc_and_lxt(tmp_path: Path) -> None:
    """With `gradient`, in a process that cannot import them; `lrp` says what it lacks."""
    small.write_model(tmp_path)
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["mlflow", "dvc", "lxt", "torchvision", "datasets", "peft"]))
import sparc3
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r})
own, general = (sparc3.score(model, tokenizer, t) for t in ({TEXTS}, {GENERAL}))
circuit = sparc3.Circuit.choose(sparc3.differential(general, own), 5, abs(general).mean(0))
print(len(circuit), sparc3.evaluate(model, tokenizer, circuit, {GENERAL})["ppl_delta"]["n"])
try:
    sparc3.score(model, tokenizer, {TEXTS}, "lrp")
except sparc3.InputError as error:
    print(error)
"""
    first, second = python(code).splitlines()
    assert first == f"5 {len(GENERAL)}"
    assert "lrp and lrp-abs need the package" in second


def test_scores_are_input_times_gradient_of_the_mean_likelihood(loaded) -> None:
    model, tokenizer = loaded
    found = sparc3.score(model, tokenizer, TEXTS[:2])
    assert found.shape == (2, tiny.LAYERS, tiny.WIDTH)
    ids = torch.tensor([tokenizer(TEXTS[0], add_special_tokens=False).input_ids])
    kept = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        for layer in model.model.layers
    ]
    log_p = torch.log_softmax(model(ids).logits[0, :-1], -1)
    mean = log_p[torch.arange(ids.shape[1] - 1), ids[0, 1:]].mean()
    for layer, (h, gradient) in enumerate(zip(kept, torch.autograd.grad(mean, kept), strict=True)):
        naive = (h * gradient).sum(1)[0].detach().numpy()
        np.testing.assert_allclose(found[0, layer], naive, rtol=1e-3, atol=1e-6)
    for hook in hooks:
        hook.remove()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_scores_of_a_pair_turn_sign_with_it(loaded) -> None:
    model, tokenizer = loaded
    there = sparc3.score(model, tokenizer, PAIRS, "lrp")
    back = sparc3.score(model, tokenizer, [(b, a) for a, b in PAIRS], "lrp")
    np.testing.assert_allclose(there, -back, atol=1e-5)


def test_choosing_is_the_stages_choice(loaded) -> None:
    model, tokenizer = loaded
    own, general = (sparc3.score(model, tokenizer, texts) for texts in (TEXTS, GENERAL))
    differential = sparc3.differential(general, own)
    np.testing.assert_allclose(differential, general.mean(0) - own.mean(0), rtol=1e-5, atol=1e-7)
    importance = np.abs(general).mean(0)
    circuit = sparc3.Circuit.choose(differential, 6, importance, protect=0.5, scale=0.25)
    ids = choose(differential, 6, protected(importance, 0.5), "k")
    assert (circuit.layers * tiny.WIDTH + circuit.neurons).tolist() == ids.tolist()
    assert circuit.scales.tolist() == [0.25] * 6
    with pytest.raises(sparc3.InputError, match="not"):
        sparc3.Circuit.choose(differential, 50, importance, protect=0.5)


def test_what_is_evaluated_is_what_the_model_says(loaded) -> None:
    model, tokenizer = loaded
    circuit = tiny.circuit(1)
    found = sparc3.evaluate(model, tokenizer, circuit, GENERAL, TEXTS)

    def nats(texts: list[str]) -> float:
        """Mean NLL over all scored tokens."""
        every = []
        for text in texts:
            ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
            log_p = torch.log_softmax(model(ids).logits[0, :-1], -1)
            every += (-log_p[torch.arange(ids.shape[1] - 1), ids[0, 1:]]).tolist()
        return float(np.mean(every))

    with torch.no_grad():
        before = {"general": nats(GENERAL), "own": nats(TEXTS)}
        with circuit.applied(model):
            after = {"general": nats(GENERAL), "own": nats(TEXTS)}
    rise = {name: after[name] - before[name] for name in before}
    assert found["ppl_delta"]["value"] == pytest.approx(100 * np.expm1(rise["general"]), rel=1e-3)
    assert found["nll_shift"]["value"] == pytest.approx(rise["own"] - rise["general"], rel=1e-2)
    both = sparc3.evaluate(model, tokenizer, circuit, GENERAL, PAIRS)
    assert set(both) == {"ppl_delta", "margin", "ss"}
    assert both["margin"]["low"] <= both["margin"]["value"] <= both["margin"]["high"]
    with pytest.raises(sparc3.InputError):
        sparc3.evaluate(model, tokenizer, circuit, GENERAL[:3])


def test_the_same_seed_completes_alike_and_a_circuit_changes_it(loaded) -> None:
    model, tokenizer = loaded
    before = sparc3.complete(model, tokenizer, TEXTS, seed=3)
    assert before == sparc3.complete(model, tokenizer, TEXTS, seed=3)
    assert before != sparc3.complete(model, tokenizer, TEXTS, tiny.circuit(0, 1, 2), seed=3)
    assert before != sparc3.complete(model, tokenizer, TEXTS, seed=4)
    assert model.training is False


def test_circuits_combine_as_sets_and_scales_multiply() -> None:
    one, other = tiny.circuit(0, 1), tiny.circuit(1, 2, scale=0.5)
    union, common = one.scaled(0.5) | other, one & other
    assert {row[:2] for row in union.rows()} == {
        row[:2] for each in (one, other) for row in each.rows()
    }
    assert {row[0]: row[3] for row in union.rows()} == {0: 0.5, 1: 0.25, 2: 0.5}
    assert {row[:2] for row in common.rows()} == {row[:2] for row in one.rows() if row[0] == 1}
    assert set(common.scales) == {0.0}
    assert len(one | sparc3.INTACT) == len(one)
    assert len(one & sparc3.INTACT) == 0
    assert set(one.scaled(0.25).scales) == {0.75}
    with pytest.raises(sparc3.InputError, match="strength 2"):
        one.scaled(2)


def test_a_circuit_is_kept_applied_for_a_while_or_for_good(loaded, tmp_path: Path) -> None:
    model, _ = loaded
    circuit = replace(tiny.circuit(1), scales=np.tile([0.0, 0.5], 6))
    circuit.save(tmp_path / "circuit.csv")
    circuit.save_adapter(tmp_path / "adapter", model)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        intact = model(ids).logits
        for again in (tmp_path / "circuit.csv", tmp_path, tmp_path / "adapter"):
            with sparc3.Circuit.load(again).applied(model) as edited:
                found = edited(ids).logits
            assert torch.equal(model(ids).logits, intact)
            with circuit.applied(model):
                assert torch.equal(model(ids).logits, found)
        copy = AutoModelForCausalLM.from_pretrained(model.name_or_path)
        circuit.apply(copy)
        torch.testing.assert_close(copy(ids).logits, found)


def test_the_ten_lines_of_the_readme_run(loaded, capsys) -> None:
    model, tokenizer = loaded
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    code = block.replace("models/smollm2-135m", model.name_or_path)
    assert code != block
    space: dict[str, Any] = {"RUDE": TEXTS, "POLITE": GENERAL, "PROMPTS": ["w3 w4"]}
    exec(code, space)
    assert len(space["circuit"]) == 30
    shown = [
        str(sparc3.complete(model, tokenizer, ["w3 w4"], c))
        for c in (sparc3.INTACT, space["circuit"])
    ]
    assert capsys.readouterr().out == f"{shown[0]} {shown[1]}\n"


def test_the_page_has_every_name() -> None:
    page = (ROOT / "docs/library.md").read_text()
    methods = {name for name in vars(sparc3.Circuit) if name[0] != "_"} - {"rows", "first"}
    fields = {"layers", "neurons", "scores", "scales"}
    for name in {*sparc3.__all__, *(f"ircuit.{name}(" for name in methods - fields)}:
        assert name in page, name
