"""The runs in MLflow's UI: what is logged of the table's cells, and what a browser shows of it."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sparc3.base import comparison, runs
from sparc3.base.errors import InputError
from sparc3.base.files import digest
from sparc3.commands import ui
from sparc3.reporting.entries import datasets, row_entry, whole_entry
from sparc3.stages.checks import load

PARAMS, ROOT = load(), Path(__file__).parent.parent
BOUND = 300  # seconds, on a machine with much else to do
FIGURE = "answer.svg"
PICTURE = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><circle r="9"/></svg>'


def cell(behaviour: str, method: str, reduction: float | None, **more: Any) -> dict[str, Any]:
    """A cell of the table, as `cells` gives it, whose change is beyond doubt if there is one."""
    change = None if reduction is None else {"value": reduction, "moved": 20, "n": 30}
    own = PARAMS.behaviours[behaviour].method == method
    made = {
        "behaviour": behaviour,
        "method": method,
        "family": "confirmatory" if own else "exploratory",
        "num_neurons": 1030,
        "gap": {"value": -6.21, "low": -18.44, "high": 4.91},
        "differences": {"ppl_worst": {"value": 0.72, "low": 0.14, "high": 3.01, "p": 0.2}},
        "worst": "questions",
        "change": change,
        "against": None,
        "broken": False,
        "overshot": False,
        "degenerate": 0.0,
        "circuit": None,
    }
    if reduction is not None:
        share = {"value": reduction, "low": reduction - 5, "high": reduction + 5}
        made |= {"share": share, "p": 0.0156, "least": 0.001, "level": 0.02, "sign": 1}
        made |= {"mde": float("inf")}
    return made | more


CELLS = [
    cell("toxicity", "lrp", 33.5),
    cell("toxicity", "gradient", None),
    cell("race", "gradient-t", 15.5, p=0.4, mde=19.2),
]
NAMES = [f"{c['behaviour']}, {c['method']}, 1,030 neurons" for c in CELLS]


def test_a_row_has_what_matters_in_words_and_numbers() -> None:
    row = row_entry(PARAMS, CELLS[0])
    assert row.name == "toxicity, lrp, 1,030 neurons"
    assert row.tags == {
        "profile": "default",
        "model": "smollm2-135m",
        "behaviour": "toxicity",
        "method": "lrp",
        "family": "confirmatory",
        "verdict": "reduced; no control of its size",
        "reduction": "+33.5 [+28.5, +38.5] %",
        "perplexity": "+0.7 [+0.1, +3.0] % questions",
        "differential": "-6.2 [-18.4, +4.9] %",
        "neurons": "1,030",
    }
    ends = {"reduction_low": 28.5, "reduction_high": 38.5, "neurons": 1030, "p": 0.0156}
    assert row.metrics.items() >= {"reduction": 33.5, "perplexity": 0.72, **ends}.items()
    assert "detectable_reduction" not in row.metrics  # infinite
    assert len(row.metrics) <= 15
    assert row.note.startswith("**reduced; no control of its size**\n\n| behaviour | method |")
    assert row_entry(PARAMS, CELLS[1]).tags["reduction"] == "-"
    assert row_entry(PARAMS, cell("toxicity", "word-ban", 1.0, num_neurons=0)).name == (
        "toxicity, word-ban"
    )


def test_the_whole_has_a_few_numbers_of_the_behaviours_own_methods() -> None:
    whole = whole_entry(PARAMS, CELLS, [])
    assert whole.name == "smollm2-135m"
    assert whole.metrics == {
        "toxicity/reduction": 33.5,
        "toxicity/reduction_low": 28.5,
        "toxicity/reduction_high": 38.5,
        "toxicity/perplexity": 0.72,
        "race/reduction": 15.5,
        "race/reduction_low": 10.5,
        "race/reduction_high": 20.5,
        "race/perplexity": 0.72,
    }
    for said in ("toxicity by lrp: reduced", "race by gradient-t: not shown; 19 % would have been"):
        assert f"- **{said}" in whole.note
        assert said in whole.tags["verdict"]


# --- in a browser ------------------------------------------------------------------------------


NAME = "attributes.`Run Name`"


class Page(HTMLParser):
    """What a page shows: its text, its images, and the cells of its grid by row and column."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.row, self.column = "", "", ""
        self.images: list[str] = []
        self.cells: dict[str, dict[str, str]] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.row = found.get("row-index", self.row)
        self.column = found.get("col-id", self.column)
        if tag == "img":
            self.images.append(found["src"])

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "
        row = self.cells.setdefault(self.row, {})
        row[self.column] = row.get(self.column, "") + data

    def rows(self) -> list[dict[str, str]]:
        """The grid's rows from top to bottom: the run's name and tags."""
        return [
            {key[6:-1] if key.startswith("tags.") else "name": told for key, told in row.items()}
            for _, row in sorted((int(n), row) for n, row in self.cells.items() if n)
            for row in [{k: v for k, v in row.items() if k.startswith(("tags.", NAME))}]
            if NAME in row
        ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(address: str) -> bytes:
    """Body of the answer, asked for until the server is up."""
    end = time.monotonic() + BOUND
    while True:
        try:
            with urllib.request.urlopen(address) as answer:
                return answer.read()
        except urllib.error.URLError:
            assert time.monotonic() < end, address
            time.sleep(0.5)


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Two pipelines in a store of this module, and a row as an earlier version left it; ids of the
    parents, and of a row of the second, by name.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("MLFLOW_", "SPARC3_", "DVC_"))]:
            patch.delenv(name)
        patch.chdir(tmp_path_factory.mktemp("ui"))
        patch.setenv("PYTHONPATH", str(ROOT))
        Path(FIGURE).write_bytes(PICTURE)
        for data in (data for name in PARAMS.behaviours for data in datasets(PARAMS, name)):
            data.path.parent.mkdir(parents=True, exist_ok=True)
            data.path.write_text("{}\n")
        whole = whole_entry(PARAMS, CELLS, [Path(FIGURE)])
        rows = {f"{c['behaviour']}/{c['method']}": row_entry(PARAMS, c) for c in CELLS}
        with runs.stage_run("report", {}, {}) as report:
            old = runs.create(report.client, report.experiment, None)
            old.set_tags({"mlflow.runName": "toxicity/lrp", "sparc3.row": "toxicity/lrp"})
            ids = {}
            for name, budget in (("first-fern", 1.0), ("second-fern", 1.5)):
                patch.setenv("DVC_EXP_NAME", name)
                params = {"select": {"ppl_budget": budget, "seed": 0}}
                ids[name] = comparison.pipeline_run(report, name, params, whole, rows, {})
            wanted = "tags.`sparc3.row` = 'toxicity/lrp' and tags.pipeline = 'second-fern'"
            (row,) = report.client.search_runs([report.experiment], wanted)
        yield {**ids, "toxicity/lrp": row.info.run_id}


@pytest.fixture(scope="module")
def link(logged: dict[str, str]) -> Iterator[str]:
    """What `ui` prints, while it serves."""
    port = free_port()
    command = [sys.executable, "-m", "sparc3", "ui", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        said = server.stdout.readline().removeprefix("The runs are at ").strip()
        assert b"<title>MLflow</title>" in get(f"http://127.0.0.1:{port}/")
        yield said
    finally:
        server.terminate()
        server.wait(BOUND)


@pytest.fixture
def browse(tmp_path: Path) -> Callable[[str], Page]:
    """Open an address in Chromium and read the page as it is after the scripts have run."""
    if shutil.which("chromium") is None:
        pytest.skip("no browser is installed (Debian: chromium)")
    options = [
        *("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"),
        *("--virtual-time-budget=30000", "--window-size=3000,1600", "--dump-dom"),
    ]

    def read(address: str) -> Page:
        command = ["chromium", *options, address]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=BOUND)
        return Page(done.stdout)

    return read


def test_the_link_opens_the_answers_grouped_by_pipeline(
    link: str, browse: Callable[[str], Page]
) -> None:
    page = browse(link)
    rows = [row for row in page.rows() if row["name"] in ("first-fern", "second-fern", *NAMES)]
    # The latest is on top, and the table's order is kept.
    assert [row["name"] for row in rows] == ["second-fern", *NAMES, "first-fern", *NAMES]
    for row, expected in zip(rows[1:4], CELLS, strict=True):
        tags = row_entry(PARAMS, expected).tags
        assert row == {"name": row["name"], **{column: tags[column] for column in ui.COLUMNS}}
    assert all(f"Group: {name}" in page.text for name in ("first-fern", "second-fern"))
    assert "8 matching runs" in " ".join(page.text.split())  # none of an earlier version


def test_a_parents_page_shows_verdicts_and_figure(
    logged: dict[str, str], link: str, browse: Callable[[str], Page]
) -> None:
    address, parent = link.partition("/runs?")[0], logged["first-fern"]
    page = browse(f"{address}/runs/{parent}")
    for text in ("toxicity by lrp: reduced", "+33.5 [+28.5, +38.5] %", "Metrics (8)"):
        assert text in page.text
    figure = f"get-artifact?path={FIGURE}&run_uuid={parent}"
    assert figure in page.images
    assert get(f"{address.partition('#')[0]}{figure}") == PICTURE


def test_a_rows_page_names_its_prompts_by_digest(
    logged: dict[str, str], link: str, browse: Callable[[str], Page]
) -> None:
    text = browse(f"{link.partition('/runs?')[0]}/runs/{logged['toxicity/lrp']}").text
    prompts = datasets(PARAMS, "toxicity")[0].path
    assert f"{prompts.stem} ({digest(prompts)[:32]})" in " ".join(text.split())
    assert "Parent run second-fern" in " ".join(text.split())


def test_comparing_parents_shows_what_changed(
    logged: dict[str, str], link: str, browse: Callable[[str], Page]
) -> None:
    ids = ",".join(f'"{logged[name]}"' for name in ("first-fern", "second-fern"))
    server = link.partition("#")[0]
    text = browse(f'{server}#/compare-runs?runs=[{ids}]&experiments=["0"]').text
    assert text.index("select.ppl_budget") < text.index("Run details")  # the plot is of it


def test_a_port_that_is_taken_is_named(logged: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"PORT: {port} .* make ui PORT={port + 1}"):
            ui.run(port)


def test_the_link_of_a_server_is_the_servers(
    logged: dict[str, str], link: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = link.partition("/#")[0]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.replace("//", "//me:secret@"))
    assert ui.ui_link() == link
