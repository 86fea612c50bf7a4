"""How far a circuit depends on which prompts were drawn: bootstrap over the prompts it came from.

Only neurons that could be chosen are resampled, the candidates: the `CANDIDATES * k` most negative
ones of the full sample, most negative first. One from beyond them would have to overtake them all.
"""

from collections.abc import Sequence

import numpy as np

from sparc3.contrasts import CONTRASTS
from sparc3.files import Array

CANDIDATES = 20
SHARES = (0.125, 0.25, 0.5, 1.0)  # of the prompts: where the curve of agreement is measured


def resampled_circuits(
    reference: Array,
    behaviour: Array,
    contrast: str,
    k: int,
    sizes: Sequence[int],
    resamples: int,
    seed: int,
) -> list[Array]:
    """Columns chosen in each resample, for every size: arrays (resample, k).

    `reference` and `behaviour` are scores (prompt, candidate). A size s draws, with replacement,
    the share s / len(behaviour) of both sets.
    """
    rng = np.random.default_rng(seed)
    found = []
    for size in sizes:
        chosen = np.empty((resamples, k), dtype=np.int64)
        other = max(2, round(size * len(reference) / len(behaviour)))
        for draw in range(resamples):
            one = reference[rng.integers(0, len(reference), other)][:, None]
            two = behaviour[rng.integers(0, len(behaviour), size)][:, None]
            values = CONTRASTS[contrast](one, two)[0]
            chosen[draw] = np.argsort(values, kind="stable")[:k]
        found.append(chosen)
    return found


def selection_frequency(chosen: Array, count: int) -> Array:
    """Share of resamples (resample, k) that chose each of `count` candidates, in [0, 1]."""
    return np.bincount(chosen.ravel(), minlength=count) / len(chosen)


def mean_overlap(chosen: Array, k: int) -> float:
    """Mean share of the full sample's circuit, candidates 0 to k - 1, that a resample finds again.

    In [0, 1]; 1 for an empty circuit, of which nothing can be missed.
    """
    return float((chosen < k).sum(axis=1).mean() / k) if k else 1.0
