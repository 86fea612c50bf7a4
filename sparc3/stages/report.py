"""Report: the result table, the figures and the claims table, from the metrics files alone."""

import logging
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from sparc3.base.artifacts import metrics_path, stability_path, sweep_path
from sparc3.base.files import read_csv, read_json, write_json, write_text
from sparc3.base.params import Params
from sparc3.circuits.overlap import joined
from sparc3.reporting.published import claims_table
from sparc3.reporting.summary import SUMMARY, short, summary
from sparc3.reporting.tables import (
    FOLDER,
    TABLE,
    cells,
    first_split,
    group_lines,
    result_table,
    swept,
    transfer_matrix,
)

log = logging.getLogger(__name__)
BARS = {  # a difference of the table -> its panel's title
    "reduction": "reduction on held-out prompts, %",
    "in_sample_reduction": "reduction in sample, %",
    "ppl_delta": "perplexity change, %",
}


def draw(params: Params, table: list[dict[str, Any]]) -> list[Path]:
    """All figures; returns their paths, in the order of the page."""
    from sparc3.reporting import figures  # matplotlib takes a second to import

    overlap, behaviours = read_json(metrics_path("overlap")), list(params.behaviours)
    methods = list(params.methods)
    drawn: list[Path] = []

    def at(name: str) -> Path:
        drawn.append(FOLDER / f"{name}.png")
        return drawn[-1]

    figures.bars(at("bars"), table, BARS)
    sweeps = {name: read_csv(sweep_path(name)) for name in behaviours}
    objectives = {
        name: "neurons" if params.prompt_sets[spec.prompts].blocks else swept(spec).axis
        for name, spec in params.behaviours.items()
    }
    figures.pareto(at("pareto"), sweeps, objectives, methods)
    if first_split(params) == "test":
        columns, values, labels = transfer_matrix(params)
        title = "Pruned for (row), measured on (column)"
        figures.heat_map(at("transfer"), values, behaviours, columns, title, labels=labels)
    if len(behaviours) in (2, 3):
        figures.venn(at("venn"), overlap["regions"], behaviours)
    if len(behaviours) > 1:
        figures.pairwise_overlap(at("overlaps"), overlap["overlaps"])
        matrix = np.eye(len(behaviours))
        for (i, a), (j, b) in combinations(enumerate(behaviours), 2):
            matrix[i, j] = matrix[j, i] = overlap["correlations"][joined((a, b))]["pearson"]
        title = "Correlation of differentials"
        figures.heat_map(at("correlations"), matrix, behaviours, behaviours, title, limit=1)
    figures.layer_distribution(at("layers"), overlap["layers"])
    curves = {name: read_csv(stability_path(name)) for name in behaviours}
    figures.rank_stability(at("stability"), curves, methods)
    return drawn


def run(params: Params) -> dict[str, float]:
    table = cells(params)
    results = result_table(params, table)
    figures = draw(params, table)
    page = [
        "# Results\n\n",
        results,
        "\n## Published numbers\n\n",
        claims_table(params, table),
        "\n## Groups\n",
        *(group_lines(params, behaviour) for behaviour in params.behaviours),
        "\n## Figures\n\n",
        *(f"![{path.stem}]({path.name})\n" for path in figures),
    ]
    write_text(FOLDER / "report.md", "".join(page))
    write_text(TABLE, results)
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
