"""Attribution against the obvious way and against the least that any gradient costs.

    python -m benchmarks.attribution [MODEL]

naive    per-weight |w * dy/dw| of every linear layer but the head under AttnLRP, one prompt at a
         time: the 28 GB of LLaMA-3-8B are these weights
floor    forward and activation backward of the plain model, from the last position's largest logit
lrp      sparc3.relevance.attribution.score, in the same batches as the floor
lrp-abs  the same for |w * dy/dw| summed per neuron over the incoming weights of `up`

Throughput is the median over repeats in which the ways take turns, memory the peak of a process
that runs one way alone (model included).
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from benchmarks.generation import MODEL, alternating, as_installed, machine
from sparc3.base.params import Model
from sparc3.model import families, loading
from sparc3.relevance.attribution import Prompt, score
from sparc3.relevance.lrp import attnlrp

REPEATS = 5
SETTINGS = {256: 4, 16: 32}  # tokens per prompt: prompts per batch
NAIVE_PROMPTS = {256: 1, 16: 2}  # it is slow


def naive(model: PreTrainedModel, prompts: Sequence[Prompt]) -> int:
    layers = [m for m in families.body(model).modules() if isinstance(m, nn.Linear)]
    totals = [torch.zeros_like(layer.weight) for layer in layers]
    for layer in layers:
        layer.weight.requires_grad_(True)
    for prompt in prompts:
        with as_installed(), attnlrp(model):
            model(torch.tensor(prompt.sequences)).logits[0, -1].max().backward()
        for layer, total in zip(layers, totals, strict=True):
            assert layer.weight.grad is not None
            total += (layer.weight.detach() * layer.weight.grad).abs()
            layer.weight.grad = None
    for layer in layers:
        layer.weight.requires_grad_(False)
    return len(prompts)


def floor(model: PreTrainedModel, prompts: Sequence[Prompt]) -> int:
    ids = torch.tensor([prompt.sequences[0] for prompt in prompts])
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    states = families.body(model)(
        inputs_embeds=embedded, attention_mask=torch.ones_like(ids), use_cache=False
    )
    families.logits(model, states.last_hidden_state[:, -1]).amax(-1).sum().backward()
    return len(prompts)


def ours(name: str) -> Callable[[PreTrainedModel, Sequence[Prompt]], int]:
    def way(model: PreTrainedModel, prompts: Sequence[Prompt]) -> int:
        tokens = sum(len(s) for p in prompts for s in p.sequences)
        (scores,) = score(model, [prompts], [name], batch_tokens=tokens)
        return len(scores[name])

    return way


WAYS = {"naive": naive, "floor": floor, "lrp": ours("lrp"), "lrp-abs": ours("lrp-abs")}


def prompts_of(model: PreTrainedModel, way: str, tokens: int) -> list[Prompt]:
    """Random ids: only their number matters."""
    generator = torch.Generator().manual_seed(0)
    shape = (NAIVE_PROMPTS if way == "naive" else SETTINGS)[tokens], tokens
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    return [Prompt(str(i), (row,)) for i, row in enumerate(ids.tolist())]


def throughput(model: PreTrainedModel, tokens: int, repeats: int) -> dict[str, float]:
    """Median prompts per second of each way."""

    def prepared(name: str) -> Callable[[], int]:
        prompts = prompts_of(model, name, tokens)
        return lambda: WAYS[name](model, prompts)

    rates = alternating({name: prepared(name) for name in WAYS}, repeats)
    return {name: statistics.median(values) for name, values in rates.items()}


def peak_memory(path: str, way: str, tokens: int) -> float:
    """GB, of a fresh process that runs one way once."""
    command = [sys.executable, "-m", "benchmarks.attribution", path, "--alone", way, str(tokens)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def own_peak() -> float:
    """GB this process has held at most (Linux). Not ru_maxrss: a child starts at its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return peak * 1024 / 1e9


def product_rate(rows: int, inner: int, columns: int, repeats: int = 20) -> float:
    """GFLOP/s of float32 products (rows, inner) @ (inner, columns)."""
    a, b = torch.randn(rows, inner), torch.randn(columns, inner).T
    torch.mm(a, b)
    began = time.perf_counter()
    for _ in range(repeats):
        torch.mm(a, b)
    return 2 * rows * inner * columns * repeats / (time.perf_counter() - began) / 1e9


def floor_work(model: PreTrainedModel, tokens: int) -> float:
    """GFLOP per prompt in linear layers: forward, and backward to their inputs."""
    linear = [m for m in families.body(model).modules() if isinstance(m, nn.Linear)]
    weights = sum(m.weight.numel() for m in linear)
    head = model.get_parameter("lm_head.weight").numel()
    return 4 * (weights * tokens + head) / 1e9


def account(model: PreTrainedModel, tokens: int) -> dict[str, float]:
    """Shares of the floor's time: linear layers, attention, everything else."""
    prompts = prompts_of(model, "floor", tokens)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        floor(model, prompts)
    shares = {"linear layers": 0.0, "attention": 0.0, "elementwise, norms, copies": 0.0}
    for event in profiled.key_averages():
        attention = "scaled_dot_product" in event.key or "flash_attention" in event.key
        linear = event.key in ("aten::mm", "aten::addmm", "aten::bmm")
        kind = (
            "linear layers"
            if linear
            else "attention"
            if attention
            else "elementwise, norms, copies"
        )
        shares[kind] += event.self_cpu_time_total
    total = sum(shares.values())
    return {kind: share / total for kind, share in shares.items()}


def report(tokens: int, rates: Mapping[str, float], memory: Mapping[str, float]) -> list[str]:
    lines = [
        f"{SETTINGS[tokens]} prompts of {tokens} tokens in a batch (naive: one by one)",
        f"{'':8}  {'prompts/s':>9}  {'tokens/s':>8}  {'of floor':>8}  {'of naive':>8}  "
        f"{'peak GB':>7}  {'of floor':>8}",
    ]
    for name, rate in rates.items():
        lines.append(
            f"{name:8}  {rate:9.2f}  {rate * tokens:8.1f}  {rate / rates['floor']:8.2f}  "
            f"{rate / rates['naive']:8.1f}  {memory[name]:7.2f}  "
            f"{memory[name] / memory['floor']:8.2f}"
        )
    lines.append(f"lrp-abs takes {rates['lrp'] / rates['lrp-abs']:.2f} times as long as lrp")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=MODEL)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--alone", nargs=2, metavar=("WAY", "TOKENS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model = loading.load(Model(path=arguments.model))

    if arguments.alone:
        way, tokens = arguments.alone[0], int(arguments.alone[1])
        WAYS[way](model, prompts_of(model, way, tokens))
        print(own_peak())
        return

    print(machine(), flush=True)
    square = product_rate(2048, 2048, 2048)
    for tokens, batch in SETTINGS.items():
        rates = throughput(model, tokens, arguments.repeats)
        memory = {name: peak_memory(arguments.model, name, tokens) for name in WAYS}
        print("\n".join(["", *report(tokens, rates, memory)]))
        up = families.incoming(families.mlps(model)[0].up)
        shaped = product_rate(batch * tokens, up.shape[1], up.shape[0])
        done = rates["floor"] * floor_work(model, tokens)
        shares = ", ".join(f"{k} {v:.0%}" for k, v in account(model, tokens).items())
        print(
            f"floor: {done:.0f} GFLOP/s in linear layers, {done / square:.0%} of a 2048-cube "
            f"product's {square:.0f}, {done / shaped:.0%} of {shaped:.0f} at the shape of `up`\n"
            f"floor's time: {shares}",
            flush=True,
        )


if __name__ == "__main__":
    main()
