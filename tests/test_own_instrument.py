"""An instrument that exists in this file only, through the whole pipeline.

It measures how long completions are. Nothing else knows it: this one row registers it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import whole
import yaml

from sparc3.base.files import read_csv, read_json, read_jsonl
from sparc3.base.params import Behaviour
from sparc3.circuits.ablate import Edit
from sparc3.measure.instrument import (
    How,
    Instrument,
    Measured,
    Reading,
    Sample,
    Value,
    paired,
    reduced,
)
from sparc3.measure.instruments import INSTRUMENTS, completions, perplexity

CONTROL = "random-layer-matched"


def read(model: Any, edits: Sequence[Edit], sample: Sample, how: How) -> list[Reading]:
    """Mean number of tokens of every prompt's completions."""
    readings = []
    for rows in completions.write(model, edits, sample, how):
        lengths = np.array([row["length"] for row in rows], float)
        mean = lengths.reshape(len(sample.ids), -1).mean(1)
        columns = {"length": mean}
        readings.append(Reading(columns, sample.groups, columns, rows))
    return readings


def levels(reading: Reading) -> dict[str, float]:
    return {"length": float(reading.columns["length"].mean())}


def shorter(before: Measured, after: Measured) -> float:
    return -levels(after.reading)["length"]


def length(behaviour: Behaviour) -> Instrument:
    return Instrument(
        encode=perplexity.encode,
        read=read,
        values=(
            Value("reduction", reduced("length"), "reduction %", column="length"),
            Value("length", paired("length"), "length, tokens", digits=2, less=-1),
        ),
        levels=levels,
        objective=shorter,
        primary="reduction",
        axis="-length, tokens",
        headline=(("length", "length {:.2f}"),),
        cell="length",
        writes=True,
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Finished, the behaviour `rude` measured by length alone."""
    folder = tmp_path_factory.mktemp("length")
    whole.write_project(folder)
    tree = yaml.safe_load((folder / "params.yaml").read_text())
    tree["behaviours"]["rude"] |= {"instruments": ["length"], "scorers": []}
    (folder / "params.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(INSTRUMENTS, "length", length)
        whole.run(folder)
        yield folder


def mean_length(folder: Path, circuit: str, split: str = "test") -> float:
    rows = read_jsonl(folder / "outputs/evaluation/rude/completions.jsonl")
    lengths = [r["length"] for r in rows if (r["circuit"], r["split"]) == (circuit, split)]
    return sum(lengths) / len(lengths)


def test_the_sweep_maximises_it(project: Path) -> None:
    points = read_csv(project / "outputs/sweep/rude.csv")
    assert len(points) > 4
    for point in points:
        assert float(point["objective"]) == -float(point["length"])
    assert len({point["length"] for point in points}) > 1


def test_evaluation_has_its_differences_with_intervals(project: Path) -> None:
    results = read_json(project / "metrics/evaluate/rude.json")
    before = mean_length(project, "none")
    assert results["baseline"]["test_length"] == pytest.approx(before)
    circuits = results["circuits"]
    written = [name for name, row in circuits.items() if "length" in row["test"]]
    assert {"lrp", "gradient-t", *whole.CONTROLS[: whole.DRAWN]} <= set(written)
    for name in written:
        change, after = circuits[name]["test"], mean_length(project, name)
        assert change["length"]["value"] == pytest.approx(after - before)
        assert change["reduction"]["value"] == pytest.approx(100 * (1 - after / before))
        assert change["length"]["low"] <= change["length"]["value"] <= change["length"]["high"]
    seen = mean_length(project, "lrp", "in_sample") - mean_length(project, "none", "in_sample")
    assert circuits["lrp"]["in_sample"]["length"]["value"] == pytest.approx(seen)
    assert {"lrp", "none"} <= results["completions"].keys()  # their quality is counted


def test_it_is_held_against_the_control(project: Path) -> None:
    row = read_json(project / "metrics/evaluate/rude.json")["circuits"]["lrp"]
    drawn = [mean_length(project, name) for name in whole.CONTROLS[: whole.DRAWN]]
    own = mean_length(project, "lrp")
    assert row["against_control"]["length"]["value"] == pytest.approx(own - np.mean(drawn))
    ranked = row["among_controls"]["length"]
    assert ranked["value"] == pytest.approx(mean_length(project, "none") - own)
    assert ranked["n"] == len(drawn)


def test_transfer_has_a_cell_for_it(project: Path) -> None:
    cells = read_json(project / "metrics/transfer.json")
    for pruned_for in whole.BEHAVIOURS:
        cell = cells[pruned_for]["rude"]["length"]
        assert cell["low"] <= cell["value"] <= cell["high"]
    assert "nll_shift" not in cells["rude"]["rude"]


def test_table_and_card_show_it(project: Path) -> None:
    text = (project / "metrics/table.md").read_text()
    assert f"**rude**: unpruned length {mean_length(project, 'none'):.2f}, degenerate" in text
    rows = {row["method"]: row for row in whole.result_rows(project)["rude"]}
    change = mean_length(project, "lrp") - mean_length(project, "none")
    assert rows["lrp"]["length, tokens"].startswith(f"{change:+.2f} [")
    assert rows["lrp"]["verdict"] != "not measured"
    assert rows[f"{CONTROL} ({whole.DRAWS} draws)"]["verdict"] == "control"
    card = (project / "rude/README.md").read_text()
    measures = {row["measure"] for row in whole.table(card.partition("## Evaluation")[2])}
    assert {
        "test.length",
        "test.reduction",
        "in_sample.length",
        "against_control.length",
    } <= measures
