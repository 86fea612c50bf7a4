"""Nulls of overlap: halves of a behaviour, references without common text, a behaviour of none."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np

from sparc3.base.errors import InputError
from sparc3.circuits.correlation import Interval, Scores, checked_scores, pearson
from sparc3.circuits.overlap import Array, Names, common, jaccard, subsets

Differential = Callable[[Array, Array], Array]  # (prompt, neuron) reference, behaviour -> (neuron,)
Choose = Callable[[Array, int], Array]  # (neuron,) differential, k -> (k,) ids


def split(
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

    def add(self, names: Names, differentials: Sequence[Array], circuits: Sequence[Array]) -> None:
        row = {"overlap": float(common(*circuits)), "jaccard": jaccard(*circuits)}
        if len(differentials) == 2:
            row["correlation"] = float(pearson(np.stack(differentials))[0, 1])
        for key, value in row.items():
            self.seen.setdefault(names, {}).setdefault(key, []).append(value)

    def summary(self) -> dict[Names, dict[str, Interval]]:
        return {
            names: {key: spread(values) for key, values in row.items()}
            for names, row in self.seen.items()
        }


def spread(values: Sequence[float]) -> Interval:
    low, high = np.quantile(values, [0.025, 0.975])
    return {"value": float(np.mean(values)), "low": float(low), "high": float(high)}


def contrast(
    differential: Differential, reference: Scores, rows: Array, behaviour: Scores, own: Array
) -> Array:
    return np.asarray(differential(reference.values[rows], behaviour.values[own]), float)


def split_halves(
    scores: Mapping[str, Scores],
    contrasts: Mapping[str, tuple[str, str]],
    differential: Differential,
    choose: Choose,
    k: int,
    repeats: int = 10,
    seed: int = 0,
) -> dict[Names, dict[str, Interval]]:
    """What two disjoint halves of the prompts, reference and behaviour, agree on.

    (a, a) compares the two halves of one behaviour: the ceiling, since nothing can overlap with a
    circuit more than the circuit does with itself. (a, b) compares one half of a with the other
    half of b: the cross-behaviour figure of the same sample size, without shared prompts. Only
    these two are comparable; an overlap of full-size circuits is not.
    """
    used = checked_scores(scores, contrasts, groups=2)
    rng = np.random.default_rng(seed)
    agreement = Agreement()
    for _ in range(repeats):
        rows = split(used, 2, rng)
        halves = {}
        for name, (ref, own) in contrasts.items():
            for half in (0, 1):
                found = contrast(
                    differential, used[ref], rows[ref][half], used[own], rows[own][half]
                )
                halves[name, half] = found, np.asarray(choose(found, k))
        for a in contrasts:
            agreement.add((a, a), *zip(halves[a, 0], halves[a, 1], strict=True))
        for a, b in combinations(contrasts, 2):
            agreement.add((a, b), *zip(halves[a, 0], halves[b, 1], strict=True))
            agreement.add((a, b), *zip(halves[a, 1], halves[b, 0], strict=True))
    return agreement.summary()


def disjoint_references(
    scores: Mapping[str, Scores],
    contrasts: Mapping[str, tuple[str, str]],
    differential: Differential,
    choose: Choose,
    k: int,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, dict[Names, dict[str, Interval]]]:
    """Agreement of behaviours when each has its own part of the reference prompts, and when not.

    The n behaviours' references are split in n disjoint parts. "disjoint": every behaviour uses a
    different part; "shared": all use the same part, so that sample sizes are equal and the
    difference between the two is what sharing the reference sample adds. Behaviour prompts stay
    whole. Every combination of two or more behaviours is reported.
    """
    used = checked_scores(scores, contrasts, groups=1)
    references = {ref: used[ref] for ref, _ in contrasts.values()}
    names, parts = list(contrasts), len(contrasts)
    rng = np.random.default_rng(seed)
    found = {"shared": Agreement(), "disjoint": Agreement()}
    for _ in range(repeats):
        rows = split(references, parts, rng)
        cells = {}
        for name, (ref, own) in contrasts.items():
            everything = np.arange(len(used[own].values))
            for part in range(parts):
                row = contrast(differential, used[ref], rows[ref][part], used[own], everything)
                cells[name, part] = row, np.asarray(choose(row, k))
        for turn in range(parts):
            same = {name: cells[name, turn] for name in names}
            own = {name: cells[name, (i + turn) % parts] for i, name in enumerate(names)}
            for group in subsets(names, 2):
                for kind, taken in (("shared", same), ("disjoint", own)):
                    members = [taken[name] for name in group]
                    found[kind].add(group, *zip(*members, strict=True))
    return {kind: agreement.summary() for kind, agreement in found.items()}


def pseudo_behaviour(
    scores: Mapping[str, Scores],
    contrasts: Mapping[str, tuple[str, str]],
    differential: Differential,
    choose: Choose,
    k: int,
    repeats: int = 10,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, Interval]]]:
    """Agreement of every behaviour with a behaviour that is none: a third of its own reference.

    The reference is split in thirds G1, G2, G3. The pseudo-behaviour contrasts G1 with G3. "shared"
    compares it with the real behaviour against G1, "disjoint" against G2: kind -> behaviour ->
    overlap, jaccard, correlation. A real overlap means something only beyond this.
    """
    used = checked_scores(scores, contrasts, groups=1)
    references = {ref: used[ref] for ref, _ in contrasts.values()}
    rng = np.random.default_rng(seed)
    found = {"shared": Agreement(), "disjoint": Agreement()}
    for _ in range(repeats):
        rows = split(references, 3, rng)
        for name, (ref, own) in contrasts.items():
            first, second, third = rows[ref]
            everything = np.arange(len(used[own].values))
            fake = contrast(differential, used[ref], first, used[ref], third)
            for kind, part in (("shared", first), ("disjoint", second)):
                real = contrast(differential, used[ref], part, used[own], everything)
                circuits = [np.asarray(choose(row, k)) for row in (fake, real)]
                found[kind].add((name,), [fake, real], circuits)
    return {
        kind: {name: row for (name,), row in agreement.summary().items()}
        for kind, agreement in found.items()
    }
