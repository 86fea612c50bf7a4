"""Tables of results, from the metrics files alone.

Cells are enumerated from params, never globbed, so that nothing left over from an earlier run can
slip into a table.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from sparc3.base.artifacts import METRICS, OUTPUTS, circuit_names, circuit_path, metrics_path
from sparc3.base.files import markdown, read_json
from sparc3.base.params import Behaviour, Params
from sparc3.measure import inference
from sparc3.measure.instrument import Instrument
from sparc3.measure.instruments import instruments_of

FOLDER = OUTPUTS / "report"
TABLE = METRICS / "table.md"
PREFIXES = {  # of a circuit's differences, by where they were measured
    "test": "",
    "in_sample": "in_sample_",
    "against_control": "against_control_",
    "second": "second_",
}
BROKEN = 5.0  # points that the share of degenerate completions may rise by


def first_split(params: Params) -> str:
    """Held-out prompts where there are any, else those that the circuit was chosen on."""
    return "test" if params.prepare.splits["test"] > 0 else "in_sample"


def swept(spec: Behaviour) -> Instrument:
    """The instrument that sweep and transfer read."""
    return next(each for each in instruments_of(spec).values() if each.swept)


def cell(params: Params, behaviour: str, method: str, results: dict[str, Any]) -> dict[str, Any]:
    """One (behaviour, method): every difference it reports, by name.

    A method with several draws is summarised by the mean over draws, with their range as low and
    high and no p-value: the draws are the distribution that the others are held against.
    """
    names, split = circuit_names(method, params.methods[method]), first_split(params)
    circuits, completions = [results["circuits"][name] for name in names], results["completions"]
    broken = [
        completions[name][split]["degenerate_percent"]
        for name in ("none", *names)
        if split in completions.get(name, {})
    ]
    differences: dict[str, Any] = {"ppl_delta": summary([c["ppl_delta"] for c in circuits])}
    for part, prefix in PREFIXES.items():
        for name in circuits[0].get(part, {}):
            if name != "values":
                differences[prefix + name] = summary([c[part][name] for c in circuits])
    before = {name: results["baseline"].get(f"{split}_{name}") for name in differences}
    degenerate = float(np.mean(broken[1:])) if broken[1:] else None
    return {
        "behaviour": behaviour,
        "method": method,
        "draws": len(circuits),
        "num_neurons": circuits[0]["num_neurons"],
        "differences": differences,
        "degenerate": degenerate,
        "broken": degenerate is not None and degenerate > broken[0] + BROKEN,
        "overshot": any(
            overshot(value.even, before[value.name], differences[value.name]["value"])
            for instrument in instruments_of(params.behaviours[behaviour]).values()
            for value in instrument.values
            if value.even is not None and before.get(value.name) is not None
        ),
        "circuit": circuit_path(behaviour, names[0]),
    }


def overshot(even: float, before: float, change: float) -> bool:
    """Whether a level ends up at least as far from the even one as it was before."""
    return abs(before + change - even) >= abs(before - even)


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
            table.append(row | {"gap": gate["gap"], "drawn": drawn})
    tested = [row["differences"].get("reduction", {}) for row in table]
    tested = [difference for difference in tested if "p" in difference]
    adjusted = inference.holm([difference["p"] for difference in tested])
    for difference, p in zip(tested, adjusted, strict=True):
        difference["p_holm"] = p
        difference["mde_holm"] = inference.mde_of_family(
            difference["mde"], int(difference["n"]), len(tested)
        )
    return table


def verdict(row: dict[str, Any]) -> str:
    """What the held-out reduction shows, in words.

    "reduced" takes a control of equal size: the interval against the mean of its draws lies above
    0, and no draw reduces as much. The interval alone has nothing of the spread between draws.
    """
    reduction = row["differences"].get("reduction")
    if reduction is None:
        return "not measured"
    if "p_holm" not in reduction:
        return "control"
    if reduction["moved"] < inference.MIN_CLUSTERS:
        return f"not shown; {reduction['moved']} of {reduction['n']} groups changed at all"
    if reduction["p_holm"] >= 0.05:
        return f"not shown; {reduction['mde_holm']:.0f} % would have been"
    if reduction["value"] < 0:
        return "increased"
    if row["broken"]:
        return "degenerate"
    if row["overshot"]:
        return "overshot"
    control = row["differences"].get("against_control_reduction")
    if control is None:
        return "reduced; no control of its size"
    if control["low"] <= 0 or reduction["value"] <= max(row["drawn"]):
        return "reduced, not beyond the control"
    return f"reduced, beyond each of {len(row['drawn'])} random draws"


def interval(difference: dict[str, float] | None, digits: int = 1, gap: str = " ") -> str:
    """`-3.2 [-5.0, -1.4]`, or a dash where nothing was measured."""
    if difference is None:
        return "-"
    value, low, high = (f"{difference[k]:+.{digits}f}" for k in ("value", "low", "high"))
    return f"{value}{gap}[{low}, {high}]"


def number(value: float | None, digits: int = 4) -> str:
    """A number of so many significant digits, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}g}"


def result_table(params: Params, table: list[dict[str, Any]]) -> str:
    """The table that `make repro` prints and README shows."""
    text = [
        "Held-out prompts" if first_split(params) == "test" else "In sample: nothing is held out",
        "; 95 % intervals by cluster bootstrap; p by sign flips, Holm-adjusted over all rows. Rows "
        "with several draws show their mean and range.\n",
    ]
    for behaviour in params.behaviours:
        rows = [row for row in table if row["behaviour"] == behaviour]
        text.append(f"\n**{behaviour}**: {headline(params, behaviour, rows[0])}\n\n")
        text.append(behaviour_table(params, behaviour, rows))
    return "".join(text)


def behaviour_table(params: Params, behaviour: str, rows: list[dict[str, Any]]) -> str:
    """A line per method; after the columns of all behaviours those of its instruments."""
    instruments = instruments_of(params.behaviours[behaviour]).values()
    beyond = "beyond control" + (", in sample" if first_split(params) == "in_sample" else "")

    def shown(name: str, digits: int = 1) -> Callable[[dict[str, Any]], str]:
        return lambda row: interval(row["differences"].get(name), digits)

    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("method", lambda r: r["method"] + (f" ({r['draws']} draws)" if r["draws"] > 1 else "")),
        ("neurons", lambda row: str(row["num_neurons"])),
        ("perplexity %", shown("ppl_delta")),
        ("reduction %", shown("reduction")),
        (f"{beyond} %", shown("against_control_reduction")),
        ("in sample %", shown("in_sample_reduction")),
    ]
    for each in instruments:
        columns += [(v.title, shown(v.name, v.digits)) for v in each.values if v.title]
    if any(each.writes for each in instruments):
        columns.append(("degenerate %", lambda row: number(row["degenerate"], 2)))
    columns.append(
        ("p", lambda row: number(row["differences"].get("reduction", {}).get("p_holm"), 3))
    )
    columns.append(("verdict", verdict))
    cells = ([write(row) for _, write in columns] for row in rows)
    return markdown([title for title, _ in columns], cells)


def headline(params: Params, behaviour: str, row: dict[str, Any]) -> str:
    """The unpruned model's own numbers, and the gate's."""
    results, split = read_json(metrics_path("evaluate", behaviour)), first_split(params)
    levels = results["baseline"]
    shown = []
    for instrument in instruments_of(params.behaviours[behaviour]).values():
        shown += [
            form.format(levels[f"{split}_{name}"])
            for name, form in instrument.headline
            if f"{split}_{name}" in levels
        ]
        if instrument.writes:
            broken = results["completions"]["none"][split]["degenerate_percent"]
            shown.append(f"degenerate {number(broken, 2)} %")
    return (
        f"unpruned {', '.join(shown)}, perplexity {levels['perplexity']:.2f}; "
        f"relevance gap {interval(row['gap'])} %"
    )


def transfer_matrix(params: Params) -> tuple[list[str], np.ndarray, list[list[str]]]:
    """Columns, their effects divided by the column's largest, and the effects in their own units.

    Larger is less of the behaviour, and for general text more perplexity.
    """
    transfer = read_json(metrics_path("transfer"))
    columns: list[tuple[str, str, str, int, int]] = []  # title, measured, quantity, digits, sign
    for name, spec in params.behaviours.items():
        instrument = swept(spec)
        value = next(value for value in instrument.values if value.name == instrument.cell)
        title = value.title if value.less > 0 else f"fall of {value.title}"
        columns.append((f"{name}\n{title}", name, value.name, value.digits, value.less))
    for name in params.transfer.texts:
        columns.append((f"{name}\nperplexity %", name, "ppl_delta", 2, 1))
    values = np.zeros((len(params.behaviours), len(columns)))
    labels = []
    for i, pruned_for in enumerate(params.behaviours):
        labels.append([])
        for j, (_, name, quantity, digits, sign) in enumerate(columns):
            change = transfer[pruned_for][name][quantity]
            low, high = sorted(0 + sign * change[key] for key in ("low", "high"))  # no -0.0
            values[i, j] = 0 + sign * change["value"]
            effect = {"value": values[i, j], "low": low, "high": high}
            labels[i].append(interval(effect, digits, "\n"))
    scale = np.abs(values).max(axis=0)
    return [title for title, *_ in columns], values / np.where(scale > 0, scale, 1), labels
