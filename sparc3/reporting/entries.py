"""What MLflow shows of the table's cells: columns, metrics and descriptions of the comparison."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparc3.base.artifacts import prompts_path
from sparc3.base.comparison import Entry
from sparc3.base.files import markdown
from sparc3.base.params import Params
from sparc3.base.runs import Dataset
from sparc3.reporting.page import side_by_side
from sparc3.reporting.tables import CONFIRMATORY, interval, number, verdict


def datasets(params: Params, behaviour: str) -> list[Dataset]:
    """The prompts of a behaviour, those that it is set off against, and general texts."""
    spec = params.behaviours[behaviour]
    uses = {spec.prompts: "behaviour", spec.reference: "reference"}
    if spec.second:
        uses[spec.second] = "second opinion"
    uses |= {text: "perplexity" for text in params.evaluate.general if text not in uses}
    return [Dataset(prompts_path(name), use) for name, use in uses.items()]


def row_entry(params: Params, cell: dict[str, Any]) -> Entry:
    """A behaviour under a method."""
    behaviour, method, neurons = cell["behaviour"], cell["method"], cell["num_neurons"]
    columns = _columns(params, cell)
    return Entry(
        name=f"{behaviour}, {method}" + (f", {neurons:,} neurons" if neurons else ""),
        metrics=_finite(
            {
                **_ends("reduction", cell.get("share")),
                **_ends("perplexity", cell["differences"]["ppl_worst"]),
                **_ends("differential", cell["gap"]),
                "p": cell.get("p"),
                "detectable_reduction": cell.get("mde"),
                "degenerate": cell["degenerate"],
                "neurons": neurons,
            }
        ),
        tags={**_source(params), **columns, "family": cell["family"]},
        note=f"**{columns['verdict']}**\n\n{_table([columns], [cell])}",
        figure=f"forest-{behaviour}.svg",
        artifacts=[cell["circuit"]] if cell["circuit"] else [],
        stages=[f"{word}@{behaviour}" for word in ("gate", "select", "evaluate")],
        datasets=datasets(params, behaviour),
    )


def completions(
    params: Params, cell: dict[str, Any]
) -> tuple[str, list[str], list[list[Any]]] | None:
    """A row's table: of the behaviour's own method, what the report shows of completions."""
    if cell["family"] != CONFIRMATORY:
        return None
    names, lines = side_by_side(params, cell["behaviour"])
    if not lines:
        return None
    columns = ["prompt", *(column for name in names for column in (name, f"{name}: score"))]
    rows = [[line["prompt"], *(part for pair in line["by"] for part in pair)] for line in lines]
    return "completions.json", columns, rows


def whole_entry(params: Params, cells: Sequence[dict[str, Any]], files: Sequence[Path]) -> Entry:
    """The pipeline's state: what the behaviours' own methods do."""
    own = [cell for cell in cells if cell["family"] == CONFIRMATORY]
    columns = [_columns(params, cell) for cell in own]
    said = [f"{c['behaviour']} by {c['method']}: {c['verdict']}" for c in columns]
    metrics: dict[str, float | None] = {}
    for cell in own:
        metrics |= _ends(f"{cell['behaviour']}/reduction", cell.get("share"))
        metrics[f"{cell['behaviour']}/perplexity"] = cell["differences"]["ppl_worst"]["value"]
    origin = _source(params)
    return Entry(
        name=origin["model"] if params.profile is None else origin["profile"],
        metrics=_finite(metrics),
        tags={**origin, "verdict": "; ".join(said)},
        note="\n".join([*(f"- **{line}**" for line in said), "", _table(columns, own)]),
        figure="answer.svg",
        artifacts=files,
    )


def _source(params: Params) -> dict[str, str]:
    return {"profile": params.profile or "default", "model": Path(params.model.path).name}


def _columns(params: Params, cell: dict[str, Any]) -> dict[str, str]:
    """What the runs table shows of a row; the reduction in percent of complete removal."""
    cost = cell["differences"]["ppl_worst"]
    return {
        "behaviour": cell["behaviour"],
        "method": cell["method"],
        "verdict": verdict(params, cell),
        "reduction": _percent(cell.get("share")),
        "perplexity": f"{_percent(cost)} {cell['worst']}",
        "differential": _percent(cell["gap"]),
        "neurons": f"{cell['num_neurons']:,}",
    }


def _table(rows: Sequence[Mapping[str, str]], cells: Sequence[Mapping[str, Any]]) -> str:
    """The columns but the verdict, which stands above, and p; MLflow sets cells without a gap."""
    names = [name for name in rows[0] if name != "verdict"]
    lines = [
        [*(row[name] for name in names), number(cell.get("p"), 2)]
        for row, cell in zip(rows, cells, strict=True)
    ]
    return markdown([*names, "p"], [[f"{text}&emsp;" for text in line] for line in lines])


def _percent(difference: dict[str, float] | None) -> str:
    return "-" if difference is None else f"{interval(difference)} %"


def _ends(name: str, difference: Mapping[str, float] | None) -> dict[str, float | None]:
    if difference is None:
        return {}
    return {name: difference["value"], **{f"{name}_{e}": difference[e] for e in ("low", "high")}}


def _finite(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: v for name, v in metrics.items() if v is not None and math.isfinite(v)}
