"""Report: the result table, the figures and the claims table, from the metrics files alone."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from sparc3.base.artifacts import (
    metrics_path,
    stability_path,
    sweep_path,
)
from sparc3.base.files import read_csv, read_json, write_text
from sparc3.base.params import Params
from sparc3.circuits.overlap import joined
from sparc3.reporting.published import claims_table
from sparc3.reporting.tables import (
    FOLDER,
    TABLE,
    cells,
    first_split,
    result_table,
    transfer_matrix,
)


def draw(params: Params, table: list[dict[str, Any]]) -> list[Path]:
    """All figures; returns their paths."""
    from sparc3.reporting import figures  # matplotlib takes a second to import

    overlap = read_json(metrics_path("overlap"))
    behaviours = list(params.behaviours)
    paths = {
        name: FOLDER / f"{name}.png"
        for name in (
            "bars",
            "pareto",
            "transfer",
            "venn",
            "overlaps",
            "correlations",
            "layers",
            "stability",
        )
    }
    figures.bars(
        paths["bars"],
        table,
        {
            "reduction": "reduction on held-out prompts, %",
            "in_sample_reduction": "reduction in sample, %",
            "ppl_delta": "perplexity change, %",
        },
    )
    figures.layer_distribution(paths["layers"], overlap["layers"])
    curves = {
        behaviour: {
            method: [
                {key: float(row[key]) for key in ("prompts", "overlap")}
                for row in read_csv(stability_path(behaviour))
                if row["method"] == method
            ]
            for method, spec in params.methods.items()
            if spec.score != "random"
        }
        for behaviour in behaviours
    }
    figures.rank_stability(paths["stability"], curves, list(params.methods))
    sweeps = {name: read_csv(sweep_path(name)) for name in behaviours}
    titles = {
        "completions": ("nll_shift", "rise of NLL, nats"),
        "pairs": ("margin", "preference margin, nats"),
    }
    figures.pareto(
        paths["pareto"],
        sweeps,
        {n: titles[b.measure] for n, b in params.behaviours.items()},
        list(params.methods),
    )
    if len(behaviours) > 1:
        figures.pairwise_overlap(paths["overlaps"], overlap["overlaps"])
        matrix = np.eye(len(behaviours))
        for i, a in enumerate(behaviours):
            for j, b in enumerate(behaviours[i + 1 :], start=i + 1):
                matrix[i, j] = matrix[j, i] = overlap["correlations"][joined((a, b))]["pearson"]
        figures.heat_map(
            paths["correlations"],
            matrix,
            behaviours,
            behaviours,
            "Correlation of differentials",
            limit=1,
        )
    if len(behaviours) in (2, 3):
        figures.venn(paths["venn"], overlap["regions"], behaviours)
    if first_split(params) == "test":
        columns, values, labels = transfer_matrix(params)
        figures.heat_map(
            paths["transfer"],
            values,
            behaviours,
            columns,
            "Pruned for (row), measured on (column)",
            labels=labels,
        )
    return [path for path in paths.values() if path.exists()]


def run(params: Params) -> dict[str, float]:
    table = cells(params)
    results = result_table(params, table)
    figures = draw(params, table)
    page = [
        "# Results\n\n",
        results,
        "\n## Published numbers\n\n",
        claims_table(params, table),
        "\n## Figures\n\n",
        *(f"![{path.stem}]({path.name})\n" for path in figures),
    ]
    write_text(FOLDER / "report.md", "".join(page))
    write_text(TABLE, results)
    return {
        f"{row['behaviour']}.{row['method']}.{key}": row["differences"][key]["value"]
        for row in table
        for key in ("reduction", "ppl_delta")
        if key in row["differences"] and math.isfinite(row["differences"][key]["value"])
    }
