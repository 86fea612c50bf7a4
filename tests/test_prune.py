"""Pruning by column against a hook on the activation, for every family; circuits in and out."""

import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch

from sparc3.base.errors import InputError
from sparc3.circuits.ablate import edited, prune_weights, pruned, pruned_rows, without_each
from sparc3.circuits.circuit import INTACT, Circuit, read_circuit, write_circuit
from sparc3.measure.word_ban import word_ban
from sparc3.model import families

IDS = torch.tensor(tiny.sequences([12, 12]))


def circuit(*rows: tuple[int, int, float]) -> Circuit:
    """From (layer, neuron, scale)."""
    layers, neurons, scales = zip(*rows, strict=True) if rows else ((), (), ())
    return Circuit(
        np.array(layers, np.int64),
        np.array(neurons, np.int64),
        -np.linspace(1, 0.1, len(rows)),
        np.array(scales, np.float64),
    )


PRUNE = circuit((0, 1, 0.0), (0, 7, 0.0), (0, 8, 0.0), (2, 23, 0.0))
DAMPEN = circuit((0, 3, 0.0), (1, 0, 0.3), (1, 5, 0.75), (2, 2, 1.0))


def ablated_logits(model, chosen):
    """The slow way: multiply activations as they enter the output projection."""

    def hook(layer):
        def scale(module, args):
            hidden = args[0].clone()
            for at, neuron, _, factor in chosen.rows():
                if at == layer:
                    hidden[..., neuron] *= factor
            return (hidden,)

        return scale

    handles = [
        mlp.down.register_forward_pre_hook(hook(i)) for i, mlp in enumerate(families.mlps(model))
    ]
    out = model(IDS).logits
    for handle in handles:
        handle.remove()
    return out


def bits(model):
    """Every parameter, to the bit; a tied one under each of its names."""
    return {
        name: p.detach().contiguous().view(torch.uint8).clone()
        for name, p in model.named_parameters(remove_duplicate=False)
    }


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.parametrize("chosen", [PRUNE, DAMPEN], ids=["prune", "dampen"])
def test_column_equals_ablation_equals_all_three_components(family, chosen):
    model = tiny.model(family)
    whole = model(IDS).logits
    expected = ablated_logits(model, chosen)
    assert (expected - whole).abs().max() > 1e-2
    with pruned(model, chosen):
        by_column = model(IDS).logits
    torch.testing.assert_close(by_column, expected, atol=2e-5, rtol=1e-5)
    prune_weights(model, chosen)
    torch.testing.assert_close(model(IDS).logits, by_column, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_come_back_to_the_bit(family, dtype):
    model = tiny.model(family, dtype)
    before = bits(model)
    with pruned(model, DAMPEN) as same:
        assert same is model
        assert (
            len(changed(before, bits(model))) == 2
        )  # two output projections; scale 1 changes none
    assert not changed(before, bits(model))

    def fails():
        with pruned(model, PRUNE):
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        fails()
    assert not changed(before, bits(model))


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_rows_without_a_circuit_of_their_own_equal_ablation(family):
    model = tiny.model(family)
    circuits = [DAMPEN, INTACT, PRUNE]
    places = [2, 0, 1, 2]
    ids = torch.tensor(tiny.sequences([12] * 4))
    whole = model(IDS).logits
    with pruned_rows(model, circuits) as tell:
        tell(places)
        found = model(ids).logits
        tell(places[:3])  # rows leave a batch, and come into it
        fewer = model(ids[:3]).logits
    for place, row, logits in zip(places, ids, found, strict=True):
        with pruned(model, circuits[place]):
            torch.testing.assert_close(logits, model(row[None]).logits[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(fewer, found[:3], atol=2e-5, rtol=1e-5)
    assert torch.equal(model(IDS).logits, whole)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_layers_below_every_circuit_run_once(family):
    model = tiny.model(family)
    runs = [0] * tiny.LAYERS
    for layer, mlp in enumerate(families.mlps(model)):

        def count(module, args, layer=layer):
            runs[layer] += 1

        mlp.down.register_forward_pre_hook(count)
    circuits = [tiny.circuit(1), INTACT, tiny.circuit(2), tiny.circuit(1, 2)]
    with torch.inference_mode():
        found = without_each(model, circuits, lambda: model(IDS).logits)
    assert runs == [1, 3, 4]
    for circuit, logits in zip(circuits, found, strict=True):
        with pruned(model, circuit):
            assert torch.equal(logits, model(IDS).logits)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_ban_of_words_runs_no_layer_again(family):
    model = tiny.model(family)
    edits = [word_ban([1, 2]), INTACT, tiny.circuit(1), word_ban([3])]
    expected = []
    for edit in edits:
        with edited(model, edit):
            expected.append(model(IDS).logits)
    runs = [0] * tiny.LAYERS
    for layer, mlp in enumerate(families.mlps(model)):

        def count(module, args, layer=layer):
            runs[layer] += 1

        mlp.down.register_forward_pre_hook(count)
    with torch.inference_mode():
        found = without_each(model, edits, lambda: model(IDS).logits)
    assert runs == [1, 2, 2]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(found[0], found[1])


def test_a_failure_within_leaves_the_model_whole():
    model = tiny.model("llama")
    before, logits = bits(model), model(IDS).logits
    first = families.layers(model)[0]
    own = vars(first)["forward"] = lambda *args, **kwargs: type(first).forward(
        first, *args, **kwargs
    )
    turns = []

    def fails():
        turns.append(model(IDS).logits)
        if len(turns) == 2:
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        without_each(model, [INTACT, tiny.circuit(2)], fails)
    assert not changed(before, bits(model))
    assert vars(first)["forward"] is own
    assert torch.equal(model(IDS).logits, logits)
    assert not any(block._forward_hooks for block in families.layers(model))


def test_nothing_to_run_without():
    assert without_each(tiny.model("llama"), [], lambda: 1) == []


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_only_the_circuit_is_touched_and_embeddings_are_not(family):
    model = tiny.model(family)
    before = bits(model)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    owners = {id(m): name for name, m in model.named_modules()}
    transposed = family == "gpt2"
    for layer, mlp in enumerate(families.mlps(model)):
        for at, neuron, *_ in PRUNE.rows():
            if at == layer:
                down = expected[f"{owners[id(mlp.down)]}.weight"]
                (down if transposed else down.T)[neuron] = 0
                for part in (mlp.up, mlp.gate) if mlp.gate is not None else (mlp.up,):
                    row = neuron + (part.of.start or 0)
                    up = expected[f"{owners[id(part.module)]}.weight"]
                    (up.T if transposed else up)[row] = 0
                    if part.module.bias is not None:
                        expected[f"{owners[id(part.module)]}.bias"][row] = 0
    prune_weights(model, PRUNE)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    projections = {
        owners[id(module)]
        for mlp in families.mlps(model)
        for module in (mlp.up.module, (mlp.gate or mlp.up).module, mlp.down)
    }
    assert {name.rpartition(".")[0] for name in changed(before, bits(model))} <= projections
    if model.config.tie_word_embeddings:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert head is not None
        assert embedding.weight is head.weight


def test_pruning_twice_is_pruning_once():
    model = tiny.model("qwen2")
    prune_weights(model, PRUNE)
    once = model(IDS).logits
    with pruned(model, PRUNE):
        assert torch.equal(model(IDS).logits, once)
    prune_weights(model, PRUNE)
    assert torch.equal(model(IDS).logits, once)


def test_nested_circuits_multiply_and_unwind():
    model = tiny.model("llama")
    before, whole = bits(model), model(IDS).logits
    with pruned(model, PRUNE):
        with pruned(model, DAMPEN):
            both = model(IDS).logits
        torch.testing.assert_close(model(IDS).logits, ablated_logits(tiny.model("llama"), PRUNE))
    union = circuit(*((at, n, s) for c in (PRUNE, DAMPEN) for at, n, _, s in c.rows()))
    torch.testing.assert_close(both, ablated_logits(model, union), atol=2e-5, rtol=1e-5)
    assert not changed(before, bits(model))
    assert torch.equal(model(IDS).logits, whole)


@pytest.mark.parametrize("chosen", [circuit(), circuit((1, 4, 1.0))], ids=["empty", "scale 1"])
def test_identity(chosen):
    model = tiny.model("gpt2")
    before = bits(model)
    with pruned(model, chosen):
        assert not changed(before, bits(model))
    prune_weights(model, chosen)
    assert not changed(before, bits(model))


def test_frozen_and_trainable_weights_and_inference_mode():
    model = tiny.model("opt").requires_grad_(True)
    before = bits(model)
    with torch.inference_mode(), pruned(model, PRUNE):
        inside = model(IDS).logits.clone()
    assert not changed(before, bits(model))
    torch.testing.assert_close(inside, ablated_logits(model, PRUNE).detach(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [((3, 0, 0.0), "layers 0 to 2"), ((1, 24, 0.0), "neurons 0 to 23")],
)
def test_neuron_of_another_model_is_refused_and_nothing_changed(row, message):
    model = tiny.model("llama")
    before = bits(model)
    chosen = circuit((0, 0, 0.0), row)
    with pytest.raises(InputError, match=message), pruned(model, chosen):
        pass
    with pytest.raises(InputError, match=message):
        prune_weights(model, chosen)
    assert not changed(before, bits(model))


def test_weights_that_are_elsewhere_are_refused():
    model = tiny.model("llama")
    torch.nn.Module.to(model, "meta")
    with pytest.raises(InputError, match=r"model\.device"), pruned(model, PRUNE):
        pass


def test_written_circuit_is_sorted_and_reads_back_exactly(tmp_path):
    path = tmp_path / "lrp.csv"
    rng = np.random.default_rng(0)
    places = rng.permutation(30 * 1536)[:200]
    scores = rng.normal(size=200).astype(np.float32).astype(np.float64)
    chosen = Circuit(places // 1536, places % 1536, scores, rng.random(200))
    write_circuit(path, chosen)
    assert path.read_text().splitlines()[0] == "layer,neuron,score,scale"
    back = read_circuit(path)
    assert list(back.rows()) == sorted(chosen.rows(), key=lambda row: row[2])
    write_circuit(tmp_path / "again.csv", back)
    assert (tmp_path / "again.csv").read_bytes() == path.read_bytes()


def test_empty_circuit_in_and_out(tmp_path):
    write_circuit(tmp_path / "none.csv", circuit())
    assert len(read_circuit(tmp_path / "none.csv")) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1 is ''; expected 'layer,neuron,score,scale'"),
        ("layer,neuron,score\n0,1,2\n", "line 1"),
        ("layer,neuron,score,scale\n0,1,-2,0\n0,x,-1,0\n", "line 3 is '0,x,-1,0'"),
        ("layer,neuron,score,scale\n0,1,-2\n", "line 2"),
        ("layer,neuron,score,scale\n0,1,-2,0\n\n", "line 3 is ''"),
        ("layer,neuron,score,scale\n0,1.0,-2,0\n", "line 2"),
        ("layer,neuron,score,scale\n0,1,nan,0\n", "line 2: score nan"),
        ("layer,neuron,score,scale\n0,1,-2,2\n", "line 2: scale 2.0"),
        ("layer,neuron,score,scale\n0,-1,-2,0\n", "line 2: layer 0, neuron -1"),
        ("layer,neuron,score,scale\n4,1,-2,0\n4,1,-1,0\n", "line 3: .* line 2 already"),
    ],
)
def test_bad_file_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "lrp.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_circuit(path)
    assert str(caught.value).startswith(f"{path}: line")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.csv: file not found"):
        read_circuit(tmp_path / "none.csv")


def test_circuits_are_read_without_torch():
    modules = "sparc3.circuits.circuit, sparc3.circuits.choose, sparc3.circuits.ablate"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
