"""Sets of neurons: how far circuits overlap, and which part of that overlap chance explains.

A neuron is named by its flat index `layer * width + neuron`. A circuit is a 1-D array of such ids,
and circuits come as a mapping from name to ids. `total` is the number of neurons to choose from.
Where a group of behaviours needs one key, in files and metrics, `joined` makes it.

Defined edge cases: two empty circuits have Jaccard 0 (they share nothing); an overlap that can only
be 0 has enrichment 1 and p 1; a constant differential correlates 0 with everything.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import log, prod

import numpy as np
from scipy.special import gammaln

from sparc3.base.errors import InputError
from sparc3.base.files import Array

Names = tuple[str, ...]
MARK = "."  # between behaviours in a key; no name of a behaviour holds it


def joined(names: Iterable[str]) -> str:
    """One key for a group of behaviours, whatever their order: ("b", "a") is "a.b"."""
    return MARK.join(sorted(names))


# Regions and measures of overlap


def checked(sets: Mapping[str, Array], total: int) -> dict[str, Array]:
    """The same sets as int64 arrays; an id that is no neuron or that appears twice is refused."""
    out = {}
    for name, given in sets.items():
        ids = np.asarray(given)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise InputError(f"circuit {name!r}: expected a 1-D array of integer neuron ids")
        ids = ids.astype(np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < total:
            raise InputError(f"circuit {name!r}: neuron ids must lie in [0, {total})")
        if np.unique(ids).size != ids.size:
            raise InputError(f"circuit {name!r}: a neuron is listed twice; list each one once")
        out[name] = ids
    return out


def subsets(names: Sequence[str], smallest: int) -> Iterator[Names]:
    """Every combination of at least `smallest` names: small ones first, in the order given."""
    for size in range(smallest, len(names) + 1):
        yield from combinations(names, size)


def regions(sets: Mapping[str, Array], total: int) -> dict[Names, Array]:
    """All 2^n - 1 regions of a Venn diagram: the sorted ids that lie in exactly those sets."""
    sets = checked(sets, total)
    names = list(sets)
    union = np.unique(np.concatenate([*sets.values(), np.empty(0, np.int64)]))
    inside = {name: np.isin(union, ids) for name, ids in sets.items()}
    out = {}
    for group in subsets(names, 1):
        exactly = [inside[name] == (name in group) for name in names]
        out[group] = union[np.logical_and.reduce(exactly)]
    return out


def jaccard(*sets: Array) -> float:
    """|intersection| / |union| of any number of sets of distinct ids, in [0, 1]."""
    members, counts = np.unique(np.concatenate(sets), return_counts=True)
    return float(np.sum(counts == len(sets)) / members.size) if members.size else 0.0


def common(*sets: Array) -> int:
    """How many ids lie in every one of the sets (of distinct ids)."""
    _, counts = np.unique(np.concatenate(sets), return_counts=True)
    return int(np.sum(counts == len(sets)))


# Chance


def expected(sizes: Sequence[int], total: int) -> float:
    """Mean overlap of sets of these sizes drawn independently: product of sizes / total^(n-1)."""
    check_sizes(sizes, total)
    return prod(int(size) for size in sizes) / int(total) ** (len(sizes) - 1)


def enrichment(observed: float, sizes: Sequence[int], total: int) -> float:
    """Observed overlap over the mean overlap of independent draws; 1 where only 0 is possible."""
    mean = expected(sizes, total)
    return observed / mean if mean else 1.0


def check_sizes(sizes: Sequence[int], total: int) -> None:
    if not sizes or min(sizes) < 0 or max(sizes) > total:
        raise InputError(f"circuit sizes {list(sizes)}: expected each between 0 and {total}")


def log_distribution(sizes: Sequence[int], total: int) -> Array:
    """Log-probability of every size of the overlap of n independent uniform draws.

    The overlap of the first m + 1 sets, given that of the first m, is hypergeometric; summing over
    the latter, one set at a time, gives the exact law (Fisher's test for n = 2). In logarithms,
    so that it stays accurate where the probability itself underflows.

    Returns shape (min(sizes) + 1,), index = size of the overlap; -inf where it is impossible.
    """
    check_sizes(sizes, total)
    ordered = sorted(int(size) for size in sizes)
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
    if observed >= law.size:
        return -np.inf
    return min(0.0, float(np.logaddexp.reduce(law[observed:])))


def overlap_p(observed: int, sizes: Sequence[int], total: int) -> float:
    """P(|A1 & ... & An| >= observed) for independent uniform draws; 0 below about 1e-308."""
    return float(np.exp(log_upper_tail(log_distribution(sizes, total), observed)))


def layered_log_distribution(counts: Array, width: int) -> Array:
    """As `log_distribution`, for sets that keep their number of neurons in every layer.

    `counts` (layer, set) holds those numbers, `width` the neurons per layer. The overlap is the sum
    of independent overlaps of the layers, so its law is the convolution of theirs: what a
    permutation of neurons within layers tends to with infinitely many draws.
    """
    law = np.zeros(1)
    for sizes in np.asarray(counts):
        layer = log_distribution([int(size) for size in sizes], width)
        summed = np.full(law.size + layer.size - 1, -np.inf)
        for overlap, weight in enumerate(layer):
            part = slice(overlap, overlap + law.size)
            summed[part] = np.logaddexp(summed[part], law + weight)
        law = summed
    return law


@dataclass(frozen=True)
class Overlap:
    """The overlap of two or more circuits, against uniform draws and against draws within layers.

    `layered_*` keep every circuit's number of neurons per layer, so they do not call it an overlap
    when two circuits merely prefer the same layers. p is P(overlap >= observed); log10_p holds
    where p underflows.
    """

    names: Names
    sizes: tuple[int, ...]
    observed: int
    jaccard: float
    expected: float
    enrichment: float
    log10_p: float
    layered_expected: float
    layered_enrichment: float
    layered_log10_p: float

    @property
    def p(self) -> float:
        return 10.0**self.log10_p

    @property
    def layered_p(self) -> float:
        return 10.0**self.layered_log10_p


def overlaps(sets: Mapping[str, Array], layers: int, width: int) -> list[Overlap]:
    """Every pair, triple, ... of the circuits of a model with `layers` x `width` neurons."""
    total = layers * width
    sets = checked(sets, total)
    counts = {name: layer_counts(ids, layers, width) for name, ids in sets.items()}
    out = []
    for names in subsets(list(sets), 2):
        members = [sets[name] for name in names]
        sizes = tuple(ids.size for ids in members)
        observed = common(*members)
        by_layer = np.stack([counts[name] for name in names], axis=1)
        layered = sum(expected(row, width) for row in by_layer.tolist())
        law = log_distribution(sizes, total)
        layered_law = layered_log_distribution(by_layer, width)
        out.append(
            Overlap(
                names=names,
                sizes=sizes,
                observed=observed,
                jaccard=jaccard(*members),
                expected=expected(sizes, total),
                enrichment=enrichment(observed, sizes, total),
                log10_p=log_upper_tail(law, observed) / log(10),
                layered_expected=layered,
                layered_enrichment=observed / layered if layered else 1.0,
                layered_log10_p=log_upper_tail(layered_law, observed) / log(10),
            )
        )
    return out


@dataclass(frozen=True)
class GivenPairs:
    """How surprising a triple overlap is once the pairwise overlaps are known.

    `through[i]`: P(triple >= observed) if, inside set i, its overlaps with the two others are
    independent uniform draws, i.e. the two others meet only through set i; `through_expected[i]`
    its mean. `p` is the largest of the three (with its mean `expected`): small only if no single
    set explains the triple, a valid level for that union of hypotheses.
    `joint_p`, `joint_expected`: the exact law of the triple of three independent uniform draws
    given all three pairwise overlaps at once (equally the law without three-way interaction).
    The two answers can differ as far as possible: where pairwise overlaps are rare events, a shared
    triple is the cheapest way to get all three of them, so the joint law expects a large triple.
    """

    p: float
    expected: float
    through: tuple[float, float, float]
    through_expected: tuple[float, float, float]
    joint_p: float
    joint_expected: float


def triple_given_pairs(
    triple: int, pairs: tuple[int, int, int], sizes: tuple[int, int, int], total: int
) -> GivenPairs:
    """P(|A & B & C| >= triple) given the pairwise overlaps `pairs` = (A&B, A&C, B&C).

    Through A: within A's neurons, A&B and A&C are independent draws, hence hypergeometric. Jointly:
    all assignments of neurons to the eight regions are equally likely that have the sizes and
    pairwise overlaps observed, so P(t) is proportional to 1 / product of factorials of the regions.
    """
    ab, ac, bc = pairs
    a, b, c = sizes
    check_sizes(sizes, total)

    def cells(t: Array) -> Array:
        alone = [a - ab - ac + t, b - ab - bc + t, c - ac - bc + t]
        return np.stack([t, ab - t, ac - t, bc - t, *alone, total - (a + b + c) + ab + ac + bc - t])

    possible = np.arange(min(pairs) + 1)
    possible = possible[(cells(possible) >= 0).all(axis=0)]
    if triple not in possible:
        raise InputError(
            f"overlap: a triple of {triple} cannot be with pairs {pairs} of sets of {sizes} "
            f"among {total} neurons"
        )
    law = -gammaln(cells(possible) + 1.0).sum(axis=0)
    law -= np.logaddexp.reduce(law)
    through = [
        (overlap_p(triple, two, size), expected(two, size) if size else 0.0)
        for two, size in (((ab, ac), a), ((ab, bc), b), ((ac, bc), c))
    ]
    largest = max(through)
    (p_a, p_b, p_c), (mean_a, mean_b, mean_c) = zip(*through, strict=True)
    return GivenPairs(
        p=largest[0],
        expected=largest[1],
        through=(p_a, p_b, p_c),
        through_expected=(mean_a, mean_b, mean_c),
        joint_p=min(1.0, float(np.exp(law[possible >= triple]).sum())),
        joint_expected=float(np.exp(law) @ possible),
    )


# Where circuits lie


def layer_counts(ids: Array, layers: int, width: int) -> Array:
    """Neurons per layer, shape (layers,)."""
    return np.bincount(np.asarray(ids, np.int64) // width, minlength=layers)


def late_layers(layers: int) -> int:
    """How many layers stand for the last 10 of 32 of LLaMA-3-8B: the same share of the depth."""
    return max(1, round(layers * 10 / 32))


def late_share(counts: Array, last: int) -> float:
    """Share of the neurons that lie in the last `last` layers, in [0, 1]; 0 for no neurons."""
    return float(counts[len(counts) - last :].sum() / max(1, counts.sum()))
