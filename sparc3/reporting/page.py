"""The page: report.html, from metrics, outputs and the figures beside it; and its main table."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from sparc3.base.artifacts import (
    circuit_names,
    evaluation_folder,
    metrics_path,
    prompts_path,
    sweep_path,
)
from sparc3.base.files import Array, digest, read_csv, read_json, read_jsonl, read_text
from sparc3.base.params import Params, private_of
from sparc3.base.products import MODEL, manifest_path
from sparc3.measure.instruments import instruments_of, primary_of
from sparc3.reporting import tables
from sparc3.reporting.published import claim_rows
from sparc3.reporting.tables import FOLDER, first_split, interval, number

TEMPLATE = Path(__file__).with_name("page.html.jinja")
COSTS = "<p>What every stage cost, and its commit: in this page's copy with MLflow's runs.</p>"
MOST = 7  # methods of a behaviour in the main figure
SIDE_BY_SIDE = 20  # prompts whose completions are shown
RUNS = "http://127.0.0.1:5000/#/experiments/0/runs?searchFilter="  # `make ui` of this checkout
Table = tuple[list[str], list[list[str]]]


def level(params: Params, behaviour: str) -> str:
    """How much of a behaviour the unpruned model has, in words."""
    primary, split = primary_of(params.behaviours[behaviour]), first_split(params)
    if primary is None:
        return ""
    levels = read_json(metrics_path("evaluate", behaviour))["baseline"]
    name, form = instruments_of(params.behaviours[behaviour])[primary[0]].headline[0]
    return form.format(levels[f"{split}_{name}"])


def prompt_levels(params: Params, behaviour: str) -> tuple[str, dict[str, Array]]:
    """Title, and what every prompt gave under each circuit: the score that the verdict is of, or
    the preference for the stereotype.
    """
    primary = primary_of(params.behaviours[behaviour])
    if primary is None:
        return "", {}
    value, found = primary[1], dict[str, list[float]]()
    for row in read_csv(evaluation_folder(behaviour) / "prompts.csv"):
        if row["split"] == first_split(params):
            if row.get(value.column):
                found.setdefault(row["circuit"], []).append(float(row[value.column]))
            elif row.get("stereotype") and row.get("anti"):
                margin = float(row["stereotype"]) - float(row["anti"])
                found.setdefault(row["circuit"], []).append(margin)
    title = value.title.removeprefix("fall of ")
    if "%" in title:
        title = value.column.replace("_mean", " score")
    return title, {name: np.array(values) for name, values in found.items()}


def own_rows(params: Params, table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells of the behaviours' own methods."""
    return [row for row in table if row["method"] == params.behaviours[row["behaviour"]].method]


def sentences(params: Params, table: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The answer, a sentence for every behaviour's own method: the verdict, and its numbers."""
    found = []
    for row in own_rows(params, table):
        about = read_json(row["circuit"].with_suffix(".json"))
        cost = row["differences"]["ppl_worst"]
        numbers = (
            f"Removing {row['num_neurons']} of {about['layers'] * about['width']:,} neurons "
            f"({row['method']}) {taken(row.get('share'))} (unpruned: "
            f"{level(params, row['behaviour'])}) and changes perplexity by {interval(cost)} %, on "
            f"{row['worst']}, the kind of text where that is worst."
        )
        verdict = tables.verdict(params, row)
        found.append({"behaviour": row["behaviour"], "verdict": verdict, "numbers": numbers})
    return found


def taken(share: Mapping[str, float] | None) -> str:
    if share is None:
        return "was not measured on it"
    value, low, high = (f"{share[end]:.0f}" for end in ("value", "low", "high"))
    return f"takes {value} % [{low}, {high}] of it away"


def main_table(params: Params, table: list[dict[str, Any]]) -> Table:
    """A line for every behaviour and method whose behaviour was measured, own methods first."""
    header = ["behaviour", "method", "neurons", "removed, %", "perplexity, %", "p", "verdict"]
    own = {id(row) for row in own_rows(params, table)}
    order = {name: n for n, name in enumerate(params.behaviours)}
    rows = [row for row in table if row["change"]]
    rows.sort(key=lambda row: (order[row["behaviour"]], id(row) not in own))
    return header, [
        [
            *(row["behaviour"], row["method"], str(row["num_neurons"])),
            interval(row["share"], 0),
            f"{interval(row['differences']['ppl_worst'])} {row['worst']}",
            number(row.get("p"), 2),
            tables.verdict(params, row),
        ]
        for row in rows
    ]


def latex(params: Params, table: list[dict[str, Any]]) -> str:
    """The main table for LaTeX with booktabs."""
    header, rows = main_table(params, table)

    def line(cells: list[str]) -> str:
        return " & ".join(map(escaped, cells)) + r" \\"

    body = []
    for before, row in zip([None, *rows], rows, strict=False):
        if before and before[0] != row[0]:
            body.append(r"\midrule")
        body.append(line(row))
    lines = [r"\begin{tabular}{llrrlrp{6cm}}", r"\toprule", line(header), r"\midrule", *body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def escaped(text: str) -> str:
    """Text for LaTeX: what it would take for commands stands for itself, and minus is no hyphen."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {char: f"\\{char}" for char in "&%$#_{}"}
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", "".join(special.get(char, char) for char in text))


def side_by_side(params: Params, behaviour: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The first completion of the first prompts, not chosen: by the unpruned model, without the
    circuit, and without as many random neurons. Nothing of private prompts.
    """
    if private_of(params, behaviour):
        return [], []
    spec, control = params.behaviours[behaviour], params.evaluate.control
    random = circuit_names(control, params.methods[control])[0]
    models = {"none": "unpruned", spec.method: f"without {spec.method}'s neurons"}
    models |= {random: "without random neurons"}
    texts = {row["id"]: row["text"] for row in read_jsonl(prompts_path(spec.prompts))}
    found: dict[str, dict[str, Any]] = {}
    for row in read_jsonl(evaluation_folder(behaviour) / "completions.jsonl"):
        if (row["split"], row["completion"]) == (first_split(params), 0):
            found.setdefault(row["prompt"], {})[row["circuit"]] = row
    shown = [name for name in models if any(name in by for by in found.values())]
    scorer = spec.scorers[0] if spec.scorers else ""
    lines = [
        {"prompt": texts[prompt], "by": [(by[n]["text"], by[n].get(scorer)) for n in shown]}
        for prompt, by in list(found.items())[:SIDE_BY_SIDE]
    ]
    return [models[name] for name in shown], lines


def source(word: str, value: str | None = None) -> dict[str, str]:
    """The metrics of a stage, and by which filter MLflow finds the run that wrote them."""
    path, name = metrics_path(word, value), f"{word}@{value}" if value else word
    return {"file": str(path), "run": name, "filter": f"tags.`sparc3.product` = '{digest(path)}'"}


def made_from(params: Params) -> list[tuple[str, str]]:
    """(what, sha256) of the model and of the prompts that evaluations read."""
    found: dict[str, str] = {}
    for behaviour in params.behaviours:
        read = json.loads(manifest_path("evaluate", behaviour).read_text("utf-8"))["read"]
        names = {name for name in read if name.startswith(str(prompts_path("x").parent))}
        found |= {name: read[name] for name in sorted({*names, *({MODEL} & read.keys())})}
    return sorted(found.items())


def behaviour_part(
    params: Params, name: str, rows: list[dict[str, Any]], figure: Any
) -> dict[str, Any]:
    """What the page says of one behaviour."""
    folder = evaluation_folder(name)
    return {
        "name": name,
        "spec": params.behaviours[name],
        "headline": tables.headline(params, name, rows[0]),
        "table": tables.behaviour_table(params, name, rows),
        "figures": {
            kind: figure(f"{kind}-{name}")
            for kind in ("forest", "dose", "prompts", "layers", "faithfulness")
        },
        "completions": side_by_side(params, name),
        "neurons": read_json(folder / "neurons.json"),
        "groups": tables.group_table(params, name),
        "faithfulness": tables.faithfulness_table(name),
        "folder": folder,
        "sweep": sweep_path(name),
        "source": source("evaluate", name),
    }


def with_costs(costs: Sequence[Sequence[str]]) -> tuple[str, str]:
    """Name and text of the page, with what each stage's run cost: name, commit, seconds, MB. Only
    MLflow has it so, for equal results make equal files.
    """
    header = ["run", "commit", "seconds", "peak memory, MB"]
    total = sum(float(row[2]) for row in costs if row[2] != "-")
    rows = [*costs, ["all", "", f"{total:.0f}", ""]]
    text, file = "", FOLDER / "report.html"
    for tag, cells in (("th", header), *(("td", row) for row in rows)):
        text += "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"
    before, found, after = read_text(file).partition(COSTS)
    assert found
    return file.name, f"{before}<table>{text}</table>{after}"


def page(params: Params, table: list[dict[str, Any]], folder: Path) -> str:
    """The page, whole; `folder` has the figures. What texts hold is shown, never obeyed."""

    def figure(name: str) -> Markup | None:
        path = folder / f"{name}.svg"
        if not path.is_file():
            return None
        _, _, drawn = path.read_text("utf-8").partition("<svg")
        width = drawn.partition('viewBox="0 0 ')[2].split()[0]
        return Markup(f'<svg style="width: {width}pt"{drawn}')  # as drawn; and text of ours

    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    by_name = {name: [r for r in table if r["behaviour"] == name] for name in params.behaviours}
    words = [(row, tables.verdict(params, row)) for row in table if row["family"] != tables.CONTROL]
    shown = asdict(params)
    settings = {name: shown[name] for name in ("behaviours", "methods", "prompt_sets", "test_sets")}
    return environment.get_template(TEMPLATE.name).render(
        params=params,
        sentences=sentences(params, table),
        main=main_table(params, table),
        figure=figure,
        most=MOST,
        source=source,
        parts=[behaviour_part(params, n, rows, figure) for n, rows in by_name.items()],
        claims=claim_rows(params, table),
        unshown=[(r, said) for r, said in words if not said.startswith(("reduced", "increased"))],
        made_from=made_from(params),
        settings=yaml.safe_dump(settings, sort_keys=False),
        held_out=first_split(params) == "test",
        costs=Markup(COSTS),  # text of ours
        runs=RUNS,
    )
