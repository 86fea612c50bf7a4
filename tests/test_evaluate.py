import numpy as np
import pytest

from sparc3.base.errors import InputError
from sparc3.circuits.circuit import refuse_leak
from sparc3.measure import stereotypes
from sparc3.measure.differences import (
    completion_differences,
    completion_table,
    improved,
    pair_differences,
    perplexity_difference,
    shift_difference,
)
from sparc3.measure.generate import quality
from sparc3.measure.measures import Likelihood, perplexity, perplexity_percent
from sparc3.stages.evaluate import Measured, Outcome, against, among, writing

RNG = np.random.default_rng(0)
FEW = 400  # resamples: the values are exact whatever their number


def test_a_leak_is_refused_by_prompt_and_by_group() -> None:
    rows = [{"id": "a", "group": "g"}, {"id": "b", "group": "h"}]
    refuse_leak(rows, {"chosen_on": {"toxicity": ["c"], "general": ["d"]}, "groups": ["i"]}, "x")
    with pytest.raises(InputError, match=r"chosen on 1 of the 2 test prompts .*first: b"):
        refuse_leak(rows, {"chosen_on": {"toxicity": ["c", "b"]}, "groups": []}, "x")
    with pytest.raises(InputError, match=r"chosen on 1 of the 2 test prompts .*first: a"):
        refuse_leak(rows, {"chosen_on": {"toxicity": []}, "groups": ["g"]}, "x")


def test_a_circuit_is_ranked_among_the_draws_of_its_control() -> None:
    tokens = np.full(8, 10)

    def measured(behaviour: float, general: float) -> Outcome:
        text, other = (Likelihood(np.full(8, total), tokens) for total in (behaviour, general))
        return Outcome(other, None, {"test": Measured(text=text)})

    before, after = measured(30, 20), measured(36, 22)
    control = [measured(31, 20), measured(32, 20)]
    found = among(after, control, before, "test", ["t"] * 8)
    assert found["nll"]["value"] == pytest.approx(0.6 - 0.2)  # beyond that of general text
    assert found["nll"]["mean"] == pytest.approx(0.15)
    assert found["nll"]["p"] == pytest.approx(1 / 3)
    assert among(after, control[:1], before, "test", ["t"] * 8) == {}


def test_a_margin_that_turns_round_is_no_larger_effect() -> None:
    likely = Likelihood(np.ones(8), np.ones(8, int))

    def measured(margin: float) -> Outcome:
        log_p = np.column_stack([np.full(8, margin), np.zeros(8), np.full(8, np.nan)])
        return Outcome(likely, None, {"test": Measured(log_p=log_p)})

    terms = [f"t{i}" for i in range(8)]
    before, control = measured(0.2), [measured(0.1), measured(0.15)]
    assert among(measured(-0.2), control, before, "test", terms)["margin"]["value"] == 0
    assert among(measured(0.0), control, before, "test", terms)["margin"]["p"] == 1 / 3


def test_draws_are_reduced_before_they_are_averaged() -> None:
    """Three draws with one bad completion each, in different places: EMT 0.9, not 0.3."""
    draws = [np.zeros((8, 3)) for _ in range(3)]
    for place, scores in enumerate(draws):
        scores[:, place] = 0.9
    groups = [f"g{i}" for i in range(8)]
    control = [Measured(scores={"s": scores}) for scores in draws]
    found = against(control, Measured(scores={"s": np.zeros((8, 3))}), groups, FEW)
    assert found["emt"]["value"] == pytest.approx(-0.9)
    assert found["toxic_probability"]["value"] == pytest.approx(-100)
    assert found["reduction"]["value"] == pytest.approx(100)

    moved = [np.column_stack([np.full(8, m), np.zeros(8), np.full(8, np.nan)]) for m in (1, 1, -4)]
    control = [Measured(log_p=log_p) for log_p in moved]
    even = Measured(log_p=np.column_stack([np.zeros(8), np.zeros(8), np.full(8, np.nan)]))
    found = against(control, even, groups, FEW)
    assert found["ss"]["value"] == pytest.approx(50 - 100 * 2 / 3)  # not that of the mean margin


def test_prompts_of_one_group_count_as_one() -> None:
    before, after = RNG.random((24, 2)), RNG.random((24, 2)) * 0.8
    tables = completion_table(before), completion_table(after)
    apart = completion_differences(*tables, [f"g{i}" for i in range(24)], FEW)
    grouped = completion_differences(*tables, [f"g{i // 3}" for i in range(24)], FEW)
    assert grouped["reduction"]["n"] == 8
    assert apart["reduction"]["n"] == 24
    assert grouped["reduction"]["value"] == pytest.approx(apart["reduction"]["value"])


def test_writing_counts_degenerate_completions() -> None:
    rows = [
        {"circuit": "lrp", "split": "test", **quality(tokens)}
        for tokens in ([1, 2, 3, 4], [], [5, 5, 5, 5, 5, 5])
    ]
    found = writing(rows)["lrp"]["test"]
    assert found["degenerate_percent"] == pytest.approx(200 / 3)
    assert found["length"] == pytest.approx(10 / 3)


def test_completion_differences_are_those_of_gehman() -> None:
    before, after = RNG.random((20, 5)), RNG.random((20, 5)) * 0.7
    groups = [f"g{i}" for i in range(20)]
    tables = completion_table(before), completion_table(after)
    found = completion_differences(*tables, groups, FEW)
    mean = [sum(row) / len(row) for row in before], [sum(row) / len(row) for row in after]
    total = sum(mean[0]) / 20, sum(mean[1]) / 20
    assert found["reduction"]["value"] == pytest.approx(100 * (total[0] - total[1]) / total[0])
    emt = [sum(max(row) for row in scores) / 20 for scores in (before, after)]
    assert found["emt"]["value"] == pytest.approx(emt[1] - emt[0])
    toxic = [
        100 * sum(any(s >= 0.5 for s in row) for row in scores) / 20 for scores in (before, after)
    ]
    assert found["toxic_probability"]["value"] == pytest.approx(toxic[1] - toxic[0])


def test_improved_counts_prompts_and_halves_of_ties() -> None:
    before = np.array([[0.5, 0.7], [0.2, 0.2], [0.1, 0.3], [0.9, 0.1]] * 2)
    after = np.array([[0.4, 0.7], [0.1, 0.4], [0.3, 0.1], [0.2, 0.2]] * 2)
    groups = [f"g{i}" for i in range(8)]
    old, new = completion_table(before), completion_table(after)
    found = improved(old, new, groups, FEW)
    assert found["value"] == pytest.approx(100 * (2 + 0.5) / 4)  # falls, rises, ties, falls
    assert 0 <= found["low"] < found["value"] < found["high"] <= 100
    nothing = improved(old, old, groups, FEW)
    assert nothing["value"] == nothing["low"] == nothing["high"] == 50


def test_identical_models_differ_by_nothing() -> None:
    table, groups = completion_table(RNG.random((10, 3))), [f"g{i}" for i in range(10)]
    likely = Likelihood(RNG.random(10) * 30, np.full(10, 12))
    pairs = RNG.standard_normal((60, 3))
    terms = [f"t{i % 8}" for i in range(60)]
    for difference in (
        *completion_differences(table, table, groups, FEW).values(),
        *pair_differences(pairs, pairs, terms, FEW).values(),
        perplexity_difference(likely, likely, FEW),
    ):
        assert difference["value"] == difference["low"] == difference["high"] == 0
        assert difference["p"] == 1
    shift = shift_difference((likely, likely), (likely, likely), groups, FEW)
    assert shift["value"] == shift["low"] == shift["high"] == 0


def test_shift_is_the_behaviours_rise_beyond_that_of_general_text() -> None:
    tokens = RNG.integers(3, 20, (2, 12))
    nll = RNG.random((4, 12)) * 40
    before = Likelihood(nll[0], tokens[0]), Likelihood(nll[1], tokens[1])
    after = Likelihood(nll[2], tokens[0]), Likelihood(nll[3], tokens[1])
    rise = [
        sum(a.nll) / sum(a.tokens) - sum(b.nll) / sum(b.tokens)
        for b, a in zip(before, after, strict=True)
    ]
    found = shift_difference(before, after, [f"g{i}" for i in range(12)], FEW)
    assert found["value"] == pytest.approx(rise[0] - rise[1])
    assert found["low"] <= found["value"] <= found["high"]


def test_perplexity_is_of_all_tokens_together() -> None:
    before, after = Likelihood(RNG.random(9) * 50, RNG.integers(5, 30, 9)), None
    after = Likelihood(before.nll * 1.1, before.tokens)
    ratio = perplexity(after) / perplexity(before)
    assert perplexity_percent(before, after) == pytest.approx(100 * (ratio - 1))
    assert perplexity_difference(before, after, FEW)["value"] == pytest.approx(100 * (ratio - 1))


def test_pair_differences_average_per_term_first() -> None:
    terms = ["a"] * 9 + ["b"] * 3 + [f"c{i}" for i in range(6)] * 2
    before, after = RNG.standard_normal((24, 3)), RNG.standard_normal((24, 3))

    def ss(table: np.ndarray) -> float:
        shares = []
        for term in dict.fromkeys(terms):
            own = [row for row, name in zip(table, terms, strict=True) if name == term]
            shares.append(100 * sum(row[0] > row[1] for row in own) / len(own))
        return sum(shares) / len(shares)

    found = pair_differences(before, after, terms, FEW)
    assert found["ss"]["value"] == pytest.approx(ss(after) - ss(before))
    assert found["reduction"]["value"] == pytest.approx(100 * (1 - ss(after) / ss(before)))
    icat = [
        stereotypes.stereoset(stereotypes.per_term(*table.T, terms=terms)[1])["icat"]
        for table in (before, after)
    ]
    assert found["icat"]["value"] == pytest.approx(icat[1] - icat[0])


def test_pairs_without_unrelated_texts_have_no_icat() -> None:
    table = RNG.standard_normal((30, 3))
    table[:, 2] = np.nan
    moved = table + np.array([0.1, 0, 0])
    found = pair_differences(table, moved, [f"t{i % 10}" for i in range(30)], FEW)
    assert "icat" not in found
    assert found["margin"]["value"] == pytest.approx(0.1)
