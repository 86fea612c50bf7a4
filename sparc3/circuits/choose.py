"""Choose a circuit: the most negative neurons of a differential that are not protected."""

import numpy as np

from sparc3.base.errors import InputError
from sparc3.base.files import Array
from sparc3.base.params import Method
from sparc3.circuits.circuit import Circuit


def protected(importance: Array, share: float) -> Array:
    """Boolean (layer, neuron): the `share` of all neurons that matter most for general text."""
    count = round(share * importance.size)
    mask = np.zeros(importance.size, dtype=bool)
    mask[np.argsort(-importance, axis=None, kind="stable")[:count]] = True
    return mask.reshape(importance.shape)


def choose(differential: Array, k: int, barred: Array) -> Array:
    """Flat ids (layer * width + neuron) of the k most negative neurons that are not barred.

    Sorted from the most negative on; ties go to the lower id. Raises InputError if fewer than k
    neurons are left.
    """
    free = int(differential.size - barred.sum())
    if k > free:
        raise InputError(
            f"select.num_neurons is {k}, but only {free} of {differential.size} neurons are not "
            "protected; lower num_neurons or protect"
        )
    values = np.where(barred, np.inf, differential).ravel()
    return np.argsort(values, kind="stable")[:k]


def choose_per_layer(differential: Array, counts: Array, barred: Array) -> Array:
    """As `choose`, with counts[l] neurons from every layer l."""
    width = differential.shape[1]
    chosen = [
        layer * width + choose(differential[layer : layer + 1], int(k), barred[layer : layer + 1])
        for layer, k in enumerate(counts)
        if k
    ]
    ids = np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64)
    return ids[np.argsort(differential.ravel()[ids], kind="stable")]


def scales(method: Method, differential: Array) -> Array:
    """Factor left on each neuron of a circuit, from its differential; 0 prunes.

    `auroc` is AurA's dampening, 1 - 2 (AUROC - 0.5) (Suau et al. 2024, Eq. 4), and the `auroc`
    contrast is 0.5 - AUROC.
    """
    if method.scale == "auroc":
        return np.clip(1 + 2 * differential, 0, 1)
    return np.full(differential.shape, method.scale)


def circuit_at(
    method: Method, differential: Array, importance: Array, k: int, share: float
) -> Circuit:
    """The circuit of k neurons that a differential gives, with `share` of all protected."""
    ids = choose(differential, k, protected(importance, share))
    layers, neurons = np.divmod(ids, differential.shape[1])
    scores = differential.ravel()[ids].astype(np.float64)
    return Circuit(layers, neurons, scores, scales(method, scores))
