"""Choose a circuit: the most negative neurons of a differential that are not protected."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparc3.base.artifacts import differential_path
from sparc3.base.errors import InputError
from sparc3.base.files import Array, read_tensors
from sparc3.base.params import Budget, Method
from sparc3.circuits.circuit import Circuit

# Of a sweep's columns, what a budget of `select` bounds, and its standard error.
BUDGETS = {
    "perplexity": ("ppl_delta", "ppl_error"),
    "kl": ("kl", "kl_error"),
    "accuracy": ("accuracy_loss", "accuracy_error"),
}


def keeps(budget: Budget, found: Mapping[str, Any]) -> bool:
    """Whether every cost that a sweep found, with its standard error, keeps to its budget.

    Of several noisy points the one that is chosen tends to be cheap by luck, and would cost more
    than the budget on other texts.
    """
    return all(
        float(found[cost]) + float(found[error]) <= limit
        for name, (cost, error) in BUDGETS.items()
        if (limit := getattr(budget, name)) is not None
    )


def read_differential(behaviour: str, method: str, block: str = "") -> tuple[Array, Array]:
    """A method's differential, of a block if it has any, and the importance: (layer, neuron)."""
    tensors, _ = read_tensors(differential_path(behaviour, method))
    whole = tensors["differential"]
    return tensors.get(block, whole), tensors["importance"]


def protected(importance: Array, share: float) -> Array:
    """Boolean (layer, neuron): the `share` of all neurons that matter most for general text."""
    count = round(share * importance.size)
    mask = np.zeros(importance.size, dtype=bool)
    mask[np.argsort(-importance, axis=None, kind="stable")[:count]] = True
    return mask.reshape(importance.shape)


def ranked(differential: Array, barred: Array) -> Array:
    """Flat ids of all neurons not barred, the most negative first; ties go to the lower id."""
    values = np.where(barred, np.inf, differential).ravel()
    return np.argsort(values, kind="stable")[: differential.size - int(barred.sum())]


def choose(differential: Array, k: int, barred: Array, key: str) -> Array:
    """The first k of `ranked`, as `key` of params asks; InputError if fewer are left."""
    ids = ranked(differential, barred)
    if k > ids.size:
        raise InputError(
            f"params: {key}: {k} neurons, but only {ids.size} of {differential.size} are not "
            "protected; ask for fewer, or protect a smaller share"
        )
    return ids[:k]


def choose_per_layer(differential: Array, counts: Array, barred: Array, key: str) -> Array:
    """As `choose`, with counts[l] neurons from every layer l."""
    width = differential.shape[1]
    rows = zip(differential[:, None], counts.tolist(), barred[:, None], strict=True)
    ids = [
        layer * width + choose(values, k, mask, f"{key}, layer {layer}")
        for layer, (values, k, mask) in enumerate(rows)
    ]
    flat = np.concatenate(ids)
    return flat[np.argsort(differential.ravel()[flat], kind="stable")]


def scales(method: Method, differential: Array) -> Array:
    """Factor left on each neuron, from its differential; `auroc` is AurA's dampening, 1 - 2 (AUROC
    - 0.5) (Suau et al. 2024, Eq. 4), and the `auroc` contrast is 0.5 - AUROC.
    """
    if method.scale == "auroc":
        return np.clip(1 + 2 * differential, 0, 1)
    return np.full(differential.shape, method.scale)


def circuit_of(method: Method, differential: Array, ids: Array) -> Circuit:
    """The circuit of chosen neurons, given by their flat ids."""
    layers, neurons = np.divmod(ids, differential.shape[1])
    scores = differential.ravel()[ids].astype(np.float64)
    return Circuit(layers, neurons, scores, scales(method, scores))


def circuit_at(
    method: Method, differential: Array, importance: Array, k: int, share: float, key: str
) -> Circuit:
    """The circuit of k neurons, as `key` asks, that a differential gives with a share protected."""
    ids = choose(differential, k, protected(importance, share), key)
    return circuit_of(method, differential, ids)
