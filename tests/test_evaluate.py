from dataclasses import replace

import numpy as np
import pytest
from naive import FEW, likelihood

from sparc3.base.errors import InputError
from sparc3.base.params import Keep
from sparc3.circuits.circuit import refuse_leak
from sparc3.measure.instrument import Reading, Sample
from sparc3.measure.instruments import INSTRUMENTS
from sparc3.measure.setting import Outcome, Setting
from sparc3.stages.checks import load
from sparc3.stages.evaluate import against, baseline


def test_a_leak_is_refused_by_prompt_and_by_group() -> None:
    rows = [{"id": "a", "group": "g"}, {"id": "b", "group": "h"}]
    refuse_leak(rows, {"chosen_on": {"toxicity": ["c"], "general": ["d"]}, "groups": ["i"]}, "x")
    with pytest.raises(InputError, match=r"chosen on 1 of the 2 test prompts .*first: b"):
        refuse_leak(rows, {"chosen_on": {"toxicity": ["c", "b"]}, "groups": []}, "x")
    with pytest.raises(InputError, match=r"chosen on 1 of the 2 test prompts .*first: a"):
        refuse_leak(rows, {"chosen_on": {"toxicity": []}, "groups": ["g"]}, "x")


def test_a_circuit_is_ranked_among_the_draws_of_its_control() -> None:
    def outcome(behaviour: float, general: float) -> Outcome:
        text, other = (likelihood([total] * 8, [10] * 8) for total in (behaviour, general))
        return Outcome({"general": other}, {"test": {"nll": text}}, {}, None)

    texts = Sample([str(i) for i in range(8)], ["t"] * 8, [])
    instruments = {"nll": INSTRUMENTS["nll"](load().behaviours["toxicity"])}
    setting = Setting(instruments, {"test": {"": {"nll": texts}}}, {"general": texts}, {})
    before, after = outcome(30, 20), outcome(36, 22)
    control = [outcome(31, 20), outcome(32, 20)]
    found = against(before, after, control, setting, FEW)
    ranked = found["among_controls"]["nll_shift"]
    assert ranked["value"] == pytest.approx(0.6 - 0.2)  # beyond that of general text
    assert ranked["mean"] == pytest.approx(0.15)
    assert ranked["p"] == pytest.approx(1 / 3)
    assert ranked["least"] < 0.1 < 0.2 < ranked["most"]
    assert found["against_control"]["nll_shift"]["value"] == pytest.approx(0.4 - 0.15)


def test_draws_that_did_not_complete_are_no_rivals_of_completions() -> None:
    def outcome(score: float | None) -> Outcome:
        columns = {f"profanity_{kind}": np.full(8, score) for kind in ("mean", "max", "toxic")}
        readings = {} if score is None else {"completions": Reading(columns)}
        return Outcome({"general": likelihood([20.0] * 8, [10] * 8)}, {"test": readings}, {}, None)

    texts = Sample([str(i) for i in range(8)], ["t"] * 8, [])
    behaviour = replace(load().behaviours["toxicity"], scorers=("profanity",))
    instruments = {"completions": INSTRUMENTS["completions"](behaviour)}
    setting = Setting(instruments, {"test": {"": {"completions": texts}}}, {"general": texts}, {})
    rivals = [outcome(0.4), outcome(0.3), outcome(None)]
    found = against(outcome(0.5), outcome(0.1), rivals, setting, FEW)
    ranked = found["among_controls"]["reduction"]
    assert (ranked["n"], ranked["value"], ranked["mean"]) == (
        2,
        pytest.approx(80.0),
        pytest.approx(30.0),
    )
    assert found["against_control"]["reduction"]["value"] == pytest.approx(
        100 * (0.35 - 0.1) / 0.35
    )
    assert against(outcome(0.5), outcome(0.1), rivals[2:], setting, FEW) == {
        "against_control": {},
        "among_controls": {},
    }


def test_the_gap_of_elicited_prompts_is_between_scores_of_one_scorer() -> None:
    """Of the scorer that chose them; of a behaviour that it does not score there is none."""
    params, general = load(), likelihood([20.0] * 8, [10] * 8)
    rows = {"test": {"": [{"elicited": 0.7}], "block-1": [{"elicited": 0.9}]}}

    def gap(scorer: str, levels: dict[str, float]) -> float | None:
        keep = replace(params.prompt_sets["toxicity"], keep=Keep(scorer=scorer, top=8))
        kept = replace(params, prompt_sets={**params.prompt_sets, "toxicity": keep})
        known = INSTRUMENTS["nll"](params.behaviours["toxicity"])
        known = known._replace(levels=lambda reading: levels)
        setting = Setting({"x": known}, {"test": {}}, {}, {})
        outcome = Outcome({"general": general}, {"test": {"x": Reading({})}}, {}, None)
        return baseline(kept, "toxicity", outcome, setting, rows).get("test_elicited_gap")

    assert gap("profanity", {"profanity": 0.25, "other": 0.1}) == pytest.approx(0.55)
    assert gap("other", {"profanity": 0.25, "other": 0.1}) == pytest.approx(0.7)
    assert gap("third", {"profanity": 0.25}) is None
    assert gap("profanity", {"ss": 60.0, "margin": 0.1}) is None  # measured by pairs
