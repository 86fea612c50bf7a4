"""Report: the result table, the figures and the claims table, from the metrics files alone.

Cells are enumerated from params, never globbed, so that nothing left over from an earlier run can
slip into a table.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparc3 import statistics
from sparc3.artifacts import (
    METRICS,
    OUTPUTS,
    circuit_names,
    circuit_path,
    evaluation_folder,
    metrics_path,
    stability_path,
    sweep_path,
)
from sparc3.claims import claims
from sparc3.errors import InputError
from sparc3.files import markdown, read_csv, read_json, read_text, write_text
from sparc3.params import Behaviour, Params

FOLDER = OUTPUTS / "report"
TABLE = METRICS / "table.md"
IN_README = {  # its blocks, and the tables that they show
    "results": TABLE,
    "full": Path("profiles/results/smollm2-135m-full/table.md"),  # of a run by that profile
}
BROKEN = 5.0  # points that the share of degenerate completions may rise by


def cell(params: Params, behaviour: str, method: str, results: dict[str, Any]) -> dict[str, Any]:
    """One (behaviour, method): every difference it reports, by name.

    A method with several draws is summarised by the mean over draws, with their range as low and
    high and no p-value: the draws are the distribution that the others are held against.
    """
    circuits = [results["circuits"][name] for name in circuit_names(method, params.methods[method])]
    sources = {
        "": [c.get("test", {}) for c in circuits],
        "in_sample_": [c.get("in_sample", {}) for c in circuits],
        "against_control_": [c.get("against_control", {}) for c in circuits],
        "second_": [c.get("second", {}) for c in circuits],
    }
    split, completions = first_split(params), results["completions"]
    broken = [
        completions[name][split]["degenerate_percent"]
        for name in circuit_names(method, params.methods[method])
        if split in completions.get(name, {})
    ]
    found: dict[str, Any] = {"ppl_delta": summary([c["ppl_delta"] for c in circuits])}
    for prefix, parts in sources.items():
        for name in parts[0]:
            if name != "values":
                found[prefix + name] = summary([part[name] for part in parts])
    return {
        "behaviour": behaviour,
        "method": method,
        "draws": len(circuits),
        "num_neurons": circuits[0]["num_neurons"],
        "differences": found,
        "degenerate": float(np.mean(broken)) if broken else None,
        "baseline": {
            "ss": results["baseline"].get(f"{split}_ss"),
            "degenerate": completions.get("none", {}).get(split, {}).get("degenerate_percent"),
        },
        "circuit": circuit_path(behaviour, circuit_names(method, params.methods[method])[0]),
    }


def summary(differences: list[dict[str, float]]) -> dict[str, float]:
    """The difference itself, or mean and range of the differences of several draws."""
    if len(differences) == 1:
        return differences[0]
    values = [difference["value"] for difference in differences]
    return {"value": float(np.mean(values)), "low": min(values), "high": max(values)}


def cells(params: Params) -> list[dict[str, Any]]:
    """All cells in the order of params, with Holm's p over the reductions that are shown."""
    control = params.evaluate.control
    controls = circuit_names(control, params.methods[control])
    table = []
    for behaviour in params.behaviours:
        results = read_json(metrics_path("evaluate", behaviour))
        gate = read_json(metrics_path("gate", behaviour))
        draws = [results["circuits"][name].get(first_split(params), {}) for name in controls]
        drawn = [draw["reduction"]["value"] for draw in draws if "reduction" in draw]
        for method in params.methods:
            row = cell(params, behaviour, method, results)
            table.append(row | {"differential": gate["differential"], "drawn": drawn})
    tested = [row["differences"].get("reduction", {}) for row in table]
    tested = [difference for difference in tested if "p" in difference]
    for difference, p in zip(
        tested, statistics.holm([difference["p"] for difference in tested]), strict=True
    ):
        difference["p_holm"] = p
        difference["mde_holm"] = statistics.mde_of_family(
            difference["mde"], int(difference["n"]), len(tested)
        )
    return table


def verdict(row: dict[str, Any]) -> str:
    """What the held-out reduction shows, in words.

    "reduced" takes a control of equal size: the interval against the mean of its draws lies above
    0, and no draw reduces as much. The interval alone has nothing of the spread between draws.
    """
    found = row["differences"].get("reduction")
    if found is None:
        return "not measured"
    if "p_holm" not in found:
        return "control"
    if found["moved"] < statistics.MIN_CLUSTERS:
        return f"not shown; {found['moved']} of {found['n']} groups changed at all"
    if found["p_holm"] >= 0.05:
        return f"not shown; {found['mde_holm']:.0f} % would have been"
    if found["value"] < 0:
        return "increased"
    if row["degenerate"] is not None and row["degenerate"] > row["baseline"]["degenerate"] + BROKEN:
        return "degenerate"
    ss, change = row["baseline"]["ss"], row["differences"].get("ss")
    if ss is not None and change is not None and abs(ss + change["value"] - 50) >= abs(ss - 50):
        return "overshot"
    control = row["differences"].get("against_control_reduction")
    if control is None:
        return "reduced; no control of its size"
    if control["low"] <= 0 or found["value"] <= max(row["drawn"]):
        return "reduced, not beyond the control"
    return f"reduced, beyond each of {len(row['drawn'])} random draws"


def interval(difference: dict[str, float] | None, digits: int = 1) -> str:
    """`-3.2 [-5.0, -1.4]`, or a dash where nothing was measured."""
    if difference is None:
        return "-"
    value, low, high = (f"{difference[k]:+.{digits}f}" for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def result_table(params: Params, table: list[dict[str, Any]]) -> str:
    """The table that `make repro` prints and README shows."""
    held_out = first_split(params) == "test"
    text = [
        "Held-out prompts" if held_out else "In sample: nothing is held out",
        "; 95 % intervals by cluster bootstrap; p by sign flips, Holm-adjusted over all rows. Rows "
        "with several draws show their mean and range.\n",
    ]
    for behaviour, spec in params.behaviours.items():
        results = read_json(metrics_path("evaluate", behaviour))
        rows = [row for row in table if row["behaviour"] == behaviour]
        text.append(f"\n**{behaviour}**: {headline(params, spec, results, rows[0])}\n\n")
        own = (
            [("nll_shift", "NLL shift, nats", 3), ("emt", "EMT", 3)]
            if spec.measure == "completions"
            else [("ss", "SS", 1), ("lms", "LMS", 1), ("icat", "ICAT", 1)]
        )
        header = [
            "method",
            "neurons",
            "perplexity %",
            "reduction %",
            "beyond control %" if held_out else "beyond control, in sample %",
            "in sample %",
            *(title for _, title, _ in own),
            *(["degenerate %"] if spec.measure == "completions" else []),
            "p",
            "verdict",
        ]
        lines = []
        for row in rows:
            found = row["differences"]
            p = found.get("reduction", {}).get("p_holm")
            draws = f" ({row['draws']} draws)" if row["draws"] > 1 else ""
            lines.append(
                [
                    row["method"] + draws,
                    str(row["num_neurons"]),
                    interval(found["ppl_delta"]),
                    interval(found.get("reduction")),
                    interval(found.get("against_control_reduction")),
                    interval(found.get("in_sample_reduction")),
                    *(interval(found.get(key), digits) for key, _, digits in own),
                    *([number(row["degenerate"], 2)] if spec.measure == "completions" else []),
                    "-" if p is None else f"{p:.3g}",
                    verdict(row),
                ]
            )
        text.append(markdown(header, lines))
    return "".join(text)


def headline(params: Params, spec: Behaviour, results: dict[str, Any], row: dict[str, Any]) -> str:
    """The unpruned model's own numbers, and the gate's."""
    values = results["baseline"]
    split = first_split(params)
    if spec.measure == "completions":
        name = f"{split}_{spec.scorers[0]}"
        own = (
            f"mean {spec.scorers[0]} score {values[name]:.3f}, EMT {values[f'{name}_emt']:.3f}, "
            f"degenerate {number(row['baseline']['degenerate'], 2)} %"
        )
    else:
        own = ", ".join(
            f"{key.upper()} {values[f'{split}_{key}']:.1f}"
            for key in ("ss", "lms", "icat")
            if f"{split}_{key}" in values
        )
    return (
        f"unpruned {own}, perplexity {values['perplexity']:.2f}; "
        f"differential {interval(row['differential'])} %"
    )


def first_split(params: Params) -> str:
    """Held-out prompts where there are any, else those that the circuit was chosen on."""
    return "test" if params.prepare.splits["test"] > 0 else "in_sample"


def measured(params: Params, table: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What this run has to say on the published numbers, in the shape that `claims` takes."""
    overlap = read_json(metrics_path("overlap"))
    general = {**params.prompt_sets, **params.test_sets}[params.evaluate.general]
    found: dict[str, dict[str, Any]] = {
        "setup": {
            "perplexity_text": general.source.removeprefix("hub/"),
            "overlap_neurons": params.overlap.num_neurons,
        },
        "region": overlap["regions"],
        "correlation": {},
        "correlation_difference": {},
        "quadrant": {},
        "late_share": {},
    }
    for row in table:
        if row["method"] == params.report.method:
            for name, value in measured_of(params, row).items():
                found.setdefault(name, {}).update(value)
    for key, quantity in (("observed", "overlap"), ("enrichment", "enrichment")):
        found[quantity] = {name: row[key] for name, row in overlap["overlaps"].items()}
    # What was published is not corrected for noise, so the plain correlation stands beside it; that
    # two correlations differ is tested on the corrected ones.
    found["correlation"] = {k: row["pearson"] for k, row in overlap["correlations"].items()}
    if "corrected" in overlap:
        found["correlation_difference"] = overlap["corrected"]["differences"]
    counts = overlap["quadrants"].get("toxicity-gender")
    if counts is not None:
        found["quadrant"] = {k: 100 * v / sum(counts.values()) for k, v in counts.items()}
    last, layers = overlap["late_layers"], overlap["layers"].values()
    total = sum(sum(row) for row in layers)
    if total:
        late = sum(sum(row[-last:]) for row in layers)
        found["late_share"] = {"all": 100 * late / total}
    return found


def measured_of(params: Params, row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """One behaviour's part of `measured`: its cell, and the plain scores before and after."""
    name, differences = row["behaviour"], row["differences"]
    spec, split = params.behaviours[name], first_split(params)
    about = read_json(row["circuit"].with_suffix(".json"))
    perplexity = read_json(metrics_path("evaluate", name))["baseline"]["perplexity"]
    change = differences["ppl_delta"]
    found: dict[str, dict[str, Any]] = {
        "setup": {
            "layers": about["layers"],
            "width": about["width"],
            f"neurons_{name}": about["num_neurons"],
        },
        "differential": {name: row["differential"]},
        "ppl_delta": {name: change},
        "perplexity": {
            "before": perplexity,
            name: {k: perplexity * (1 + change[k] / 100) for k in ("value", "low", "high")},
        },
    }
    if spec.measure == "pairs":  # what was published are scores of completions
        return found
    prefix = "" if split == "test" else f"{split}_"
    for quantity in ("reduction", "improved"):
        if prefix + quantity in differences:
            found[quantity] = {name: differences[prefix + quantity]}
    scorer = params.scorers[spec.scorers[0]]
    modern = "modernbert" in (scorer.path or "").lower()
    found["setup"][f"scorer_{name}"] = "modernbert" if modern else scorer.kind
    prompts = read_csv(evaluation_folder(name) / "prompts.csv")
    for quantity, circuit in (("baseline", "none"), ("pruned", row["circuit"].stem)):
        rows = [r for r in prompts if (r["circuit"], r["split"]) == (circuit, split)]
        scores = [float(r[f"{spec.scorers[0]}_mean"]) for r in rows if r[f"{spec.scorers[0]}_mean"]]
        if scores:
            estimate = statistics.mean_interval(scores, [r["group"] for r in rows])
            found[quantity] = {name: estimate.as_dict()}
    return found


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def claims_table(params: Params, table: list[dict[str, Any]]) -> str:
    """Every published number beside what this run measured, and the verdict."""
    rows = []
    for claim in claims(measured(params, table)):
        here = number(claim.value)
        if claim.low is not None and claim.high is not None and claim.low != claim.high:
            here += f" [{number(claim.low)}, {number(claim.high)}]"
        rows.append(
            [
                claim.what,
                f"{claim.published:g} {claim.unit}",
                here,
                claim.verdict + (f", direction {claim.direction}" if claim.direction else ""),
                claim.reason,
            ]
        )
    return markdown(["published", "value", "here", "verdict", "because"], rows)


def draw(params: Params, table: list[dict[str, Any]]) -> list[Path]:
    """All figures; returns their paths."""
    from sparc3 import figures  # matplotlib takes a second to import

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
                matrix[i, j] = matrix[j, i] = overlap["correlations"][f"{a}-{b}"]["pearson"]
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


def transfer_matrix(params: Params) -> tuple[list[str], np.ndarray, list[list[str]]]:
    """Columns, their effects divided by the column's largest, and the effects in their own units.

    Larger is less of the behaviour, and for general text more perplexity.
    """
    transfer = read_json(metrics_path("transfer"))
    shown: dict[str, tuple[str, str, str, float]] = {
        name: ("nll_shift", f"{name}\nNLL shift", "{:+.3f}", 1)
        if spec.measure == "completions"
        else ("ss", f"{name}\nfall of SS", "{:+.1f}", -1)
        for name, spec in params.behaviours.items()
    }
    for name in params.transfer.texts:
        shown[name] = ("ppl_delta", f"{name}\nperplexity %", "{:+.2f}", 1)
    values = np.zeros((len(params.behaviours), len(shown)))
    labels = []
    for i, pruned_for in enumerate(params.behaviours):
        line = []
        for j, (name, (quantity, _, form, sign)) in enumerate(shown.items()):
            found = transfer[pruned_for][name][quantity]
            low, high = sorted(0 + sign * found[key] for key in ("low", "high"))  # no -0.0
            values[i, j] = 0 + sign * found["value"]
            line.append(f"{form.format(values[i, j])}\n[{form.format(low)}, {form.format(high)}]")
        labels.append(line)
    scale = np.abs(values).max(axis=0)
    return [row[1] for row in shown.values()], values / np.where(scale > 0, scale, 1), labels


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


def cost_table(stages: list[str], costs: dict[str, dict[str, float]]) -> str:
    """Wall time and memory of every stage, summed over its runs; `costs` by name (stage@axis)."""
    rows, total = [], 0.0
    for stage in stages:
        own = [cost for name, cost in costs.items() if name.partition("@")[0] == stage]
        seconds = sum(cost["seconds"] for cost in own)
        total += seconds
        peak = max((cost["peak_megabytes"] for cost in own), default=0.0)
        rows.append([stage, str(len(own)), f"{seconds:.0f}", f"{peak / 1000:.1f}"])
    rows.append(["all", str(sum(int(row[1]) for row in rows)), f"{total:.0f}", ""])
    return markdown(["stage", "runs", "seconds in all", "peak memory, GB"], rows)


def readme_with(readme: str, name: str, content: str) -> str:
    """README's text with the block of that name replaced."""
    start, end = f"<!-- {name}: written by `make readme` -->", f"<!-- end of {name} -->"
    head, found, rest = readme.partition(start)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise InputError(f"README.md: expected the lines {start!r} and {end!r}")
    return f"{head}{start}\n\n{content}\n{end}{tail}"


def write_readme(blocks: Mapping[str, str]) -> None:
    """Put the result tables, and `blocks` by their names, into README.md, as `make readme` does."""
    path = Path("README.md")
    text = read_text(path)
    tables = {name: read_text(table) for name, table in IN_README.items()}
    for name, content in {**tables, **blocks}.items():
        text = readme_with(text, name, content)
    write_text(path, text)
