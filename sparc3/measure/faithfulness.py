"""Faithfulness: does a score of neurons know what removing them does?

The true effect of a neuron on a prompt is the fall of the explained target y when that neuron alone
is removed: positive where it serves y. To first order it is h dy/dh, the score `gradient`. Scores
and effects are of the same prompts; the units of evidence are neurons.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from transformers import PreTrainedModel

from sparc3.base.files import Array
from sparc3.circuits.ablate import pruned_rows, without_each
from sparc3.circuits.circuit import Circuit
from sparc3.measure import inference
from sparc3.measure.inference import Estimate
from sparc3.measure.instrument import Progress
from sparc3.model import families, loading, trunk
from sparc3.relevance.attribution import Prompt, explained, run
from sparc3.relevance.scores import Target

STRATA = (1 / 64, 1 / 16, 1 / 4, 1)  # of a layer's neurons by |score|: where each stratum ends
PARTS = ("all", "early", "middle", "late")  # layers: all, and the thirds of depth
TOP = 0.1  # share of the sample whose precision is asked for


class Batch(NamedTuple):
    """Prompts as the model reads them: ids (sequence, token), padded, and lengths (sequence,)."""

    ids: torch.Tensor
    lengths: torch.Tensor
    target: Target

    def times(self, count: int) -> "Batch":
        return Batch(self.ids.repeat(count, 1), self.lengths.repeat(count), self.target)


def batch_of(model: PreTrainedModel, prompts: Sequence[Prompt], target: Target) -> Batch:
    sequences = [torch.tensor(s) for prompt in prompts for s in prompt.sequences]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    device = loading.input_device(model)
    lengths = torch.tensor([len(s) for s in sequences], device=device)
    return Batch(ids.to(device), lengths, target)


def values(model: PreTrainedModel, batch: Batch) -> Array:
    """y of every prompt of a batch, float64 (prompt,), by the model as it is."""
    with torch.inference_mode():
        hidden = run(model, batch.ids)
        y = explained(model, batch.target, hidden, batch.ids, batch.lengths)
    return y.cpu().numpy()


def strata(scores: Mapping[str, Array], count: int, seed: int) -> Array:
    """Flat ids of `count` different neurons at random, sorted: as many of every layer, and of a
    layer as many of every stratum of every score (layer, neuron), by rank of |score|.

    What decides a circuit are the few neurons at the top, which plain draws would miss.
    """
    layers, width = next(iter(scores.values())).shape
    rng = np.random.default_rng(seed)
    places = [
        {name: np.argsort(-np.abs(values[layer]), kind="stable") for name, values in scores.items()}
        for layer in range(layers)
    ]
    ends = [0, *(round(share * width) for share in STRATA)]
    cells = [(name, part) for part in range(len(STRATA)) for name in scores]
    taken: set[int] = set()
    queues = [rng.permutation(len(cells)) for _ in range(layers)]
    for turn in range(layers * width):
        if len(taken) >= min(count, layers * width):
            break
        layer, at = turn % layers, turn // layers
        name, part = cells[queues[layer][at % len(cells)]]
        ranks = places[layer][name]
        inside = [i for i in ranks[ends[part] : ends[part + 1]] + layer * width if i not in taken]
        rest = inside or [i for i in ranks + layer * width if i not in taken]
        taken.add(int(rng.choice(rest)))
    return np.array(sorted(taken))


def alone(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    neurons: Array,
    batch_tokens: int,
    progress: Progress | None = None,
) -> list[Array]:
    """Fall of y by removing each neuron alone, (neuron, prompt), for each of `batches`, which are
    of the same ids. `neurons`: sorted flat ids. Rows of one batch each lack another neuron, and
    begin at its layer. `progress` counts neurons.
    """
    first, blocks, width = batches[0], families.layers(model), families.width(model)
    every = [(int(i) // width, int(i) % width) for i in neurons]
    at_once = max(1, batch_tokens // first.ids.numel())
    with torch.inference_mode(), trunk.keeping(blocks, range(len(blocks))) as kept:
        hidden = run(model, first.ids)
        whole = [explained(model, b.target, hidden, b.ids, b.lengths) for b in batches]
        found: list[list[torch.Tensor]] = [[] for _ in batches]
        trunks = dict(kept)
        for layer in sorted({layer for layer, _ in every}):
            here = [neuron for at, neuron in every if at == layer]
            for start in range(0, len(here), at_once):
                some = here[start : start + at_once]
                circuits = [single(layer, neuron) for neuron in some]
                ids = first.times(len(some)).ids
                below = trunk.repeated(trunks[layer - 1], len(some)) if layer else None
                with pruned_rows(model, circuits) as tell, trunk.skipping(blocks[:layer], below):
                    tell([place for place in range(len(some)) for _ in first.ids])
                    hidden = run(model, ids)
                for rows, batch, y in zip(found, batches, whole, strict=True):
                    many = batch.times(len(some))
                    after = explained(model, batch.target, hidden, many.ids, many.lengths)
                    rows.append(y - after.view(len(some), -1))
                if progress:
                    progress(len(some))
    return [torch.cat(rows).cpu().numpy() for rows in found]


def single(layer: int, neuron: int) -> Circuit:
    return Circuit(np.array([layer]), np.array([neuron]), np.array([0.0]), np.array([0.0]))


def removed(ids: Array, width: int) -> Circuit:
    """The circuit of neurons by their flat ids, all removed."""
    return Circuit(*np.divmod(ids, width), np.zeros(len(ids)), np.zeros(len(ids)))


def together(model: PreTrainedModel, batch: Batch, circuits: Sequence[Circuit]) -> Array:
    """Fall of y by removing each of `circuits`, (circuit, prompt)."""
    whole = values(model, batch)
    without = without_each(model, circuits, lambda: values(model, batch))
    return np.stack([whole - y for y in without])


# --- how far scores agree with effects -------------------------------------------------------


def agreement(score: Array, effect: Array, resamples: int) -> dict[str, Estimate]:
    """Of neurons' scores and true effects, (neuron,), with intervals over neurons: Pearson's and
    Spearman's correlation, Spearman's of their sizes, the share whose signs agree, and of the TOP
    highest by score the share that is among as many highest by effect.
    """
    top = max(1, round(TOP * len(score)))
    first, best = (rankdata(-x, method="ordinal") <= top for x in (score, effect))

    def share(hits: Array, of: Array) -> Estimate:
        def statistic(weights: Array) -> Array:
            total = weights @ of.astype(float)
            hit = weights @ (hits & of)
            return np.divide(hit, total, out=np.zeros_like(total), where=total > 0)

        return inference.bootstrap(statistic, [len(score)], resamples)

    whole = np.ones(len(score), bool)
    return {
        "pearson": inference.correlation(score, effect, resamples),
        "spearman": inference.rank_agreement(score, effect, resamples=resamples),
        "size": inference.rank_agreement(np.abs(score), np.abs(effect), resamples=resamples),
        "sign": share(np.sign(score) == np.sign(effect), whole),
        "precision": share(best, first),
    }


def by_depth(
    score: Array, effect: Array, layer: Array, layers: int, resamples: int
) -> dict[str, dict[str, Estimate]]:
    """`agreement` of all neurons and of those of each third of depth; `layer` (neuron,)."""
    third = layer * 3 // layers
    inside = {"all": third >= 0} | {name: third == n for n, name in enumerate(PARTS[1:])}
    return {name: agreement(score[mask], effect[mask], resamples) for name, mask in inside.items()}


def curves(
    model: PreTrainedModel, batch: Batch, scores: Mapping[str, Array], sizes: Sequence[int]
) -> dict[str, dict[str, Array]]:
    """Perturbation curves: fall of y, (size, prompt), by removing together the `sizes` neurons of
    the highest scores (layer, neuron), "most", and of the lowest, "least".
    """
    width = families.width(model)
    ways, circuits = [], []
    for name, values_of in scores.items():
        order = np.argsort(-values_of, axis=None, kind="stable")
        for way, ids in (("most", order), ("least", order[::-1])):
            ways.append((name, way))
            circuits += [removed(ids[:k], width) for k in sizes]
    falls = together(model, batch, circuits).reshape(len(ways), len(sizes), -1)
    found: dict[str, dict[str, Array]] = {}
    for (name, way), fall in zip(ways, falls, strict=True):
        found.setdefault(name, {})[way] = fall
    return found


def area(curve: Mapping[str, Array], sizes: Sequence[int], resamples: int) -> Estimate:
    """Area between the two curves over log size, as a mean: how much more the neurons of high score
    do than those of low score, in the target's unit; with its interval over prompts.
    """
    between = curve["most"] - curve["least"]
    steps = np.diff(np.log(sizes)) if len(sizes) > 1 else np.ones(1)
    middle = (between[1:] + between[:-1]) / 2 if len(sizes) > 1 else between
    return inference.mean_interval(steps @ middle / steps.sum(), resamples=resamples)
