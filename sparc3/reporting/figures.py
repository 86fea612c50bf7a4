"""Figures of the report, drawn from tables and metrics that exist already: SVG and PDF of each.

Read without colour: a method has its own marker, line and hatch in every figure, and controls are
grey. Better is up, or to the right, or the axis says so. A model whose perplexity changes by more
than DESTROYED is named at the edge and does not set the scale.
"""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import blended_transform_factory
from matplotlib_venn import venn2, venn3

from sparc3.base.files import replacing
from sparc3.circuits.overlap import MARK, joined, subsets
from sparc3.circuits.stability import CANDIDATES

DESTROYED = 10.0  # percent of perplexity
GREY, DRAWS, BAND, HARM, GOOD = "#767676", "#bbbbbb", "#dddddd", "#d55e00", "#0072b2"
COLOURS = (GOOD, HARM, "#009e73", "#aa4499", "#b07d00", "#117733", "#332288", "#882255")
MARKERS, LINES, HATCHES = "osD^vPXp<>", ("-", "--", "-.", ":"), ("", "//", "..", "xx", "--")
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "sparc3",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
}
NO_DATE = {
    "svg": dict.fromkeys(("Date", "Creator", "Format", "Type")),
    "pdf": dict.fromkeys(("CreationDate", "Creator", "Producer")),
}
SIZE = re.compile(r'width="([\d.]+)pt" height="([\d.]+)pt"')
WIDEST = 860  # pixels, in which README, MLflow's descriptions and DVC's pages have room
NOTES = 0.434, 0.54, 0.707  # where text stands beside the main figure's panels, in its widths
RING = {"s": 170, "facecolors": "none", "edgecolors": "black", "linewidths": 1.3}
Interval = Mapping[str, float]  # value, low, high


class Look(NamedTuple):
    """How a method is drawn, the same in every figure of a run."""

    colour: str
    marker: str
    line: str
    hatch: str


class Row(NamedTuple):
    """One line of a forest plot. `found`: an interval for every panel that has one, by its title.

    lost: the perplexity change of a destroyed model, in words. `notes`: text at the right.
    detectable: by panel the least effect that would have been found.
    """

    method: str
    found: Mapping[str, Interval]
    own: bool = False
    lost: str = ""
    notes: Sequence[str] = ()
    detectable: Mapping[str, float] = {}


def looks(methods: Mapping[str, bool]) -> dict[str, Look]:
    """By method, in order; `methods` says of each whether it is a control."""
    found, seen = {}, {False: 0, True: 0}
    for name, control in methods.items():
        n, seen[control] = seen[control], seen[control] + 1
        colour = GREY if control else COLOURS[n % len(COLOURS)]
        marker = MARKERS[-1 - n % len(MARKERS)] if control else MARKERS[n % len(MARKERS)]
        found[name] = Look(colour, marker, LINES[n % len(LINES)], HATCHES[n % len(HATCHES)])
    return found


@contextmanager
def drawing(
    path: Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (5, 4), **options: Any
) -> Iterator[tuple[Figure, list[Any]]]:
    """A figure of `size` inches and its axes, row by row; `path`.svg and .pdf when the block
    succeeds, of the same bytes for the same numbers.
    """
    with mpl.rc_context(STYLE):
        options = {"layout": "constrained", "squeeze": False} | options
        figure, axes = plt.subplots(rows, columns, figsize=size, **options)
        try:
            yield figure, list(axes.flat)
            for kind, metadata in NO_DATE.items():
                with replacing(path.with_name(f"{path.name}.{kind}")) as temporary:
                    figure.savefig(temporary, format=kind, metadata=metadata)
                    if kind == "svg":
                        text = temporary.read_text("utf-8")
                        temporary.write_text(SIZE.sub(_fitting, text, count=1), "utf-8")
        finally:
            plt.close(figure)


def _fitting(size: re.Match[str]) -> str:
    width, height = (float(part) / 0.75 for part in size.groups())
    scale = min(1, WIDEST / width)
    return f'width="{scale * width:.0f}" height="{scale * height:.0f}"'


def point(axis: Any, at: float, found: Interval, look: Look, own: bool = True) -> None:
    """A value with its interval, on a line of a forest plot; hollow where it is not `own`."""
    style = {"color": look.colour, "lw": 2.4 if own else 1.4, "solid_capstyle": "butt"}
    axis.plot([found["low"], found["high"]], [at, at], **style, zorder=3)
    fill = look.colour if own else "white"
    style = {"ms": 8 if own else 6.5, "mfc": fill, "mec": look.colour, "mew": 1.4}
    axis.plot(found["value"], at, look.marker, **style, zorder=4)


def limits(found: Sequence[Interval], *others: float) -> tuple[float, float]:
    """Of an axis that shows all of these, 0, and some room."""
    ends = [0.0, *others, *(f[end] for f in found for end in ("low", "high"))]
    room = 0.06 * (max(ends) - min(ends) or 1)
    return min(ends) - room, max(ends) + room


def forest(
    axis: Any,
    title: str,
    rows: Sequence[Row],
    drawn: Mapping[str, Look],
    span: tuple[float, float] | None = None,
) -> None:
    """A panel, a line for each row, the first on top; beyond the scale of the models that are not
    destroyed stands an arrow.
    """
    whole = [row.found[title] for row in rows if title in row.found and not row.lost]
    left, right = span or limits(whole)
    axis.set(xlim=(left, right), ylim=(len(rows) - 0.5, -0.5), xlabel=title)
    axis.axvline(0, color="black", lw=0.8, zorder=1)
    axis.tick_params(axis="y", length=0)
    axis.set_yticks(range(len(rows)), [row.method for row in rows])
    for at, (row, tick) in enumerate(zip(rows, axis.yaxis.get_major_ticks(), strict=True)):
        colour = GREY if drawn[row.method].colour == GREY else "black"
        tick.label1.set(fontweight="bold" if row.own else "normal", color=colour)
        if title in row.found:
            point(axis, at, row.found[title], drawn[row.method], row.own)
            ends = row.found[title]["low"], row.found[title]["high"]
            for edge, over in ((left, ends[0] < left), (right, ends[1] > right)):
                if over:
                    arrow = "<" if edge == left else ">"
                    axis.plot(edge, at, arrow, color=drawn[row.method].colour, clip_on=False)
        if row.lost:
            style = {"ha": "right", "va": "bottom", "fontsize": 7.5, "color": GREY, "zorder": 5}
            axis.text(right, at - 0.12, f"destroyed: perplexity {row.lost}", **style)
        least = row.detectable.get(title, np.inf)
        if left < least < right:
            axis.plot([least, least], [at - 0.28, at + 0.28], color="black", lw=1.2, zorder=2)


def answer(
    path: Path,
    title: str,
    panels: Mapping[str, Sequence[Row]],
    bands: Mapping[str, tuple[float, float] | None],
    drawn: Mapping[str, Look],
) -> None:
    """The main figure: a forest plot for every behaviour (its heading), all on one scale; at the
    right effect, perplexity and verdict in words. `bands`: of random neurons.
    """
    every = [row.found[title] for rows in panels.values() for row in rows if not row.lost]
    span = limits(every, *(end for band in bands.values() for end in band or ()))
    heights = [len(rows) for rows in panels.values()]
    line, gap = 0.37, 0.75  # inches
    size = 12.5, line * sum(heights) + gap * len(panels) + 0.75
    ratios = {"height_ratios": heights, "hspace": gap * len(panels) / (line * sum(heights))}
    options = {"layout": None, "sharex": True, "gridspec_kw": ratios}
    with drawing(path, len(panels), size=size, **options) as (figure, axes):
        edges = {"top": 1 - gap / size[1], "bottom": 0.85 / size[1]}
        longest = max(len(row.method) for rows in panels.values() for row in rows)
        left = max(0.115, (0.3 + 0.075 * longest) / size[0])
        figure.subplots_adjust(left=left, right=0.425, **edges)
        for axis, (heading, rows) in zip(axes, panels.items(), strict=True):
            forest(axis, title, rows, drawn, span)
            if band := bands[heading]:
                axis.axvspan(*band, color=BAND, zorder=0)
            style = {"transform": blended_transform_factory(figure.transFigure, axis.transData)}
            axis.text(0.004, -0.72, heading, fontsize=10.5, fontweight="bold", **style)
            if axis is not axes[-1]:
                axis.set_xlabel("")
            for x, head in zip(
                NOTES, ("removed", "perplexity, worst text", "verdict"), strict=True
            ):
                if axis is axes[0]:
                    axis.text(x, -0.72, head, color=GREY, **style)
                for at, row in enumerate(rows):
                    weight, most = ("bold", 54) if row.own else ("normal", 64)
                    note = textwrap.fill(row.notes[NOTES.index(x)], most)
                    axis.text(x, at, note, va="center", fontsize=7.5, fontweight=weight, **style)
        marks = [
            Line2D([], [], color="black", marker="o", lw=2.4, label="the behaviour's own method"),
            Patch(color=BAND, label="range of the draws of random neurons"),
            Line2D([], [], color="black", marker="|", ms=9, lw=0, label="would have been found"),
        ]
        figure.legend(handles=marks, loc="lower left", ncols=3)
        said = "95 % intervals, each of one change alone; verdicts are adjusted for the tests made"
        figure.text(0.99, 0.02, said, ha="right", fontsize=8, color=GREY)


def forests(
    path: Path,
    rows: Sequence[Row],
    titles: Sequence[str],
    budget: tuple[str, float],
    drawn: Mapping[str, Look],
) -> None:
    """All methods of a behaviour, a panel for every title; `budget`: a panel's line, and where."""
    size = 2.2 + 2.7 * len(titles), 0.9 + 0.3 * len(rows)
    with drawing(path, columns=len(titles), size=size, sharey=True) as (_, axes):
        for axis, title in zip(axes, titles, strict=True):
            here = [row._replace(lost=row.lost if title == budget[0] else "") for row in rows]
            ends = [row.found[title] for row in rows if title in row.found and not row.lost]
            extra = (budget[1],) if title == budget[0] else ()
            forest(axis, title, here, drawn, limits(ends, *extra))
            if extra:
                axis.axvline(budget[1], color="black", lw=1, ls="--")
                axis.text(budget[1], -0.5, " budget", fontsize=7.5, va="bottom")


def dose(
    path: Path,
    points: Sequence[Mapping[str, str]],
    chosen: Mapping[str, tuple[int, float]],
    objective: str,
    budget: float,
    drawn: Mapping[str, Look],
) -> None:
    """A sweep: perplexity, upside down, and the objective, if it has one, with their standard
    errors, by the number of neurons. `chosen`: method -> (neurons, protected share) of its circuit.
    """
    none, *swept = points
    panels = {"ppl_delta": "perplexity change, % (± standard error)\n(up: cheaper)"}
    if objective:
        panels = {
            "objective": f"{objective}\n(± standard error; tune split; up: less of it)"
        } | panels
    shares = sorted({float(r["protect"]) for r in swept})
    curves: dict[tuple[str, float], list[Mapping[str, str]]] = {}
    for row in swept:
        curves.setdefault((row["method"], float(row["protect"])), []).append(row)
    size = 5.2 * len(panels), 3.4
    with drawing(path, columns=len(panels), size=size) as (figure, axes):
        for axis, (key, title) in zip(axes, panels.items(), strict=True):
            cost = key == "ppl_delta"
            for (method, share), rows in curves.items():
                look, line = drawn[method], LINES[shares.index(share) % len(LINES)]
                kept = [r for r in rows if float(r["ppl_delta"]) <= DESTROYED]
                spread = "ppl_error" if cost else "objective_error"
                x, y, error = ([float(r[k]) for r in kept] for k in ("num_neurons", key, spread))
                label = method if len(shares) == 1 else f"{method}, {share:.0%} protected"
                style = {"color": look.colour, "marker": look.marker, "ls": line, "capsize": 3}
                axis.errorbar(x, y, error, label=label, lw=1.3, **style)
                for r in kept:
                    if chosen.get(method) == (int(r["num_neurons"]), share):
                        place = float(r["num_neurons"]), float(r[key])
                        axis.scatter(*place, **RING, label="chosen", zorder=5)
            axis.axhline(float(none[key]), color=GREY, lw=0.8)
            axis.set(xscale="log", xlabel="neurons removed (log scale)", ylabel=title)
            sizes = sorted({int(r["num_neurons"]) for r in swept})
            axis.set_xticks(sizes, map(str, sizes))
            axis.minorticks_off()
            if cost:
                axis.axhline(budget, color="black", lw=1, ls="--")
                style = {"transform": axis.get_yaxis_transform(), "fontsize": 8, "va": "center"}
                axis.text(1.01, budget, f"budget {budget:g} %", **style)
                axis.invert_yaxis()
                axis.yaxis.set_major_formatter("{x:+g}")
        lost = [
            f"destroyed: {r['method']} at {r['num_neurons']}, {float(r['ppl_delta']):+,.0f} %"
            for r in swept
            if float(r["ppl_delta"]) > DESTROYED
        ]
        style = {"transform": axes[-1].transAxes, "fontsize": 7.5, "color": GREY, "va": "bottom"}
        axes[-1].text(0.02, 0.02, "\n".join(lost), **style)
        handles, labels = axes[-1].get_legend_handles_labels()
        named = dict(zip(labels, handles, strict=True))
        figure.legend(named.values(), named.keys(), loc="outside right upper")


def transfer(
    path: Path, rows: Sequence[str], columns: Mapping[str, int], cells: Sequence[Sequence[Interval]]
) -> None:
    """Pruned for (row), measured on (column, with its digits): effects, positive is better. What
    a cell is filled with means the same in every column: which side of 0 its interval lies on.
    """
    size = 1.7 + 1.55 * len(columns), 1.5 + 0.62 * len(rows)
    kinds = {"better": (GOOD, ""), "no difference shown": ("white", ""), "worse": (HARM, "///")}
    fills = {
        kind: {"facecolor": (colour, 0.35), "edgecolor": "black", "hatch": hatch}
        for kind, (colour, hatch) in kinds.items()
    }
    with drawing(path, size=size) as (figure, (axis,)):
        places = product(range(len(rows)), enumerate(columns.values()))
        for i, (j, digits) in places:
            value, low, high = (cells[i][j][end] for end in ("value", "low", "high"))
            kind = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
            axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, **fills[kind]))
            text = f"{value:+.{digits}f}\n[{low:+.{digits}f}, {high:+.{digits}f}]"
            weight = "normal" if kind == "no difference shown" else "bold"
            box = (
                {"facecolor": "white", "alpha": 0.75, "lw": 0, "pad": 1}
                if kind == "worse"
                else None
            )
            style = {"ha": "center", "va": "center", "fontsize": 8, "fontweight": weight}
            axis.text(j, i, text, bbox=box, **style)
        axis.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows)
        axis.set(xlabel="measured on (95 % intervals); + is better", ylabel="pruned for")
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        marks = [Patch(**fill, label=kind) for kind, fill in fills.items()]
        figure.legend(handles=marks, loc="outside upper center", ncols=3)


def overlap(
    path: Path,
    regions: Mapping[str, int],
    behaviours: Sequence[str],
    overlaps: Mapping[str, tuple[float, Interval]],
    title: str,
) -> None:
    """Neurons that circuits share, `title` says which: a Venn diagram, of more than three a bar for
    every region; and each overlap beside the range that 95 % of chance draws within layers have.
    """
    groups = list(subsets(behaviours, 1))
    shown = sum(map(bool, regions.values())) if len(behaviours) > 3 else 0
    size = 9.5, max(3.4, 0.22 * max(shown, len(overlaps)))
    with drawing(path, columns=2, size=size) as (_, (axis, beside)):
        if len(behaviours) <= 3:
            inside = {"".join("01"[n in group] for n in behaviours): group for group in groups}
            sizes = {key: regions[joined(group)] for key, group in inside.items()}
            diagram = {2: venn2, 3: venn3}[len(behaviours)](sizes, behaviours, ax=axis)
            for patch in filter(None, diagram.patches):
                patch.set(facecolor="#eeeeee", edgecolor="black")
        else:
            there = [group for group in groups if regions[joined(group)]]
            counts = [regions[joined(group)] for group in there]
            axis.barh(range(len(there)), counts, color=GREY)
            axis.bar_label(axis.containers[0], padding=2)
            axis.set_yticks(range(len(there)), [" & ".join(group) for group in there])
            axis.set(xlabel="neurons", ylim=(len(there) - 0.5, -0.5))
        rows = {name: (None, *both) for name, both in overlaps.items()}
        names = "observed", "", "chance within layers, 95 % and mean"
        beside_chance(beside, rows, names)
        beside.set(xlabel="shared neurons")
        axis.set_title(title, fontsize=9)


def faithfulness(
    path: Path,
    rows: Sequence[Row],
    titles: tuple[str, str],
    depths: Mapping[str, Mapping[str, float]],
    drawn: Mapping[str, Look],
) -> None:
    """Scores beside the true effects of removing neurons: forests of the two titles, and between
    them the correlation by part of depth, `depths` by score.
    """
    size = 12.5, 1.3 + 0.32 * len(rows)
    with drawing(path, columns=3, size=size) as (_, (axis, middle, beside)):
        forest(axis, titles[0], rows, drawn, (-1.05, 1.05))
        forest(beside, titles[1], rows, drawn)
        for name, values in depths.items():
            look = drawn[name]
            style = {"color": look.colour, "marker": look.marker, "ls": look.line, "lw": 1.2}
            middle.plot(list(values), list(values.values()), ms=6, mfc="white", **style)
        middle.axhline(0, color="black", lw=0.8)
        middle.set(ylim=(-1.05, 1.05), xlabel="third of depth", ylabel="Spearman's correlation")


def layers(path: Path, method: str, counts: Sequence[int], look: Look) -> None:
    """Removed neurons by layer."""
    with drawing(path, size=(7, 2.5)) as (_, (axis,)):
        style = {"edgecolor": "black", "lw": 0.6, "hatch": look.hatch, "alpha": 0.8}
        axis.bar(range(len(counts)), counts, 0.85, color=look.colour, **style)
        axis.set(xlabel="layer (0 is next to the input)", ylabel="neurons removed")
        axis.set(xlim=(-0.7, len(counts) - 0.3), title=f"{method}: {sum(counts)} neurons")
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))


def correlations(
    path: Path, rows: Mapping[str, tuple[Interval | None, float, Interval | None]]
) -> None:
    """Correlations of differentials by pair of behaviours: corrected for noise, plain, and of
    references without common text.
    """
    with drawing(path, size=(8, 1.2 + 0.45 * len(rows))) as (_, (axis,)):
        names = "plain", "corrected for noise, 95 %", "references without common text, 95 %"
        beside_chance(axis, rows, names)
        axis.set(xlim=(-1.05, 1.05), xlabel="correlation of differentials over all neurons")


def beside_chance(
    axis: Any,
    rows: Mapping[str, tuple[Interval | None, float, Interval | None]],
    names: tuple[str, str, str],
) -> None:
    """A line for each group of behaviours: an interval, a number, and what chance gives; `names` in
    the legend are of the number, the interval and chance.
    """
    for at, (found, number, chance) in enumerate(rows.values()):
        if chance:
            axis.plot(
                [chance["low"], chance["high"]], [at, at], color=DRAWS, lw=9, solid_capstyle="butt"
            )
            axis.plot(chance["value"], at, "|", color="black", ms=11)
        if found:
            point(axis, at, found, Look(GOOD, "o", "-", ""))
        axis.plot(number, at, "D", color="black", mfc="white", ms=7, zorder=5)
    axis.axvline(0, color="black", lw=0.8, zorder=0)
    axis.set_yticks(range(len(rows)), [" & ".join(group.split(MARK)) for group in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    marks = [
        Line2D([], [], color="black", mfc="white", marker="D", ms=7, lw=0, label=names[0]),
        Line2D([], [], color=GOOD, marker="o", ms=8, lw=2.4, label=names[1]),
        Line2D([], [], color=DRAWS, lw=9, label=names[2]),
    ]
    shown = [mark for mark in marks if mark.get_label()]
    axis.legend(handles=shown, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)


def stability(
    path: Path, curves: Mapping[str, Sequence[Mapping[str, str]]], drawn: Mapping[str, Look]
) -> None:
    """Share of a circuit found again, by prompts: a panel per behaviour, a curve per method, the
    range of 95 % of the resamples, and what chance would find.
    """
    size = 3.4 * len(curves) + 1.2, 3.0
    with drawing(path, columns=len(curves), size=size, sharey=True) as (figure, axes):
        for axis, (behaviour, rows) in zip(axes, curves.items(), strict=True):
            for place, (name, look) in enumerate(drawn.items()):
                x, y, low, high = (
                    np.array([float(r[k]) for r in rows if r["method"] == name])
                    for k in ("prompts", "overlap", "low", "high")
                )
                if x.size:
                    style = {"color": look.colour, "marker": look.marker, "ls": look.line}
                    ends = np.abs([y - low, high - y])
                    x += (place - len(drawn) / 2) * 0.01 * x.max()  # side by side
                    axis.errorbar(x, y, ends, ms=5, lw=1.2, elinewidth=0.7, label=name, **style)
            axis.axhline(1 / CANDIDATES, color=GREY, lw=0.8, ls=":", label="by chance")
            axis.set(xlabel="prompts", ylim=(0, 1), title=behaviour)
        axes[0].set_ylabel("share found again: mean and range of\n95 % of resamples of the prompts")
        found = [axis.get_legend_handles_labels() for axis in axes]
        handles = {label: handle for pair in found for handle, label in zip(*pair, strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside right center")


def prompts(
    path: Path, title: str, panels: Mapping[str, np.ndarray], drawn: Mapping[str, Look]
) -> None:
    """How every prompt changed by pruning (y) from what it gave unpruned (x), a panel for each
    method, (prompt, 2): unpruned and pruned. Lower is less of the behaviour.
    """
    every = np.concatenate([pairs[:, 1] - pairs[:, 0] for pairs in panels.values()])
    low, high = limits([{"low": float(every.min()), "high": float(every.max())}])
    size = 3.9 * len(panels), 3.3
    with drawing(path, columns=len(panels), size=size, sharey=True, sharex=True) as (_, axes):
        for axis, (name, pairs) in zip(axes, panels.items(), strict=True):
            x, change = pairs[:, 0], pairs[:, 1] - pairs[:, 0]
            style = {"facecolors": "none", "edgecolors": drawn[name].colour, "s": 24, "lw": 1}
            axis.scatter(x, change, marker=drawn[name].marker, **style, zorder=3)
            axis.axhspan(low, 0, color="#eeeeee", zorder=0)
            axis.axhline(0, color="black", lw=0.8)
            less, more = (change < 0).sum(), (change > 0).sum()
            axis.set(xlabel=f"{title}, unpruned", ylim=(low, high))
            axis.set_title(f"{name}: less in {less}, more in {more} of {len(x)}", fontsize=9)
        axes[0].set_ylabel("change by pruning (grey: less of it)")
