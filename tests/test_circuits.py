"""Overlap of circuits against enumeration, scipy and simulation; differentials over prompts."""

import subprocess
import sys
from fractions import Fraction
from itertools import combinations, product
from math import comb, log10
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import hypergeom, spearmanr

from sparc3.base.errors import InputError
from sparc3.circuits import correlation, nulls, overlap
from sparc3.circuits.correlation import Scores

Array = np.ndarray
NEURONS = 458_752  # LLaMA-3-8B: 32 layers x 14,336


def published() -> dict[str, Array]:
    """Three circuits of 100 with the published regions: triple 5, pairs only 6, 1 and 10."""
    regions = {
        ("toxicity", "gender", "race"): 5,
        ("toxicity", "gender"): 6,
        ("toxicity", "race"): 1,
        ("gender", "race"): 10,
        ("toxicity",): 88,
        ("gender",): 79,
        ("race",): 84,
    }
    ids = np.random.default_rng(0).choice(NEURONS, sum(regions.values()), replace=False)
    parts = dict(zip(regions, np.split(ids, np.cumsum(list(regions.values()))[:-1]), strict=True))
    return {
        name: np.concatenate([part for names, part in parts.items() if name in names])
        for name in ("toxicity", "gender", "race")
    }


def random_sets(rng: np.random.Generator, total: int, sizes: tuple[int, ...]) -> dict[str, Array]:
    return {f"s{i}": rng.choice(total, size, replace=False) for i, size in enumerate(sizes)}


# Regions and measures


def test_regions_are_what_python_sets_say() -> None:
    sets = random_sets(np.random.default_rng(1), 40, (20, 15, 9, 0))
    found = overlap.regions(sets)
    assert len(found) == 2**4 - 1
    for key, ids in found.items():
        names = key.split(".")
        naive = set.intersection(*(set(sets[name].tolist()) for name in names))
        for name in set(sets) - set(names):
            naive -= set(sets[name].tolist())
        assert ids.tolist() == sorted(naive)
    everything = np.concatenate(list(found.values()))
    assert sorted(everything.tolist()) == np.unique(np.concatenate(list(sets.values()))).tolist()


def test_of_hundreds_of_sets_there_are_regions_that_hold_neurons_and_pairs() -> None:
    sets = random_sets(np.random.default_rng(2), 500, (20,) * 200)
    members: dict[str, list[int]] = {}
    for neuron in sorted(set(np.concatenate(list(sets.values())).tolist())):
        inside = sorted(name for name, ids in sets.items() if neuron in ids)
        members.setdefault(".".join(inside), []).append(neuron)
    assert {name: ids.tolist() for name, ids in overlap.regions(sets).items()} == members
    found = overlap.overlaps(dict(list(sets.items())[:11]), 5, 100)
    assert {row["names"] for row in found.values()} == set(combinations(list(sets)[:11], 2))
    assert overlap.regions({"a": sets["s0"][:0], "b": sets["s0"][:0]}).keys() == {"a", "b", "a.b"}


def test_published_regions_and_pairs() -> None:
    sets = published()
    sizes = {names: ids.size for names, ids in overlap.regions(sets).items()}
    assert sizes["gender.race"] == 10
    assert sizes["gender.race.toxicity"] == 5
    found = overlap.overlaps(sets, 32, 14_336)
    assert found["gender.toxicity"]["observed"] == 11
    assert found["race.toxicity"]["observed"] == 6
    assert found["gender.race"]["observed"] == 15
    assert found["gender.race"]["jaccard"] == 15 / 185


def test_jaccard_of_n_sets() -> None:
    rng = np.random.default_rng(2)
    for sizes in product((0, 3, 12), repeat=3):
        sets = [ids for ids in random_sets(rng, 15, sizes).values()]
        plain = [set(ids.tolist()) for ids in sets]
        union = set.union(*plain)
        naive = len(set.intersection(*plain)) / len(union) if union else 0.0
        assert overlap.jaccard(*sets) == naive
    same = np.array([3, 1, 2])
    assert overlap.jaccard(same, same[::-1], same) == 1.0


# Chance


@pytest.mark.parametrize(
    "sizes", [(2, 3), (3, 2, 4), (1, 4, 3), (0, 3, 2), (5, 5, 2), (2, 3, 2, 4)]
)
def test_distribution_is_that_of_an_enumeration(sizes: tuple[int, ...]) -> None:
    total = 5
    draws = [[set(c) for c in combinations(range(total), size)] for size in sizes]
    seen = [len(set.intersection(*drawn)) for drawn in product(*draws)]
    law = np.exp(overlap.log_distribution(sizes, total))
    assert law.size == min(sizes) + 1
    np.testing.assert_allclose(law, np.bincount(seen, minlength=law.size) / len(seen), atol=1e-12)
    for observed in range(total + 2):
        share = np.mean(np.array(seen) >= observed)
        assert overlap.overlap_p(observed, sizes, total) == pytest.approx(share, abs=1e-12)
    assert overlap.expected(sizes, total) == pytest.approx(np.mean(seen))


@pytest.mark.parametrize(
    ("total", "first", "second"), [(NEURONS, 100, 100), (46_080, 60, 400), (50, 30, 40), (9, 9, 4)]
)
def test_two_sets_agree_with_scipy(total: int, first: int, second: int) -> None:
    law = overlap.log_distribution((first, second), total)
    sizes = np.arange(law.size)
    np.testing.assert_allclose(
        np.exp(law), hypergeom.pmf(sizes, total, first, second), rtol=1e-7, atol=1e-300
    )
    for observed in {0, 1, min(first, second) // 2, min(first, second)}:
        assert overlap.overlap_p(observed, (first, second), total) == pytest.approx(
            hypergeom.sf(observed - 1, total, first, second), rel=1e-7
        )


def test_order_of_sets_is_of_no_account_and_the_mean_is_the_expectation() -> None:
    laws = [overlap.log_distribution(order, 300) for order in ((20, 90, 60), (90, 60, 20))]
    np.testing.assert_allclose(laws[0], laws[1], rtol=1e-9)
    mean = np.exp(laws[0]) @ np.arange(21)
    assert mean == pytest.approx(overlap.expected((20, 90, 60), 300))


def test_published_enrichment_and_exact_p() -> None:
    sizes = (100, 100, 100)
    assert round(overlap.enrichment(5, sizes, NEURONS)) == 1_052_267
    assert overlap.expected(sizes, NEURONS) == pytest.approx(4.75e-6, rel=1e-3)
    exact = Fraction(0)
    ways = comb(NEURONS, 100)
    for pair in range(101):
        of_pair = Fraction(comb(100, pair) * comb(NEURONS - 100, 100 - pair), ways)
        tail = sum(comb(pair, t) * comb(NEURONS - pair, 100 - t) for t in range(5, pair + 1))
        exact += of_pair * Fraction(tail, ways)
    p = overlap.overlap_p(5, sizes, NEURONS)
    assert p == pytest.approx(float(exact), rel=1e-7)
    assert f"{p:.1e}" == "1.5e-29"


def test_p_that_underflows_keeps_its_logarithm() -> None:
    ids = np.arange(0, NEURONS, NEURONS // 100)[:100]
    row = overlap.overlaps({"a": ids, "b": ids, "c": ids}, 32, 14_336)["a.b.c"]
    assert row["log10_p"] == pytest.approx(-2 * log10(comb(NEURONS, 100)), rel=1e-9)
    assert row["p"] == 0.0
    assert row["jaccard"] == 1.0


def test_empty_circuits_give_defined_results() -> None:
    sets = {"a": np.array([], int), "b": np.array([], int), "c": np.array([3])}
    for row in overlap.overlaps(sets, 2, 5).values():
        assert (row["observed"], row["jaccard"]) == (0, 0.0)
        assert (row["enrichment"], row["p"]) == (1.0, 1.0)
        assert (row["layered_enrichment"], row["layered_p"]) == (1.0, 1.0)
    assert overlap.late_share(overlap.layer_counts(sets["a"], 2, 5), 1) == 0.0


# Within layers


def test_one_layer_is_the_uniform_null() -> None:
    layered = overlap.layered_log_distribution(np.array([[6, 9, 5]]), 30)
    np.testing.assert_allclose(layered, overlap.log_distribution((6, 9, 5), 30))


def test_layered_law_is_what_permutations_within_layers_give() -> None:
    layers, width, draws = 4, 20, 20_000
    counts = np.array([[0, 3, 1], [8, 6, 9], [2, 0, 2], [12, 9, 15]])
    rng = np.random.default_rng(3)
    seen = np.zeros(draws, int)
    for layer in range(layers):
        inside = np.ones((draws, width), bool)
        for size in counts[layer]:
            order = rng.random((draws, width)).argsort(axis=1).argsort(axis=1)
            inside &= order < size
        seen += inside.sum(axis=1)
    law = np.exp(overlap.layered_log_distribution(counts, width))
    simulated = np.bincount(seen, minlength=law.size) / draws
    assert law.sum() == pytest.approx(1)
    np.testing.assert_allclose(simulated, law, atol=5 * np.sqrt(0.25 / draws))
    assert seen.mean() == pytest.approx(law @ np.arange(law.size), rel=0.02)


def test_layered_null_explains_a_shared_layer() -> None:
    rng = np.random.default_rng(4)
    sets = {name: 20 * 50 + rng.choice(50, 20, replace=False) for name in "ab"}
    row = overlap.overlaps(sets, 30, 50)["a.b"]
    assert row["observed"] == len(set(sets["a"].tolist()) & set(sets["b"].tolist()))
    assert row["layered_expected"] == pytest.approx(20 * 20 / 50)
    assert row["p"] < 1e-6
    assert row["layered_p"] == pytest.approx(hypergeom.sf(row["observed"] - 1, 50, 20, 20))
    assert row["layered_p"] > 0.01


def test_layer_distribution() -> None:
    ids = np.array([0, 4, 5, 14, 12, 13])
    counts = overlap.layer_counts(ids, 3, 5)
    assert counts.tolist() == [2, 1, 3]
    assert overlap.late_share(counts, 1) == 0.5
    assert overlap.late_share(counts, 3) == 1.0
    assert overlap.late_layers(32) == 10
    assert overlap.late_layers(30) == 9
    assert overlap.late_layers(2) == 1


# The triple, given the pairs


def test_published_triple_given_pairs() -> None:
    found = overlap.triple_given_pairs(5, (11, 6, 15), (100, 100, 100), NEURONS)
    assert round(found["p"], 3) == 0.011
    assert found["expected"] == pytest.approx(11 * 15 / 100)
    assert 5 / found["expected"] == pytest.approx(3, abs=0.05)
    for p, (n, m) in zip(found["through"], ((11, 6), (11, 15), (6, 15)), strict=True):
        assert p == pytest.approx(hypergeom.sf(4, 100, n, m))
    # Given all three pairs at once, uniform draws would share even more than the five observed.
    assert found["joint_p"] == pytest.approx(0.995, abs=5e-4)
    assert found["joint_expected"] == pytest.approx(5.87, abs=5e-3)


def test_joint_law_is_that_of_enumerated_draws() -> None:
    total, sizes = 6, (3, 2, 3)
    seen: dict[tuple[int, ...], list[int]] = {}
    draws = [[set(c) for c in combinations(range(total), size)] for size in sizes]
    for a, b, c in product(*draws):
        seen.setdefault((len(a & b), len(a & c), len(b & c)), []).append(len(a & b & c))
    assert len(seen) > 10
    for (ab, ac, bc), triples in seen.items():
        for triple in set(triples):
            found = overlap.triple_given_pairs(triple, (ab, ac, bc), sizes, total)
            assert found["joint_p"] == pytest.approx(np.mean(np.array(triples) >= triple))
            assert found["joint_expected"] == pytest.approx(np.mean(triples))


def test_through_one_set_is_right_where_the_others_meet_only_there() -> None:
    # A neuron of a joins b or c by chance of its own: within a, independent draws.
    rng = np.random.default_rng(5)
    draws, size, ab, ac = 20_000, 12, 5, 4
    first = rng.random((draws, size)).argsort(axis=1).argsort(axis=1) < ab
    second = rng.random((draws, size)).argsort(axis=1).argsort(axis=1) < ac
    triples = (first & second).sum(axis=1)
    found = overlap.triple_given_pairs(3, (ab, ac, 3), (12, 8, 9), 100)
    assert found["through"][0] == pytest.approx(np.mean(triples >= 3), abs=0.015)
    assert found["through_expected"][0] == pytest.approx(triples.mean(), rel=0.02)
    assert found["p"] == max(found["through"])


def test_triple_of_empty_circuits() -> None:
    found = overlap.triple_given_pairs(0, (0, 0, 0), (0, 5, 0), 10)
    assert found["p"] == found["joint_p"] == 1.0
    assert found["expected"] == found["joint_expected"] == 0.0


# Differentials


def test_correlations_agree_with_numpy_and_scipy() -> None:
    rng = np.random.default_rng(6)
    rows = rng.standard_normal((3, 400))
    rows[1] += rows[0]
    rows[2] = np.round(rows[1] ** 3)  # ties
    named = dict(zip("abc", rows, strict=True))
    found = correlation.correlations(named)
    assert list(found) == ["a.b", "a.c", "b.c"]
    for pair, row in found.items():
        one, other = (named[name] for name in pair.split("."))
        assert row["pearson"] == pytest.approx(np.corrcoef(one, other)[0, 1])
        assert row["spearman"] == pytest.approx(spearmanr(one, other)[0])


def test_constant_differentials() -> None:
    rising = np.arange(50.0)
    rows = np.stack([np.full(50, 0.1), rising, -rising])
    np.testing.assert_allclose(correlation.pearson(rows), [[1, 0, 0], [0, 1, -1], [0, -1, 1]])
    found = correlation.correlations(dict(zip("abc", rows, strict=True)))
    for kind in ("pearson", "spearman"):
        assert [row[kind] for row in found.values()] == pytest.approx([0, 0, -1])


def test_quadrants_of_every_pair() -> None:
    rng = np.random.default_rng(7)
    rows = dict(zip("abc", rng.integers(-2, 3, (3, 200)).astype(float), strict=True))
    found = correlation.quadrants(rows)
    assert list(found) == ["a.b", "a.c", "b.c"]
    for pair, cells in found.items():
        one, two = pair.split(".")
        alone = f"{one} only", f"{two} only"
        naive = dict.fromkeys(("both", *alone, "neither"), 0)
        for x, y in zip(rows[one], rows[two], strict=True):
            word = {(True, True): "both", (True, False): alone[0], (False, True): alone[1]}
            naive[word.get((x < 0, y < 0), "neither")] += 1
        assert cells == naive


# Correlations on other prompts

BEHAVIOURS = {"a": ("g", "a"), "b": ("g", "b")}


def drawn(
    rng: np.random.Generator, mean: Array, groups: int, noise: float, name: str, each: int = 1
) -> Scores:
    """Prompts about a mean: half of the noise belongs to the group, half to the prompt."""
    own = rng.standard_normal((groups * each, mean.size)) * noise
    shared = np.repeat(rng.standard_normal((groups, mean.size)) * noise, each, axis=0)
    keys = np.repeat([f"{name}{i}" for i in range(groups)], each)
    return Scores(mean + own + shared, keys)


def world(seed: int, rho: float, noise: float, groups: int, each: int = 1) -> tuple[dict, float]:
    """Two behaviours whose differentials correlate rho on infinitely many prompts."""
    rng = np.random.default_rng(seed)
    g, x, y = rng.standard_normal((3, 500))
    means = {"g": g, "a": g - x, "b": g - rho * x - np.sqrt(1 - rho**2) * y}
    true = np.corrcoef(g - means["a"], g - means["b"])[0, 1]
    return {k: drawn(rng, v, groups, noise, k, each) for k, v in means.items()}, float(true)


def test_observed_and_corrected_correlation_written_out() -> None:
    scores, _ = world(0, 0.4, 1.5, groups=6, each=2)
    found = correlation.bootstrap_correlations(scores, BEHAVIOURS, draws=20)
    mean = {name: given.values.mean(axis=0) for name, given in scores.items()}
    rows = [mean["g"] - mean["a"], mean["g"] - mean["b"]]
    row = found["correlations"]["a.b"]
    assert row["observed"] == pytest.approx(np.corrcoef(rows)[0, 1])

    def unbiased(one: str, two: str) -> float:
        """Mean covariance of a prompt of one set with a prompt of another group of the other."""
        left, right = scores[one], scores[two]
        values = [
            np.cov(x, y, bias=True)[0, 1]
            for x, key in zip(left.values, left.groups, strict=True)
            for y, other in zip(right.values, right.groups, strict=True)
            if key != other
        ]
        return float(np.mean(values))

    def covariance(a: str, b: str) -> float:
        return unbiased("g", "g") - unbiased("g", b) - unbiased(a, "g") + unbiased(a, b)

    naive = covariance("a", "b") / np.sqrt(covariance("a", "a") * covariance("b", "b"))
    assert row["value"] == pytest.approx(naive)
    share = covariance("a", "a") / np.var(rows[0])
    assert found["reliability"]["a"] == pytest.approx(share)


@pytest.mark.parametrize(("rho", "each"), [(0.0, 1), (0.7, 3)])
def test_intervals_hold_the_true_correlation_where_the_observed_one_is_off(
    rho: float, each: int
) -> None:
    inside, errors, plain, widths = 0, [], [], []
    experiments = 200
    for seed in range(experiments):
        scores, true = world(seed, rho, 2.0, groups=12, each=each)
        found = correlation.bootstrap_correlations(scores, BEHAVIOURS, draws=200, seed=seed)
        row = found["correlations"]["a.b"]
        inside += row["low"] <= true <= row["high"]
        errors.append(row["value"] - true)
        plain.append(row["observed"] - true)
        widths.append(row["high"] - row["low"])
    assert inside / experiments >= 0.92
    assert np.mean(widths) < 1.6 * (2 * 1.96 * np.std(errors))  # and not by being vacuous
    assert abs(np.mean(errors)) < 0.03
    if rho == 0:  # the noise of the common reference alone correlates the differentials
        assert np.mean(plain) > 0.15


def test_difference_of_dependent_correlations() -> None:
    behaviours = {name: ("g", name) for name in "abc"}
    experiments, rejected, found = 200, 0, {}
    for seed in range(experiments):
        rng = np.random.default_rng(seed)
        g, common, first, second = rng.standard_normal((4, 500))
        second -= first * (first @ second) / (first @ first)
        second -= common * (common @ second) / (common @ common)
        first -= common * (common @ first) / (common @ common)
        second *= np.linalg.norm(first) / np.linalg.norm(second)
        # The truth, but for 1 / neurons: a correlates alike with b and with c, and less b with c.
        means = {"g": g, "a": g - common, "b": g - common - first, "c": g - common - second}
        scores = {name: drawn(rng, mean, 10, 1.0, name) for name, mean in means.items()}
        found = correlation.bootstrap_correlations(scores, behaviours, draws=200, seed=seed)
        rejected += found["differences"]["a.b minus a.c"]["p"] < 0.05
    assert 0 < rejected / experiments <= 0.08
    unequal = found["differences"]["a.b minus b.c"]
    assert unequal["value"] == pytest.approx(1 / np.sqrt(2) - 1 / 2, abs=0.1)
    assert 0 < unequal["low"] < unequal["value"] < unequal["high"]
    assert unequal["p"] < 0.05
    reverse = found["differences"]["b.c minus a.b"]
    assert reverse["p"] == unequal["p"]
    bounds = -reverse["value"], -reverse["high"], -reverse["low"]
    assert bounds == pytest.approx((unequal["value"], unequal["low"], unequal["high"]))


def test_one_reference_under_two_names_is_one_reference() -> None:
    scores, _ = world(1, 0.5, 1.0, groups=8)
    twice = {**scores, "g2": scores["g"]}
    one = correlation.bootstrap_correlations(scores, BEHAVIOURS, draws=50)
    two = correlation.bootstrap_correlations(twice, {"a": ("g", "a"), "b": ("g2", "b")}, draws=50)
    for key, value in one["correlations"]["a.b"].items():
        assert two["correlations"]["a.b"][key] == pytest.approx(value)


def test_nothing_but_noise_is_said_to_be_unknown() -> None:
    same = np.tile(np.arange(30.0), (6, 1))
    keys = np.array([str(i) for i in range(6)])
    scores = {name: Scores(same, np.char.add(name, keys)) for name in "gabc"}
    found = correlation.bootstrap_correlations(
        scores, {name: ("g", name) for name in "abc"}, draws=20
    )
    row = found["correlations"]["a.b"]
    assert row == {"value": 0.0, "low": -1.0, "high": 1.0, "observed": 0.0}
    assert found["differences"]["a.b minus a.c"]["p"] == 1.0
    assert found["reliability"]["a"] == 0.0


def test_memory_maps_and_blocks(tmp_path: Path) -> None:
    scores, _ = world(2, 0.5, 1.0, groups=6)
    wide = {}
    for name, given in scores.items():
        values = np.tile(given.values, 10).astype(np.float32)  # 5,000 neurons: more than a block
        np.save(tmp_path / f"{name}.npy", values)
        wide[name] = Scores(np.load(tmp_path / f"{name}.npy", mmap_mode="r"), given.groups)
    narrow = correlation.bootstrap_correlations(scores, BEHAVIOURS, draws=30)
    mapped = correlation.bootstrap_correlations(wide, BEHAVIOURS, draws=30)
    for key, value in narrow["correlations"]["a.b"].items():
        assert mapped["correlations"]["a.b"][key] == pytest.approx(value, abs=1e-5)


def test_too_few_groups_are_refused() -> None:
    scores, _ = world(3, 0.5, 1.0, groups=6)
    few, _ = world(3, 0.5, 1.0, groups=4)
    with pytest.raises(InputError, match="'a': 4 groups of prompts; this needs at least 5"):
        correlation.bootstrap_correlations({**scores, "a": few["a"]}, BEHAVIOURS, draws=5)


# Splits


def mean_difference(reference: Array, behaviour: Array) -> Array:
    return reference.mean(axis=0) - behaviour.mean(axis=0)


def most_negative(k: int) -> nulls.Derive:
    """The mean difference and its k most negative neurons."""

    def derive(reference: Array, behaviour: Array) -> nulls.Derived:
        differential = mean_difference(reference, behaviour)
        return differential, np.argsort(differential, kind="stable")[:k]

    return derive


def test_split_keeps_groups_whole_and_sets_consistent() -> None:
    rng = np.random.default_rng(8)
    keys = np.repeat([f"k{i}" for i in range(9)], rng.integers(1, 5, 9))
    other = np.array([f"k{i}" for i in range(4, 15)])
    scores = {"x": Scores(np.zeros((keys.size, 1)), keys), "y": Scores(np.zeros((11, 1)), other)}
    rows = nulls.disjoint_parts(scores, 3, rng)
    owner: dict[str, int] = {}
    for name, given in scores.items():
        assert sorted(np.concatenate(rows[name]).tolist()) == list(range(len(given.groups)))
        sizes = [part.size for part in rows[name]]
        assert max(sizes) - min(sizes) <= 5
        for part, members in enumerate(rows[name]):
            for key in given.groups[members].tolist():
                assert owner.setdefault(key, part) == part
    with pytest.raises(InputError, match=r"'x': 2 groups.*3 disjoint"):
        nulls.disjoint_parts({"x": Scores(np.zeros((4, 1)), np.array(list("aabb")))}, 3, rng)


def test_halves_of_a_behaviour_without_noise_agree_wholly() -> None:
    scores, true = world(4, 0.3, 0.0, groups=6)
    found = nulls.repeated(nulls.split_halves, scores, BEHAVIOURS, most_negative(20), 3)["halves"]
    ceiling = found["a.a"]
    assert ceiling["overlap"] == {"value": 20.0, "low": 20.0, "high": 20.0}
    assert ceiling["jaccard"]["value"] == pytest.approx(1)
    assert ceiling["correlation"]["value"] == pytest.approx(1)
    assert found["a.b"]["correlation"]["value"] == pytest.approx(true)


def test_halves_of_pure_noise_agree_by_chance_only() -> None:
    rng = np.random.default_rng(9)
    scores = {name: drawn(rng, np.zeros(2000), 12, 1.0, name) for name in "gab"}
    found = nulls.repeated(nulls.split_halves, scores, BEHAVIOURS, most_negative(200), 5)
    for row in found["halves"].values():
        assert abs(row["correlation"]["value"]) < 0.1
        assert row["overlap"]["value"] == pytest.approx(200 * 200 / 2000, abs=12)


def test_sharing_a_reference_correlates_unrelated_behaviours() -> None:
    rng = np.random.default_rng(10)
    groups = {"g": 12, "a": 12, "b": 24, "c": 12}
    scores = {name: drawn(rng, np.zeros(3000), n, 1.0, name) for name, n in groups.items()}
    behaviours = {name: ("g", name) for name in "abc"}
    derive = most_negative(150)
    found = nulls.repeated(nulls.disjoint_references, scores, behaviours, derive, 2)
    # Variance of a mean is 1 / prompts; each behaviour has 4 of the 12 reference prompts.
    predicted = (1 / 4) / np.sqrt((1 / 4 + 1 / 12) * (1 / 4 + 1 / 24))
    shared, disjoint = (found[kind]["a.b"] for kind in ("shared", "disjoint"))
    assert shared["correlation"]["value"] == pytest.approx(predicted, abs=0.04)
    assert abs(disjoint["correlation"]["value"]) < 0.04
    assert shared["overlap"]["value"] > 3 * disjoint["overlap"]["value"]
    assert list(found["disjoint"]["a.b.c"]) == ["overlap", "jaccard"]


def test_pseudo_behaviour_shows_what_a_common_reference_makes() -> None:
    rng = np.random.default_rng(11)
    scores = {name: drawn(rng, np.zeros(3000), 12, 1.0, name) for name in "ga"}
    derive = most_negative(150)
    found = nulls.repeated(nulls.pseudo_behaviour, scores, {"a": ("g", "a")}, derive, 4)
    predicted = (1 / 4) / np.sqrt((1 / 4 + 1 / 4) * (1 / 4 + 1 / 12))
    assert found["shared"]["a"]["correlation"]["value"] == pytest.approx(predicted, abs=0.04)
    assert abs(found["disjoint"]["a"]["correlation"]["value"]) < 0.04
    assert found["shared"]["a"]["jaccard"]["value"] > found["disjoint"]["a"]["jaccard"]["value"]


def test_light_start() -> None:
    heavy = "{'torch', 'transformers', 'mlflow', 'scipy.stats'}"
    modules = "sparc3.circuits.overlap, sparc3.circuits.correlation, sparc3.circuits.nulls"
    code = f"import sys, {modules}; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
