"""Sets of neurons: how far circuits overlap, and which part of that overlap chance explains.

A neuron is named by its flat index `layer * width + neuron`. A circuit is a 1-D array of such ids,
and circuits come as a mapping from name to ids. `total` is the number of neurons to choose from.

Defined edge cases: two empty circuits have Jaccard 0 (they share nothing); an overlap that can only
be 0 has enrichment 1 and p 1; a constant differential correlates 0 with everything.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import log, prod

import numpy as np
from scipy.special import gammaincinv, gammaln

from sparc3.errors import InputError

Array = np.ndarray
Names = tuple[str, ...]
Differential = Callable[[Array, Array], Array]  # (prompt, neuron) reference, behaviour -> (neuron,)
Choose = Callable[[Array, int], Array]  # (neuron,) differential, k -> (k,) ids
Interval = dict[str, float]  # value, low, high

FEWEST_GROUPS = 5  # below, a bootstrap of groups says nothing


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


# Differentials: one number per neuron


def stacked(differentials: Mapping[str, Array]) -> Array:
    """(behaviour, neuron) in float64; refused unless all have one length and are finite."""
    rows = [np.asarray(row, float) for row in differentials.values()]
    for name, row in zip(differentials, rows, strict=True):
        if row.shape != (rows[0].size,) or not row.size or not np.isfinite(row).all():
            raise InputError(
                f"differential {name!r}: expected {rows[0].size or 'some'} finite values in one "
                f"dimension, found shape {row.shape} with {np.sum(~np.isfinite(row))} not finite"
            )
    return np.stack(rows)


def ranks(values: Array) -> Array:
    """Ranks from 1, ties given their mean rank. Shape as `values` (1-D)."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def pearson(rows: Array) -> Array:
    """Correlation matrix of the rows (row, neuron); diagonal 1; a constant row has 0 elsewhere."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    # Rounding leaves a constant row a little off zero; that remainder is not a direction.
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    floor = 1e-12 * np.abs(rows).max(axis=1, keepdims=True, initial=0) * np.sqrt(rows.shape[1])
    unit = np.where(length > floor, centred, 0) / np.where(length > floor, length, 1)
    matrix = np.clip(unit @ unit.T, -1, 1)
    np.fill_diagonal(matrix, 1)
    return matrix


def correlations(differentials: Mapping[str, Array]) -> tuple[Array, Array]:
    """Pearson's and Spearman's correlation matrices, (behaviour, behaviour) in the order given."""
    rows = stacked(differentials)
    return pearson(rows), pearson(np.stack([ranks(row) for row in rows]))


def quadrants(differentials: Mapping[str, Array]) -> dict[Names, dict[str, int]]:
    """For every pair of behaviours, neurons by sign: negative for both, one or neither of them."""
    negative = dict(zip(differentials, stacked(differentials) < 0, strict=True))
    return {
        (a, b): {
            "both": int(np.sum(negative[a] & negative[b])),
            "first": int(np.sum(negative[a] & ~negative[b])),
            "second": int(np.sum(~negative[a] & negative[b])),
            "neither": int(np.sum(~negative[a] & ~negative[b])),
        }
        for a, b in combinations(differentials, 2)
    }


# Prompts: what the differentials would be on other prompts


@dataclass(frozen=True)
class Scores:
    """Scores of one prompt set: `values` (prompt, neuron), `groups` (prompt,) their grouping keys.

    Prompts that share a grouping key, within a set or across sets, are drawn and split together.
    `values` may be a memory map; it is read in blocks.
    """

    values: Array
    groups: Array

    def at(self, rows: Array) -> "Scores":
        return Scores(self.values[rows], self.groups[rows])


def checked_scores(
    scores: Mapping[str, Scores], contrasts: Mapping[str, tuple[str, str]], groups: int
) -> dict[str, Scores]:
    """The sets that `contrasts` names, each with a key per prompt and enough distinct keys."""
    used = {}
    for name in (name for pair in contrasts.values() for name in pair):
        if name not in scores:
            raise InputError(f"prompt set {name!r}: no scores given; run attribute for it")
        used[name] = scores[name]
    neurons = {given.values.shape[1:] for given in used.values()}
    for name, given in used.items():
        keys = np.asarray(given.groups)
        if given.values.ndim != 2 or keys.shape != given.values.shape[:1] or len(neurons) > 1:
            raise InputError(
                f"scores of {name!r}: expected (prompt, neuron) with a grouping key per prompt and "
                f"equally many neurons in every set, found {given.values.shape}, {keys.shape} keys"
            )
        distinct = np.unique(keys).size
        if distinct < groups:
            raise InputError(
                f"prompt set {name!r}: {distinct} groups of prompts; this needs at least {groups}"
            )
    return used


def bootstrap_correlations(
    scores: Mapping[str, Scores],
    contrasts: Mapping[str, tuple[str, str]],
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, dict]:
    """Pearson correlations of mean-difference differentials (paper, Eq. 7), with intervals.

    `contrasts`: behaviour -> (reference set, behaviour set). The correlation of *estimated*
    differentials is biased: noise of the prompts pulls it to 0, a reference sample shared by two
    behaviours pushes it up. Both come from products of a prompt with itself, so products within a
    grouping key are left out of every (co)variance (a U-statistic, unbiased), and `value` estimates
    the correlation on infinitely many prompts. `low`, `high`: percentiles of the same estimate
    under the Bayesian bootstrap (Rubin 1981) of groups; simulated coverage 94 to 98 %, more (and
    intervals up to 1.5 times too wide) where reliability is below a half. What the shared *mean* of
    a reference adds stays in: it is part of Eq. 7.

    Returns three mappings:
    "correlations": (a, b) -> value, low, high and `observed`, the uncorrected correlation;
    "differences": (pair, pair) -> value, low, high, p, for every two pairs: a test of dependent
    correlations in which the prompts are the sample, since neurons are not independent;
    "reliability": behaviour -> the share of its differential's variance that is not noise, [0, 1].
    Where nothing but noise is left, value is 0, the interval as wide as can be, and p 1.
    """
    used = checked_scores(scores, contrasts, groups=FEWEST_GROUPS)
    observed, signal, drawn = drawn_covariances(used, contrasts, draws, seed)
    names = list(contrasts)
    tails = [(1 - level) / 2, (1 + level) / 2]
    found, curves = {}, {}
    for i, j in combinations(range(len(names)), 2):
        pair = names[i], names[j]
        estimate, plain = (correlation(m[i, j], m[i, i], m[j, j]) for m in (signal, observed))
        if min(signal[i, i], signal[j, j]) > 0:
            curves[pair] = correlation(drawn[:, i, j], drawn[:, i, i], drawn[:, j, j])
            low, high = np.quantile(curves[pair], tails)
        else:
            estimate, low, high = 0.0, -1.0, 1.0
        row = {"value": estimate, "low": low, "high": high, "observed": plain}
        found[pair] = {key: float(number) for key, number in row.items()}
    differences = {}
    for one, other in combinations(found, 2):
        low, high, p = -2.0, 2.0, 1.0
        if one in curves and other in curves:
            curve = curves[one] - curves[other]
            low, high = np.quantile(curve, tails)
            p = min(1.0, 2 * (min(np.sum(curve <= 0), np.sum(curve >= 0)) + 1) / (draws + 1))
        value = found[one]["value"] - found[other]["value"]
        row = {"value": value, "low": low, "high": high, "p": p}
        differences[one, other] = {key: float(number) for key, number in row.items()}
    whole, kept = np.diag(observed), np.diag(signal)
    share = np.clip(kept / np.where(whole > 0, whole, 1), 0, 1)
    reliability = dict(zip(names, share.tolist(), strict=True))
    return {"correlations": found, "differences": differences, "reliability": reliability}


def correlation(covariance: Array, first: Array, second: Array) -> Array:
    """Covariance / root of the variances' product, in [-1, 1]; its sign where one is not > 0."""
    sure = (first > 0) & (second > 0)
    scale = np.sqrt(np.where(sure, first * second, 1))
    return np.where(sure, np.clip(covariance / scale, -1, 1), np.sign(covariance))


def drawn_covariances(
    used: Mapping[str, Scores], contrasts: Mapping[str, tuple[str, str]], draws: int, seed: int
) -> tuple[Array, Array, Array]:
    """Covariances, over neurons, of the behaviours' differentials.

    Returns those of the estimated differentials (behaviour, behaviour), the unbiased ones of the
    same shape, and the unbiased ones of every bootstrap draw (draw, behaviour, behaviour). Mean
    scores enter only by their products, so one Gram matrix of the groups' scores serves all draws.
    """
    keys, sizes, where, gram = group_products(used)
    apart = keys[:, None] != keys[None, :]
    label, position = np.unique(keys, return_inverse=True)
    uniform = np.random.default_rng(seed).random((draws, label.size))[:, position]
    weights = np.ones((draws + 1, keys.size))
    for rows in where.values():
        # Dirichlet weights of parameter a over g groups give a mean the variance s^2 / (a g + 1);
        # this a makes it s^2 / (g - 1), which is unbiased. Sets that share a key share its draw.
        groups = rows.stop - rows.start
        weights[1:, rows] = gammaincinv((groups - 2) / groups, uniform[:, rows])
    counts = np.outer(sizes, sizes)
    plain = np.empty((len(where), len(where)))
    means = np.empty((draws + 1, len(where), len(where)))
    for i, one in enumerate(where.values()):
        for j, other in enumerate(where.values()):
            plain[i, j] = gram[one, other].sum() / counts[one, other].sum()
            left, right, kept = weights[:, one], weights[:, other], apart[one, other]
            above = np.sum((left @ (gram[one, other] * kept)) * right, axis=1)
            below = np.sum((left @ (counts[one, other] * kept)) * right, axis=1)
            means[:, i, j] = above / below
    sets = list(where)
    sign = np.zeros((len(contrasts), len(sets)))
    for row, (reference, behaviour) in zip(sign, contrasts.values(), strict=True):
        row[sets.index(reference)] += 1
        row[sets.index(behaviour)] -= 1
    unbiased = sign @ means @ sign.T
    return sign @ plain @ sign.T, unbiased[0], unbiased[1:]


def group_products(
    used: Mapping[str, Scores], block: int = 4096
) -> tuple[Array, Array, dict[str, slice], Array]:
    """Grouping key and number of prompts of every group of every set, where each set's groups lie,
    and the covariances over neurons of the groups' summed scores, (group, group).
    """
    keys, sizes, where, members = [], [], {}, {}
    start = 0
    for name, given in used.items():
        label, position, count = np.unique(
            np.asarray(given.groups).astype(str), return_inverse=True, return_counts=True
        )
        keys.append(label)
        sizes.append(count)
        where[name] = slice(start, start + label.size)
        members[name] = (position == np.arange(label.size)[:, None]).astype(float)
        start += label.size
    neurons = next(iter(used.values())).values.shape[1]
    gram, total = np.zeros((start, start)), np.zeros(start)
    for first in range(0, neurons, block):
        columns = slice(first, first + block)
        sums = np.concatenate(
            [
                members[name] @ np.asarray(given.values[:, columns], float)
                for name, given in used.items()
            ]
        )
        gram += sums @ sums.T
        total += sums.sum(axis=1)
    if not np.isfinite(gram).all():
        raise InputError("scores: non-finite values; correlations need finite scores")
    gram = gram / neurons - np.outer(total, total) / neurons**2
    return np.concatenate(keys), np.concatenate(sizes), where, gram


def split(
    scores: Mapping[str, Scores], parts: int, rng: np.random.Generator
) -> dict[str, list[Array]]:
    """Rows of every set in `parts` disjoint parts of about equal size: name -> [rows, ...].

    Whole groups are dealt, in random order, to the part that has fewest prompts of the set; a
    group that an earlier set already placed stays there, so that no part of one set shares a
    grouping key with another part of another set. InputError where a part would be empty.
    """
    placed: dict[object, int] = {}
    out = {}
    for name, given in scores.items():
        keys, inverse, counts = np.unique(
            np.asarray(given.groups), return_inverse=True, return_counts=True
        )
        load = np.zeros(parts)
        for key, count in zip(keys.tolist(), counts, strict=True):
            if key in placed:
                load[placed[key]] += count
        for index in rng.permutation(keys.size):
            key = keys[index].item()
            if key not in placed:
                placed[key] = int(load.argmin())
                load[placed[key]] += counts[index]
        if not load.all():
            raise InputError(
                f"prompt set {name!r}: {keys.size} groups of prompts do not fill {parts} disjoint "
                f"parts; give it more groups"
            )
        part = np.array([placed[key] for key in keys.tolist()])[inverse]
        out[name] = [np.flatnonzero(part == index) for index in range(parts)]
    return out


class Agreement:
    """Collects how well circuits and differentials agree, once per random split.

    `summary` gives, for each key, the mean over splits and the range (low, high) that 95 % of them
    lie in: the spread of the splitting, not a confidence interval. Overlap counts neurons.
    """

    def __init__(self) -> None:
        self.seen: dict[Names, dict[str, list[float]]] = {}

    def add(self, names: Names, differentials: Sequence[Array], circuits: Sequence[Array]) -> None:
        row = {"overlap": float(common(*circuits)), "jaccard": jaccard(*circuits)}
        if len(differentials) == 2:
            row["correlation"] = float(pearson(np.stack(differentials))[0, 1])
        for key, value in row.items():
            self.seen.setdefault(names, {}).setdefault(key, []).append(value)

    def summary(self) -> dict[Names, dict[str, Interval]]:
        return {
            names: {key: spread(values) for key, values in row.items()}
            for names, row in self.seen.items()
        }


def spread(values: Sequence[float]) -> Interval:
    low, high = np.quantile(values, [0.025, 0.975])
    return {"value": float(np.mean(values)), "low": float(low), "high": float(high)}


def contrast(
    differential: Differential, reference: Scores, rows: Array, behaviour: Scores, own: Array
) -> Array:
    return np.asarray(differential(reference.values[rows], behaviour.values[own]), float)


def split_halves(
    scores: Mapping[str, Scores],
    contrasts: Mapping[str, tuple[str, str]],
    differential: Differential,
    choose: Choose,
    k: int,
    repeats: int = 10,
    seed: int = 0,
) -> dict[Names, dict[str, Interval]]:
    """What two disjoint halves of the prompts, reference and behaviour, agree on.

    (a, a) compares the two halves of one behaviour: the ceiling, since nothing can overlap with a
    circuit more than the circuit does with itself. (a, b) compares one half of a with the other
    half of b: the cross-behaviour figure of the same sample size, without shared prompts. Only
    these two are comparable; an overlap of full-size circuits is not.
    """
    used = checked_scores(scores, contrasts, groups=2)
    rng = np.random.default_rng(seed)
    agreement = Agreement()
    for _ in range(repeats):
        rows = split(used, 2, rng)
        halves = {}
        for name, (ref, own) in contrasts.items():
            for half in (0, 1):
                found = contrast(
                    differential, used[ref], rows[ref][half], used[own], rows[own][half]
                )
                halves[name, half] = found, np.asarray(choose(found, k))
        for a in contrasts:
            agreement.add((a, a), *zip(halves[a, 0], halves[a, 1], strict=True))
        for a, b in combinations(contrasts, 2):
            agreement.add((a, b), *zip(halves[a, 0], halves[b, 1], strict=True))
            agreement.add((a, b), *zip(halves[a, 1], halves[b, 0], strict=True))
    return agreement.summary()


def disjoint_references(
    scores: Mapping[str, Scores],
    contrasts: Mapping[str, tuple[str, str]],
    differential: Differential,
    choose: Choose,
    k: int,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, dict[Names, dict[str, Interval]]]:
    """Agreement of behaviours when each has its own part of the reference prompts, and when not.

    The n behaviours' references are split in n disjoint parts. "disjoint": every behaviour uses a
    different part; "shared": all use the same part, so that sample sizes are equal and the
    difference between the two is what sharing the reference sample adds. Behaviour prompts stay
    whole. Every combination of two or more behaviours is reported.
    """
    used = checked_scores(scores, contrasts, groups=1)
    references = {ref: used[ref] for ref, _ in contrasts.values()}
    names, parts = list(contrasts), len(contrasts)
    rng = np.random.default_rng(seed)
    found = {"shared": Agreement(), "disjoint": Agreement()}
    for _ in range(repeats):
        rows = split(references, parts, rng)
        cells = {}
        for name, (ref, own) in contrasts.items():
            everything = np.arange(len(used[own].values))
            for part in range(parts):
                row = contrast(differential, used[ref], rows[ref][part], used[own], everything)
                cells[name, part] = row, np.asarray(choose(row, k))
        for turn in range(parts):
            same = {name: cells[name, turn] for name in names}
            own = {name: cells[name, (i + turn) % parts] for i, name in enumerate(names)}
            for group in subsets(names, 2):
                for kind, taken in (("shared", same), ("disjoint", own)):
                    members = [taken[name] for name in group]
                    found[kind].add(group, *zip(*members, strict=True))
    return {kind: agreement.summary() for kind, agreement in found.items()}


def pseudo_behaviour(
    scores: Mapping[str, Scores],
    contrasts: Mapping[str, tuple[str, str]],
    differential: Differential,
    choose: Choose,
    k: int,
    repeats: int = 10,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, Interval]]]:
    """Agreement of every behaviour with a behaviour that is none: a third of its own reference.

    The reference is split in thirds G1, G2, G3. The pseudo-behaviour contrasts G1 with G3. "shared"
    compares it with the real behaviour against G1, "disjoint" against G2: kind -> behaviour ->
    overlap, jaccard, correlation. A real overlap means something only beyond this.
    """
    used = checked_scores(scores, contrasts, groups=1)
    references = {ref: used[ref] for ref, _ in contrasts.values()}
    rng = np.random.default_rng(seed)
    found = {"shared": Agreement(), "disjoint": Agreement()}
    for _ in range(repeats):
        rows = split(references, 3, rng)
        for name, (ref, own) in contrasts.items():
            first, second, third = rows[ref]
            everything = np.arange(len(used[own].values))
            fake = contrast(differential, used[ref], first, used[ref], third)
            for kind, part in (("shared", first), ("disjoint", second)):
                real = contrast(differential, used[ref], part, used[own], everything)
                circuits = [np.asarray(choose(row, k)) for row in (fake, real)]
                found[kind].add((name,), [fake, real], circuits)
    return {
        kind: {name: row for (name,), row in agreement.summary().items()}
        for kind, agreement in found.items()
    }
