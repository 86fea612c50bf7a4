"""The page and its figures: what they show is what was measured, and nothing in a text acts."""

import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from sparc3.base.files import read_json, read_jsonl, write_jsonl
from sparc3.measure.instrument import Value, paired, reduced
from sparc3.reporting import figures, page, tables
from sparc3.reporting.figures import DESTROYED, Row
from sparc3.stages import report, sweep
from sparc3.stages.checks import load

HOSTILE = (
    '<script>alert(1)</script><img src="http://evil.example/x" onerror=a()> {{ 7 * 7 }} & \u202e'
)
LOOKS = figures.looks({"lrp": False, "gradient": False, "random": True})
SHARE = "share, %"


@pytest.fixture(scope="module")
def project(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of a tiny model, with hostile texts among its prompts and completions."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("page") / "project")
    for name in ("outputs/prompts/rude.jsonl", "outputs/evaluation/rude/completions.jsonl"):
        rows = read_jsonl(folder / name)
        write_jsonl(folder / name, [{**row, "text": HOSTILE} for row in rows])
    return folder


@pytest.fixture
def text(project: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(project)
    params = load()
    return page.page(params, tables.cells(params), tables.FOLDER)


class Tags(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_no_network_and_no_script(text: str) -> None:
    page_of = Tags(text)
    loading = ("src", "href", "xlink:href", "data", "action", "poster", "srcset")
    for tag, attributes in page_of.tags:
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "img")
        assert not any(name.startswith("on") for name in attributes)
        # A link leads within the page, or to MLflow's own UI on this machine.
        where = ("#", page.RUNS) if tag == "a" else "#"
        assert all((attributes.get(name) or "#").startswith(where) for name in loading)
    styles = text.replace("http://www.w3.org/", "")  # names of XML, not addresses
    assert not re.search(r"url\((?!#)|@import", styles)
    assert "default-src 'none'" in text
    assert len(text.encode()) < 5_000_000


def test_hostile_texts_are_shown_and_not_obeyed(text: str) -> None:
    read = Tags(text)
    assert HOSTILE in read.text  # whole, as it was written: no 49, no tag
    assert "evil.example" not in "".join(str(attributes) for _, attributes in read.tags)


def test_the_page_says_what_the_metrics_say(
    project: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    params, said = load(), " ".join(Tags(text).text.split())
    for row in tables.cells(params):
        found = read_json(Path(f"metrics/evaluate/{row['behaviour']}.json"))["circuits"]
        if row["draws"] > 1 or not row["change"]:
            continue
        change = found[row["method"]]["test"]
        value, low, high = (row["share"][end] for end in ("value", "low", "high"))
        assert f"{value:+.0f} [{low:+.0f}, {high:+.0f}]" in said
        if "reduction" in change and row["behaviour"] == "rude":
            assert value == pytest.approx(change["reduction"]["value"])
        assert tables.verdict(params, row) in said
    for name, figure in (("answer", "the main one"), ("forest-rude", ""), ("layers-bias", "")):
        drawn = Path(f"outputs/report/{name}.svg").read_text()
        assert drawn.partition("viewBox")[2] in text, figure  # its size is the page's
    for file in ("metrics/evaluate/rude.json", "outputs/evaluation/bias/prompts.csv"):
        assert file in said
    assert Path("outputs/report/report.html").stat().st_size > 50_000


def test_the_main_table_is_escaped_for_latex(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert page.escaped(r"50 % of a_b & {c} \d ~ ^ $ #") == (
        r"50 \% of a\_b \& \{c\} \textbackslash{}d \textasciitilde{} \textasciicircum{} \$ \#"
    )
    assert page.escaped("gradient-t -4 [-11, +2]") == "gradient-t $-$4 [$-$11, +2]"
    monkeypatch.chdir(project)
    params = load()
    lines = page.latex(params, tables.cells(params)).splitlines()
    header, rows = page.main_table(params, tables.cells(params))
    assert lines[1] == r"\toprule"
    assert lines[-2] == r"\bottomrule"
    body = [line for line in lines if line.endswith(r" \\")]
    assert len(body) == 1 + len(rows)
    for line in body:
        assert len(re.findall(r"(?<!\\)&", line)) == len(header) - 1
        assert not re.search(r"(?<!\\)[%$#_]", line.replace("$-$", ""))


def interval(value: float, reach: float = 1.0) -> dict[str, float]:
    return {"value": value, "low": value - reach, "high": value + reach}


def test_a_share_is_of_the_unpruned_level_and_rises_with_less_of_the_behaviour() -> None:
    groups = [
        {"circuit": "none", "units": "1", "mean": "0.1"},
        {"circuit": "none", "units": "3", "mean": "0.3"},
        {"circuit": "lrp", "units": "1", "mean": "9"},
    ]
    margin = Value("margin", paired("margin"), "margin, nats", less=-1, even=0.0)
    change = {"value": -0.05, "low": -0.1, "high": 0.025}
    assert tables.share(margin, groups, change) == pytest.approx(
        {"value": 20.0, "low": -10.0, "high": 40.0}
    )
    score = Value("reduction", reduced("x"), "profanity reduction %")
    assert tables.share(score, groups, interval(30.0)) == interval(30.0)
    assert tables.oriented(margin, change) == {"value": 0.05, "low": -0.025, "high": 0.1}


def drawn(name: str, folder: Path, *arguments: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of a figure, once it is saved."""
    kept: list[Any] = []
    save = figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k))
    )
    getattr(figures, name)(folder / name, *arguments)
    return kept[0].axes


ROWS = [
    Row("lrp", {SHARE: interval(30.0)}, own=True, notes=("a", "b", "c")),
    Row("gradient", {SHARE: interval(900.0, 500.0)}, lost="+9000 %", notes=("a", "b", "c")),
]


def test_a_destroyed_model_is_named_and_does_not_set_the_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = SHARE, {"toxicity": ROWS}, {"toxicity": (-3.0, 4.0)}, LOOKS
    (axis,) = drawn("answer", tmp_path, *arguments, monkeypatch=monkeypatch)
    low, high = axis.get_xlim()
    assert low < -3.0
    assert 31.0 < high < 40.0
    assert any("destroyed: perplexity +9000 %" in text.get_text() for text in axis.texts)


@pytest.mark.parametrize("name", ["lrp", "max-activation-auroc"])
def test_no_word_beside_the_main_figure_is_cut_or_lies_on_another(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bold is wider."""
    verdict = "reduced, beyond 19 random draws (4 in completions), not beyond a word ban; over the "
    notes = "+40 [+27, +51] %", "+12.2 [+10.4, +13.5] % questions", verdict + "budget on questions"
    rows = [Row(name, {SHARE: interval(30.0)}, own=own, notes=notes) for own in (True, False)]
    looks = figures.looks({name: False})
    arguments = SHARE, {"toxicity": rows}, {"toxicity": (-3.0, 4.0)}, looks
    (axis,) = drawn("answer", tmp_path, *arguments, monkeypatch=monkeypatch)
    whole = axis.figure.bbox
    found = {(note, at): box for note, at, box in boxes(axis) if at >= 0}
    assert len(found) == 6
    assert all(box.x1 < whole.x1 for box in found.values())
    for at in range(2):
        edges = sorted((box.x0, box.x1) for (_, row), box in found.items() if row == at)
        assert all(end < begin for (_, end), (begin, _) in pairwise(edges))


def boxes(axis: Any) -> list[tuple[str, float, Any]]:
    """Of every text beside a panel what it says, in which row, and where in the figure."""
    renderer = FigureCanvasAgg(axis.figure).get_renderer()
    return [(t.get_text(), t.get_position()[1], t.get_window_extent(renderer)) for t in axis.texts]


def test_a_destroying_dose_is_named_and_does_not_set_the_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [
        dict(zip(sweep.COLUMNS, map(str, row), strict=True))
        for row in (
            ("none", 0.0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
            ("lrp", 0.2, 10, 0.1, 0.05, 0.001, 0.0001, 0.2, 0.01),
            ("lrp", 0.2, 60, 0.8, 0.1, 0.01, 0.001, 0.5, 0.02),
            ("lrp", 0.2, 900, 5000.0, 300.0, 4.0, 0.2, 9.0, 1.0),
        )
    ]
    assert float(points[-1]["ppl_delta"]) > DESTROYED
    arguments = points, {"lrp": (60, 0.2)}, "rise, nats", 1.0, LOOKS
    objective, cost = drawn("dose", tmp_path, *arguments, monkeypatch=monkeypatch)
    assert max(cost.get_ylim()) < 2
    assert max(objective.get_ylim()) < 1
    bottom, top = cost.get_ylim()
    assert bottom > top  # a cheaper model is higher
    assert any("lrp at 900, +5,000 %" in text.get_text() for text in cost.texts)
    for axis in (objective, cost):
        (ring,) = (c for c in axis.collections if c.get_label() == "chosen")
        assert ring.get_offsets().tolist() == [[60.0, 0.8 if axis is cost else 0.5]]


def test_figures_have_the_same_bytes_twice(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        arguments = SHARE, {"toxicity": ROWS}, {"toxicity": (-3.0, 4.0)}, LOOKS
        figures.answer(tmp_path / folder / "answer", *arguments)
    for kind in ("svg", "pdf"):
        one, two = ((tmp_path / folder / f"answer.{kind}").read_bytes() for folder in "ab")
        assert one == two
        assert b"Date" not in one


def test_methods_differ_without_colour_and_controls_are_grey() -> None:
    many = figures.looks({f"m{n}": False for n in range(18)} | {f"c{n}": True for n in range(4)})
    assert len({look[1:] for look in many.values()}) == len(many)  # marker, line and hatch
    assert {name[0] for name, look in many.items() if look.colour == figures.GREY} == {"c"}


def test_a_cell_of_the_transfer_matrix_is_filled_by_the_side_of_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [[interval(0.002, 0.001), interval(5.0, 9.0)], [interval(-0.6, 0.1), interval(9.0)]]
    arguments = ["a", "b"], {"x": 3, "y": 1}, cells
    (axis,) = drawn("transfer", tmp_path, *arguments, monkeypatch=monkeypatch)
    fills = [to_hex(patch.get_facecolor()) for patch in axis.patches]
    assert fills == [figures.GOOD, "#ffffff", figures.HARM, figures.GOOD]
    assert axis.texts[2].get_text() == "-0.600\n[-0.700, -0.500]"


def test_chance_is_the_exact_law_within_layers() -> None:
    """Two sets with 3 and 2 of 5 neurons in a layer share 1.2 on average, 0 to 2."""
    found = report.chance(np.array([[3, 2], [0, 4]]), 5)
    assert found == pytest.approx({"value": 1.2, "low": 0, "high": 2})


def test_of_more_behaviours_than_a_figure_has_room_for_the_page_has_tables(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "many")
    monkeypatch.chdir(tmp_path / "many")
    monkeypatch.setattr(report, "FEW", 1)
    report.run(load())
    drawn = {path.stem for path in Path("outputs/report").glob("*.svg")}
    assert drawn >= {"forest-rude", "layers-bias"}
    assert not drawn & {"answer", "transfer", "overlap", "correlations", "stability"}
    text = Path("outputs/report/report.html").read_text()
    assert all(name in text for name in load().behaviours)
