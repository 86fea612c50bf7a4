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
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*")


def figures(text: str) -> list[float]:
    return [float(each.replace(",", "").rstrip(".")) for each in NUMBER.findall(text)]


def test_its_cells_print_what_it_shows(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures up to rounding; the completions, which one rounding may change, only in number."""
    monkeypatch.chdir(fetched / "examples")
    space: dict[str, Any] = {}
    for cell in CELLS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("".join(cell["source"]), space)
        shown = "".join(line for output in cell["outputs"] for line in output["text"])
        if "before:" in shown:
            assert len(printed.getvalue().splitlines()) == len(shown.splitlines())
        else:
            assert re.sub(NUMBER, "0", printed.getvalue()) == re.sub(NUMBER, "0", shown)
            assert figures(printed.getvalue()) == pytest.approx(figures(shown), rel=0.05, abs=0.01)


def test_it_was_run_from_top_to_bottom() -> None:
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    assert NOTEBOOK["nbformat"] == 4
    assert all(cell["id"] for cell in NOTEBOOK["cells"])
