from dataclasses import replace

import pytest
from naive import FEW, likelihood

from sparc3.base.errors import InputError
from sparc3.base.params import Keep
from sparc3.circuits.circuit import refuse_leak
from sparc3.measure.instrument import Reading, Sample
from sparc3.measure.instruments import INSTRUMENTS
from sparc3.stages.checks import load
from sparc3.stages.evaluate import Outcome, Setting, baseline, controlled


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
        return Outcome(other, None, {"test": {"nll": text}})

    texts = Sample([str(i) for i in range(8)], ["t"] * 8, [])
    instruments = {"nll": INSTRUMENTS["nll"](load().behaviours["toxicity"])}
    setting = Setting(instruments, {"test": {"nll": texts}}, texts, None, [], {})
    before, after = outcome(30, 20), outcome(36, 22)
    control = [outcome(31, 20), outcome(32, 20)]
    ranked = controlled(before, after, control, setting, FEW)["among_controls"]["nll"]
    assert ranked["value"] == pytest.approx(0.6 - 0.2)  # beyond that of general text
    assert ranked["mean"] == pytest.approx(0.15)
    assert ranked["p"] == pytest.approx(1 / 3)
    assert controlled(before, after, control[:1], setting, FEW)["among_controls"] == {}


def test_the_gap_of_elicited_prompts_is_between_scores_of_one_scorer() -> None:
    """Of the scorer that chose them; of a behaviour that it does not score there is none."""
    params, general = load(), likelihood([20.0] * 8, [10] * 8)
    texts = Sample(["a"], ["a"], [])
    setting = Setting({}, {"test": {}}, texts, None, [], {"test": 0.8})

    def gap(scorer: str, levels: dict[str, float]) -> float | None:
        keep = replace(params.prompt_sets["toxicity"], keep=Keep(scorer=scorer, top=8))
        kept = replace(params, prompt_sets={**params.prompt_sets, "toxicity": keep})
        reading = {"x": Reading({}, levels=levels)}
        outcome = Outcome(general, None, {"test": reading})
        return baseline(kept, "toxicity", outcome, setting).get("test_elicited_gap")

    assert gap("profanity", {"profanity": 0.25, "other": 0.1}) == pytest.approx(0.55)
    assert gap("other", {"profanity": 0.25, "other": 0.1}) == pytest.approx(0.7)
    assert gap("third", {"profanity": 0.25}) is None
    assert gap("profanity", {"ss": 60.0, "margin": 0.1}) is None  # measured by pairs
