"""Contrasts: from the scores of a reference and of a behaviour to one number per neuron.

Every contrast takes float (prompt, layer, neuron) scores, first of the reference, then of the
behaviour, and returns the differential, float32 (layer, neuron): the most negative neurons are the
most specific to the behaviour, or, for a control, those that it prunes instead. A new contrast is
one function of one layer's scores, (prompt, neuron), and one row of CONTRASTS. All prompts of a
reference count alike, whatever their seed.
"""

from collections.abc import Callable
from functools import partial, wraps

import numpy as np

from sparc3.base.errors import InputError
from sparc3.base.files import Array

Contrast = Callable[[Array, Array], Array]


def by_layer(contrast: Contrast, fewest: int = 1) -> Contrast:
    """A contrast of all layers, one after the other, so that working memory stays far below that of
    the scores. InputError: unlike sets, or fewer prompts in one than it needs.
    """
    name = contrast.__name__.replace("_", "-")

    @wraps(contrast)
    def of_layers(reference: Array, behaviour: Array) -> Array:
        if reference.ndim != 3 or reference.shape[1:] != behaviour.shape[1:]:
            raise InputError(
                f"contrast {name}: reference {reference.shape} and behaviour {behaviour.shape} "
                "must be (prompt, layer, neuron) of one model; run attribute for both again"
            )
        for which, scores in (("reference", reference), ("behaviour", behaviour)):
            if len(scores) < fewest:
                raise InputError(
                    f"contrast {name}: {len(scores)} prompts in the {which}; "
                    f"it needs {fewest} or more: raise count in prompt_sets"
                )
        rows = [contrast(reference[:, i], behaviour[:, i]) for i in range(reference.shape[1])]
        return np.stack(rows).astype(np.float32)

    return of_layers


@by_layer
def mean_difference(reference: Array, behaviour: Array) -> Array:
    """mean R_reference - mean R_behaviour (SparC3, Eq. 7)."""
    return reference.mean(0, dtype=np.float64) - behaviour.mean(0, dtype=np.float64)


@by_layer
def auroc(reference: Array, behaviour: Array) -> Array:
    """0.5 - AUROC, in [-0.5, 0.5]; AUROC = P(behaviour > reference) + P(equal) / 2.

    AurA (Suau et al. 2024) ranks neurons by the AUROC of their largest activation, and dampens one
    by 1 - 2 (AUROC - 0.5) = 1 + 2 * differential.
    """
    from scipy.stats import rankdata  # slow to import, and only this contrast needs it

    m, n = len(reference), len(behaviour)
    ranks = rankdata(np.concatenate([reference, behaviour]), axis=0)  # ties share their mean rank
    wins = ranks[m:].sum(0) - n * (n + 1) / 2  # Mann-Whitney's U of the behaviour
    return 0.5 - wins / (m * n)


@partial(by_layer, fewest=2)
def t(reference: Array, behaviour: Array) -> Array:
    """Welch's t statistic of reference - behaviour; 0 for a neuron constant within both sets."""
    difference = reference.mean(0, dtype=np.float64) - behaviour.mean(0, dtype=np.float64)
    error = np.sqrt(_variance_of_mean(reference) + _variance_of_mean(behaviour))
    return np.divide(difference, error, out=np.zeros_like(difference), where=error > 0)


def _variance_of_mean(scores: Array) -> Array:
    variance = scores.var(0, ddof=1, dtype=np.float64)
    # Rounding of the mean leaves some variance in a constant: that would make t enormous.
    return np.where((scores == scores[0]).all(0), 0.0, variance) / len(scores)


def reversed_difference(reference: Array, behaviour: Array) -> Array:
    """mean R_behaviour - mean R_reference: a control that prunes the most positive differential."""
    return -mean_difference(reference, behaviour)


@by_layer
def reference_only(reference: Array, behaviour: Array) -> Array:
    """-mean |R_reference|: a control that prunes what matters most for the reference."""
    return -np.abs(reference).mean(0, dtype=np.float64)


CONTRASTS: dict[str, Contrast] = {
    "mean-difference": mean_difference,
    "auroc": auroc,
    "t": t,
    "reversed-difference": reversed_difference,
    "reference-only": reference_only,
}
