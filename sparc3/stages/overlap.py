"""Overlap: how far the behaviours' circuits and differentials coincide, and what chance explains.

All circuits have one size here: overlap means little between sets of different sizes. The plain
numbers of the reproduction stand beside the nulls that the uniform one hides: neurons permuted
within layers, references that share no text, halves of one behaviour, a behaviour that is none.
Of more than FEW behaviours there are pairs only, and what needs prompts again is left out.
Behaviours are taken by their names' order, so that no number depends on that of params.
"""

import logging
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from sparc3.base.artifacts import OUTPUTS, metrics_path, read_prompts
from sparc3.base.files import Array, write_csv, write_json
from sparc3.base.params import Params
from sparc3.circuits import correlation, nulls, overlap
from sparc3.circuits.choose import choose, protected, ranked, read_differential
from sparc3.circuits.overlap import joined
from sparc3.relevance.contrasts import CONTRASTS

log = logging.getLogger(__name__)


def compare_sets(sets: Mapping[str, Array], layers: int, width: int) -> dict[str, Any]:
    """Everything that needs only the sets of neurons: behaviour -> flat ids."""
    last = overlap.late_layers(layers)
    counts = {name: overlap.layer_counts(ids, layers, width) for name, ids in sets.items()}
    found = {
        "regions": {names: ids.size for names, ids in overlap.regions(sets).items()},
        "overlaps": overlap.overlaps(sets, layers, width),
        "layers": {name: row.tolist() for name, row in counts.items()},
        "late_share": {name: overlap.late_share(row, last) for name, row in counts.items()},
        "late_layers": last,
    }
    triples = {}
    for names in combinations(sets, 3) if len(sets) <= overlap.FEW else ():
        a, b, c = (sets[name] for name in names)
        pairs = overlap.common(a, b), overlap.common(a, c), overlap.common(b, c)
        sizes = a.size, b.size, c.size
        triple = overlap.common(a, b, c)
        triples[joined(names)] = overlap.triple_given_pairs(triple, pairs, sizes, layers * width)
    return found | ({"triple_given_pairs": triples} if triples else {})


def one_of_each(prompt_set: str, seed: int) -> Array:
    """Positions of one prompt, at random, of every text of a set's attribute split: neutral pairs
    hold each item in both orders, whose relevance has opposite signs, and a null built from such
    parts would compare rounding errors.
    """
    texts = [row["text"] for row in read_prompts(prompt_set, "attribute")]
    order = np.random.default_rng(seed).permutation(len(texts))
    _, first = np.unique(np.array(texts)[order], return_index=True)
    return np.sort(order[first])


def compare_prompts(
    params: Params, behaviours: correlation.Behaviours, barred: Array
) -> dict[str, Any]:
    """What other prompts would give: corrected correlations and nulls. `barred`: (neuron,)."""
    settings, method = params.overlap, params.methods[params.overlap.method]
    assert method.contrast is not None  # stages.checks
    contrast, seed = CONTRASTS[method.contrast], settings.seed
    needed = {name for pair in behaviours.values() for name in pair}
    sets = (name for name in params.prompt_sets if name in needed)
    scores = {name: correlation.read_flat(name, method.score) for name in sets}
    found = {}
    if method.contrast == "mean-difference":  # what the estimator is for
        drawn = scores, behaviours, settings.resamples, seed
        found["corrected"] = correlation.bootstrap_correlations(*drawn)

    def derive(reference: Array, prompts: Array) -> nulls.Derived:
        differential = contrast(reference[:, None], prompts[:, None])[0]
        return differential, ranked(differential, barred)[: settings.num_neurons]

    for reference in {reference for reference, _ in behaviours.values()}:
        scores[reference] = scores[reference].at(one_of_each(reference, seed))
    drawn = scores, behaviours, derive, settings.repeats, seed
    found["nulls"] = {
        "split_halves": nulls.repeated(nulls.split_halves, *drawn)["halves"],
        "disjoint_references": nulls.repeated(nulls.disjoint_references, *drawn),
        "pseudo_behaviour": nulls.repeated(nulls.pseudo_behaviour, *drawn),
    }
    return found


def run(params: Params) -> dict[str, float]:
    name, k = params.overlap.method, params.overlap.num_neurons
    behaviours = sorted(params.behaviours)
    tensors = {behaviour: read_differential(behaviour, name) for behaviour in behaviours}
    _, importance = tensors[behaviours[0]]  # general text's: the same for all
    (layers, width), barred = importance.shape, protected(importance, params.overlap.protect)
    differentials = {behaviour: values.ravel() for behaviour, (values, _) in tensors.items()}
    sets = {
        behaviour: choose(values, k, barred, "overlap.num_neurons")
        for behaviour, (values, _) in tensors.items()
    }
    found = compare_sets(sets, layers, width) | {
        "correlations": correlation.correlations(differentials),
        "quadrants": correlation.quadrants(differentials),
    }
    if 1 < len(behaviours) <= overlap.FEW:
        specs = {behaviour: params.behaviours[behaviour] for behaviour in behaviours}
        prompt_sets = {behaviour: (s.reference, s.prompts) for behaviour, s in specs.items()}
        found |= compare_prompts(params, prompt_sets, barred.ravel())
    rows = [
        {"behaviours": names, "layer": int(i) // width, "neuron": int(i) % width}
        for names, ids in overlap.regions(sets).items()
        for i in ids
    ]
    write_csv(OUTPUTS / "overlap" / "regions.csv", rows, ("behaviours", "layer", "neuron"))
    write_json(metrics_path("overlap"), found)
    shared = (f"{names} {row['observed']}" for names, row in found["overlaps"].items())
    log.info("overlap: of %d neurons each (%s), in common: %s", k, name, ", ".join(shared) or "-")
    return {
        f"{key}.{names}": float(row[key])
        for names, row in found["overlaps"].items()
        for key in ("observed", "enrichment", "jaccard")
    } | {f"correlation.{names}": row["pearson"] for names, row in found["correlations"].items()}
