"""Correlation of differentials, plain and corrected for the noise of the prompts."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np
from scipy.special import gammaincinv

from sparc3.base.artifacts import groups_of, read_scores
from sparc3.base.errors import InputError
from sparc3.base.files import Array
from sparc3.circuits.overlap import joined

Behaviours = Mapping[str, tuple[str, str]]  # name -> its reference's prompt set, its own
FEWEST_GROUPS = 5  # below, a bootstrap of groups says nothing
BLOCK = 4096  # neurons whose scores are read at once
TAILS = [(1 - 0.95) / 2, (1 + 0.95) / 2]  # of the draws, beyond an interval


def pearson(rows: Array) -> Array:
    """Correlation matrix of the rows (row, neuron); diagonal 1; a constant row has 0 elsewhere."""
    with np.errstate(invalid="ignore"):  # 0 / 0 of a constant
        matrix = np.atleast_2d(np.corrcoef(rows))
    constant = np.ptp(rows, axis=1) == 0
    matrix[constant[:, None] | constant] = 0
    np.fill_diagonal(matrix, 1)
    return matrix


def correlations(differentials: Mapping[str, Array]) -> dict[str, dict[str, float]]:
    """Pearson's and Spearman's correlation of every pair, by `joined` names."""
    from scipy.stats import rankdata  # slow to import

    rows = np.stack([np.asarray(row, float) for row in differentials.values()])
    matrices = {"pearson": pearson(rows), "spearman": pearson(rankdata(rows, axis=1))}
    return {
        joined((a, b)): {name: float(matrix[i, j]) for name, matrix in matrices.items()}
        for (i, a), (j, b) in combinations(enumerate(differentials), 2)
    }


def quadrants(differentials: Mapping[str, Array]) -> dict[str, dict[str, int]]:
    """Neurons by sign for every pair (a, b): negative for "both", "a only", "b only", "neither"."""
    found = {}
    for (a, one), (b, other) in combinations(differentials.items(), 2):
        cells = {"both": (one < 0) & (other < 0), "neither": ~((one < 0) | (other < 0))}
        cells |= {f"{a} only": (one < 0) & ~(other < 0), f"{b} only": ~(one < 0) & (other < 0)}
        found[joined((a, b))] = {name: int(inside.sum()) for name, inside in cells.items()}
    return found


@dataclass(frozen=True)
class Scores:
    """Scores of one prompt set: `values` (prompt, neuron), perhaps a memory map, and `groups`
    (prompt,), keys of the prompts that are drawn and split together, within a set or across sets.
    """

    values: Array
    groups: Array

    def at(self, rows: Array) -> "Scores":
        return Scores(self.values[rows], self.groups[rows])


def read_flat(prompt_set: str, score: str, neurons: Array | slice = slice(None)) -> Scores:
    """Scores of a set's attribute split, of all neurons or of some, by their flat ids."""
    ids, values = read_scores(prompt_set, score)
    return Scores(values.reshape(len(ids), -1)[:, neurons], np.array(groups_of(prompt_set, ids)))


def bootstrap_correlations(
    scores: Mapping[str, Scores], behaviours: Behaviours, draws: int, seed: int = 0
) -> dict[str, dict]:
    """Pearson correlations of mean-difference differentials (paper, Eq. 7), with intervals.

    The correlation of *estimated* differentials is biased: noise of the prompts pulls it to 0, a
    reference sample shared by two behaviours pushes it up. Both come from products of a prompt with
    itself, so products within a grouping key are left out of every (co)variance (a U-statistic,
    unbiased), and `value` estimates the correlation on infinitely many prompts. `low`, `high`:
    percentiles under the Bayesian bootstrap (Rubin 1981) of groups; simulated coverage 94 to 98 %,
    more (and intervals up to 1.5 times too wide) where reliability is below a half. What the shared
    *mean* of a reference adds stays in: it is part of Eq. 7.

    "correlations": "a.b" -> value, low, high and `observed`, the uncorrected correlation;
    "differences": "a.b minus c.d" -> value, low, high, p, either way round, with prompts, not
    neurons, as the sample; "reliability": behaviour -> the share of its differential's variance
    that is not noise. Of noise alone value is 0, the interval as wide as can be, and p 1.
    """
    for name, given in scores.items():
        if (groups := np.unique(given.groups).size) < FEWEST_GROUPS:
            raise InputError(
                f"prompt set {name!r}: {groups} groups of prompts; this needs at least "
                f"{FEWEST_GROUPS}; raise prompt_sets.{name}.count"
            )
    observed, signal, drawn = drawn_covariances(scores, behaviours, draws, seed)
    names = list(behaviours)
    rows, curves = {}, {}
    for i, j in combinations(range(len(names)), 2):
        pair = joined((names[i], names[j]))
        estimate, plain = (correlation(m[i, j], m[i, i], m[j, j]) for m in (signal, observed))
        if min(signal[i, i], signal[j, j]) > 0:
            curves[pair] = correlation(drawn[:, i, j], drawn[:, i, i], drawn[:, j, j])
            low, high = np.quantile(curves[pair], TAILS)
        else:
            estimate, low, high = 0.0, -1.0, 1.0
        row = {"value": estimate, "low": low, "high": high, "observed": plain}
        rows[pair] = {key: float(number) for key, number in row.items()}
    whole, kept = np.diag(observed), np.diag(signal)
    share = np.clip(kept / np.where(whole > 0, whole, 1), 0, 1)
    return {
        "correlations": rows,
        "differences": {
            f"{one} minus {other}": {"value": rows[one]["value"] - rows[other]["value"]}
            | _difference(curves.get(one), curves.get(other))
            for one, other in permutations(rows, 2)
        },
        "reliability": dict(zip(names, share.tolist(), strict=True)),
    }


def _difference(one: Array | None, other: Array | None) -> dict[str, float]:
    """Interval and two-sided p of the difference of two correlations, from their draws (draw,)."""
    if one is None or other is None:
        return {"low": -2.0, "high": 2.0, "p": 1.0}
    low, high = np.quantile(one - other, TAILS).tolist()
    beyond = min(np.sum(one <= other), np.sum(one >= other))
    return {"low": low, "high": high, "p": min(1.0, float(2 * (beyond + 1) / (one.size + 1)))}


def correlation(covariance: Array, first: Array, second: Array) -> Array:
    """Covariance / root of the variances' product, in [-1, 1]; its sign where one is not > 0."""
    sure = (first > 0) & (second > 0)
    scale = np.sqrt(np.where(sure, first * second, 1))
    return np.where(sure, np.clip(covariance / scale, -1, 1), np.sign(covariance))


def drawn_covariances(
    scores: Mapping[str, Scores], behaviours: Behaviours, draws: int, seed: int
) -> tuple[Array, Array, Array]:
    """Covariances, over neurons, of the behaviours' differentials.

    Returns those of the estimated differentials (behaviour, behaviour), the unbiased ones of the
    same shape, and the unbiased ones of every bootstrap draw (draw, behaviour, behaviour). Mean
    scores enter only by their products, so one Gram matrix of the groups' scores serves all draws.
    """
    keys, sizes, where, gram = group_products(scores)
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
    sign = np.zeros((len(behaviours), len(sets)))
    for row, (reference, behaviour) in zip(sign, behaviours.values(), strict=True):
        row[sets.index(reference)] += 1
        row[sets.index(behaviour)] -= 1
    unbiased = sign @ means @ sign.T
    return sign @ plain @ sign.T, unbiased[0], unbiased[1:]


def group_products(scores: Mapping[str, Scores]) -> tuple[Array, Array, dict[str, slice], Array]:
    """Key and size of every group of every set, where each set's groups lie, and the covariances
    over neurons of the groups' summed scores, (group, group).
    """
    keys, sizes, where, members = [], [], {}, {}
    start = 0
    for name, given in scores.items():
        label, position, count = np.unique(given.groups, return_inverse=True, return_counts=True)
        keys.append(label)
        sizes.append(count)
        where[name] = slice(start, start + label.size)
        members[name] = np.eye(label.size)[:, position]
        start += label.size
    neurons = next(iter(scores.values())).values.shape[1]
    gram, total = np.zeros((start, start)), np.zeros(start)
    for first in range(0, neurons, BLOCK):
        block = slice(first, first + BLOCK)
        sums = np.concatenate(
            [members[name] @ given.values[:, block].astype(float) for name, given in scores.items()]
        )
        gram += sums @ sums.T
        total += sums.sum(axis=1)
    gram = gram / neurons - np.outer(total, total) / neurons**2
    return np.concatenate(keys), np.concatenate(sizes), where, gram
