"""Which rule of AttnLRP costs its scores the agreement with what removing a neuron does?

    python -m benchmarks.rules [MODEL] [--texts FILE] [--pairs FILE] [--neurons N] [--prompts N]
        [--targets TARGET ...]

Spearman's correlation of the true effect of removing single neurons alone with h dy/dh, whose
gradient follows AttnLRP without one of its rules, by one of them alone, by rules that others have
put together, and by none. FILEs are prompt sets of a finished run; what no circuit was chosen on is
read. A table for docs/faithfulness.md.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import numpy as np

from sparc3.base.files import Array, markdown, read_jsonl
from sparc3.base.params import Model
from sparc3.measure.faithfulness import alone, batch_of, by_depth, strata
from sparc3.model import families, loading
from sparc3.relevance.attribution import Prompt, score
from sparc3.relevance.lrp import ATTNLRP, RULE_SETS, Rules
from sparc3.relevance.scores import Target
from sparc3.stages.attribute import encode

PLAIN = Rules(norm=False, activation=False, gate=(1, 1), queries=1, values=1)
VARIANTS: dict[str, Rules] = {
    "AttnLRP": ATTNLRP,
    "- norm": ATTNLRP._replace(norm=False),
    "- activation": ATTNLRP._replace(activation=False),
    "- gate": ATTNLRP._replace(gate=(1, 1)),
    "- attention products (RelP)": RULE_SETS["relp"],
    "- softmax (queries and keys constant)": ATTNLRP._replace(queries=0),
    "epsilon 0.01": ATTNLRP._replace(epsilon=0.01),
    "CP-LRP": RULE_SETS["cp-lrp"],
    "RelP, attention weights constant": RULE_SETS["relp"]._replace(queries=0),
    "norm alone": PLAIN._replace(norm=True),
    "activation alone": PLAIN._replace(activation=True),
    "gate alone": PLAIN._replace(gate=(0.5, 0.5)),
    "attention products alone": PLAIN._replace(queries=0.25, values=0.5),
    "gate and attention products": PLAIN._replace(gate=(0.5, 0.5), queries=0.25, values=0.5),
    "none: gradient": PLAIN,
}
RESAMPLES = 1000


def relevance(model: Any, prompts: list[Prompt], rules: Rules, target: Target) -> Array:
    """Mean over prompts, (layer, neuron)."""
    with patch.dict(RULE_SETS, {"attnlrp": rules}):
        (found,) = score(model, [prompts], ["lrp"], target=target, batch_tokens=2048)
    return found["lrp"].mean(0, dtype=np.float64)


def held_out(path: Path, count: int) -> list[dict[str, Any]]:
    """As the stage takes them: of the tune split, or of blocks that are tested."""
    rows = [row for row in read_jsonl(path) if row["split"] not in ("attribute", "test", "block-0")]
    middle = np.median([row["tokens"] for row in rows])
    return sorted(rows, key=lambda row: abs(row["tokens"] - middle))[:count]


def measure(
    model: Any, prompts: list[Prompt], targets: list[Target], count: int
) -> list[list[str]]:
    """A line for every target and variant."""
    found: dict[tuple[Target, str], Array] = {
        (target, name): relevance(model, prompts, rules, target)
        for target in targets
        for name, rules in VARIANTS.items()
    }
    first = {name: found[targets[0], name] for name in ("AttnLRP", "none: gradient")}
    neurons = strata(first, count, seed=0)
    batches = [batch_of(model, prompts, target) for target in targets]
    effects = dict(zip(targets, alone(model, batches, neurons, 2048), strict=True))
    layers, width = families.num_layers(model), families.width(model)
    lines = []
    for (target, name), values in found.items():
        given = values.ravel()[neurons], effects[target].mean(1), neurons // width
        parts = by_depth(*given, layers, RESAMPLES)
        rank, line = parts["all"]["spearman"], parts["all"]["pearson"]
        cells = [f"{rank.value:.2f} [{rank.low:.2f}, {rank.high:.2f}]", f"{line.value:.2f}"]
        cells += [f"{parts[part]['spearman'].value:.2f}" for part in ("early", "middle", "late")]
        lines.append([target, name, *cells])
        print(*lines[-1], sep="  ", file=sys.stderr, flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="models/smollm2-135m")
    parser.add_argument("--texts", type=Path, default=Path("outputs/prompts/toxicity.jsonl"))
    parser.add_argument("--pairs", type=Path, default=Path("outputs/prompts/race.jsonl"))
    parser.add_argument("--neurons", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--targets", nargs="+", choices=get_args(Target), default=get_args(Target))
    given = parser.parse_args()
    spec = Model(path=given.model)
    model, tokenizer = loading.load(spec), loading.tokenizer(spec)
    texts, pairs = (held_out(path, given.prompts) for path in (given.texts, given.pairs))
    lines: list[list[str]] = []
    if of_texts := [target for target in given.targets if target != "pair"]:
        lines += measure(model, encode(texts, tokenizer, "likelihood"), of_texts, given.neurons)
    if "pair" in given.targets:
        lines += measure(model, encode(pairs, tokenizer, "pair"), ["pair"], given.neurons)
    header = ["target", "rules", "Spearman", "Pearson", "early", "middle", "late"]
    print(f"{given.model}, {given.neurons} neurons, {given.prompts} prompts of each kind\n")
    print(markdown(header, lines))


if __name__ == "__main__":
    main()
