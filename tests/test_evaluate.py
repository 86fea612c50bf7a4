import pytest
from naive import FEW, likelihood

from sparc3.base.errors import InputError
from sparc3.circuits.circuit import refuse_leak
from sparc3.measure.instrument import Sample
from sparc3.measure.instruments import INSTRUMENTS
from sparc3.stages.checks import load
from sparc3.stages.evaluate import Outcome, Setting, controlled


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
