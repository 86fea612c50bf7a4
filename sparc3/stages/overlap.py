"""Overlap: how far the behaviours' circuits and differentials coincide, and what chance explains.

All circuits have one size here, whatever size each is pruned at: overlap means little between sets
of different sizes. The plain numbers of the reproduction (regions, enrichment, correlations,
quadrants, layers) stand beside the nulls that the uniform one hides: neurons permuted within
layers, references that share no text, halves of one behaviour, a behaviour that is none.
"""

from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from sparc3.base.artifacts import (
    OUTPUTS,
    differential_path,
    groups_of,
    metrics_path,
    read_prompts,
    read_scores,
)
from sparc3.base.files import Array, read_tensors, write_csv, write_json
from sparc3.base.params import Params
from sparc3.circuits import correlation, nulls
from sparc3.circuits import overlap as sets_of
from sparc3.circuits.choose import choose, protected
from sparc3.relevance.contrasts import CONTRASTS

REGION_COLUMNS = ("behaviours", "layer", "neuron")


def named(table: dict[Any, Any]) -> dict[str, Any]:
    """The same mapping with keys for JSON: ('a', 'b') is 'a-b', (('a', 'b'), ('a', 'c')) is
    'a-b minus a-c'.
    """
    return {
        " minus ".join(map("-".join, key)) if isinstance(key[0], tuple) else joined(key): value
        for key, value in table.items()
    }


def joined(key: Any) -> str:
    return key if isinstance(key, str) else "-".join(key)


def prompt_scores(prompt_set: str, score: str) -> correlation.Scores:
    """All scores of a set, flat, with the grouping key of each prompt."""
    ids, values = read_scores(prompt_set, score)
    return correlation.Scores(values.reshape(len(ids), -1), np.array(groups_of(prompt_set, ids)))


def one_of_each(prompt_set: str, seed: int) -> Array:
    """Positions of one prompt, at random, of every text of a set's attribute split.

    Neutral pairs hold each item in both orders, whose relevance has opposite signs: any part of
    them has the mean 0, and a null built from such parts would compare rounding errors.
    """
    texts = [row["text"] for row in read_prompts(prompt_set, "attribute")]
    order = np.random.default_rng(seed).permutation(len(texts))
    _, first = np.unique(np.array(texts)[order], return_index=True)
    return np.sort(order[first])


def compare_sets(sets: dict[str, Array], layers: int, width: int) -> dict[str, Any]:
    """Everything that needs only the sets of neurons."""
    found: dict[str, Any] = {
        "regions": {
            "-".join(names): int(ids.size)
            for names, ids in sets_of.regions(sets, layers * width).items()
        },
        "overlaps": {
            "-".join(o.names): asdict(o) | {"p": o.p, "layered_p": o.layered_p}
            for o in sets_of.overlaps(sets, layers, width)
        },
        "layers": {
            name: sets_of.layer_counts(ids, layers, width).tolist() for name, ids in sets.items()
        },
    }
    last = sets_of.late_layers(layers)
    found["late_share"] = {
        name: sets_of.late_share(np.array(counts), last) for name, counts in found["layers"].items()
    }
    found["late_layers"] = last
    for names in combinations(sets, 3):
        a, b, c = (sets[name] for name in names)
        given = sets_of.triple_given_pairs(
            sets_of.common(a, b, c),
            (sets_of.common(a, b), sets_of.common(a, c), sets_of.common(b, c)),
            (a.size, b.size, c.size),
            layers * width,
        )
        found.setdefault("triple_given_pairs", {})["-".join(names)] = asdict(given)
    return found


def run(params: Params) -> dict[str, float]:
    overlap = params.overlap
    method = params.methods[overlap.method]
    assert method.contrast is not None  # stages.checks
    sets, differentials, importance = {}, {}, None
    for behaviour in params.behaviours:
        tensors, _ = read_tensors(differential_path(behaviour, overlap.method))
        importance = tensors["importance"]
        barred = protected(importance, overlap.protect)
        sets[behaviour] = choose(tensors["differential"], overlap.num_neurons, barred)
        differentials[behaviour] = tensors["differential"].ravel()
    assert importance is not None  # params.behaviours is never empty
    layers, width = importance.shape

    found = compare_sets(sets, layers, width)
    pearson, spearman = correlation.correlations(differentials)
    found["correlations"] = {
        f"{a}-{b}": {"pearson": float(pearson[i, j]), "spearman": float(spearman[i, j])}
        for (i, a), (j, b) in combinations(enumerate(differentials), 2)
    }
    found["quadrants"] = named(correlation.quadrants(differentials))

    contrasts = {n: (b.reference, b.prompts) for n, b in params.behaviours.items()}
    used = {
        name: prompt_scores(name, method.score)
        for name in dict.fromkeys(name for pair in contrasts.values() for name in pair)
    }
    by_layer = CONTRASTS[method.contrast]
    flat = protected(importance, overlap.protect).reshape(1, -1)

    def contrast(reference: Array, behaviour: Array) -> Array:
        return by_layer(reference[:, None], behaviour[:, None])[0]

    def choose_flat(differential: Array, count: int) -> Array:
        return choose(differential.reshape(1, -1), count, flat)

    if len(contrasts) > 1:
        if method.contrast == "mean-difference":  # what the estimator is for
            estimated = correlation.bootstrap_correlations(
                used, contrasts, draws=overlap.resamples, seed=overlap.seed
            )
            found["corrected"] = {key: named(table) for key, table in estimated.items()}
        references = {reference for reference, _ in contrasts.values()}
        apart = {
            name: scores.at(one_of_each(name, overlap.seed)) if name in references else scores
            for name, scores in used.items()
        }
        arguments = (apart, contrasts, contrast, choose_flat, overlap.num_neurons)
        repeated = {"repeats": overlap.repeats, "seed": overlap.seed}
        found["nulls"] = {
            "split_halves": named(nulls.split_halves(*arguments, **repeated)),
            "disjoint_references": {
                kind: named(table)
                for kind, table in nulls.disjoint_references(*arguments, **repeated).items()
            },
            "pseudo_behaviour": nulls.pseudo_behaviour(*arguments, **repeated),
        }
    rows = [
        {"behaviours": "-".join(names), "layer": int(i) // width, "neuron": int(i) % width}
        for names, ids in sets_of.regions(sets, layers * width).items()
        for i in ids
    ]
    write_csv(OUTPUTS / "overlap" / "regions.csv", rows, REGION_COLUMNS)
    write_json(metrics_path("overlap"), found)
    return {
        f"{key}.{name}": float(row[key])
        for name, row in found["overlaps"].items()
        for key in ("observed", "enrichment", "jaccard")
    } | {f"correlation.{name}": row["pearson"] for name, row in found["correlations"].items()}
