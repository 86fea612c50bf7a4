"""Nulls of overlap: halves of a behaviour, references without common text, a behaviour of none.

Each draws prompts once, and asks `derive` what circuits those would have given: it yields groups of
such circuits under a kind and the names that they stand for. `repeated` does that many times.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations

import numpy as np

from sparc3.base.errors import InputError
from sparc3.base.files import Array
from sparc3.circuits.correlation import Behaviours, Scores, pearson
from sparc3.circuits.overlap import Names, common, jaccard, joined, subsets

Derived = tuple[Array, Array]  # a differential (neuron,), and the ids of its circuit
Derive = Callable[[Array, Array], Derived]  # from (prompt, neuron) of reference and behaviour
Drawn = Iterator[tuple[str, Names, list[Derived]]]  # what one draw of the prompts gives
Null = Callable[[Mapping[str, Scores], Behaviours, Derive, np.random.Generator], Drawn]


def repeated(
    null: Null,
    scores: Mapping[str, Scores],
    behaviours: Behaviours,
    derive: Derive,
    repeats: int,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """How well circuits and differentials agree over `repeats` draws of a null.

    kind -> names, `joined` -> overlap (in neurons), jaccard and, of two, correlation: each as the
    mean over draws and the range (low, high) of 95 % of them, which is no confidence interval.
    """
    rng = np.random.default_rng(seed)
    seen: dict[str, dict[str, dict[str, list[float]]]] = {}
    for _ in range(repeats):
        for kind, names, members in null(scores, behaviours, derive, rng):
            differentials, circuits = zip(*members, strict=True)
            row = {"overlap": float(common(*circuits)), "jaccard": jaccard(*circuits)}
            if len(members) == 2:
                row["correlation"] = float(pearson(np.stack(differentials))[0, 1])
            values = seen.setdefault(kind, {}).setdefault(joined(names), {})
            for key, value in row.items():
                values.setdefault(key, []).append(value)
    return {
        kind: {n: {key: spread(row[key]) for key in row} for n, row in table.items()}
        for kind, table in seen.items()
    }


def spread(values: list[float]) -> dict[str, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return {"value": float(np.mean(values)), "low": float(low), "high": float(high)}


def disjoint_parts(
    scores: Mapping[str, Scores], parts: int, rng: np.random.Generator
) -> dict[str, list[Array]]:
    """Rows of every set in `parts` disjoint parts of about equal size: name -> [rows, ...].

    Whole groups are dealt, in random order, to the part that has fewest prompts of the set; a group
    that an earlier set placed stays there, so that parts share no grouping key, whatever set they
    are of. InputError where one would be empty.
    """
    placed: dict[object, int] = {}
    out = {}
    for name, given in scores.items():
        keys, inverse, counts = np.unique(given.groups, return_inverse=True, return_counts=True)
        load = np.zeros(parts)
        for key, count in zip(keys.tolist(), counts, strict=True):
            if key in placed:
                load[placed[key]] += count
        for index in rng.permutation(keys.size):
            key = keys[index].item()
            if key not in placed:
                placed[key] = int(load.argmin())
                load[placed[key]] += counts[index]
        if not load.all():
            raise InputError(
                f"prompt set {name!r}: {keys.size} groups of prompts do not fill {parts} disjoint "
                f"parts; raise prompt_sets.{name}.count"
            )
        part = np.array([placed[key] for key in keys.tolist()])[inverse]
        out[name] = [np.flatnonzero(part == index) for index in range(parts)]
    return out


def reference_parts(
    scores: Mapping[str, Scores], behaviours: Behaviours, parts: int, rng: np.random.Generator
) -> dict[str, list[Array]]:
    """`disjoint_parts` of the references alone: behaviour -> the rows of its reference's parts."""
    named = {reference for reference, _ in behaviours.values()}
    given = {name: scores[name] for name in scores if name in named}
    rows = disjoint_parts(given, parts, rng)
    return {name: rows[reference] for name, (reference, _) in behaviours.items()}


def split_halves(
    scores: Mapping[str, Scores], behaviours: Behaviours, derive: Derive, rng: np.random.Generator
) -> Drawn:
    """What two disjoint halves of the prompts, reference and behaviour, agree on.

    (a, a) compares the two halves of one behaviour: the ceiling. (a, b) compares one half of a with
    the other half of b: of the same sample size, without shared prompts. Only these two are
    comparable; an overlap of full-size circuits is not.
    """
    rows = disjoint_parts(scores, 2, rng)
    halves = {
        (name, half): derive(*(scores[part].values[rows[part][half]] for part in pair))
        for name, pair in behaviours.items()
        for half in (0, 1)
    }
    for a in behaviours:
        yield "halves", (a, a), [halves[a, 0], halves[a, 1]]
    for a, b in combinations(behaviours, 2):
        yield "halves", (a, b), [halves[a, 0], halves[b, 1]]
        yield "halves", (a, b), [halves[a, 1], halves[b, 0]]


def disjoint_references(
    scores: Mapping[str, Scores], behaviours: Behaviours, derive: Derive, rng: np.random.Generator
) -> Drawn:
    """What sharing a reference sample adds, for every combination of two or more behaviours.

    The n behaviours' references are split in n disjoint parts. "disjoint": every behaviour uses a
    different part; "shared": all use the same one. Behaviour prompts stay whole.
    """
    names, parts = list(behaviours), len(behaviours)
    rows = reference_parts(scores, behaviours, parts, rng)
    derived = {
        (name, part): derive(scores[reference].values[chosen], scores[prompts].values)
        for name, (reference, prompts) in behaviours.items()
        for part, chosen in enumerate(rows[name])
    }
    for turn in range(parts):
        for group in subsets(names, 2):
            yield "shared", group, [derived[name, turn] for name in group]
            places = {name: (names.index(name) + turn) % parts for name in group}
            yield "disjoint", group, [derived[item] for item in places.items()]


def pseudo_behaviour(
    scores: Mapping[str, Scores], behaviours: Behaviours, derive: Derive, rng: np.random.Generator
) -> Drawn:
    """Every behaviour beside a behaviour that is none: a third of its reference.

    The pseudo-behaviour contrasts the first third with the last. "shared" compares it with the real
    behaviour against the first, "disjoint" against the second. Only a real overlap beyond this
    means something.
    """
    rows = reference_parts(scores, behaviours, 3, rng)
    for name, (reference, prompts) in behaviours.items():
        first, second, third = (scores[reference].values[part] for part in rows[name])
        pseudo, real = derive(first, third), scores[prompts].values
        yield "shared", (name,), [pseudo, derive(first, real)]
        yield "disjoint", (name,), [pseudo, derive(second, real)]
