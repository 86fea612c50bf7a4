"""Nulls of overlap: halves of a behaviour, references without common text, a behaviour of none.

All of them draw prompts, `repeats` times, and ask `derive` what circuit those would have given.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np

from sparc3.base.errors import InputError
from sparc3.base.files import Array
from sparc3.circuits.correlation import Behaviours, Scores, checked_scores, pearson
from sparc3.circuits.overlap import Names, common, jaccard, subsets

Derived = tuple[Array, Array]  # a differential (neuron,), and the ids of its circuit
Derive = Callable[[Array, Array], Derived]  # from (prompt, neuron) of reference and behaviour
Spread = dict[str, float]  # over the repeats: mean as value; low and high, which hold 95 %


def disjoint_parts(
    scores: Mapping[str, Scores], parts: int, rng: np.random.Generator
) -> dict[str, list[Array]]:
    """Rows of every set in `parts` disjoint parts of about equal size: name -> [rows, ...].

    Whole groups are dealt, in random order, to the part that has fewest prompts of the set; a
    group that an earlier set already placed stays there, so that no part of one set shares a
    grouping key with another part of another set. InputError where a part would be empty.
    """
    placed: dict[object, int] = {}
    out = {}
    for name, given in scores.items():
        keys, inverse, counts = np.unique(
            np.asarray(given.groups), return_inverse=True, return_counts=True
        )
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
                f"parts; give it more groups"
            )
        part = np.array([placed[key] for key in keys.tolist()])[inverse]
        out[name] = [np.flatnonzero(part == index) for index in range(parts)]
    return out


class Agreement:
    """Collects how well circuits and differentials agree, once per random split.

    `summary` gives, for each key, the mean over splits and the range (low, high) that 95 % of them
    lie in: the spread of the splitting, not a confidence interval. Overlap counts neurons.
    """

    def __init__(self) -> None:
        self.seen: dict[Names, dict[str, list[float]]] = {}

    def add(self, names: Names, *members: Derived) -> None:
        differentials, circuits = zip(*members, strict=True)
        row = {"overlap": float(common(*circuits)), "jaccard": jaccard(*circuits)}
        if len(members) == 2:
            row["correlation"] = float(pearson(np.stack(differentials))[0, 1])
        for key, value in row.items():
            self.seen.setdefault(names, {}).setdefault(key, []).append(value)

    def summary(self) -> dict[Names, dict[str, Spread]]:
        return {
            names: {key: spread(values) for key, values in row.items()}
            for names, row in self.seen.items()
        }


def spread(values: Sequence[float]) -> Spread:
    low, high = np.quantile(values, [0.025, 0.975])
    return {"value": float(np.mean(values)), "low": float(low), "high": float(high)}


def split_halves(
    scores: Mapping[str, Scores],
    behaviours: Behaviours,
    derive: Derive,
    repeats: int = 10,
    seed: int = 0,
) -> dict[Names, dict[str, Spread]]:
    """What two disjoint halves of the prompts, reference and behaviour, agree on.

    (a, a) compares the two halves of one behaviour: the ceiling, since nothing can overlap with a
    circuit more than the circuit does with itself. (a, b) compares one half of a with the other
    half of b: the cross-behaviour figure of the same sample size, without shared prompts. Only
    these two are comparable; an overlap of full-size circuits is not.
    """
    used = checked_scores(scores, behaviours, groups=2)
    rng = np.random.default_rng(seed)
    agreement = Agreement()
    for _ in range(repeats):
        rows = disjoint_parts(used, 2, rng)
        halves = {
            (name, half): derive(*(used[part].values[rows[part][half]] for part in pair))
            for name, pair in behaviours.items()
            for half in (0, 1)
        }
        for a in behaviours:
            agreement.add((a, a), halves[a, 0], halves[a, 1])
        for a, b in combinations(behaviours, 2):
            agreement.add((a, b), halves[a, 0], halves[b, 1])
            agreement.add((a, b), halves[a, 1], halves[b, 0])
    return agreement.summary()


def disjoint_references(
    scores: Mapping[str, Scores],
    behaviours: Behaviours,
    derive: Derive,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, dict[Names, dict[str, Spread]]]:
    """Agreement of behaviours when each has its own part of the reference prompts, and when not.

    The n behaviours' references are split in n disjoint parts. "disjoint": every behaviour uses a
    different part; "shared": all use the same part, so that sample sizes are equal and the
    difference between the two is what sharing the reference sample adds. Behaviour prompts stay
    whole. Every combination of two or more behaviours is reported.
    """
    used = checked_scores(scores, behaviours, groups=1)
    names, parts = list(behaviours), len(behaviours)
    rng = np.random.default_rng(seed)
    agreements = {"shared": Agreement(), "disjoint": Agreement()}
    for _ in range(repeats):
        rows = disjoint_parts(_references(used, behaviours), parts, rng)
        derived = {
            (name, part): derive(used[reference].values[chosen], used[prompts].values)
            for name, (reference, prompts) in behaviours.items()
            for part, chosen in enumerate(rows[reference])
        }
        for turn in range(parts):
            for group in subsets(names, 2):
                places = {name: (names.index(name) + turn) % parts for name in group}
                agreements["shared"].add(group, *(derived[name, turn] for name in group))
                agreements["disjoint"].add(group, *(derived[item] for item in places.items()))
    return {kind: agreement.summary() for kind, agreement in agreements.items()}


def pseudo_behaviour(
    scores: Mapping[str, Scores],
    behaviours: Behaviours,
    derive: Derive,
    repeats: int = 10,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, Spread]]]:
    """Agreement of every behaviour with a behaviour that is none: a third of its reference.

    The reference is split in thirds G1, G2, G3. The pseudo-behaviour contrasts G1 with G3. "shared"
    compares it with the real behaviour against G1, "disjoint" against G2: kind -> behaviour ->
    overlap, jaccard, correlation. A real overlap means something only beyond this.
    """
    used = checked_scores(scores, behaviours, groups=1)
    rng = np.random.default_rng(seed)
    agreements = {"shared": Agreement(), "disjoint": Agreement()}
    for _ in range(repeats):
        rows = disjoint_parts(_references(used, behaviours), 3, rng)
        for name, (reference, prompts) in behaviours.items():
            first, second, third = (used[reference].values[part] for part in rows[reference])
            pseudo, real = derive(first, third), used[prompts].values
            agreements["shared"].add((name,), pseudo, derive(first, real))
            agreements["disjoint"].add((name,), pseudo, derive(second, real))
    return {
        kind: {name: row for (name,), row in agreement.summary().items()}
        for kind, agreement in agreements.items()
    }


def _references(used: Mapping[str, Scores], behaviours: Behaviours) -> dict[str, Scores]:
    named = {reference for reference, _ in behaviours.values()}
    return {name: given for name, given in used.items() if name in named}
