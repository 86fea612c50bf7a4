"""Figures of the report, drawn from tables and metrics that exist already; PNG files."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib_venn import venn2, venn3

from sparc3.base.files import replacing
from sparc3.circuits.overlap import MARK, joined, subsets

COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666", "#882255"),
    *("#999933", "#332288", "#88ccee", "#44aa99", "#000000", "#aa4499", "#ddcc77", "#117733"),
    *("#661100", "#6699cc"),
)
ENDS = ("value", "low", "high")
WIDE = 10.0  # percent of perplexity, beyond which a linear axis hides what is small


def coloured(methods: Sequence[str]) -> dict[str, str]:
    """A colour for each method, the same in every figure of a run."""
    return {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(methods)}


@contextmanager
def drawing(
    path: Path, columns: int = 1, size: tuple[float, float] = (5, 4)
) -> Iterator[tuple[Figure, list[Any]]]:
    """A figure and its axes, side by side, `size` inches each; saved when the block succeeds."""
    shape = size[0] * columns, size[1]
    figure, axes = plt.subplots(1, columns, figsize=shape, layout="constrained", squeeze=False)
    try:
        yield figure, list(axes[0])
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=130, format="png", metadata={"Software": None})
    finally:
        plt.close(figure)


def bars(path: Path, cells: Sequence[Mapping[str, Any]], quantities: Mapping[str, str]) -> None:
    """One panel per quantity (key -> title): a bar with its interval per behaviour and method."""
    behaviours = list(dict.fromkeys(c["behaviour"] for c in cells))
    methods = list(dict.fromkeys(c["method"] for c in cells))
    colours, width = coloured(methods), 0.8 / len(methods)
    with drawing(path, columns=len(quantities), size=(5.5, 4.5)) as (figure, axes):
        for axis, (key, title) in zip(axes, quantities.items(), strict=True):
            for m, method in enumerate(methods):
                shown = [c for c in cells if c["method"] == method and key in c["differences"]]
                at = np.array([behaviours.index(c["behaviour"]) for c in shown])
                at = at + (m - (len(methods) - 1) / 2) * width
                found = [c["differences"][key] for c in shown]
                value, low, high = (np.array([f[end] for f in found]) for end in ENDS)
                reach = np.maximum([value - low, high - value], 0)
                axis.bar(at, value, width, color=colours[method], label=method)
                axis.errorbar(at, value, reach, fmt="none", ecolor="black", capsize=2, lw=1)
            axis.axhline(0, color="black", lw=0.8)
            axis.set_xticks(range(len(behaviours)), behaviours)
            axis.set_xlim(-0.5, len(behaviours) - 0.5)
            axis.set_title(title)
            if key == "ppl_delta":  # a control may destroy the model and hide all others
                axis.set_yscale("symlog", linthresh=10)
        handles, labels = axes[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)


def venn(path: Path, regions: Mapping[str, int], behaviours: Sequence[str]) -> None:
    """Two- or three-way Venn diagram of circuits; `regions` counts by `joined` names."""
    sizes = {
        "".join("1" if name in names else "0" for name in behaviours): regions[joined(names)]
        for names in subsets(behaviours, 1)
    }
    with drawing(path) as (_, (axis,)):
        diagram = {2: venn2, 3: venn3}[len(behaviours)]
        diagram(sizes, behaviours, ax=axis)
        axis.set_title("Neurons of the circuits")


def heat_map(
    path: Path,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    labels: Sequence[Sequence[str]] | None = None,
    limit: float | None = None,
) -> None:
    """A matrix (row, column) with its numbers, or `labels`, written in; colours centred on 0."""
    reach = limit or float(np.nanmax(np.abs(values), initial=1e-9))
    with drawing(path, size=(2 + 1.4 * len(columns), 1.5 + 0.8 * len(rows))) as (figure, (axis,)):
        image = axis.imshow(values, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            text = labels[i][j] if labels else f"{value:.2f}"
            colour = "white" if abs(value) > 0.6 * reach else "black"
            axis.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows)
        axis.set_title(title)
        figure.colorbar(image, ax=axis)


def layer_distribution(path: Path, layers: Mapping[str, Sequence[int]]) -> None:
    """Pruned neurons per layer, a line per behaviour."""
    colours = coloured(list(layers))
    with drawing(path, size=(7, 3.5)) as (_, (axis,)):
        for name, counts in layers.items():
            axis.step(range(len(counts)), counts, where="mid", label=name, color=colours[name])
        axis.set_xlabel("layer")
        axis.set_ylabel("pruned neurons")
        axis.legend()


def pairwise_overlap(path: Path, overlaps: Mapping[str, Mapping[str, Any]]) -> None:
    """Observed overlaps beside what uniform draws and draws within layers would give."""
    labels = {
        "observed": "observed",
        "layered_expected": "expected within layers",
        "expected": "expected, uniform",
    }
    at = np.arange(len(overlaps))
    with drawing(path, size=(2 + 1.5 * len(overlaps), 4)) as (_, (axis,)):
        for n, (key, label) in enumerate(labels.items()):
            heights = [row[key] for row in overlaps.values()]
            axis.bar(at + (n - 1) * 0.27, heights, 0.27, label=label, color=COLOURS[n])
        axis.set_xticks(at, [names.replace(MARK, "\n") for names in overlaps])
        axis.set_ylabel("neurons")
        axis.legend(fontsize=8)


def pareto(
    path: Path,
    sweeps: Mapping[str, Sequence[Mapping[str, str]]],
    objectives: Mapping[str, str],
    methods: Sequence[str],
) -> None:
    """Objective (larger is less of the behaviour), titled by `objectives`, against perplexity: a
    panel per behaviour, a curve per method and protection. `methods`: all of the run's.
    """
    colours = coloured(methods)
    with drawing(path, columns=len(sweeps), size=(5.5, 4.5)) as (figure, axes):
        for axis, (behaviour, rows) in zip(axes, sweeps.items(), strict=True):
            swept = [r for r in rows if r["method"] != "none"]
            shares = sorted({float(r["protect"]) for r in swept})
            for method, share in product(dict.fromkeys(r["method"] for r in swept), shares):
                points = [r for r in swept if (r["method"], float(r["protect"])) == (method, share)]
                x, y = ([float(r[key]) for r in points] for key in ("ppl_delta", "objective"))
                look = {"marker": "os^Dv"[shares.index(share) % 5], "color": colours[method]}
                label = method if len(shares) == 1 else f"{method}, protect {share:g}"
                axis.plot(x, y, ms=4, lw=1, label=label, **look)
            for row in rows:
                if row["method"] == "none":
                    axis.axhline(float(row["objective"]), color="black", lw=0.8)
            if max((abs(float(r["ppl_delta"])) for r in rows), default=0) > WIDE:
                axis.set_xscale("symlog", linthresh=1)
            axis.set_xlabel("perplexity change, %")
            axis.set_ylabel(objectives[behaviour])
            axis.set_title(behaviour)
        drawn = {line.get_label(): line for axis in axes for line in axis.lines[:-1]}
        figure.legend(drawn.values(), drawn.keys(), loc="outside right center")


def rank_stability(
    path: Path, curves: Mapping[str, Sequence[Mapping[str, str]]], methods: Sequence[str]
) -> None:
    """Share of a circuit found again, by prompts: a panel per behaviour, a curve per method."""
    colours = coloured(methods)
    with drawing(path, columns=len(curves), size=(5.5, 4.5)) as (figure, axes):
        for axis, (behaviour, rows) in zip(axes, curves.items(), strict=True):
            for name in methods:
                points = [r for r in rows if r["method"] == name]
                if points:
                    x, y = ([float(r[key]) for r in points] for key in ("prompts", "overlap"))
                    axis.plot(x, y, marker="o", ms=3, label=name, color=colours[name])
            axis.set_xlabel("prompts")
            axis.set_ylim(0, 1)
            axis.set_title(behaviour)
        axes[0].set_ylabel("share of the circuit found again")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
