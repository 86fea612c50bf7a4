"""How far a circuit depends on which prompts were drawn: bootstrap over the prompts it came from.

Only neurons that could be chosen are resampled, the candidates: the `CANDIDATES * k` most negative
ones of the full sample, most negative first. One from beyond them would have to overtake them all.
"""

from collections.abc import Callable, Sequence

import numpy as np

from sparc3.base.files import Array
from sparc3.circuits.correlation import Scores

CANDIDATES = 20
SHARES = (0.125, 0.25, 0.5, 1.0)  # of the prompts: where the curve of agreement is measured


def resampled_circuits(
    reference: Scores,
    behaviour: Scores,
    contrast: Callable[[Array, Array], Array],
    k: int,
    sizes: Sequence[int],
    resamples: int,
    seed: int,
) -> list[Array]:
    """Columns chosen in each resample, for every size: arrays (resample, k), from the candidates'
    scores. Whole groups are drawn, with replacement. A size s stands for the share s / prompts of
    the groups of either set, and at least two.
    """
    rng = np.random.default_rng(seed)
    sets: list[tuple[Scores, list[Array]]] = []
    for given in (reference, behaviour):
        codes = np.unique(given.groups, return_inverse=True)[1]
        sets.append((given, [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]))

    def drawn(given: Scores, groups: Sequence[Array], share: float) -> Array:
        count = max(2, round(share * len(groups)))
        rows = np.concatenate([groups[i] for i in rng.integers(0, len(groups), count)])
        return given.values[rows][:, None]

    by_size = [np.empty((resamples, k), dtype=np.int64) for _ in sizes]
    for size, chosen in zip(sizes, by_size, strict=True):
        share = size / len(behaviour.values)
        for draw in range(resamples):
            values = contrast(*(drawn(given, groups, share) for given, groups in sets))[0]
            chosen[draw] = np.argsort(values, kind="stable")[:k]
    return by_size


def selection_frequency(chosen: Array, count: int) -> Array:
    """Share of resamples (resample, k) that chose each of `count` candidates, in [0, 1]."""
    return np.bincount(chosen.ravel(), minlength=count) / len(chosen)


def overlaps(chosen: Array, k: int) -> Array:
    """Share of candidates 0 to k - 1 that each resample finds again, (resample,); all of an empty
    circuit. By chance, among candidates, it is 1 / CANDIDATES.
    """
    return (chosen < k).sum(axis=1) / k if k else np.ones(len(chosen))
