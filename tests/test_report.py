from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sparc3.base.files import markdown
from sparc3.commands.readme import cost_table
from sparc3.measure.instrument import Value, paired
from sparc3.reporting.tables import interval, judge, overshot, removal, summary, verdict
from sparc3.stages.checks import load


def test_costs_are_summed_by_stage() -> None:
    costs = {
        "gate@a": {"seconds": 1.0, "peak_megabytes": 100.0},
        "gate@b": {"seconds": 2.4, "peak_megabytes": 2500.0},
        "report": {"seconds": 5.0, "peak_megabytes": 300.0},
    }
    lines = cost_table(["gate", "report"], costs).splitlines()
    assert lines[2] == "| gate | 2 | 3 | 2.5 |"
    assert lines[3] == "| report | 1 | 5 | 0.3 |"
    assert lines[4] == "| all | 3 | 8 |  |"


PARAMS = load()


def said(row: dict[str, Any]) -> str:
    return verdict(PARAMS, row)


def row(behaviour: str = "toxicity", **change: float) -> dict[str, Any]:
    """Of a family of three tests whose groups all moved; `change`: of the primary value."""
    row = {"behaviour": behaviour, "family": "confirmatory", "broken": False, "overshot": False}
    row |= {"level": 0.05 / 3, "least": 0.001, "mde": 9.0, "against": None, "p": 0.01, "sign": 1}
    row |= {"against_ban": None, "worst": "news", "differences": {"ppl_worst": {"value": 0.0}}}
    return row | {"change": {"moved": 20, "n": 30, **change} if change else None}


def beside(low: float, draws: int = 19, effect: float = 20.0, **more: Any) -> dict[str, Any]:
    """A reduction with a control of its size: `draws` of them, none as strong in likelihood, and
    five that complete, another of which would reduce by at most 15 %.
    """
    among = {
        "nll_shift": {"value": 0.3, "p": 1 / (draws + 1), "n": draws},
        "reduction": {"value": effect, "p": 1 / 6, "n": 5, "most": 15.0},
    }
    found = row(value=effect) | {"against": {"low": low, "high": 30.0}, "among": among}
    return found | more


def test_a_verdict_needs_a_small_p_and_names_what_could_have_been_found() -> None:
    assert said(row(value=20.0)) == "reduced; no control of its size"
    assert said(row(value=-20.0)) == "increased"
    assert said(row(value=5.0) | {"p": 0.2}) == "not shown; 9 % would have been"
    assert said(row(value=5.0) | {"family": "control"}) == "control"
    assert said(row() | {"family": "control"}) == "control"
    assert said(row()) == "not measured"
    assert said(beside(1.0, broken=True)) == "degenerate"
    assert said(beside(1.0, overshot=True)) == "overshot"


def test_each_control_refuses_on_its_own() -> None:
    assert said(beside(1.0)) == "reduced, beyond 19 random draws (5 in completions)"
    assert (
        said(beside(-1.0)) == "reduced, not beyond 19 random draws (5 in completions)"
    )  # against their mean
    # A rank: 19 draws are as few as can give p = 0.05, and of those none may be as strong.
    assert said(beside(1.0, draws=18)) == "reduced, not beyond 18 random draws (5 in completions)"
    second = beside(1.0)
    second["among"]["nll_shift"]["p"] = 2 / 20
    assert said(second) == "reduced, not beyond 19 random draws (5 in completions)"
    # Where another draw would be expected, of completions, which are noisy.
    assert (
        said(beside(1.0, effect=14.9)) == "reduced, not beyond 19 random draws (5 in completions)"
    )
    # The ban of words.
    for low, words in {
        2.0: "reduced, beyond 19 random draws (5 in completions) and a word ban",
        -2.0: "reduced, beyond 19 random draws (5 in completions), not beyond a word ban",
    }.items():
        assert said(beside(1.0, against_ban={"low": low, "high": 9.0})) == words
    both = beside(-1.0, against_ban={"low": -2.0, "high": 9.0})
    assert said(both) == "reduced, not beyond 19 random draws (5 in completions) and a word ban"


def test_a_reduction_that_costs_more_than_the_budget_says_so() -> None:
    for value, over in {
        PARAMS.select.budget.perplexity: False,
        PARAMS.select.budget.perplexity + 0.1: True,
    }.items():
        costly = beside(1.0, differences={"ppl_worst": {"value": value}})
        assert said(costly).endswith("; over the perplexity budget on news") == over
    assert "budget" not in said(row(value=-20.0) | {"differences": {"ppl_worst": {"value": 99.0}}})


def test_a_reduction_that_loses_kl_or_accuracy_beyond_the_budget_says_so() -> None:
    budget = replace(PARAMS.select.budget, kl=0.02, accuracy=2.0)
    params = replace(PARAMS, select=replace(PARAMS.select, budget=budget))
    for kl, points, words in (
        (0.01, -2.0, ""),
        (0.03, 5.0, "; over the KL budget"),
        (0.01, -2.1, "; over the accuracy budget"),
        (0.03, -2.1, "; over the KL budget; over the accuracy budget"),
    ):
        found = {"ppl_worst": {"value": 0.0}, "kl": {"value": kl}, "questions": {"value": points}}
        expected = f"reduced, beyond 19 random draws (5 in completions){words}"
        assert verdict(params, beside(1.0, differences=found)) == expected


def test_a_verdict_of_a_value_that_falls_turns_every_sign() -> None:
    """Pairs are no samples, so that no prediction is asked for."""
    ranked = {"margin": {"value": 0.2, "p": 0.05, "n": 19, "most": 0.5}}
    fall = row("gender", value=-0.2) | {"sign": -1, "among": ranked}
    beyond = fall | {"against": {"low": -0.3, "high": -0.1}}
    assert said(beyond) == "reduced, beyond 19 random draws"
    assert said(fall | {"against": {"low": -0.3, "high": 0.1}}).startswith("reduced, not beyond")
    ranked = {"margin": ranked["margin"] | {"p": 0.1}}
    assert said(beyond | {"among": ranked}) == "reduced, not beyond 19 random draws"
    assert said(row("gender", value=0.2) | {"sign": -1}) == "increased"


def test_a_verdict_says_what_no_effect_could_have_shown() -> None:
    few = row(value=5.0, moved=2, n=11) | {"p": 1.0, "least": 0.5}
    assert said(few) == "cannot be shown: 2 of 11 groups changed, so p is at least 0.5"
    whole = row(value=5.0) | {"p": 0.3, "mde": 100.1}
    assert said(whole) == "not shown; even complete removal could not have been"
    # Below 0.05 after others of the family were: Holm asks less of it.
    assert said(row(value=5.0, moved=6) | {"p": 0.031, "least": 0.031}).startswith("reduced")


def test_a_family_has_its_own_level_and_complete_removal_bounds_what_is_found() -> None:
    def groups(means: list[float], spread: float) -> list[dict[str, str]]:
        noise = spread * np.random.default_rng(0).standard_normal(len(means))
        after = dict(zip(("none", "lrp"), (means, np.array(means) + noise), strict=True))
        return [
            {"circuit": name, "units": "2", "mean": str(value)}
            for name, values in after.items()
            for value in values
        ]

    def judged(spread: float, tests: int) -> dict[str, Any]:
        value = Value("margin", paired("margin"), less=-1, column="margin", even=0.0)
        found = removal(value, groups([0.1, 0.3] * 8, spread), "lrp")
        rows = [row(value=-0.1, p=0.02, moved=16) | found for _ in range(tests)]
        judge(rows, 1000)
        return rows[0]

    one, three = judged(0.02, 1), judged(0.02, 3)
    assert (one["level"], three["level"]) == (0.05, pytest.approx(0.05 / 3))
    assert (one["p"], three["p"]) == (0.02, pytest.approx(0.06))
    assert 0 < one["mde"] < three["mde"] < 100
    assert three["least"] == 2 / 2**16
    assert said(judged(1.0, 3)) == "not shown; even complete removal could not have been"


def test_removal_is_in_percent_of_what_there_is_and_toward_the_even_level() -> None:
    groups = [
        {"circuit": name, "units": units, "mean": value}
        for name, means in (("none", ("-0.3", "-0.1")), ("lrp", ("-0.1", "-0.1")))
        for units, value in zip(("1", "3"), means, strict=True)
    ]
    margin = Value("margin", paired("margin"), less=-1, even=0.0)
    found = removal(margin, groups, "lrp")
    assert found["sign"] == 1  # the other side was preferred: a rise is less of it
    assert found["rise"].sum() / found["units"].sum() == pytest.approx(100 / 3)
    assert not found["overshot"]
    assert removal(margin, groups, "none")["overshot"]  # no nearer


def test_a_level_overshoots_where_it_is_no_nearer_to_the_even_one() -> None:
    assert overshot(50.0, before=60.0, change=-20.0)
    assert not overshot(50.0, before=60.0, change=-19.0)
    assert overshot(50.0, before=60.0, change=1.0)


def test_draws_are_summarised_by_mean_and_range() -> None:
    one = {"value": 1.0, "low": 0.0, "high": 2.0, "p": 0.3}
    assert summary([one]) is one
    three = [{"value": v, "low": -9.0, "high": 9.0, "p": 0.5} for v in (1.0, 2.0, 6.0)]
    assert summary(three) == {"value": 3.0, "low": 1.0, "high": 6.0}


def test_tables_are_markdown() -> None:
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    assert interval({"value": -3.21, "low": -5.0, "high": 1.44}) == "-3.2 [-5.0, +1.4]"
    assert interval(None) == "-"
