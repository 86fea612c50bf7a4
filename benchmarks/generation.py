"""Completions against transformers' own, one at a time and batched, in tokens per second.

    python -m benchmarks.generation [MODEL]

All ways sample with the same settings from the same prompts; the slower ones do a part of the work.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from sparc3.base.params import Model
from sparc3.circuits.circuit import INTACT
from sparc3.measure.generate import Sampling, complete
from sparc3.model import families, loading
from sparc3.prompts.embedded import real_toxicity_prompts

MODEL = "models/smollm2-135m"
REPEATS = 5
BATCH = 200
COUNT = 12  # prompts
SAMPLING = Sampling(completions=25, new_tokens=20, temperature=1.0, top_p=0.9, seed=0)


def alternating(
    ways: Mapping[str, Callable[[], int]], repeats: int = REPEATS
) -> dict[str, list[float]]:
    """Items per second of each way, `repeats` times; a way returns how many items it did.

    The ways take turns, so that a busy moment of the machine falls on all of them alike.
    """
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            done = way()
            rates[name].append(done / (time.perf_counter() - began))
    return rates


@contextmanager
def as_installed() -> Iterator[None]:
    """Float32 products as PyTorch makes them unless told otherwise: for the ways that are not ours
    (`loading.load` prefers oneDNN's).
    """
    matmul = cast(Any, torch.backends.mkldnn).matmul
    preferred, matmul.fp32_precision = matmul.fp32_precision, "none"
    yield
    matmul.fp32_precision = preferred


def table(rates: Mapping[str, list[float]], unit: str, against: str) -> str:
    """Median and range of each way, and the ratio of its median to that of `against`."""
    width = max(map(len, rates))
    lines = [f"{'':{width}}  {'median':>8}  {'range':>15}  {'ratio':>6}   ({unit})"]
    for name, values in rates.items():
        median = statistics.median(values)
        ratio = median / statistics.median(rates[against])
        spread = f"{min(values):.1f}-{max(values):.1f}"
        lines.append(f"{name:{width}}  {median:8.1f}  {spread:>15}  {ratio:6.2f}")
    return "\n".join(lines)


def machine() -> str:
    """Processor, threads and versions, without which a timing says little."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = named[0] if named else platform.processor()
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def limit(model: PreTrainedModel) -> Callable[[], int]:
    """Tokens per second if decoding were the model's matrix products and nothing else."""
    weights: list[Tensor] = [families.outgoing(mlp.down) for mlp in families.mlps(model)]
    inputs = torch.randn(BATCH, weights[0].shape[1], dtype=model.dtype, device=model.device)
    share = sum(w.numel() for w in weights) / sum(p.numel() for p in model.parameters())

    @torch.inference_mode()
    def products() -> int:
        for weight in weights:
            (inputs @ weight.T)[0, 0].item()
        return round(BATCH * share)

    return products


def ways(model: PreTrainedModel, prompts: list[list[int]]) -> dict[str, Callable[[], int]]:
    """Each returns the number of tokens it drew."""
    device = loading.input_device(model)
    generate: Any = model.generate
    model.generation_config = GenerationConfig(pad_token_id=0)  # no end: equal work for all

    def sampled(prompts: list[list[int]], completions: int) -> int:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        settings: dict[str, Any] = {
            "do_sample": True,
            "temperature": SAMPLING.temperature,
            "top_p": SAMPLING.top_p,
            "top_k": 0,
            "max_new_tokens": SAMPLING.new_tokens,
            "num_return_sequences": completions,
        }
        with as_installed():
            drawn = generate(inputs=ids, attention_mask=seen.to(device), **settings)
        return drawn[:, longest:].numel()

    def ours() -> int:
        keys = [str(n) for n in range(len(prompts))]
        (drawn,) = complete(model, [INTACT], prompts, keys, SAMPLING, BATCH)
        return sum(len(tokens) for row in drawn for tokens in row)

    return {
        "generate, one at a time": lambda: sum(sampled([p], 1) for p in prompts[:3]),
        "generate, batch of 100": lambda: sampled(
            prompts[: 100 // SAMPLING.completions], SAMPLING.completions
        ),
        "complete": ours,
        "matrix products alone": limit(model),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=MODEL)
    spec = Model(path=parser.parse_args().model)
    model, tokenizer = loading.load(spec), loading.tokenizer(spec)
    texts = [row.text for row in real_toxicity_prompts({})]
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    prompts = [tokens for tokens in encoded if 5 <= len(tokens) <= 20][:COUNT]
    rates = alternating(ways(model, prompts))
    print(machine())
    print(
        f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, "
        f"{SAMPLING.completions} completions of {SAMPLING.new_tokens} tokens, "
        f"top-p {SAMPLING.top_p}, {REPEATS} repeats"
    )
    print(table(rates, "tokens/s", "generate, one at a time"))


if __name__ == "__main__":
    main()
