"""The notebook of examples/: its cells run, and what it shows is what they print."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = json.loads((Path(__file__).parent.parent / "examples/library.ipynb").read_text())
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
NUMBER = re.compile(r"[-+]\d+\.\d+")  # of the table of changes


def test_its_cells_print_what_it_shows(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same words; changes up to what a neuron chosen otherwise, by rounding, would move. What
    is completed may differ from the first token on.
    """
    monkeypatch.chdir(fetched / "examples")
    space: dict[str, Any] = {}
    for cell in CELLS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("".join(cell["source"]), space)
        text = printed.getvalue()
        shown = "".join(line for output in cell["outputs"] for line in output["text"])
        if "before:" in shown:
            assert len(text.splitlines()) == len(shown.splitlines())
            continue
        assert re.sub(r"[^a-z]+", " ", text) == re.sub(r"[^a-z]+", " ", shown)
        changes = [float(each) for each in NUMBER.findall(shown)]
        assert [float(each) for each in NUMBER.findall(text)] == pytest.approx(changes, abs=0.1)


def test_it_was_run_from_top_to_bottom() -> None:
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    assert NOTEBOOK["nbformat"] == 4
    assert all(cell["id"] for cell in NOTEBOOK["cells"])
