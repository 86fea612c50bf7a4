"""Intervals, tests and corrections for paired comparisons of two models on the same prompts.

The unit of evidence is the cluster: a prompt, or a group of prompts that share a grouping key (a
StereoSet target term, an occupation). Completions of a prompt and items of a term are not
independent, so whole clusters are resampled and whole clusters are swapped.

Estimand: the mean over prompts. A cluster of 30 prompts weighs 30 times a cluster of one, in the
value and in every resample. For a mean over clusters (SS, LMS and ICAT average per target term
first) reduce with `cluster_means` and pass the result without clusters.

Interval: percentile bootstrap, widened for small samples (the expanded percentile interval of
Hesterberg 2015, "What Teachers Should Know About the Bootstrap", The American Statistician 69(4)):
a 95 % interval reads the quantiles at Phi(+-sqrt(n / (n - 1)) t), with t the 97.5 % quantile of
Student's distribution at n - 1 degrees of freedom. Chosen by simulated coverage of nominal 95 %
intervals under a true null: paired difference and relative change of the mean of skewed,
toxicity-like scores, 1 and 8 completions per prompt (6,000 experiments each):

    clusters   percentile   widened       BCa          widened BCa
    6          82 - 85 %    92 - 94 %     77 - 85 %    88 - 93 %
    10         87 - 90 %    92 - 94 %     81 - 90 %    87 - 95 %
    20         91 - 93 %    94 - 95 %     89 - 93 %    91 - 95 %
    60, 100    94 %         94 - 95 %     94 - 95 %    94 - 96 %

Where it falls short: large effects on few single completions (a true reduction of 40 %: 83 % at 6
prompts, 89 % at 10, 95 % from 60), clusters of very unequal size (93 % at 10 to 40 clusters), heavy
tails (92 % for the mean of 100 lognormal values), and a kink. ICAT has one at SS = 50: with the
true SS at 50 after pruning, the sample's ICAT is too low on average and the interval covers 89 %;
with SS at 53 it covers 99 %. Report the interval of SS beside that of ICAT.

p-value: before and after are swapped within whole clusters, which for means flips the sign of the
cluster's difference. Exact for exchangeable pairs at any sample size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt

from sparc3.base.errors import InputError

Array = npt.NDArray[np.float64]


# The grouping key of every row.
Clusters = Sequence[str] | Sequence[int] | npt.NDArray


# (resample, column) means -> (resample,) values
Statistic = Callable[[Array], Array]


# (resample, column) means before, the same after -> (resample,) values
Contrast = Callable[[Array, Array], Array]


# The smallest number of clusters whose sign flips can reach p < 0.05: 2 / 2**6 = 0.03.
MIN_CLUSTERS = 6


# Up to here all 2**k swaps are enumerated; beyond, they are sampled.
MAX_ENUMERATED = 16
LEVEL = 0.95  # of every interval
POWER = 0.8


# Floats per block of resamples (8 MB), whatever the number of clusters.
BLOCK = 2**20


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval; `n` counts the clusters behind it."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """What changed between two models measured on the same prompts.

    `p` is two-sided. `n` counts clusters. `mde` is the minimum detectable effect, in the units of
    `value`: the true change that a two-sided test at 1 - LEVEL finds with 80 % power; 0 where
    nothing varies. `moved` counts the clusters that differ at all: p is at least 2 / 2**moved.
    Before and after identical: value, low, high and mde are 0 and p is 1.
    """

    value: float
    low: float
    high: float
    p: float
    n: int
    mde: float
    moved: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Control:
    """An effect among `n` draws of a random control: their mean and range, and its rank p."""

    value: float
    mean: float
    low: float
    high: float
    p: float
    n: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


# --- input -----------------------------------------------------------------------------------


def _table(values: npt.ArrayLike, name: str) -> Array:
    """(row,) or (row, column) numbers as a float64 table; refuses anything not finite."""
    table = np.asarray(values, dtype=np.float64)
    if table.ndim == 1:
        table = table[:, None]
    if table.ndim != 2:
        raise InputError(
            f"{name}: expected shape (prompt,) or (prompt, column), got {table.shape}; "
            "pass one row per prompt"
        )
    if not np.isfinite(table).all():
        row = int(np.flatnonzero(~np.isfinite(table).all(axis=1))[0])
        raise InputError(f"{name}: row {row} is not finite; score every prompt before comparing")
    return table


def _same_rows(first: Array, second: Array, names: str) -> None:
    if first.shape != second.shape:
        raise InputError(
            f"{names}: shapes {first.shape} and {second.shape} differ; "
            "pass the same prompts in the same order"
        )


def _codes(clusters: Clusters | None, rows: int) -> npt.NDArray[np.intp]:
    """Cluster number of every row, clusters sorted; without clusters every row is its own."""
    if clusters is None:
        return np.arange(rows)
    if len(clusters) != rows:
        raise InputError(f"clusters: {len(clusters)} keys for {rows} prompts; pass one per prompt")
    return np.unique(np.asarray(clusters), return_inverse=True)[1]


def _sums(table: Array, codes: npt.NDArray[np.intp]) -> Array:
    """Sums per cluster: (row, column) -> (cluster, column)."""
    sums = np.zeros((int(codes.max(initial=-1)) + 1, table.shape[1]))
    np.add.at(sums, codes, table)
    return sums


def cluster_sums(values: npt.ArrayLike, clusters: Clusters) -> Array:
    """Sums per cluster, (row, column) -> (cluster, column), clusters in sorted order."""
    table = _table(values, "values")
    return _sums(table, _codes(clusters, len(table)))


def _totals(weights: Array, sums: Array) -> Array:
    """(resample, cluster) @ (cluster, column), without BLAS.

    The products are small, and BLAS threads that wait for each other on a busy machine made them
    thirty times slower.
    """
    return np.einsum("ru,cu->rc", weights, np.ascontiguousarray(sums.T))


def cluster_means(values: npt.ArrayLike, clusters: Clusters) -> Array:
    """Means per cluster, (row, column) -> (cluster, column), clusters in sorted order.

    The first step of every statistic that averages per target term before it averages over terms.
    """
    table = _table(values, "values")
    codes = _codes(clusters, len(table))
    return _sums(table, codes) / np.bincount(codes)[:, None]


# --- bootstrap -------------------------------------------------------------------------------


def _student_quantile(probability: float, degrees: int) -> float:
    from scipy import special  # here, for stages that only read metrics start without it

    return float(special.stdtrit(degrees, probability))


def _resample_counts(
    sizes: Sequence[int], resamples: int, width: int, rng: np.random.Generator
) -> Iterator[Array]:
    """How often each unit is drawn: blocks (resample, sum of sizes), each sample on its own."""
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
    sizes: int | Sequence[int],
    *,
    width: int = 0,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Value and interval of any statistic of weighted units.

    `statistic` maps weights (resample, unit) to values (resample,). A weight is how often the
    unit was drawn; all ones give the value itself. Several sizes mean independent samples, side
    by side in the unit axis and each resampled on its own; the smallest sets the widening, and
    is reported as `n`. A statistic that spreads its weights over more floats than units says so
    by `width`, floats per resample, and is given smaller blocks.

    A percentile interval follows the bias of the statistic instead of correcting it: harmless
    where that is small beside the spread, wrong for the correlation of two long vectors of noisy
    means (differentials), where 95 % intervals covered 19 to 76 % in simulation.

    Raises InputError with fewer than 6 units in a sample, and where so many resamples leave the
    statistic infinite that an end of the interval is.
    """
    sizes = [sizes] if isinstance(sizes, int) else list(sizes)
    n = min(sizes)
    if n < MIN_CLUSTERS:
        raise InputError(
            f"{n} prompts or groups of prompts are too few for an interval, at least "
            f"{MIN_CLUSTERS} are needed; raise the set's count or the share of this split"
        )
    if resamples < 1:
        raise InputError(f"resamples {resamples}: expected at least 1, and 10000 is usual")
    rng = np.random.default_rng(seed)
    blocks = _resample_counts(sizes, resamples, width, rng)
    drawn = np.concatenate([statistic(weights) for weights in blocks])
    reach = math.sqrt(n / (n - 1)) * _student_quantile((1 + LEVEL) / 2, n - 1)
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
    """The statistic of a plain mean."""
    return means[:, 0]


def mean_interval(
    values: npt.ArrayLike,
    clusters: Clusters | None = None,
    statistic: Statistic = first_column,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Interval of a mean over prompts, or of a statistic of several such means, for one model.

    `values`: (prompt,) or (prompt, column). `statistic` maps means (resample, column) to values
    (resample,): ICAT of the columns SS and LMS, for instance.
    """
    table = _table(values, "values")
    sums = _sums(np.column_stack([table, np.ones(len(table))]), _codes(clusters, len(table)))

    def of_weights(weights: Array) -> Array:
        totals = _totals(weights, sums)
        return statistic(totals[:, :-1] / totals[:, -1:])

    return bootstrap(of_weights, len(sums), resamples=resamples, seed=seed)


# --- paired comparisons ----------------------------------------------------------------------


def _swaps(count: int, draws: int, rng: np.random.Generator) -> Iterator[Array]:
    """Which clusters are swapped, (draw, cluster) of 0 and 1, in blocks.

    Few clusters: every pattern once, the last cluster held (swapping all changes no |effect|).
    """
    total = 2 ** (count - 1) if count <= MAX_ENUMERATED else draws
    rows = max(1, BLOCK // count)
    for start in range(0, total, rows):
        stop = min(start + rows, total)
        if count <= MAX_ENUMERATED:
            yield (np.arange(start, stop)[:, None] >> np.arange(count) & 1).astype(np.float64)
        else:
            yield rng.integers(0, 2, (stop - start, count), dtype=np.int8).astype(np.float64)


def _swap_p(
    before: Array, after: Array, size: Array, effect: Contrast, draws: int, seed: int
) -> float:
    """Two-sided p of `effect` under swapping before and after of whole clusters.

    `before`, `after`: sums (cluster, column); `size`: prompts per cluster. `effect` must change
    its sign when before and after are exchanged.
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
    rng = np.random.default_rng([seed, count])
    effects = np.concatenate([at(swapped) for swapped in _swaps(count, draws, rng)])
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
    seed: int,
) -> Difference:
    """`value` with its interval, `effect` tested by swaps; columns as in `paired_difference`."""
    _same_rows(before, after, "before, after")
    codes = _codes(clusters, len(before))
    b, a = _sums(before, codes), _sums(after, codes)
    size = _sums(np.ones((len(before), 1)), codes)

    def of_weights(weights: Array) -> Array:
        drawn = _totals(weights, size)
        return value(_totals(weights, b) / drawn, _totals(weights, a) / drawn)

    found = bootstrap(of_weights, len(size), resamples=resamples, seed=seed)
    # Half the interval is t * standard error; power adds its own quantile to t.
    t_level, t_power = (_student_quantile(q, found.n - 1) for q in ((1 + LEVEL) / 2, POWER))
    return Difference(
        value=found.value,
        low=found.low,
        high=found.high,
        p=_swap_p(b, a, size, effect, resamples, seed),
        n=found.n,
        mde=(found.high - found.low) / 2 * (1 + t_power / t_level),
        moved=int((b != a).any(axis=1).sum()),
    )


def paired_difference(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    clusters: Clusters | None = None,
    statistic: Statistic = first_column,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """`statistic` after minus before, each of means over the same prompts.

    `before`, `after`: (prompt,) or (prompt, column), rows in the same order. `statistic` maps
    means (resample, column) to values (resample,); the default is the mean itself. p is exact by
    enumeration while at most 16 clusters differ, else (b + 1) / (m + 1) over m = `resamples`
    random swaps.

    Raises InputError for shapes that differ, values not finite, or fewer than 6 clusters.
    """

    def change(b: Array, a: Array) -> Array:
        return statistic(a) - statistic(b)

    tables = _table(before, "before"), _table(after, "after")
    return _paired(*tables, clusters, change, change, resamples, seed)


def _difference_of_means(before: Array, after: Array) -> Array:
    return after[:, 0] - before[:, 0]


def _percent_change(before: Array, after: Array) -> Array:
    """100 (after - before) / before of the first column; from 0 it is 0 (to 0) or infinite."""
    change = after[:, 0] - before[:, 0]
    from_zero = np.where(change == 0, 0.0, np.inf)
    return 100 * np.divide(change, before[:, 0], out=from_zero, where=before[:, 0] > 0)


def relative_change(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    clusters: Clusters | None = None,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """100 (mean after - mean before) / mean before, in percent of the mean before.

    `before`, `after`: (prompt,) scores of at least 0. Both means are taken anew in every
    resample; p tests the difference of the means. From 0 to 0 is a change of 0.

    Raises InputError as `paired_difference`, for negative scores, for a baseline of 0 that rises,
    and for a baseline so sparse that the interval is unbounded.
    """
    b, a = _table(before, "before"), _table(after, "after")
    if min(b.min(initial=0), a.min(initial=0)) < 0:
        raise InputError(
            "relative change: scores must be at least 0, found a negative one; "
            "report the difference instead"
        )
    if not b.any() and a.any():
        raise InputError(
            "relative change: the mean before is 0, expected a positive baseline; "
            "report the difference instead"
        )
    return _paired(b, a, clusters, _percent_change, _difference_of_means, resamples, seed)


def reduction(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    clusters: Clusters | None = None,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """`relative_change` with the sign turned: a positive number is less of the behaviour."""
    change = relative_change(before, after, clusters, resamples=resamples, seed=seed)
    # 0 - x, so that no change is 0 and not -0.
    return replace(change, value=0 - change.value, low=0 - change.high, high=0 - change.low)


def perplexity_change(
    nll_before: npt.ArrayLike,
    nll_after: npt.ArrayLike,
    tokens: npt.ArrayLike,
    clusters: Clusters | None = None,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Change of perplexity exp(sum of nll / sum of tokens), in percent of the value before.

    `nll_before`, `nll_after`: (text,) negative log-likelihoods summed over a text's predicted
    tokens, in nats; `tokens`: (text,) how many those are. Texts are resampled with their tokens;
    p tests the difference of the summed nll.
    """
    count = _table(tokens, "tokens")
    if (count <= 0).any():
        raise InputError("tokens: every text needs at least one predicted token; drop empty texts")
    tables = _table(nll_before, "nll_before"), _table(nll_after, "nll_after")
    for table in tables:
        _same_rows(table, count, "nll, tokens")
    before, after = (np.column_stack([table, count]) for table in tables)

    def percent(b: Array, a: Array) -> Array:
        return 100 * np.expm1((a[:, 0] - b[:, 0]) / b[:, 1])

    return _paired(before, after, clusters, percent, _difference_of_means, resamples, seed)


# --- controls and families -------------------------------------------------------------------


def against_draws(value: float, draws: npt.ArrayLike) -> Control:
    """A method's effect beside the effects of random controls of equal size.

    Larger is the stronger effect (pass reductions). p is the one-sided rank (b + 1) / (m + 1),
    b of m draws being at least `value`: m draws cannot show less than 1 / (m + 1), so p < 0.05
    takes 20 of them.
    """
    effects = _table(draws, "draws")[:, 0]
    if len(effects) < 2:
        raise InputError(f"draws: {len(effects)} of the control, expected at least 2; raise draws")
    if not np.isfinite(value):
        raise InputError(f"value: {value} cannot be compared with draws; score it first")
    rank = int((effects >= value).sum()) + 1
    return Control(
        value=float(value),
        mean=float(effects.mean()),
        low=float(effects.min()),
        high=float(effects.max()),
        p=rank / (len(effects) + 1),
        n=len(effects),
    )


def holm(p_values: Sequence[float] | Array) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given: they keep the family-wise error."""
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise InputError("p_values: expected numbers from 0 to 1; leave out what was not tested")
    order = np.argsort(p, kind="stable")
    scaled = p[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted.tolist()


def mde_of_family(mde: float, n: int, tests: int) -> float:
    """The minimum detectable effect of one among `tests` tests, from that of a test by itself.

    Holm's first step asks for (1 - LEVEL) / tests of the smallest p; `n` counts clusters.
    """
    power = _student_quantile(POWER, n - 1)
    alone, strict = (
        _student_quantile(1 - (1 - LEVEL) / (2 * count), n - 1) for count in (1, max(tests, 1))
    )
    return mde * (strict + power) / (alone + power)


# --- correlations ----------------------------------------------------------------------------


def _standardised(values: npt.ArrayLike, name: str) -> Array:
    """(row,) with mean 0 and variance 1, against cancellation in sums of squares; constant: 0."""
    column = _table(values, name)[:, 0]
    if len(column) == 0 or np.ptp(column) == 0:
        return np.zeros(len(column))
    return (column - column.mean()) / column.std()


def _pearson(totals: Array) -> Array:
    """Weighted sums (resample, 6) of 1, x, y, xx, yy and xy to correlations; 0 for a constant."""
    weight, x, y, xx, yy, xy = totals.T
    x, y = x / weight, y / weight
    spread = np.maximum(xx / weight - x * x, 0) * np.maximum(yy / weight - y * y, 0)
    covariance = xy / weight - x * y
    # Rows are standardised, so a product of variances at rounding level means a constant.
    constant = spread < 1e-20
    return np.where(
        constant, 0.0, np.clip(covariance / np.sqrt(np.where(constant, 1, spread)), -1, 1)
    )


def _weighted_ranks(values: Array) -> Callable[[Array], Array]:
    """Function of weights (resample, row): mid-ranks (resample, row), rows repeated by weight."""
    order = np.argsort(values, kind="stable")
    _, starts, group = np.unique(values[order], return_index=True, return_inverse=True)
    position = np.empty(len(values), dtype=np.intp)
    position[order] = group

    def ranks(weights: Array) -> Array:
        tied = np.add.reduceat(weights[:, order], starts, axis=1)
        return (np.cumsum(tied, axis=1) - tied / 2)[:, position]

    return ranks


def rank_agreement(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    clusters: Clusters | None = None,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Spearman correlation of two scorers over the same prompts, ties at their mid-rank.

    `x`, `y`: (prompt,). Every resample is ranked anew. A scorer that is constant gives value 0 in
    [-1, 1].
    """
    a, b = _standardised(x, "x"), _standardised(y, "y")
    _same_rows(a, b, "x, y")
    codes = _codes(clusters, len(a))
    ranks_a, ranks_b = _weighted_ranks(a), _weighted_ranks(b)

    def spearman(weights: Array) -> Array:
        rows = weights[:, codes]
        total = rows.sum(axis=1, keepdims=True)
        # Weighted mid-ranks have mean total / 2; divided by total they lie in (-1/2, 1/2).
        u, v = ranks_a(rows) / total - 0.5, ranks_b(rows) / total - 0.5
        wu, wv = rows * u, rows * v
        parts = (rows, wu, wv, wu * u, wv * v, wu * v)
        return _pearson(np.stack([part.sum(axis=1) for part in parts], axis=-1))

    n = int(codes.max(initial=-1)) + 1
    found = bootstrap(spearman, n, width=len(a), resamples=resamples, seed=seed)
    return found if a.any() and b.any() else Estimate(0.0, -1.0, 1.0, found.n)
