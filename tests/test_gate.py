"""Gate: the relevance gap in percent, its interval, and what it does below the threshold."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small

from sparc3.base.artifacts import metrics_path, read_prompts
from sparc3.base.errors import InputError
from sparc3.base.files import read_json, read_tensors, write_tensors
from sparc3.stages import checks, gate
from sparc3.stages.gate import Totals, gap_interval


def relevance_gap(reference: np.ndarray, behaviour: np.ndarray) -> float:
    """The formula, written out."""
    total = sum(reference) / len(reference)
    return 100 * (total - sum(behaviour) / len(behaviour)) / total


def test_the_gap_is_the_difference_of_totals_in_percent() -> None:
    groups = [f"g{i}" for i in range(6)]
    reference = Totals(np.array([2.0, 4.0] * 3), groups)
    behaviour = Totals(np.array([1.0, 2.0, 3.0] * 3), [f"g{i}" for i in range(9)])
    assert gap_interval(reference, behaviour).value == pytest.approx(100 * (3 - 2) / 3)
    with pytest.raises(InputError, match="no relevance"):
        gap_interval(Totals(np.zeros(6), groups), behaviour)


def test_the_interval_counts_groups_and_not_their_copies() -> None:
    rng = np.random.default_rng(0)
    values = rng.lognormal(0, 0.3, (2, 30))
    alone = [Totals(v, [f"g{i}" for i in range(30)]) for v in values]
    twice = [Totals(np.repeat(v, 2), [f"g{i // 2}" for i in range(60)]) for v in values]
    once, copied = gap_interval(*alone), gap_interval(*twice)
    assert once.value == pytest.approx(relevance_gap(*values))
    assert copied.value == pytest.approx(once.value)
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    assert once.low < once.value < once.high
    apart = Totals(twice[0].relevance, [f"g{i}" for i in range(60)])
    assert gap_interval(apart, twice[1]).low > copied.low


def test_the_interval_covers_the_truth() -> None:
    """Of a ratio of means: a true gap of 20 %."""
    rng = np.random.default_rng(1)
    groups = [f"g{i}" for i in range(40)]
    hits = 0
    for _ in range(300):
        reference, behaviour = rng.lognormal(0, 0.5, (2, 40))
        found = gap_interval(Totals(reference, groups), Totals(0.8 * behaviour, groups))
        hits += found.low <= 20 <= found.high
    assert 0.91 <= hits / 300 <= 0.98


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scores of which the behaviour's are 0.9 of the reference's: a gap of 10 %."""
    monkeypatch.setattr(small, "SETS", {"general": 8, "talk": 7})
    monkeypatch.chdir(small.write_project(tmp_path / "project"))
    for name, scale in (("general", 1.0), ("talk", -0.9)):
        ids = [row["id"] for row in read_prompts(name, "attribute")]
        scores = np.full((len(ids), 2, 3), scale, np.float32)
        path = Path(f"outputs/scores/{name}/lrp/00000.safetensors")
        write_tensors(path, {"scores": scores}, {"ids": str(ids).replace("'", '"')})
    return Path.cwd()


def run(**changes: Any) -> dict[str, float]:
    small.write_project(Path.cwd(), {"gate": {"score": "lrp", "prompts": 50, **changes}})
    return gate.run(checks.load(), "talk")


def test_below_the_threshold_it_warns_or_stops(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(threshold=9.0)["passed"] == 1
    found = run(threshold=15.0)
    assert found["differential"] == pytest.approx(10, abs=1e-4)
    assert found["passed"] == 0
    assert "relevance gap +10.0 % [" in caplog.text
    assert "below gate.threshold 15 %: the total relevance of general" in caplog.text
    measured = read_json(metrics_path("gate", "talk"))["gap"]
    assert measured["low"] <= measured["value"] <= measured["high"]
    text = Path("params.yaml").read_text().replace("on_fail: warn", "on_fail: stop")
    Path("params.yaml").write_text(text)
    with pytest.raises(InputError, match=r"below gate.threshold 15 %: .*on_fail: warn"):
        gate.run(checks.load(), "talk")


def test_the_gate_is_one_sided(project: Path) -> None:
    """More relevance than the reference's, by any amount, is no pass."""
    shard = Path("outputs/scores/talk/lrp/00000.safetensors")
    tensors, metadata = read_tensors(shard)
    write_tensors(shard, {"scores": 3 * tensors["scores"]}, metadata)
    gap = run(threshold=15.0)
    assert gap["differential"] == pytest.approx(-170, abs=1e-3)
    assert gap["passed"] == 0


def test_too_few_groups_are_named_with_their_set(project: Path) -> None:
    with pytest.raises(InputError, match=r"first 5 prompts of general are of 5 groups.*count"):
        run(threshold=15.0, prompts=5)
