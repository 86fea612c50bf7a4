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
from sparc3.circuits.overlap import MARK, joined

COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666"),
    *("#882255", "#999933", "#332288", "#88ccee", "#44aa99", "#000000", "#aa4499", "#ddcc77"),
    *("#117733", "#661100", "#6699cc"),
)


WIDE = 10.0  # percent of perplexity, beyond which a linear axis hides what is small


def coloured(methods: Sequence[str]) -> dict[str, str]:
    """A colour for each method, the same in every figure of a run."""
    return {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(methods)}


@contextmanager
def drawing(
    path: Path, columns: int = 1, rows: int = 1, size: tuple[float, float] = (5, 4)
) -> Iterator[tuple[Figure, Any]]:
    """A figure with rows x columns axes (an array if several), saved when the block succeeds."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows), layout="constrained"
    )
    try:
        yield figure, axes
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=130, format="png", metadata={"Software": None})
    finally:
        plt.close(figure)


def bars(path: Path, cells: Sequence[Mapping[str, Any]], quantities: Mapping[str, str]) -> None:
    """One panel per quantity (key -> title): a bar with its interval per behaviour and method."""
    behaviours = list(dict.fromkeys(c["behaviour"] for c in cells))
    methods = list(dict.fromkeys(c["method"] for c in cells))
    colours = coloured(methods)
    with drawing(path, columns=len(quantities), size=(5.5, 4.5)) as (figure, axes):
        for axis, (key, title) in zip(np.atleast_1d(axes), quantities.items(), strict=True):
            for m, method in enumerate(methods):
                found = {
                    c["behaviour"]: c["differences"][key]
                    for c in cells
                    if c["method"] == method and key in c["differences"]
                }
                at = [
                    behaviours.index(b) + (m - (len(methods) - 1) / 2) * 0.8 / len(methods)
                    for b in found
                ]
                value = np.array([d["value"] for d in found.values()])
                reach = [
                    value - np.array([d["low"] for d in found.values()]),
                    np.array([d["high"] for d in found.values()]) - value,
                ]
                axis.bar(at, value, 0.8 / len(methods), color=colours[method], label=method)
                axis.errorbar(
                    at, value, np.maximum(reach, 0), fmt="none", ecolor="black", capsize=2, lw=1
                )
            axis.axhline(0, color="black", lw=0.8)
            axis.set_xticks(range(len(behaviours)), behaviours)
            axis.set_xlim(-0.5, len(behaviours) - 0.5)
            axis.set_title(title)
            if key == "ppl_delta":  # a control may destroy the model and hide all others
                axis.set_yscale("symlog", linthresh=10)
        handles, labels = np.atleast_1d(axes)[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)


def venn(path: Path, regions: Mapping[str, int], behaviours: Sequence[str]) -> None:
    """Two- or three-way Venn diagram of circuits; `regions` counts by `joined` names."""
    with drawing(path) as (_, axis):
        if len(behaviours) == 3:
            a, b, c = behaviours
            order = ((a,), (b,), (a, b), (c,), (a, c), (b, c), (a, b, c))
            codes = zip(("100", "010", "110", "001", "101", "011", "111"), order, strict=True)
            sizes = {code: float(regions[joined(names)]) for code, names in codes}
            venn3(sizes, (a, b, c), ax=axis, subset_label_formatter="{:.0f}".format)
        else:
            a, b = behaviours
            venn2((regions[a], regions[b], regions[joined((a, b))]), (a, b), ax=axis)
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
    with drawing(path, size=(2 + 1.4 * len(columns), 1.5 + 0.8 * len(rows))) as (figure, axis):
        image = axis.imshow(values, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto")
        for i in range(len(rows)):
            for j in range(len(columns)):
                text = labels[i][j] if labels else f"{values[i, j]:.2f}"
                dark = abs(values[i, j]) > 0.6 * reach
                axis.text(
                    j,
                    i,
                    text,
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                )
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows)
        axis.set_title(title)
        figure.colorbar(image, ax=axis)


def layer_distribution(path: Path, layers: Mapping[str, Sequence[int]]) -> None:
    """Pruned neurons per layer, a line per behaviour."""
    with drawing(path, size=(7, 3.5)) as (_, axis):
        for (name, counts), colour in zip(layers.items(), COLOURS * len(layers), strict=False):
            axis.step(range(len(counts)), counts, where="mid", label=name, color=colour)
        axis.set_xlabel("layer")
        axis.set_ylabel("pruned neurons")
        axis.legend()


def pairwise_overlap(path: Path, overlaps: Mapping[str, Mapping[str, Any]]) -> None:
    """Observed overlaps beside what uniform draws and draws within layers would give."""
    names = list(overlaps)
    at = np.arange(len(names))
    with drawing(path, size=(2 + 1.5 * len(names), 4)) as (_, axis):
        for shift, (key, label) in enumerate(
            (
                ("observed", "observed"),
                ("layered_expected", "expected within layers"),
                ("expected", "expected, uniform"),
            )
        ):
            axis.bar(
                at + (shift - 1) * 0.27,
                [overlaps[n][key] for n in names],
                0.27,
                label=label,
                color=COLOURS[shift],
            )
        axis.set_xticks(at, [n.replace(MARK, "\n") for n in names])
        axis.set_ylabel("neurons")
        axis.legend(fontsize=8)


def pareto(
    path: Path,
    sweeps: Mapping[str, Sequence[Mapping[str, str]]],
    objectives: Mapping[str, str],
    methods: Sequence[str],
) -> None:
    """Objective against perplexity, a panel per behaviour and a curve per method and protection.

    `objectives` gives each behaviour's axis title; larger is less of the behaviour. `methods`: all
    of the run's.
    """
    colours = coloured(methods)
    with drawing(path, columns=len(sweeps), size=(5.5, 4.5)) as (figure, axes):
        panels = np.atleast_1d(axes)
        for axis, (behaviour, rows) in zip(panels, sweeps.items(), strict=True):
            swept = list(dict.fromkeys(r["method"] for r in rows if r["method"] != "none"))
            shares = sorted({float(r["protect"]) for r in rows if r["method"] != "none"})
            for method, (s, share) in product(swept, enumerate(shares)):
                points = [r for r in rows if r["method"] == method and float(r["protect"]) == share]
                axis.plot(
                    [float(r["ppl_delta"]) for r in points],
                    [float(r["objective"]) for r in points],
                    marker="os^Dv"[s % 5],
                    ms=4,
                    lw=1,
                    color=colours[method],
                    label=method if len(shares) == 1 else f"{method}, protect {share:g}",
                )
            for row in rows:
                if row["method"] == "none":
                    axis.axhline(float(row["objective"]), color="black", lw=0.8)
            if max((abs(float(r["ppl_delta"])) for r in rows), default=0) > WIDE:
                axis.set_xscale("symlog", linthresh=1)
            axis.set_xlabel("perplexity change, %")
            axis.set_ylabel(objectives[behaviour])
            axis.set_title(behaviour)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")


def rank_stability(
    path: Path,
    curves: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]],
    methods: Sequence[str],
) -> None:
    """How much of a circuit is found again, against the number of prompts: a panel per behaviour,
    a curve per method. `methods`: all of the run's.
    """
    colours = coloured(methods)
    with drawing(path, columns=len(curves), size=(5.5, 4.5)) as (figure, axes):
        panels = np.atleast_1d(axes)
        for axis, (behaviour, found) in zip(panels, curves.items(), strict=True):
            for name, points in found.items():
                axis.plot(
                    [p["prompts"] for p in points],
                    [p["overlap"] for p in points],
                    marker="o",
                    ms=3,
                    label=name,
                    color=colours[name],
                )
            axis.set_xlabel("prompts")
            axis.set_ylim(0, 1)
            axis.set_title(behaviour)
        panels[0].set_ylabel("share of the circuit found again")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
