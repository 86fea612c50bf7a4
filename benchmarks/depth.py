"""Where does a behaviour live? Circuits confined to each third of depth, on held-out prompts.

    python -m benchmarks.depth [--behaviour NAME] [--sizes K ...] [--prompts N] [--texts N]

After a run, in its folder. Circuits of every method and size, of all layers or of one third, beside
as many random neurons of the same layers, none of them protected ones: the rise of the NLL of the
tune split's prompts beyond that of general text, whose perplexity is the cost. Then of every method
and part of depth the size that rises most there within `select.budget`, as `select` chooses, on the
test split's prompts and texts, which nothing was chosen on. Two tables for docs/faithfulness.md.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparc3.base.artifacts import read_prompts
from sparc3.base.files import Array, markdown
from sparc3.base.params import Params
from sparc3.circuits.choose import choose, circuit_of, keeps, protected, read_differential
from sparc3.circuits.circuit import INTACT, Circuit
from sparc3.circuits.methods import noise
from sparc3.measure.faithfulness import PARTS
from sparc3.measure.instrument import How, Measured, Sample
from sparc3.measure.instruments import nll, perplexity
from sparc3.model import loading
from sparc3.stages.checks import load

METHODS = ("lrp", "gradient", "gradient-t", "max-activation-auroc")
Point = tuple[str, str, int]  # method, part of depth, size


def circuits(params: Params, values: Array, importance: Array, k: int) -> dict[str, Circuit]:
    """By part of depth, of `k` neurons: the most negative that are not protected."""
    barred = protected(importance, params.sweep.protect[0])
    third = np.arange(len(values)) * 3 // len(values)
    outside = {"all": third < 0} | {name: third != n for n, name in enumerate(PARTS[1:])}
    found = {}
    for part, out in outside.items():
        ids = choose(values, k, barred | out[:, None], "--sizes")
        found[part] = circuit_of(params.methods["lrp"], values, ids)
    return found


def samples_of(
    params: Params, behaviour: str, split: str, prompts: int, texts: int, tokenizer: Any
) -> list[Sample]:
    """A split of the behaviour's prompts, and of general text."""
    counts = {params.behaviours[behaviour].prompts: prompts, params.differential.general: texts}
    return [
        perplexity.encode(read_prompts(name, split)[:count], tokenizer)
        for name, count in counts.items()
    ]


def measure(
    params: Params, every: list[Circuit], samples: list[Sample], model: Any, tokenizer: Any
) -> tuple[list[Measured], list[str]]:
    """The whole model, and it without each circuit, on prompts and general text; and the groups of
    the latter.
    """
    how = How(params.evaluate, params.evaluate.batch_tokens, tokenizer)
    read = [nll.read(model, [INTACT, *every], sample, how) for sample in samples]
    return [Measured(*both) for both in zip(*read, strict=True)], samples[1].groups


def within_budget(
    params: Params, whole: Measured, found: Mapping[Point, Measured], groups: Sequence[str]
) -> list[Point]:
    """Of every method and part of depth the size with the largest shift among those that keep to
    the budget of perplexity; none where no size does.
    """
    chosen: dict[tuple[str, str], Point] = {}
    for point, after in found.items():
        cost = {
            "ppl_delta": perplexity.percent(whole.general, after.general),
            "ppl_error": perplexity.percent_error(whole.general, after.general, groups),
        }
        best = chosen.get(point[:2])
        better = best is None or nll.shift(whole, after) > nll.shift(whole, found[best])
        if better and keeps(params.select.budget, cost):
            chosen[point[:2]] = point
    return [*chosen.values()]


def table(whole: Measured, found: Mapping[Point, Measured], groups: Sequence[str]) -> str:
    lines = []
    for (method, part, k), after in found.items():
        shift = nll.shift_interval(whole, after, 10_000)
        cost = perplexity.percent(whole.general, after.general)
        error = perplexity.percent_error(whole.general, after.general, groups)
        spread = f"{shift.value:+.3f} [{shift.low:+.3f}, {shift.high:+.3f}]"
        lines.append([method, part, str(k), spread, f"{cost:+.2f} ± {error:.2f}"])
    return markdown(["method", "layers", "neurons", "NLL shift, nats", "perplexity, %"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--behaviour", default="toxicity")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 30, 60, 125])
    parser.add_argument("--prompts", type=int, default=52)
    parser.add_argument("--texts", type=int, default=48)
    given = parser.parse_args()
    params = load()
    model, tokenizer = loading.load(params.model), loading.tokenizer(params.model)
    grid: dict[Point, Circuit] = {}
    for method in (*METHODS, "random"):
        values, importance = read_differential(
            given.behaviour, method if method in METHODS else "lrp"
        )
        if method == "random":
            values = noise(0, "depth", values.shape)
        for k in given.sizes:
            for part, circuit in circuits(params, values, importance, k).items():
                grid[method, part, k] = circuit

    def on(
        split: str, points: Sequence[Point]
    ) -> tuple[Measured, dict[Point, Measured], list[str]]:
        asked = params, given.behaviour, split, given.prompts, given.texts
        samples = samples_of(*asked, tokenizer)
        every = [grid[point] for point in points]
        (whole, *without), groups = measure(params, every, samples, model, tokenizer)
        return whole, dict(zip(points, without, strict=True)), groups

    tuned = on("tune", [*grid])
    print("Tune split:\n", table(*tuned), "Test split, chosen on the other:\n", sep="\n")
    print(table(*on("test", within_budget(params, *tuned))))


if __name__ == "__main__":
    main()
