"""The plan's numbers against what really is computed, kept and written."""

import inspect
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small
import test_models
import tiny
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig, PreTrainedModel

from sparc3.__main__ import main
from sparc3.base import params as parameters
from sparc3.base.errors import InputError
from sparc3.circuits.circuit import INTACT
from sparc3.commands import cost, plan, submit
from sparc3.measure import generate, likelihood
from sparc3.model import families, loading
from sparc3.relevance import attribution
from sparc3.relevance.lrp import attnlrp
from sparc3.relevance.scores import Target
from sparc3.stages import attribute, checks

FAMILIES = list(tiny.KINDS)
LLAMA_3_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


def of_llama(params: parameters.Params) -> plan.Plan:
    shape = cost.shape(LlamaConfig(**LLAMA_3_8B), params.model.dtype)
    return plan.Plan(params, shape, exact=False)


def fits(planned: plan.Plan, name: str, cards: int = 1) -> bool:
    return planned.fits(plan.named("--device", name, cards))


class Products(TorchDispatchMode):
    """Counts the operations of every matrix product, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        count = flop_registry.get(func._overloadpacket)
        if count is None:
            with self:  # aten.linear, in inference mode, is made of products that are counted
                out = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        out = func(*args, **kwargs)
        self.operations += count(*args, **kwargs, out_val=out)
        return out


def counted(run: Callable[[], object]) -> int:
    """Operations of all matrix products that `run` does; attention plain, so that they show."""
    with sdpa_kernel(SDPBackend.MATH), Products() as products:
        run()
    return products.operations


def prompts(lengths: list[list[int]]) -> list[attribution.Prompt]:
    flat = iter(tiny.sequences([n for prompt in lengths for n in prompt]))
    return [attribution.Prompt(str(i), tuple(next(flat) for _ in p)) for i, p in enumerate(lengths)]


# --- the model's shape -----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_shape_is_that_of_the_real_model(family: str) -> None:
    model = tiny.model(family)
    shape = cost.shape(model.config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.layers, shape.width) == (families.num_layers(model), families.width(model))
    assert shape.scores(prompts=5, names=2) == 4 * 5 * 2 * tiny.LAYERS * tiny.WIDTH


def test_shape_of_llama_3_8b_without_its_weights() -> None:
    shape = cost.shape(LlamaConfig(**LLAMA_3_8B))
    embedding, layer = 128256 * 4096, 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336 + 2 * 4096
    assert shape.parameters == 8_030_261_248 == 2 * embedding + 32 * layer + 4096
    assert shape.scores(prompts=1) == 4 * 458_752
    assert shape.weights == 4 * 8_030_261_248
    assert cost.shape(LlamaConfig(**LLAMA_3_8B), "bfloat16").weights == 2 * 8_030_261_248


# --- operations ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("names", "target"),
    [
        (["activation"], "max-logit"),
        (["lrp"], "max-logit"),
        (["lrp", "lrp-abs", "wanda"], "max-logit"),
        (["lrp", "gradient"], "max-logit"),
        (["lrp"], "pair"),
    ],
)
def test_operations_of_attribution(family: str, names: list[str], target: Target) -> None:
    model = tiny.model(family)
    shape = cost.shape(model.config)
    lengths = [[12, 12]] * 3 if target == "pair" else [[12]] * 3
    found = counted(
        lambda: list(attribution.score(model, [prompts(lengths)], names, target=target))
    )
    expected = cost.attribution(shape, lengths, names, target, batch_tokens=1024)
    assert found == pytest.approx(expected.operations, rel=0.003)  # rotary angles


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_of_likelihood(family: str) -> None:
    model = tiny.model(family)
    lengths = [9, 9, 9]
    texts = tiny.sequences(lengths)
    found = counted(lambda: likelihood.token_nll(model, [INTACT], texts, list("abc")))
    expected = cost.likelihood(cost.shape(model.config), 1, lengths, batch_tokens=1024)
    assert found == pytest.approx(expected.operations, rel=0.003)


def test_operations_of_generation() -> None:
    model = tiny.model("llama")
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None  # no completion ends early
    lengths, completions, new_tokens = [6, 6], 5, 8
    sampling = generate.Sampling(completions, new_tokens, temperature=1.0, top_p=0.9, seed=0)
    found = counted(
        lambda: generate.complete(
            model,
            [INTACT],
            tiny.sequences(lengths),
            ["a", "b"],
            sampling,
        )
    )
    expected = cost.generation(cost.shape(model.config), 1, lengths, completions, new_tokens)
    assert found == pytest.approx(expected.operations, rel=0.003)
    batch = inspect.signature(generate.complete).parameters["batch"]
    assert batch.default == cost.COMPLETIONS_AT_ONCE


# --- memory ----------------------------------------------------------------------------------


def kept_by_autograd(model: PreTrainedModel, rows: int, length: int) -> int:
    """Bytes of all that autograd saves of an AttnLRP pass, but for the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.tensor(tiny.sequences([length] * rows))
    found = {"lrp": torch.empty(families.num_layers(model), rows, families.width(model))}
    real = torch.ones(rows, length, 1, dtype=torch.bool)
    with (
        attnlrp(model),
        attribution._watching(model, rows, real, found, True, {}),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        hidden = families.body(model)(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_that_attribution_keeps(family: str, dtype: str) -> None:
    """What is kept, but for statistics of rows and heads, which are nothing in a model of size.

    LayerNorm keeps its input as it is, OPT makes no mask, eager attention does not read its output
    again: they keep less.
    """
    rows, length = 2, 40
    model = tiny.model(family, loading.DTYPES[dtype])
    found = kept_by_autograd(model, rows, length)
    expected = cost.saved(cost.shape(model.config, dtype), rows * length, length, set())
    statistics = rows * length * tiny.LAYERS * 128
    spared = 0.6 if family in test_models.PLAIN else 0.9 if family == "gemma2" else 1.0
    assert spared * expected <= found <= expected + statistics


def test_disk_is_what_attribution_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small.write_project(tmp_path))
    params = checks.load()
    attribute.run(params, "general")
    work = plan.plan(params, project=params).works["attribute@general"]
    written = [
        small.scores(tmp_path, "general", name).nbytes
        for name in parameters.scores_of(params, "general")
    ]
    assert work.disk == sum(written)
    assert work.tokens == sum(range(4, 11))
    assert work.held == 2 * (2 * tiny.LAYERS * tiny.WIDTH) * 4  # two scores of a shard of two


# --- prompts and stages ----------------------------------------------------------------------


def test_lengths_of_prepared_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small.write_project(tmp_path))
    params = checks.load()
    planned = plan.plan(params, project=params)
    assert planned.exact
    assert planned.tokens("general", "attribute") == list(range(4, 11))
    assert planned.tokens("general", None, most=2) == [4, 5]
    assert planned.works["attribute@general"].tokens == sum(range(4, 11))
    other = replace(params, prompt_sets={**params.prompt_sets, "more": params.prompt_sets["talk"]})
    assert not plan.plan(other, project=params).exact
    Path("outputs/prompts/talk.jsonl").unlink()
    assert not plan.plan(params, project=params).exact


def test_lengths_of_prompts_that_are_not_prepared() -> None:
    params = checks.load()
    planned = of_llama(params)
    general, matched = params.prompt_sets["general"], params.prompt_sets["general-toxicity"]
    share = params.prepare.splits["attribute"] / sum(params.prepare.splits.values())
    assert general.count is not None
    count = round(general.count * len(general.seeds) * share)
    assert planned.tokens("general", "attribute") == [general.max_tokens] * count
    wikitext = replace(general, source="hub/wikitext-2", count=None, seeds=(0,), max_tokens=None)
    whole = planned.changed(test_sets={"text": replace(wikitext, min_tokens=None)})
    assert whole.tokens("text", None) == [4800] * 60  # 288,000 tokens
    assert matched.match_length == "toxicity"
    assert planned.tokens("general-toxicity", None)[0] == planned.tokens("toxicity", None)[0]
    assert planned.tokens("race", None)[0] == plan.ASSUMED_TOKENS


def test_stages_do_what_params_say() -> None:
    """Twice the completions are twice the drawing; one more circuit is one more evaluation."""
    params = checks.load()

    def works(changed: parameters.Params) -> dict[str, cost.Work]:
        return of_llama(changed).works

    first = works(params)
    count = params.evaluate.completions
    more = [
        works(replace(params, evaluate=replace(params.evaluate, completions=n * count)))
        for n in (2, 3)
    ]
    one, two, three = (w["evaluate@toxicity"] for w in (first, *more))
    assert three.drawn - two.drawn == two.drawn - one.drawn > 0
    assert one.passes == two.passes
    assert first["evaluate@race"].drawn == 0

    circuits = sum(method.draws for method in params.methods.values())
    control = params.evaluate.control
    draws = {control: replace(params.methods[control], draws=params.methods[control].draws + 1)}
    added = works(replace(params, methods={**params.methods, **draws}))
    passes = [w["evaluate@race"].passes for w in (first, added)]
    assert passes[0] < passes[1] < passes[0] * (circuits + 2) / (circuits + 1) * 1.1
    assert {f"attribute@{name}" for name in params.prompt_sets} <= set(first)


def test_questions_are_asked_of_the_model_every_method_and_the_ban() -> None:
    params = checks.load()
    quiz = parameters.PromptSet(source="piqa", count=10, max_tokens=20)
    params = replace(params, test_sets={**params.test_sets, "quiz": quiz})
    asking = {
        "evaluate": replace(params, evaluate=replace(params.evaluate, choices=("quiz",))),
        "sweep": replace(params, sweep=replace(params.sweep, choices=("quiz",))),
    }
    before = of_llama(params)
    models = {"evaluate": len(params.methods) + 2, "sweep": 1 + len(params.sweep.num_neurons)}
    for stage, changed in asking.items():
        name = f"{stage}@toxicity"
        more = of_llama(changed).works[name].tokens - before.works[name].tokens
        assert more == models[stage] * 10 * 2 * 20


def test_a_set_that_is_there_for_tests_is_read_whole() -> None:
    """By evaluate and transfer alike, up to what they ask for."""
    params = checks.load()
    (name,) = set(params.transfer.texts) & set(params.test_sets)
    count = params.test_sets[name].count
    assert count is not None
    planned = of_llama(params)
    assert len(planned.held_out(name, most=1000)) == count
    assert len(planned.held_out(name, most=count - 1)) == count - 1
    shares = params.prepare.splits
    general = params.prompt_sets[params.differential.general]
    assert general.count is not None
    expected = general.count * len(general.seeds) * shares["test"] / sum(shares.values())
    assert len(planned.held_out(params.differential.general, most=1000)) == round(expected)


# --- devices ---------------------------------------------------------------------------------


@pytest.fixture
def big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose model is LLaMA-3-8B's config.json and a tokenizer, without weights."""
    folder = small.write_project(tmp_path, {"model": {"path": "big", "device": "cuda"}})
    tree = yaml.safe_load((folder / "params.yaml").read_text())
    tree["behaviours"]["talk"]["faithfulness"] = False  # it would need the most memory
    (folder / "params.yaml").write_text(yaml.safe_dump(tree))
    LlamaConfig(**LLAMA_3_8B).save_pretrained(folder / "big")
    for path in (folder / "model").glob("*token*"):
        shutil.copy(path, folder / "big")
    monkeypatch.chdir(folder)
    return folder


def test_a_run_that_cannot_fit_is_refused_with_what_would(big: Path, capsys: Any) -> None:
    assert main(["plan", "--device", "A100-40"]) == 0
    full = of_llama(checks.load())
    model = full.params.model
    assert fits(full.changed(model=replace(model, dtype="bfloat16")), "L4")
    capsys.readouterr()
    assert main(["plan", "--device", "L4"]) == 2
    error = capsys.readouterr().err
    assert "GB on L4, which has 23.6 GB" in error
    assert "model.dtype: bfloat16" in error
    cards = int(error.partition("auto over ")[2].split()[0])
    spread = full.changed(model=replace(model, device="auto"))
    assert fits(spread, "L4", cards)
    assert not fits(spread, "L4", cards - 1)


def test_a_job_that_cannot_fit_is_not_submitted(big: Path) -> None:
    params = replace(checks.load(), cluster=parameters.Cluster("L4", gpus=1))
    with pytest.raises(InputError, match=r"attribute@general needs .* GB on L4"):
        submit.script(params, "attribute", {"prompt_set": "general"})
    half = replace(params, model=replace(params.model, dtype="bfloat16"))
    script = submit.script(half, "attribute", {"prompt_set": "general"})
    # 16 GB of weights come through the machine's memory.
    assert "#SBATCH --mem=22G\n" in script


def test_a_smaller_batch_is_named_where_it_helps(big: Path) -> None:
    params = checks.load()
    params = replace(
        params,
        model=replace(params.model, dtype="bfloat16"),
        attribute=replace(params.attribute, batch_tokens=2**15),
    )
    planned = of_llama(params)
    assert not fits(planned, "A100-40")
    (advice, *_) = plan.remedies(planned, plan.named("--device", "A100-40", 1))
    tokens = int(advice.split()[1])
    smaller = replace(params.attribute, batch_tokens=tokens)
    assert fits(planned.changed(attribute=smaller), "A100-40")
    larger = replace(params.attribute, batch_tokens=2 * tokens)
    assert not fits(planned.changed(attribute=larger), "A100-40")


def test_time_is_operations_over_what_is_reached() -> None:
    params = checks.load()
    half = replace(params, model=replace(params.model, dtype="bfloat16", device="cuda"))
    planned = of_llama(half)

    def seconds(stage: str, work: cost.Work, cards: int = 1) -> float:
        return planned.needs(stage, work, plan.named("--device", "A100-80", cards)).seconds

    passes = cost.Work(passes=312e12 * 0.35 * 60)
    loaded = plan.START + 16.060522496  # 8 billion weights of 2 bytes, at 1 GB/s
    assert seconds("evaluate@x", passes) == pytest.approx(loaded + 60)
    assert seconds("evaluate@x", passes, cards=4) == pytest.approx(loaded + 60)
    assert seconds("attribute@x", passes, cards=4) == pytest.approx(loaded + 15)
    # Drawing one completion at a time is a matter of reading 16 GB of weights for each token.
    drawn = cost.Work(drawn=1e9, steps=1000)
    assert seconds("evaluate@x", drawn) == pytest.approx(loaded + 1000 * 2 * 8_030_261_248 / 2039e9)


def test_this_machines_time_is_of_its_own_measured_rate() -> None:
    work = cost.Work(passes=0.8 * plan.product_rate("float32") * 60)
    loaded = plan.START + 32.121044992
    needs = of_llama(checks.load()).needs("sweep@x", work, plan.CPU)
    assert needs.seconds == pytest.approx(loaded + 60)


def test_the_stage_that_elicits_is_planned_by_its_own_name() -> None:
    params = checks.load(Path("profiles/llama3-8b.yaml"), checks.PARAMS)
    needs = plan.of_stage(params, "prepare", "A100-80", 1)
    assert needs.machine > 16e9  # the weights pass through the machine's memory
    assert needs.seconds > plan.START + 16
    assert plan.of_stage(params, "overlap", "A100-80", 1).seconds == 0


def test_the_formula_in_docs_has_the_constants_of_the_code() -> None:
    page = Path("docs/cost.md").read_text()
    formula = page[page.index("The formula, for each stage") :].partition("\n")[0]
    assert f"time = {plan.START:g} s + weights / ({plan.LOADING / 1e9:g} GB/s)" in formula
    assert f"the rate is {plan.REACHED:g} of the card's peak, and {plan.DRAWING:g} of" in formula
    assert f"Memory = {plan.CARD / 1e9:g} GB + weights" in formula


def test_all_cards_are_shown(big: Path, capsys: Any) -> None:
    assert main(["plan"]) == 0
    shown = capsys.readouterr().out
    assert "8,030,261,248 parameters, 32 layers x 14,336 neurons" in shown
    for device in (plan.CPU, *plan.CARDS):
        assert (f"\n{device} " in shown) == (device != plan.CPU)
    assert "does not fit" in shown
    assert "prompts: as prepared" in shown


def test_a_model_that_is_nowhere_names_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    changes = {"model": {"path": "models/none"}, "fetch": {"model": None}}
    monkeypatch.chdir(small.write_project(tmp_path, changes))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["plan"]) == 2
    assert "params: model.path: no config.json of models/none" in capsys.readouterr().err
    small.write_project(tmp_path, {**changes, "fetch": {"model": "gemma3-270m"}})
    assert main(["plan"]) == 2
    error = capsys.readouterr().err
    assert "params: model.path: models/none is not there yet" in error
    assert "python -m sparc3 fetch" in error
    hub = {"path": f"models/nobody/nothing@{'0' * 40}"}
    small.write_project(tmp_path, {"model": hub, "fetch": {"model": None}})
    assert main(["plan"]) == 2
    assert "params: model.path: no config.json of nobody/nothing" in capsys.readouterr().err


def test_the_published_experiment_is_planned_without_its_model() -> None:
    """From the repository alone: profiles/configs has the model's shape."""
    header, *rows = plan.costs([Path("profiles/llama3-8b.yaml")])
    assert header == ["device", "llama3-8b: GB a card", "llama3-8b: time"]
    found = {name: cells for name, *cells in rows}
    assert found["T4"][1] == "does not fit"  # 16 GB of weights on a card of 16
    assert found["A100-80"][1] != "does not fit"
    prompts = 384 + 93 + 93 + 93
    assert float(found["scores on disk"][0]) == pytest.approx(prompts * 458_752 * 4 / 1e9, rel=0.05)


def test_a_profile_beside_the_project(big: Path, capsys: Any) -> None:
    profile = big / "other.yaml"
    text = (big / "params.yaml").read_text()
    profile.write_text(text.replace("path: big", "path: model").replace("cuda", "cpu"))
    assert main(["plan", "--profile", str(profile)]) == 0
    shown = capsys.readouterr().out
    assert "3 layers x 24 neurons" in shown
    assert "not prepared" in shown  # what is in outputs/ is another model's
    with pytest.raises(InputError, match="--device 'A100' is not known"):
        plan.run(checks.load(), profile, "A100", 1)
