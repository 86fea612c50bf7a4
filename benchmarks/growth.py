"""How time and memory of attribution grow with prompts, tokens, layers and width.

    python -m benchmarks.growth

Random LLaMA models; one quantity at a time is doubled, three times, the others stay. Time is the
median over repeats in which all settings take turns, memory what a fresh process holds at its peak
beyond what it held with the model loaded. The slope is that of log time, or log memory, against log
quantity: 1 is linear, 0 is flat. Scores are streamed as the stage does it, shard by shard.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.attribution import own_peak
from benchmarks.generation import alternating, machine
from sparc3.relevance.attribution import Prompt, score

REPEATS = 5
DOUBLINGS = 4  # points
SHARD = 16  # prompts
BATCH_TOKENS = 512


@dataclass(frozen=True)
class Setting:
    prompts: int = 16
    tokens: int = 32
    layers: int = 6
    width: int = 768


def settings(quantity: str) -> list[Setting]:
    base = Setting()
    start = getattr(base, quantity)
    return [replace(base, **{quantity: start * 2**n}) for n in range(DOUBLINGS)]


def model_of(setting: Setting) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=576,
        intermediate_size=setting.width,
        num_hidden_layers=setting.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=1024,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def attribute(model: PreTrainedModel, setting: Setting) -> int:
    """Score all prompts and let go of each shard; how many prompts."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8192, (setting.prompts, setting.tokens), generator=generator).tolist()
    prompts = [Prompt(str(n), (row,)) for n, row in enumerate(ids)]
    shards = [prompts[start : start + SHARD] for start in range(0, len(prompts), SHARD)]
    every = score(model, shards, ["lrp"], batch_tokens=BATCH_TOKENS)
    return sum(len(scores["lrp"]) for scores in every)


def memory(setting: Setting) -> float:
    """GB beyond the loaded model, in a fresh process."""
    given = [f"{key}={value}" for key, value in asdict(setting).items()]
    command = [sys.executable, "-m", "benchmarks.growth", "--alone", *given]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def slope(quantities: Sequence[float], values: Sequence[float]) -> float:
    return float(np.polyfit(np.log(quantities), np.log(values), 1)[0])


def times(every: Sequence[Setting]) -> Mapping[Setting, float]:
    """Median seconds of each setting."""

    def way(setting: Setting) -> Callable[[], int]:
        model = model_of(setting)
        attribute(model, replace(setting, prompts=1))
        return lambda: int(attribute(model, setting) > 0)

    rates = alternating({repr(setting): way(setting) for setting in every}, REPEATS)
    return {s: 1 / statistics.median(rates[repr(s)]) for s in every}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alone", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        setting = Setting(**{k: int(v) for k, v in (part.split("=") for part in arguments.alone)})
        model = model_of(setting)
        attribute(model, Setting(prompts=1, tokens=2, layers=setting.layers, width=setting.width))
        before = own_peak()
        attribute(model, setting)
        print(own_peak() - before)
        return

    every = {field.name: settings(field.name) for field in fields(Setting)}
    seconds = times(list(dict.fromkeys(s for line in every.values() for s in line)))
    print(f"{machine()}, {REPEATS} repeats; {Setting()}, but for what is named")
    print(
        f"\n{'':8}  {'points':>24}  {'seconds':>24}  {'slope':>5}  {'GB beyond':>24}  {'slope':>5}"
    )
    for quantity, line in every.items():
        points = [getattr(setting, quantity) for setting in line]
        took, held = [seconds[s] for s in line], [memory(s) for s in line]
        cells = [
            " ".join(f"{value:{form}}" for value in values).rjust(24)
            for values, form in ((points, "d"), (took, ".2f"), (held, ".2f"))
        ]
        print(
            f"{quantity:8}  {cells[0]}  {cells[1]}  {slope(points, took):5.2f}  {cells[2]}  "
            f"{slope(points, held):5.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
