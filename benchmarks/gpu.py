"""What a card does with a model of LLaMA-3-8B's shape: one command, eight minutes, no network.

    python -m benchmarks.gpu                  on a card of 40 GB or more
    python -m benchmarks.gpu --small          everything at toy size, on any machine: does it run?

The weights are random, made on the card: only shapes matter. Each way runs once unmeasured, then
for some seconds, of which the median is told; the share is that of the card's own matrix products,
measured first, for the operations that `sparc3 plan` counts. The naive way keeps a score for every
weight, one prompt at a time: measured on one layer's, and extrapolated to all. A part that would
begin after six minutes is left out, so that the command ends in time.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.generation import machine
from sparc3.circuits.circuit import INTACT, Circuit
from sparc3.commands import cost
from sparc3.measure.generate import Sampling, complete
from sparc3.measure.likelihood import token_nll
from sparc3.model import families
from sparc3.relevance.attribution import Prompt, score
from sparc3.relevance.lrp import attnlrp

MINUTES = 8
BEGIN_BEFORE = 0.75  # of that: a part that would begin later is left out
NEURONS = 500  # of a circuit


class Size(NamedTuple):
    """Of the model, of what it reads, and how long a way is measured."""

    hidden: int
    width: int
    layers: int
    heads: int
    keys: int
    vocabulary: int
    long: int  # tokens of a long sequence
    batch_tokens: int
    prompts: int  # short ones, of 20 tokens
    circuits: int
    completions: int  # of each of the first 8 prompts
    seconds: float


LLAMA_3_8B = Size(4096, 14336, 32, 32, 8, 128256, 2048, 8192, 400, 4, 25, 15)
SMALL = Size(64, 128, 3, 4, 2, 256, 64, 256, 16, 2, 2, 0)
SHORT, NEW_TOKENS = 20, 20  # tokens of a prompt, and of a completion


class Row(NamedTuple):
    """One way: items per second, operations per second, peak bytes."""

    way: str
    unit: str
    rate: float
    operations: float
    memory: float


def model_of(size: Size, device: str) -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.keys,
        vocab_size=size.vocabulary,
        max_position_embeddings=8192,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    model.generation_config = GenerationConfig(pad_token_id=0)  # no end: equal work for all
    return model


def timed(way: Callable[[], object], device: str, seconds: float) -> tuple[float, float]:
    """Median seconds, after a run that is not counted, and peak bytes on the card."""
    card = device.startswith("cuda")
    way()
    if card:
        torch.cuda.reset_peak_memory_stats()
    taken: list[float] = []
    while not taken or (sum(taken) < seconds and len(taken) < 20):
        began = time.perf_counter()
        way()
        if card:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken), torch.cuda.max_memory_allocated() if card else 0.0


def products(model: PreTrainedModel, size: Size) -> tuple[Callable[[], object], float]:
    """The MLP's products on a batch, and their operations: the card's rate."""
    weight = families.incoming(families.mlps(model)[0].up)
    x = torch.randn(size.batch_tokens, size.hidden, device=weight.device, dtype=weight.dtype)

    def way() -> None:
        for _ in range(20):
            torch.mm(x, weight.T)

    return way, 20 * 2.0 * size.batch_tokens * weight.numel()


def random_prompts(size: Size, count: int, tokens: int) -> list[Prompt]:
    ids = np.random.default_rng(0).integers(3, size.vocabulary, (count, tokens)).tolist()
    return [Prompt(str(i), (row,)) for i, row in enumerate(ids)]


def circuits_of(size: Size) -> list[Circuit]:
    """The intact model, and random circuits whose first layers are spread over the model."""
    rng, found = np.random.default_rng(1), [INTACT]
    for place in range(size.circuits):
        first = place * size.layers // size.circuits
        neurons = min(NEURONS, size.width)
        layers = rng.integers(first, size.layers, neurons)
        places = rng.permutation(size.width)[:neurons]
        found.append(Circuit(layers, places, -np.ones(neurons), np.zeros(neurons)))
    return found


def weights_scored(model: PreTrainedModel, prompt: Prompt, layers: int) -> Callable[[], object]:
    """|w * dy/dw| of every weight of the first `layers` layers under AttnLRP, for one prompt."""
    weights = [
        module.weight
        for layer in families.layers(model)[:layers]
        for module in layer.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    ids = torch.tensor(prompt.sequences, device=model.device)

    def way() -> None:
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        for weight in weights:
            weight.requires_grad_()
        with attnlrp(model):
            hidden = families.body(model)(inputs_embeds=embedded, use_cache=False)
            y = families.logits(model, hidden.last_hidden_state[:, -1]).max()
        gradients = torch.autograd.grad(y, [embedded, *weights])[1:]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.requires_grad_(False)
            (weight * gradient).abs_()

    return way


def ways(model: PreTrainedModel, size: Size) -> dict[str, tuple[Callable[[], Any], str, float]]:
    """Of each way: what it does, its unit, and how many of them; `operations` counts the rest."""
    long = random_prompts(size, max(1, 2 * size.batch_tokens // size.long), size.long)
    short = random_prompts(size, size.prompts, SHORT)
    texts, circuits = [list(p.sequences[0]) for p in long], circuits_of(size)
    begun = [list(p.sequences[0]) for p in short[:8]]
    sampling = Sampling(size.completions, NEW_TOKENS, temperature=1.0, top_p=0.9, seed=0)
    drawn = len(circuits) * len(begun) * size.completions * NEW_TOKENS

    def attribute(prompts: list[Prompt]) -> Callable[[], Any]:
        return lambda: next(iter(score(model, [prompts], ["lrp"], batch_tokens=size.batch_tokens)))

    def generate() -> Any:
        settings: dict[str, Any] = {"do_sample": True, "top_p": 0.9, "top_k": 0}
        ids = torch.tensor(begun[:1], device=model.device)
        seen = torch.ones_like(ids)
        made: Any = model.generate
        return made(inputs=ids, attention_mask=seen, max_new_tokens=NEW_TOKENS, **settings)

    def likelihood() -> Any:
        names = [p.id for p in long]
        return token_nll(model, circuits, texts, names, size.batch_tokens)

    read = len(circuits) * sum(map(len, texts))
    return {
        f"attribution, {size.long} tokens": (attribute(long), "tokens", sum(map(len, texts))),
        f"attribution, {SHORT} tokens": (attribute(short), "tokens", SHORT * len(short)),
        f"likelihood, {len(circuits)} models": (likelihood, "tokens", read),
        f"completions, {len(circuits)} models": (
            lambda: complete(model, circuits, begun, [p.id for p in short[:8]], sampling),
            "tokens",
            drawn,
        ),
        "transformers.generate, one at a time": (generate, "tokens", NEW_TOKENS),
    }


def operations(model: cost.Shape, size: Size) -> list[float]:
    """What `plan` counts for each of `ways`."""
    long = [size.long] * max(1, 2 * size.batch_tokens // size.long)
    times, begun = size.circuits + 1, [SHORT] * 8

    def attribution(lengths: Sequence[int]) -> float:
        each = [[length] for length in lengths]
        return cost.attribution(model, each, ["lrp"], "max-logit", size.batch_tokens).operations

    return [
        attribution(long),
        attribution([SHORT] * size.prompts),
        cost.likelihood(model, times, long, size.batch_tokens).operations,
        cost.generation(model, times, begun, size.completions, NEW_TOKENS).operations,
        cost.generation(model, 1, begun[:1], 1, NEW_TOKENS).operations,
    ]


def measure(size: Size, device: str, deadline: float) -> tuple[list[Row], str]:
    """A row for each way, the card's own products first, and the profile of attribution."""
    model = model_of(size, device)
    shape = cost.shape(model.config, "bfloat16")
    way, done = products(model, size)
    seconds, memory = timed(way, device, size.seconds / 5)
    rows = [Row("matrix products", "operations", done / seconds, done / seconds, memory)]
    every = ways(model, size)
    for (name, (way, unit, count)), done in zip(
        every.items(), operations(shape, size), strict=True
    ):
        if time.monotonic() < deadline:
            seconds, memory = timed(way, device, size.seconds)
            rows.append(Row(name, unit, count / seconds, done / seconds, memory))
    if time.monotonic() < deadline:
        prompt = random_prompts(size, 1, size.long)[0]
        base, one = (
            timed(weights_scored(model, prompt, n), device, size.seconds / 3) for n in (0, 1)
        )
        whole = base[0] + size.layers * max(one[0] - base[0], 0)
        held = one[1] + (size.layers - 1) * max(one[1] - base[1], 0)
        name = f"naive, {size.long} tokens, from one layer"
        rows.append(Row(name, "tokens", size.long / whole, 0.0, held))
    attribution, *_ = next(iter(every.values()))
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * device.startswith("cuda")
    with profile(activities=kinds) as profiled:
        attribution()
    order = f"self_{'cuda' if device.startswith('cuda') else 'cpu'}_time_total"
    table = profiled.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=40)
    return rows, table


def report(rows: Sequence[Row]) -> str:
    """A Markdown table, and how much faster than the naive way and than one at a time."""
    peak = rows[0].operations
    lines = ["| way | a second | TFLOP/s | of matrix rate | peak GB |", "|---|---|---|---|---|"]
    for row in rows:
        flops = f"{row.operations / 1e12:.3g}" if row.operations else ""
        share = f"{100 * row.operations / peak:.3g} %" if row.operations else ""
        memory = f"{row.memory / 1e9:.1f}" if row.memory else ""
        lines.append(f"| {row.way} | {row.rate:,.0f} {row.unit} | {flops} | {share} | {memory} |")
    rates: Mapping[str, float] = {row.way.split(",")[0]: row.rate for row in reversed(rows)}
    for ours, theirs in (("attribution", "naive"), ("completions", "transformers.generate")):
        if ours in rates and theirs in rates:
            lines.append(f"\n{ours}: {rates[ours] / rates[theirs]:.1f} times {theirs}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="toy size, on the CPU")
    small = parser.parse_args(argv).small
    if not small and not torch.cuda.is_available():
        parser.error("no card is here; --small tries everything on the CPU")
    size, device = (SMALL, "cpu") if small else (LLAMA_3_8B, "cuda:0")
    name = machine() if small else f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}"
    rows, table = measure(size, device, began + 60 * MINUTES * BEGIN_BEFORE)
    print(f"{name}, {'toy' if small else 'LLaMA-3-8B'} shape, bfloat16\n")
    print(report(rows))
    print(f"\nWhere the time of attribution goes:\n\n{table}")
    print(f"{time.monotonic() - began:.0f} seconds in all")


if __name__ == "__main__":
    main()
