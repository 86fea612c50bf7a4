"""What people are told of a finished run: the summary's numbers, lines, and what DVC shows."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import whole
import yaml

from sparc3.__main__ import main, parser
from sparc3.base.artifacts import model_digest
from sparc3.base.files import read_csv, read_json
from sparc3.commands.stage import produce
from sparc3.reporting.summary import lines, short
from sparc3.stages.checks import load
from sparc3.stages.table import STAGES

COLUMNS = 100


@pytest.fixture
def found(finished: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(finished)
    return read_json(Path("metrics/summary.json"))


def test_a_reduction_is_in_percent_of_what_the_unpruned_model_has(found: dict[str, Any]) -> None:
    """Of the means over all units, by what every group gave."""
    checked = 0
    for row in found["methods"]:
        if row["reduction"] is None:
            continue
        groups = read_csv(Path(f"outputs/evaluation/{row['behaviour']}/groups.csv"))
        level = {
            circuit: sum(float(g["units"]) * float(g["mean"]) for g in own)
            for circuit in ("none", row["method"])
            for own in [[g for g in groups if g["circuit"] == circuit]]
        }
        expected = 100 * (level["none"] - level[row["method"]]) / level["none"]
        assert row["reduction"]["value"] == pytest.approx(expected, rel=1e-6), row["method"]
        assert row["reduction"]["low"] <= row["reduction"]["value"] <= row["reduction"]["high"]
        checked += 1
    assert checked > 4


def test_every_method_is_there_but_controls_and_dvc_sees_the_own_ones(
    found: dict[str, Any],
) -> None:
    tested = {"lrp", "gradient-t", "aura", "aura-published", "act"}
    assert len(found["methods"]) == len(whole.BEHAVIOURS) * len(tested)
    assert {row["method"] for row in found["methods"]} == tested
    own = {(row["behaviour"], row["method"]) for row in found["methods"][:2]}
    assert own == {("rude", "lrp"), ("bias", "gradient-t")}
    assert {row["of"] for row in found["methods"]} == {3 * 24}
    first = {row["behaviour"]: row["reduction"]["value"] for row in found["methods"][:2]}
    assert found["reduction"] == first
    costs = [row["perplexity"]["value"] for row in found["methods"][:2]]
    assert found["perplexity"] == max(costs)
    shown = [value for value in found.values() if not isinstance(value, list)]
    assert len(json.dumps(shown)) < 200


def test_the_table_says_the_same(found: dict[str, Any], finished: Path) -> None:
    for behaviour, rows in whole.result_rows(finished).items():
        table = {row["method"]: row for row in rows}
        for row in found["methods"]:
            if row["behaviour"] == behaviour:
                assert row["verdict"] == table[row["method"]]["verdict"]
                steered = row["strength"] is not None
                size = f"strength {row['strength']:g}" if steered else str(row["neurons"])
                assert size == table[row["method"]]["neurons"]
                cost = table[row["method"]]["perplexity %, worst text"]
                assert cost.startswith(f"{row['perplexity']['value']:+.1f} [")
                assert cost.endswith(row["text"])


def test_the_plots_that_dvc_shows_are_drawn(finished: Path) -> None:
    plots = yaml.safe_load((whole.ROOT / "dvc.yaml").read_text())["plots"]
    assert [path for path in plots if not (finished / path).is_file()] == []


def test_show_prints_a_line_each_and_no_colour_in_a_pipe(
    found: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show"]) == 0
    said = capsys.readouterr().out
    assert "\033" not in said
    assert max(map(len, said.splitlines())) <= COLUMNS
    for row in found["methods"]:
        steered = row["strength"] is not None
        size = f"strength {row['strength']:g}" if steered else f"{row['neurons']:,} neurons"
        (line,) = re.findall(rf"^.*  {row['behaviour']} +{row['method']} +{size} .*$", said, re.M)
        assert line.startswith(short(row["verdict"]))
        if row["reduction"]:
            low, high = -row["reduction"]["high"], -row["reduction"]["low"]
            assert f"[{round(low):+d}, {round(high):+d}]" in line
    assert "outputs/report/report." in said
    assert "make ui" in said


@pytest.mark.parametrize("given", [{}, {"NO_COLOR": "1"}])
def test_a_terminal_gets_colours_unless_it_wants_none(
    found: dict[str, Any], given: dict[str, str]
) -> None:
    coloured = [line for line in lines(found, coloured=True) if "\033" in line]
    words = {short(row["verdict"]) for row in found["methods"]}
    assert bool(coloured) == bool(words & {"reduced", "reduced, but", "increased", "degenerate"})
    master, terminal = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | given
    environment["PYTHONPATH"] = str(whole.ROOT)
    command = [sys.executable, "-m", "sparc3", "show"]
    subprocess.run(command, stdout=terminal, env=environment, check=True)
    os.close(terminal)
    said = os.read(master, 100_000).decode()
    os.close(master)
    assert ("\033[" in said) == (bool(coloured) and not given)


def test_without_a_report_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["show"]) == 2
    assert "metrics/summary.json: there is no report yet; make one by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "first"),
    [
        ("reduced, beyond 19 random draws and a word ban", "reduced"),
        ("reduced, beyond 19 random draws, not beyond a word ban", "reduced, but"),
        ("reduced, beyond 19 random draws; over the perplexity budget on news", "reduced, but"),
        ("reduced; no control of its size", "reduced, but"),
        ("not shown; 9 % would have been", "not shown"),
        ("cannot be shown: 2 of 11 groups changed, so p is at least 0.5", "cannot be shown"),
        ("not measured", "not measured"),
        ("overshot", "overshot"),
    ],
)
def test_a_verdict_in_short_hides_no_refusal(words: str, first: str) -> None:
    assert short(words) == first


def test_help_names_every_stage_with_what_it_reads_and_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    text = parser().format_help()
    assert len(text.splitlines()) <= 50
    assert max(map(len, text.splitlines())) <= COLUMNS
    places = [text.index(f"\n    {word}") for word in ("fetch", *STAGES, "main", "show")]
    assert places == sorted(places)
    for word, row in STAGES.items():
        with pytest.raises(SystemExit):
            main([word, "--help"])
        said = capsys.readouterr().out
        for name in (*row.reads, *row.products):
            assert name in said


def test_every_stage_ends_with_a_line_of_what_it_found(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    caplog.set_level("INFO", logger="sparc3")
    params, ends = load(), {}
    for word, section in whole.STAGES:
        axis = {"prompt_sets": {"prompt_set": "rude"}, "behaviours": {"behaviour": "rude"}}
        options = axis.get(str(section), {})
        model = model_digest(Path("model")) if STAGES[word].model else None
        produce(params, word, options, model)
        ends[word] = caplog.records[-1].getMessage()
        name = " ".join([word, *options.values()])
        assert ends[word].startswith(f"{name}: "), ends[word]
        assert "\n" not in ends[word]
    row = read_json(Path("metrics/evaluate/rude.json"))["circuits"]["lrp"]
    size, change = row["num_neurons"], row["test"]["reduction"]
    assert f"lrp takes {size} neurons" in ends["select"]
    assert f"without {size} neurons of lrp; profanity reduction %" in ends["evaluate"]
    assert (
        f"{change['value']:+.1f} [{change['low']:+.1f}, {change['high']:+.1f}]" in ends["evaluate"]
    )
    worst = max(row["texts"], key=lambda text: row["texts"][text]["value"])
    assert f"perplexity % of {worst} {row['texts'][worst]['value']:+.1f} [" in ends["evaluate"]
    gap = read_json(Path("metrics/gate/rude.json"))["gap"]
    assert f"{gap['value']:+.1f} % [{gap['low']:+.1f}, {gap['high']:+.1f}]" in ends["gate"]
    common = read_json(Path("metrics/overlap.json"))["overlaps"]["bias.rude"]["observed"]
    assert ends["overlap"].endswith(f"in common: bias.rude {common}")
    transfer = read_json(Path("metrics/transfer.json"))
    others = transfer["rude"]["bias"]["margin"], transfer["bias"]["rude"]["nll_shift"]
    moved = sum(not change["low"] <= 0 <= change["high"] for change in others)
    assert f"transfer: {moved} of 2 effects on another behaviour exclude 0" in ends["transfer"]
