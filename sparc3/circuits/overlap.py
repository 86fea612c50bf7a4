"""Sets of neurons: how far circuits overlap, and which part of that overlap chance explains.

A circuit is a 1-D array of flat ids, `layer * width + neuron`, and circuits come as a mapping from
name to ids. `total` is the number of neurons to choose from. Two empty circuits have Jaccard 0; an
overlap that can only be 0 has enrichment 1 and p 1.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, combinations, compress
from math import log, prod
from typing import Any

import numpy as np
from scipy.special import gammaln

from sparc3.base.files import Array

Names = tuple[str, ...]
FEW = 10  # behaviours of which every combination is looked at; of more, every pair
MARK = "."  # between behaviours in a key; no name of a behaviour holds it


def joined(names: Iterable[str]) -> str:
    """One key for a group of behaviours, whatever their order: ("b", "a") is "a.b"."""
    return MARK.join(sorted(names))


def subsets(names: Iterable[str], smallest: int) -> Iterator[Names]:
    """Every combination of at least `smallest` names, but of more than FEW none of more than two:
    small ones first, in the order given.
    """
    names = list(names)
    sizes = range(smallest, (len(names) if len(names) <= FEW else 2) + 1)
    return chain.from_iterable(combinations(names, size) for size in sizes)


def regions(sets: Mapping[str, Array]) -> dict[str, Array]:
    """The regions of a Venn diagram, the sorted ids that lie in exactly those sets: all 2^n - 1 of
    up to FEW sets, of more those that hold any.
    """
    names, union = list(sets), np.unique(np.concatenate(list(sets.values())))
    inside = np.stack([np.isin(union, ids) for ids in sets.values()], axis=1)
    patterns, place = np.unique(inside, axis=0, return_inverse=True)
    groups = [joined(compress(names, pattern)) for pattern in patterns]
    found = {group: union[place.ravel() == i] for i, group in enumerate(groups)}
    every = map(joined, subsets(names, 1)) if len(names) <= FEW else groups
    return {group: found.get(group, union[:0]) for group in every}


def common(*sets: Array) -> int:
    """How many ids lie in every one of the sets (of distinct ids)."""
    _, counts = np.unique(np.concatenate(sets), return_counts=True)
    return int(np.sum(counts == len(sets)))


def jaccard(*sets: Array) -> float:
    """|intersection| / |union| of any number of sets of distinct ids, in [0, 1]."""
    union = np.unique(np.concatenate(sets)).size
    return common(*sets) / union if union else 0.0


def expected(sizes: Sequence[int], total: int) -> float:
    """Mean overlap of sets of these sizes drawn independently: product of sizes / total^(n-1)."""
    return prod(sizes) / total ** (len(sizes) - 1)


def enrichment(observed: int, sizes: Sequence[int], total: int) -> float:
    """Observed overlap over the mean overlap of independent draws; 1 where only 0 is possible."""
    mean = expected(sizes, total)
    return observed / mean if mean else 1.0


def log_distribution(sizes: Sequence[int], total: int) -> Array:
    """Log-probability of every size of the overlap of n independent uniform draws.

    Shape (min(sizes) + 1,), by size of the overlap; -inf where it is impossible. The overlap of the
    first m + 1 sets, given that of the first m, is hypergeometric; summing over the latter, one set
    at a time, gives the exact law (Fisher's test for n = 2). In logarithms: nothing underflows.
    """
    ordered = sorted(sizes)
    factorial = gammaln(np.arange(total + 1) + 1.0)

    def ways(n: int, r: Array) -> Array:
        return factorial[n] - factorial[r] - factorial[n - r]

    law = np.full(ordered[0] + 1, -np.inf)
    law[-1] = 0.0
    for size in ordered[1:]:
        following = np.full_like(law, -np.inf)
        for overlap in np.flatnonzero(law > -np.inf).tolist():
            kept = np.arange(max(0, size - (total - overlap)), overlap + 1)
            step = ways(overlap, kept) + ways(total - overlap, size - kept)
            step -= ways(total, np.array(size))
            following[kept] = np.logaddexp(following[kept], law[overlap] + step)
        law = following
    return law


def log_upper_tail(law: Array, observed: int) -> float:
    """Natural logarithm of P(overlap >= observed) under a law as `log_distribution` returns it."""
    if observed <= 0:
        return 0.0
    return min(0.0, float(np.logaddexp.reduce(law[observed:])))


def overlap_p(observed: int, sizes: Sequence[int], total: int) -> float:
    """P(|A1 & ... & An| >= observed) for independent uniform draws; 0 below about 1e-308."""
    return float(np.exp(log_upper_tail(log_distribution(sizes, total), observed)))


def layered_log_distribution(counts: Array, width: int) -> Array:
    """As `log_distribution`, for sets that keep their number of neurons in every layer, `counts`
    (layer, set): the convolution of the layers' laws.
    """
    law = np.zeros(1)
    for sizes in counts.tolist():
        layer = log_distribution(sizes, width)
        summed = np.full(law.size + layer.size - 1, -np.inf)
        for overlap, weight in enumerate(layer):
            part = slice(overlap, overlap + law.size)
            summed[part] = np.logaddexp(summed[part], law + weight)
        law = summed
    return law


def overlaps(sets: Mapping[str, Array], layers: int, width: int) -> dict[str, dict[str, Any]]:
    """Every pair, triple, ... of circuits, each against uniform draws and, as `layered_*`, against
    draws that keep every circuit's number of neurons per layer, which do not call it an overlap
    when two circuits merely prefer the same layers. p is P(overlap >= observed); log10_p holds
    where p underflows.
    """
    total = layers * width
    counts = {name: layer_counts(ids, layers, width) for name, ids in sets.items()}
    out = {}
    for names in subsets(sets, 2):
        members = [sets[name] for name in names]
        sizes = [ids.size for ids in members]
        observed = common(*members)
        by_layer = np.stack([counts[name] for name in names], axis=1)
        layered = sum(expected(row, width) for row in by_layer.tolist())
        row = {"names": names, "sizes": sizes, "observed": observed, "jaccard": jaccard(*members)}
        for null, mean, law in (
            ("", expected(sizes, total), log_distribution(sizes, total)),
            ("layered_", layered, layered_log_distribution(by_layer, width)),
        ):
            log10_p = log_upper_tail(law, observed) / log(10)
            row |= {
                f"{null}expected": mean,
                f"{null}enrichment": observed / mean if mean else 1.0,
                f"{null}log10_p": log10_p,
                f"{null}p": 10.0**log10_p,
            }
        out[joined(names)] = row
    return out


def triple_given_pairs(
    triple: int, pairs: tuple[int, int, int], sizes: tuple[int, int, int], total: int
) -> dict[str, Any]:
    """How surprising |A & B & C| >= triple is, given the pairwise overlaps (A&B, A&C, B&C).

    `through[i]`: its P if the two others meet only through set i, inside which their overlaps with
    it are independent uniform draws; `through_expected[i]` its mean. `p` is the largest of the
    three (with its mean `expected`): small only if no single set explains the triple.
    `joint_p`, `joint_expected`: by the exact law of three independent uniform draws given all three
    pairwise overlaps: all assignments of neurons to the eight regions are equally likely, so P(t)
    is proportional to 1 / product of factorials of the regions. Where pairwise overlaps are rare, a
    shared triple is the cheapest way to get all three of them: this law expects a large one.
    """
    ab, ac, bc = pairs
    a, b, c = sizes

    def cells(t: Array) -> Array:
        alone = [a - ab - ac + t, b - ab - bc + t, c - ac - bc + t]
        return np.stack([t, ab - t, ac - t, bc - t, *alone, total - (a + b + c) + ab + ac + bc - t])

    possible = np.arange(min(pairs) + 1)
    possible = possible[(cells(possible) >= 0).all(axis=0)]
    law = -gammaln(cells(possible) + 1.0).sum(axis=0)
    law -= np.logaddexp.reduce(law)
    through = [
        (overlap_p(triple, two, size), expected(two, size) if size else 0.0)
        for two, size in (((ab, ac), a), ((ab, bc), b), ((ac, bc), c))
    ]
    p, mean = max(through)
    return {
        "p": p,
        "expected": mean,
        "through": [p for p, _ in through],
        "through_expected": [mean for _, mean in through],
        "joint_p": min(1.0, float(np.exp(law[possible >= triple]).sum())),
        "joint_expected": float(np.exp(law) @ possible),
    }


def layer_counts(ids: Array, layers: int, width: int) -> Array:
    """Neurons per layer, shape (layers,)."""
    return np.bincount(ids // width, minlength=layers)


def late_layers(layers: int) -> int:
    """How many layers stand for the last 10 of LLaMA-3-8B's 32."""
    return max(1, round(layers * 10 / 32))


def late_share(counts: Array, last: int) -> float:
    """Share of the neurons that lie in the last `last` layers, in [0, 1]; 0 for no neurons."""
    return float(counts[len(counts) - last :].sum() / max(1, counts.sum()))
