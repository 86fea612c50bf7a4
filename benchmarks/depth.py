"""Where does a behaviour live? Circuits confined to each third of depth, on held-out prompts.

    python -m benchmarks.depth [--behaviour NAME] [--sizes K ...] [--prompts N] [--texts N]

After a run, in its folder. Circuits of every method and size, of all layers or of one third, beside
as many random neurons of the same layers, none of them protected ones: the rise of the NLL of the
tune split's prompts beyond that of general text, whose perplexity is the cost. Nothing is chosen on
them. A table for docs/faithfulness.md.
"""

import argparse

import numpy as np

from sparc3.base.artifacts import read_prompts
from sparc3.base.files import Array, markdown
from sparc3.base.params import Params
from sparc3.circuits.choose import choose, circuit_of, protected, read_differential
from sparc3.circuits.circuit import INTACT, Circuit
from sparc3.circuits.methods import noise
from sparc3.measure.faithfulness import PARTS
from sparc3.measure.instrument import How, Measured
from sparc3.measure.instruments import nll, perplexity
from sparc3.model import loading
from sparc3.stages.checks import load

METHODS = ("lrp", "gradient")


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


def measure(
    params: Params, behaviour: str, every: list[Circuit], prompts: int, texts: int
) -> list[Measured]:
    """The whole model, and it without each circuit, on the behaviour's prompts and general text."""
    spec = params.behaviours[behaviour]
    model, tokenizer = loading.load(params.model), loading.tokenizer(params.model)
    how = How(params.evaluate, params.evaluate.batch_tokens, tokenizer)
    samples = [
        perplexity.encode(rows, tokenizer)
        for rows in (
            read_prompts(spec.prompts, "tune")[:prompts],
            read_prompts(params.differential.general, "tune")[:texts],
        )
    ]
    read = [nll.read(model, [INTACT, *every], sample, how) for sample in samples]
    return [Measured(*both) for both in zip(*read, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--behaviour", default="toxicity")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 30, 60, 125])
    parser.add_argument("--prompts", type=int, default=52)
    parser.add_argument("--texts", type=int, default=48)
    given = parser.parse_args()
    params = load()
    grid, values, importance = {}, np.empty((0, 0)), np.empty((0, 0))
    for method in METHODS:
        values, importance = read_differential(given.behaviour, method)
        for k in given.sizes:
            for part, circuit in circuits(params, values, importance, k).items():
                grid[method, part, k] = circuit
    for k in given.sizes:
        for part, circuit in circuits(
            params, noise(0, "depth", values.shape), importance, k
        ).items():
            grid["random", part, k] = circuit
    whole, *without = measure(params, given.behaviour, [*grid.values()], given.prompts, given.texts)
    lines = []
    for (method, part, k), after in zip(grid, without, strict=True):
        shift = nll.shift_interval(whole, after, 10_000)
        cost = perplexity.percent(whole.general, after.general)
        spread = f"{shift.value:+.3f} [{shift.low:+.3f}, {shift.high:+.3f}]"
        lines.append([str(k), method, part, spread, f"{cost:+.2f}"])
    print(markdown(["neurons", "method", "layers", "NLL shift, nats", "perplexity, %"], lines))


if __name__ == "__main__":
    main()
