"""Report: the page, the result table and the figures, from metrics and outputs alone."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from sparc3.base.artifacts import (
    circuit_names,
    circuit_path,
    metrics_path,
    stability_path,
    sweep_path,
)
from sparc3.base.files import Array, read_csv, read_json, write_json, write_text
from sparc3.base.params import Params
from sparc3.circuits.circuit import read_circuit
from sparc3.circuits.methods import BAN, is_control
from sparc3.circuits.overlap import FEW, layer_counts, layered_log_distribution
from sparc3.measure.instruments import primary_of
from sparc3.reporting import page, tables
from sparc3.reporting.published import PAGE, claim_table
from sparc3.reporting.summary import SUMMARY, short, summary
from sparc3.reporting.tables import FOLDER, TABLE, cells, first_split, result_table

log = logging.getLogger(__name__)
SHARE = "less of the behaviour, % of complete removal"
COST = "perplexity change, worst text, %\n(left is better)"


def forest_rows(params: Params, rows: list[dict[str, Any]]) -> list[Any]:
    """One behaviour's cells as rows of forest plots, its own method first, controls last."""
    from sparc3.reporting import figures

    spec = params.behaviours[rows[0]["behaviour"]]
    primary, swept = primary_of(spec), tables.swept(spec)
    cell = next(value for value in swept.values if value.name == swept.cell)
    found = []
    for row in rows:
        changes, cost = row["differences"], row["differences"]["ppl_worst"]
        shown = {COST: cost}
        if primary and row["change"]:
            value, title = primary[1], tables.fall(primary[1])
            shown |= {SHARE: row["share"], title: tables.oriented(value, row["change"])}
            if row["against"]:
                beyond = f"{title},\nbeyond random neurons"
                shown[beyond] = tables.oriented(value, row["against"])
        if cell.name in changes:
            shown[tables.fall(cell)] = tables.oriented(cell, changes[cell.name])
        said = tables.verdict(params, row)
        found.append(
            figures.Row(
                row["method"],
                shown,
                own=row["method"] == spec.method,
                lost=f"{cost['value']:+.0f} %" if cost["value"] > figures.DESTROYED else "",
                notes=(
                    f"{tables.interval(row.get('share'), 0)} %",
                    f"{tables.interval(cost)} % {row['worst']}",
                    said,
                ),
                detectable={SHARE: row["mde"]} if "would have been" in said else {},
            )
        )
    families = {row["method"]: row["family"] == tables.CONTROL for row in rows}
    return sorted(found, key=lambda r: (not r.own, families[r.method]))


def draw_behaviour(
    params: Params, behaviour: str, rows: list[Any], looks: dict[str, Any], folder: Path
) -> None:
    """All methods against the control, the sweep, every prompt, and the layers."""
    from sparc3.reporting import figures

    spec = params.behaviours[behaviour]
    titles = list(dict.fromkeys(t for r in rows for t in r.found if t not in (SHARE, COST)))
    titles, budget = [*titles, COST], (COST, params.select.budget.perplexity)
    figures.forests(folder / f"forest-{behaviour}", rows, titles, budget, looks)
    points = read_csv(sweep_path(behaviour))
    if points:
        chosen = {}
        for method in dict.fromkeys(row["method"] for row in points[1:]):
            first = circuit_names(method, params.methods[method])[0]
            about = read_json(circuit_path(behaviour, first).with_suffix(".json"))
            chosen[method] = about["num_neurons"], about["protect"]
        blocks = params.prompt_sets[spec.prompts].blocks
        axis = "" if blocks else tables.swept(spec).axis
        path = folder / f"dose-{behaviour}"
        figures.dose(path, points, chosen, axis, params.select.budget.perplexity, looks)
    title, levels = page.prompt_levels(params, behaviour)
    control = circuit_names(params.evaluate.control, params.methods[params.evaluate.control])[0]
    drawn = {spec.method: spec.method, control: params.evaluate.control}
    panels = {
        label: np.column_stack([levels["none"], levels[name]])
        for name, label in drawn.items()
        if name in levels
    }
    if spec.method in panels:
        figures.prompts(folder / f"prompts-{behaviour}", title, panels, looks)
    path = circuit_path(behaviour, spec.method)
    about, circuit = read_json(path.with_suffix(".json")), read_circuit(path)
    counts = layer_counts(circuit.layers, about["layers"], 1).tolist()
    look = looks[spec.method]
    figures.layers(folder / f"layers-{behaviour}", spec.method, counts, look)


def draw_faithfulness(params: Params, behaviour: str, looks: dict[str, Any], folder: Path) -> None:
    """A score is drawn as the first method that ranks by it."""
    from sparc3.reporting import figures

    found = read_json(metrics_path("faithfulness", behaviour))
    if "agreement" not in found:
        return
    by_score = {m.score: looks[name] for name, m in reversed(params.methods.items())}
    titles = (
        "Spearman's correlation with\nthe effect of each neuron alone",
        "high scores' effect - low scores'",
    )
    rows, depths = [], {}
    for name, parts in tables.most_faithful(found):
        shown = {titles[0]: parts["all"]["spearman"], titles[1]: found["area"][name]}
        rows.append(figures.Row(name, shown))
        depths[name] = {part: parts[part]["spearman"]["value"] for part in tables.THIRDS}
    drawn = {name: by_score.get(name, looks[name]) for name in found["agreement"]}
    figures.faithfulness(folder / f"faithfulness-{behaviour}", rows, titles, depths, drawn)


def draw_between(params: Params, looks: dict[str, Any], folder: Path) -> None:
    """What compares behaviours: transfer, overlap, correlations; and how stable circuits are."""
    from sparc3.reporting import figures

    overlap, behaviours = read_json(metrics_path("overlap")), list(params.behaviours)
    if first_split(params) == "test":
        columns, effects = tables.transfer_matrix(params)
        rows = [f"{name}\n({spec.method})" for name, spec in params.behaviours.items()]
        figures.transfer(folder / "transfer", rows, columns, effects)
    if len(behaviours) > 1:
        own = circuit_path(behaviours[0], params.behaviours[behaviours[0]].method)
        width = read_json(own.with_suffix(".json"))["width"]
        shared = {}
        for names, row in overlap["overlaps"].items():
            if len(behaviours) > 3 and len(row["names"]) > 2:  # there are hundreds
                continue
            counts = np.column_stack([overlap["layers"][name] for name in row["names"]])
            shared[names] = row["observed"], chance(counts, width)
        settings = params.overlap
        title = f"the {settings.num_neurons} first of {settings.method}, not those removed"
        figures.overlap(folder / "overlap", overlap["regions"], behaviours, shared, title)
        corrected = overlap.get("corrected", {}).get("correlations", {})
        nulls = overlap.get("nulls", {})  # of too many behaviours there are none
        apart = nulls.get("disjoint_references", {}).get("disjoint", {})
        rows = {
            names: (corrected.get(names), row["pearson"], apart.get(names, {}).get("correlation"))
            for names, row in overlap["correlations"].items()
        }
        figures.correlations(folder / "correlations", rows)
    curves = {name: read_csv(stability_path(name)) for name in behaviours}
    figures.stability(folder / "stability", curves, looks)


def chance(counts: Array, width: int) -> dict[str, float]:
    """Mean overlap of draws within layers, `counts` (layer, set), and the range of 95 % of them."""
    law = np.exp(layered_log_distribution(counts, width))
    low, high = np.searchsorted(law.cumsum(), (0.025, 0.975)).tolist()
    return {"value": float(law @ np.arange(law.size)), "low": low, "high": high}


def draw(params: Params, table: list[dict[str, Any]], folder: Path) -> None:
    """All figures, those of a behaviour under NAME-BEHAVIOUR."""
    from sparc3.reporting import figures  # matplotlib takes a second to import

    controls = {name: is_control(method) for name, method in params.methods.items()}
    names = {**controls, **dict.fromkeys(params.steer.interventions, False), BAN: True}
    for behaviour in params.behaviours:
        found = read_json(metrics_path("faithfulness", behaviour)).get("agreement", {})
        names |= {name: False for name in found if name not in names}
    looks = figures.looks(names)
    panels, bands = {}, {}
    for behaviour in params.behaviours:
        cells_of = [row for row in table if row["behaviour"] == behaviour]
        rows = forest_rows(params, cells_of)
        draw_behaviour(params, behaviour, rows, looks, folder)
        draw_faithfulness(params, behaviour, looks, folder)
        there = [r for r in rows if SHARE in r.found and r.method != params.evaluate.control]
        # In the order of params, whatever was found; the behaviour's forest has all of them.
        judged = [
            *[r for r in there if not names[r.method]][: page.MOST],
            *[r for r in there if names[r.method] and not r.lost],
        ]
        if judged:
            heading = f"{behaviour}: unpruned {page.level(params, behaviour)}"
            groups = [row["change"]["n"] for row in cells_of if "n" in (row["change"] or {})]
            heading += f", {groups[0]} groups" if groups else ""
            panels[heading] = judged
            drawn = [r for r in rows if SHARE in r.found and r.method == params.evaluate.control]
            ends = [(r.found[SHARE]["low"], r.found[SHARE]["high"]) for r in drawn]
            bands[heading] = ends[0] if ends else None
    if len(params.behaviours) > FEW:  # tables have room for them, figures do not
        return
    if panels:
        figures.answer(folder / "answer", SHARE, panels, bands, looks)
    draw_between(params, looks, folder)


def run(params: Params) -> dict[str, float]:
    table = cells(params)
    results = result_table(params, table)
    for left in FOLDER.glob("*.*"):  # by an earlier run, whose figures are not all drawn again
        left.unlink()
    draw(params, table, FOLDER)
    write_text(FOLDER / "report.html", page.page(params, table, FOLDER))
    write_text(FOLDER / "table.tex", page.latex(params, table))
    answers, claims = page.sentences(params, table), claim_table(params, table)
    text = [
        "# Results\n\n",
        *(f"- **{a['behaviour']}: {a['verdict']}.** {a['numbers']}\n" for a in answers),
        "\n![The answer](answer.svg)\n" if (FOLDER / "answer.svg").is_file() else "",
        "\nEverything else is in [report.html](report.html).\n\n",
        f"{results}\n## Published numbers\n\n{claims}",
    ]
    write_text(FOLDER / "report.md", "".join(text))
    write_text(TABLE, results)
    write_text(PAGE, claims)
    found = summary(params, table)
    write_json(SUMMARY, found)
    own = (f"{r['behaviour']} {short(r['verdict'])}" for r in found["methods"] if r["own"])
    log.info("report: %s (%s)", "; ".join(own), FOLDER)
    return {
        f"{row['behaviour']}.{row['method']}.{key}": row["differences"][key]["value"]
        for row in table
        for key in ("reduction", "ppl_delta")
        if key in row["differences"] and math.isfinite(row["differences"][key]["value"])
    }
