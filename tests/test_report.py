from pathlib import Path
from typing import Any

import pytest

from sparc3.base.errors import InputError
from sparc3.base.files import markdown
from sparc3.commands.readme import IN_README, cost_table, readme_with
from sparc3.reporting.tables import interval, overshot, summary, verdict


@pytest.mark.parametrize("name", IN_README)
def test_the_readme_shows_the_tables_of_the_runs(name: str) -> None:
    """No number in README's tables is typed: they are the files that the runs wrote."""
    readme = Path("README.md").read_text()
    assert readme_with(readme, name, IN_README[name].read_text()) == readme


def test_the_readme_is_changed_within_its_block_only() -> None:
    text = "a\n<!-- x: written by `make readme` -->\nold\n<!-- end of x -->\nb\n"
    new = readme_with(text, "x", "new\n")
    assert new.startswith("a\n")
    assert new.endswith("<!-- end of x -->\nb\n")
    assert "new" in new
    assert "old" not in new
    assert readme_with(new, "x", "new\n") == new
    with pytest.raises(InputError, match="end of y"):
        readme_with(text, "y", "new")


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


def test_a_verdict_needs_a_small_p_and_names_what_could_have_been_found() -> None:
    def row(**reduction: float) -> dict:
        measured = {"moved": 20, "n": 30, "mde_holm": 9.0, **reduction}
        return {
            "differences": {"reduction": measured} if reduction else {},
            "broken": False,
            "overshot": False,
        }

    def beside(control: float, **more: Any) -> dict:
        found = row(value=20.0, p_holm=0.01)
        found["differences"]["against_control_reduction"] = {"low": control}
        return found | {"drawn": [-3.0, 12.0]} | more

    assert verdict(beside(1.0)) == "reduced, beyond each of 2 random draws"
    assert verdict(beside(1.0, drawn=[-30.2, 30.5])) == "reduced, not beyond the control"
    assert verdict(beside(-1.0)) == "reduced, not beyond the control"
    assert verdict(row(value=20.0, p_holm=0.01)) == "reduced; no control of its size"
    assert verdict(row(value=-20.0, p_holm=0.01)) == "increased"
    assert verdict(row(value=5.0, p_holm=0.2)) == "not shown; 9 % would have been"
    few = verdict(row(value=5.0, p_holm=1.0, moved=2))
    assert few == "not shown; 2 of 30 groups changed at all"
    assert verdict(row(value=5.0, low=1.0, high=9.0)) == "control"
    assert verdict(row()) == "not measured"
    assert verdict(beside(1.0, broken=True)) == "degenerate"
    assert verdict(beside(1.0, overshot=True)) == "overshot"


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
