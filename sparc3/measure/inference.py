"""Intervals, tests and corrections for paired comparisons of two models on the same prompts.

The unit of evidence is the cluster: a prompt, or a group of prompts that share a grouping key (a
StereoSet target term, an occupation). Completions of a prompt and items of a term are not
independent, so whole clusters are resampled and whole clusters are swapped.

Estimand: the mean over prompts, so that a cluster of 30 weighs 30 times a cluster of one. For a
mean over clusters (SS, LMS and ICAT) average within each first, and pass that without clusters.

Interval: percentile bootstrap, widened for small samples (the expanded percentile interval of
Hesterberg 2015, "What Teachers Should Know About the Bootstrap", The American Statistician 69(4)):
a 95 % interval reads the quantiles at Phi(+-sqrt(n / (n - 1)) t), with t the 97.5 % quantile of
Student's distribution at n - 1 degrees of freedom. Chosen by simulated coverage under a true null
(paired difference and relative change of the mean of skewed, toxicity-like scores, 6,000
experiments each): 92 to 94 % at 6 and 10 clusters, 94 to 95 % from 20, where the plain percentile
interval covers 82 to 89 and 91 to 92 %, BCa 77 to 89 and 89 to 93 %, a widened BCa 88 to 94 and 91
to 95 %.

Where it falls short: large effects on few single completions (a true fall of 40 %: 92 % at 6 to 20
prompts, 95 % from 60; if 8 % are toxic and not 25 %, 92 % at 10 and 94 % at 60), clusters of very
unequal size (93 % at 10 to 40 clusters; of 4 to 20 items 94 to 95 %), heavy tails (92 % for the
mean of 100 lognormal values), and a kink. ICAT has one at SS = 50: with the true SS at 50 after
pruning, the sample's ICAT is too low on average and the interval covers 89 %; with SS at 53 it
covers 99 %. Report the interval of SS beside that of ICAT.

p-value: before and after are swapped within whole clusters, which for means flips the sign of the
cluster's difference. Exact for exchangeable pairs at any sample size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from sparc3.base.errors import InputError

Array = npt.NDArray[np.float64]
Clusters = Sequence[str] | Sequence[int] | npt.NDArray  # the grouping key of every row
Statistic = Callable[[Array], Array]  # (resample, column) means -> (resample,) values
Contrast = Callable[[Array, Array], Array]  # means before, means after -> (resample,) values

MIN_CLUSTERS = 6  # the fewest whose sign flips can reach p < 0.05: 2 / 2**6 = 0.03
MAX_ENUMERATED = 16  # up to here all 2**k swaps are enumerated; beyond, they are sampled
LEVEL = 0.95  # of every interval
POWER = 0.8  # of the minimum detectable effect, simulated in so many worlds
WORLDS = 500
PATTERNS = 2**11  # of swaps, at most, in each world
RESAMPLES = 10_000
SEED = 0  # of every resampling
BLOCK = 2**20  # floats per block of resamples (8 MB), whatever the number of clusters


class Estimate(NamedTuple):
    """A value with its interval; `n` counts the clusters behind it."""

    value: float
    low: float
    high: float
    n: int


class Difference(NamedTuple):
    """What changed between two models measured on the same prompts.

    `p` is two-sided. `n` counts clusters, `moved` those that differ at all: see `least_p`. Without
    any, value, low and high are 0 and p is 1.
    """

    value: float
    low: float
    high: float
    p: float
    n: int
    moved: int


class Control(NamedTuple):
    """An effect, its rank p among `n` draws of a control, and their mean, range, `prediction`."""

    value: float
    mean: float
    low: float
    high: float
    p: float
    n: int
    least: float
    most: float


def _tables(**given: npt.ArrayLike) -> list[Array]:
    """Float64 tables (row, column) of one shape; refuses what is not finite."""
    tables = []
    for name, values in given.items():
        table = np.asarray(values, dtype=np.float64)
        table = table[:, None] if table.ndim == 1 else table
        bad = ~np.isfinite(table).all(axis=1)
        if bad.any():
            raise InputError(
                f"{name}: row {bad.argmax()} is not finite; score every prompt before comparing"
            )
        tables.append(table)
    shapes = [table.shape for table in tables]
    if len(set(shapes)) > 1:
        raise InputError(
            f"{', '.join(given)}: shapes {shapes}; pass the same prompts in the same order"
        )
    return tables


def _codes(clusters: Clusters | None, rows: int) -> npt.NDArray[np.intp]:
    """Cluster number of every row, in the order of their keys; without keys each is its own."""
    if clusters is None:
        return np.arange(rows)
    return np.unique(np.asarray(clusters), return_inverse=True)[1]


def cluster_sums(table: Array, clusters: Clusters | None) -> Array:
    """Sums per cluster, (row, column) -> (cluster, column), clusters in sorted order."""
    codes = _codes(clusters, len(table))
    sums = np.zeros((int(codes.max(initial=-1)) + 1, table.shape[1]))
    np.add.at(sums, codes, table)
    return sums


def _totals(weights: Array, sums: Array) -> Array:
    """(resample, cluster) @ (cluster, column), without BLAS, whose threads, waiting for each other
    on a busy machine, made these small products thirty times slower.
    """
    return np.einsum("ru,cu->rc", weights, np.ascontiguousarray(sums.T))


def _resample_counts(sizes: Sequence[int], resamples: int, width: int) -> Iterator[Array]:
    """How often each unit is drawn: blocks (resample, sum of sizes), each sample on its own."""
    rng = np.random.default_rng(SEED)
    rows = max(1, BLOCK // max(width, sum(sizes)))
    for start in range(0, resamples, rows):
        block = min(rows, resamples - start)
        counts = []
        for size in sizes:
            drawn = rng.integers(0, size, (block, size)) + size * np.arange(block)[:, None]
            counts.append(np.bincount(drawn.ravel(), minlength=block * size).reshape(block, size))
        yield np.concatenate(counts, axis=1).astype(np.float64)


def bootstrap(
    statistic: Callable[[Array], Array],
    sizes: Sequence[int],
    resamples: int = RESAMPLES,
    width: int = 0,
) -> Estimate:
    """Value and interval of any statistic of weighted units.

    `statistic` maps weights (resample, unit), how often each unit was drawn, to values (resample,);
    all ones give the value itself. Several sizes are independent samples, side by side in the unit
    axis; the smallest sets the widening, and is `n`. `width`: floats per resample that the
    statistic makes, where they are more than units.

    A percentile interval follows the statistic's bias: harmless where that is small beside the
    spread, wrong for the correlation of two long vectors of noisy means (differentials), where
    95 % intervals covered 19 to 76 % in simulation.

    Raises InputError with fewer than 6 units in a sample, and where an end of the interval is
    infinite.
    """
    n = min(sizes)
    if n < MIN_CLUSTERS:
        raise InputError(
            f"{n} prompts or groups of prompts are too few for an interval, at least "
            f"{MIN_CLUSTERS} are needed; raise the set's count or the share of this split"
        )
    blocks = _resample_counts(sizes, resamples, width)
    drawn = np.concatenate([statistic(weights) for weights in blocks])
    reach = math.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 + LEVEL) / 2)
    tail = math.erfc(reach / math.sqrt(2)) / 2
    # Order statistics, not interpolated: infinite draws outside the interval do no harm.
    low, high = np.quantile(drawn, [tail, 1 - tail], method="inverted_cdf")
    if not np.isfinite([low, high]).all():
        raise InputError(
            "the interval is unbounded: too many resamples have a baseline of 0; "
            "give more prompts, or report the difference instead of the relative change"
        )
    value = statistic(np.ones((1, sum(sizes))))[0]
    return Estimate(float(value), float(low), float(high), n)


def first_column(means: Array) -> Array:
    return means[:, 0]


def mean_interval(
    values: npt.ArrayLike, clusters: Clusters | None = None, resamples: int = RESAMPLES
) -> Estimate:
    """Interval of the mean of values (prompt,) for one model."""
    (table,) = _tables(values=values)
    sums = cluster_sums(np.column_stack([table, np.ones(len(table))]), clusters)

    def of_weights(weights: Array) -> Array:
        totals = _totals(weights, sums)
        return totals[:, 0] / totals[:, 1]

    return bootstrap(of_weights, [len(sums)], resamples)


def _swaps(count: int, draws: int) -> Iterator[Array]:
    """Which clusters are swapped, (draw, cluster) of 0 and 1, in blocks: of few clusters every
    pattern once, the last cluster held (swapping all changes no |effect|).
    """
    rng = np.random.default_rng([SEED, count])
    total = 2 ** (count - 1) if count <= MAX_ENUMERATED else draws
    rows = max(1, BLOCK // count)
    for start in range(0, total, rows):
        stop = min(start + rows, total)
        if count <= MAX_ENUMERATED:
            yield (np.arange(start, stop)[:, None] >> np.arange(count) & 1).astype(np.float64)
        else:
            yield rng.integers(0, 2, (stop - start, count), dtype=np.int8).astype(np.float64)


def _swap_p(before: Array, after: Array, size: Array, effect: Contrast, draws: int) -> float:
    """Two-sided p of an effect that changes its sign when `before` and `after`, sums (cluster,
    column), are exchanged; `size`: prompts per cluster.
    """
    moved = (before != after).any(axis=1)
    if not moved.any():
        return 1.0
    change = (after - before)[moved]
    low, high, prompts = before.sum(axis=0), after.sum(axis=0), size.sum()

    def at(swapped: Array) -> Array:
        shift = _totals(swapped, change)
        return np.abs(effect((low + shift) / prompts, (high - shift) / prompts))

    count = len(change)
    observed = at(np.zeros((1, count)))[0]
    effects = np.concatenate([at(swapped) for swapped in _swaps(count, draws)])
    # Ties count as extreme; the tolerance keeps rounding from breaking them.
    extreme = effects >= observed - 1e-9 * max(observed, effects.max())
    if count <= MAX_ENUMERATED:
        return float(extreme.mean())
    return float((extreme.sum() + 1) / (len(extreme) + 1))


def _paired(
    before: Array,
    after: Array,
    clusters: Clusters | None,
    value: Contrast,
    effect: Contrast,
    resamples: int,
) -> Difference:
    """`value` with its interval, `effect` tested by swaps; columns as in `paired_difference`."""
    b, a = cluster_sums(before, clusters), cluster_sums(after, clusters)
    size = cluster_sums(np.ones((len(before), 1)), clusters)

    def of_weights(weights: Array) -> Array:
        drawn = _totals(weights, size)
        return value(_totals(weights, b) / drawn, _totals(weights, a) / drawn)

    *interval, n = bootstrap(of_weights, [len(size)], resamples)
    moved = int((b != a).any(axis=1).sum())
    return Difference(*interval, p=_swap_p(b, a, size, effect, resamples), n=n, moved=moved)


def paired_difference(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    clusters: Clusters | None = None,
    statistic: Statistic = first_column,
    resamples: int = RESAMPLES,
) -> Difference:
    """`statistic` after minus before, each of means over the same prompts.

    `before`, `after`: (prompt,) or (prompt, column), rows in the same order. `statistic` maps
    means (resample, column) to values (resample,); the default is the mean itself. p is exact by
    enumeration while at most 16 clusters differ, else (b + 1) / (m + 1) over m = `resamples`
    random swaps. Raises InputError for unlike shapes, values not finite, or under 6 clusters.
    """

    def change(before: Array, after: Array) -> Array:
        return statistic(after) - statistic(before)

    b, a = _tables(before=before, after=after)
    return _paired(b, a, clusters, change, change, resamples)


def _fall(before: Array, after: Array) -> Array:
    return before[:, 0] - after[:, 0]


def _percent_fall(before: Array, after: Array) -> Array:
    """100 (before - after) / before of the first column; from 0 and below it is 0 or infinite."""
    fall = _fall(before, after)
    from_zero = np.where(fall == 0, 0.0, np.copysign(np.inf, fall))
    return 100 * np.divide(fall, before[:, 0], out=from_zero, where=before[:, 0] > 0)


def reduction(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    clusters: Clusters | None = None,
    resamples: int = RESAMPLES,
    floor: float = 0.0,
) -> Difference:
    """100 (mean before - mean after) / (mean before - floor): a positive number is less of the
    behaviour.

    `before`, `after`: (prompt,) scores of at least 0. Both means are taken anew in every resample;
    p tests their difference. From the floor to the floor is a change of 0. Raises InputError as
    `paired_difference` and `bootstrap`, for negative scores, and for a baseline at or below the
    floor from which something changes.
    """
    b, a = _tables(before=before, after=after)
    if min(b.min(initial=0), a.min(initial=0)) < 0:
        raise InputError("reduction: a score is negative; report the difference instead")
    if b.mean() <= floor and (a != b).any():
        problem = f"the mean before is {b.mean():.3g}, that of what is neutral {floor:g}"
        raise InputError(f"reduction: {problem}; report the difference instead")
    return _paired(b - floor, a - floor, clusters, _percent_fall, _fall, resamples)


def perplexity_change(
    nll_before: npt.ArrayLike,
    nll_after: npt.ArrayLike,
    tokens: npt.ArrayLike,
    resamples: int = RESAMPLES,
) -> Difference:
    """Change of perplexity exp(sum of nll / sum of tokens), in percent of the value before.

    `nll_before`, `nll_after`: (text,) in nats, summed over a text's predicted tokens; `tokens`:
    (text,) how many those are. Texts are resampled with them; p tests the summed nll's difference.
    """
    b, a, count = _tables(nll_before=nll_before, nll_after=nll_after, tokens=tokens)
    if (count <= 0).any():
        raise InputError("tokens: every text needs at least one predicted token; drop empty texts")

    def percent(before: Array, after: Array) -> Array:
        return 100 * np.expm1((after[:, 0] - before[:, 0]) / before[:, 1])

    before, after = np.column_stack([b, count]), np.column_stack([a, count])
    return _paired(before, after, None, percent, _fall, resamples)


def against_draws(value: float, draws: npt.ArrayLike) -> Control:
    """A method's effect beside the effects of random controls of equal size; larger is stronger.

    p is the one-sided rank (b + 1) / (m + 1), b of m draws being at least `value`: p <= 0.05 takes
    19 of them. With fewer, a value above `most` (see `prediction`) is beyond chance at 2.5 %, if
    the draws' effects are normal.
    """
    effects = np.asarray(draws, dtype=np.float64)
    rank, n = int((effects >= value).sum()) + 1, len(effects)
    mean, low, high = float(effects.mean()), float(effects.min()), float(effects.max())
    return Control(float(value), mean, low, high, rank / (n + 1), n, *prediction(effects))


def prediction(draws: npt.ArrayLike) -> tuple[float, float]:
    """The two-sided 95 % interval in which one more draw lies, of normal draws (m,): their mean
    +- t s sqrt(1 + 1 / m), t of Student's distribution at m - 1 degrees of freedom and s their
    standard deviation. Unbounded with fewer than two draws.
    """
    effects = np.asarray(draws, dtype=np.float64)
    m = len(effects)
    if m < 2:
        return -math.inf, math.inf
    reach = stdtrit(m - 1, (1 + LEVEL) / 2) * effects.std(ddof=1) * math.sqrt(1 + 1 / m)
    return float(effects.mean() - reach), float(effects.mean() + reach)


def holm(p_values: Sequence[float] | Array) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given: they keep the family-wise error."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted.tolist()


def least_p(moved: int, draws: int = RESAMPLES) -> float:
    """The smallest p that swaps of `moved` clusters can give, `draws` as in `paired_difference`."""
    return min(1.0, 2 / 2**moved if moved <= MAX_ENUMERATED else 1 / (draws + 1))


def detectable(rise: Array, size: Array, level: float) -> float:
    """The minimum detectable effect: the true rise of the mean that the swap test finds at `level`
    (two-sided) with 80 % power, simulated on the spread of the clusters at hand; inf: none is.

    `rise`: after minus before, summed over each cluster (cluster,); `size`: its prompts. In every
    simulated world the true rise is d, and the means of clusters stray from it normally: as far as
    those at hand do from theirs, times what Student's distribution adds for a spread that is
    itself estimated. (Effects from resampled residuals were found in 65 to 76 % of new samples of
    11 to 30 clusters, these in 73 to 83 %.) A pattern that swaps some clusters stays less extreme
    than what is observed if d exceeds minus the mean noise of those, and of all others. So each
    world has one d beyond which it rejects, and the effect is the 80 % quantile of these. Beyond
    PATTERNS, patterns are drawn, with the observed one among them.
    """
    count = len(rise)
    rng = np.random.default_rng([SEED, count])
    if 2 ** (count - 1) <= PATTERNS:
        swaps = np.concatenate(list(_swaps(count, PATTERNS)))
    else:
        swaps = rng.integers(0, 2, (PATTERNS, count)).astype(np.float64)
        swaps[0] = 0
    allowed = math.floor(level * len(swaps) + 1e-9)  # patterns as extreme, the observed included
    if allowed < 1:
        return math.inf
    spread = np.sqrt(count / rng.chisquare(count - 1, (WORLDS, 1)))
    residual = rise - rise.sum() / size.sum() * size
    spread *= np.sqrt(np.sum(residual**2) / np.sum(size**2))
    noise = spread * size * rng.standard_normal((WORLDS, count))
    swapped, prompts = _totals(noise, swaps.T), swaps @ size
    kept, left = noise.sum(axis=1, keepdims=True) - swapped, size.sum() - prompts
    one, two = (  # nothing swapped, or everything: as extreme as observed, whatever d
        np.divide(-total, n, out=np.full_like(total, np.inf), where=n > 0)
        for total, n in ((swapped, prompts), (kept, left))
    )
    bounds = np.partition(np.maximum(one, two), -allowed - 1, axis=1)[:, -allowed - 1]
    return float(np.quantile(bounds, POWER))


def _weighted_ranks(values: Array) -> Callable[[Array], Array]:
    """Function of weights (resample, row): mid-ranks (resample, row), rows repeated by weight."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    starts = np.cumsum(sizes) - sizes

    def ranks(weights: Array) -> Array:
        tied = np.add.reduceat(weights[:, order], starts, axis=1)
        return (np.cumsum(tied, axis=1) - tied / 2)[:, group]

    return ranks


def correlation(x: npt.ArrayLike, y: npt.ArrayLike, resamples: int = RESAMPLES) -> Estimate:
    """Pearson correlation over units (unit,), which are resampled; 0 where one is constant."""
    a, b = (table[:, 0] for table in _tables(x=x, y=y))

    def pearson(weights: Array) -> Array:
        total = weights.sum(axis=1, keepdims=True)
        u, v = (row - (weights * row).sum(axis=1, keepdims=True) / total for row in (a, b))
        return _weighted_cosine(u, v, weights)

    return bootstrap(pearson, [len(a)], resamples, width=len(a))


def _weighted_cosine(u: Array, v: Array, weights: Array) -> Array:
    """Cosines of rows (resample, unit), each unit by its weight; 0 for a row of zeros."""
    total = weights.sum(axis=1)
    uu, vv, uv = ((weights * s * t).sum(axis=1) / total for s, t in ((u, u), (v, v), (u, v)))
    spread = np.sqrt(uu * vv)
    return np.clip(np.divide(uv, spread, out=np.zeros_like(uv), where=spread > 0), -1, 1)


def rank_agreement(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    clusters: Clusters | None = None,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Spearman correlation of two scorers over the same prompts, ties at their mid-rank.

    `x`, `y`: (prompt,). Every resample is ranked anew, and counts as 0 if a scorer is constant in
    it. A scorer that is constant gives value 0 in [-1, 1].
    """
    a, b = (table[:, 0] for table in _tables(x=x, y=y))
    codes = _codes(clusters, len(a))
    ranks_a, ranks_b = _weighted_ranks(a), _weighted_ranks(b)

    def spearman(weights: Array) -> Array:
        rows = weights[:, codes]
        total = rows.sum(axis=1)
        # Weighted mid-ranks have mean total / 2: u and v have mean 0, and are 0 for a constant.
        u, v = (ranks(rows) / total[:, None] - 0.5 for ranks in (ranks_a, ranks_b))
        return _weighted_cosine(u, v, rows)

    n = int(codes.max(initial=-1)) + 1
    agreement = bootstrap(spearman, [n], resamples, width=len(a))
    constant = min(np.ptp(a), np.ptp(b)) == 0
    return Estimate(0.0, -1.0, 1.0, n) if constant else agreement
