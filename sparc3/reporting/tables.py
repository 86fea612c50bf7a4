"""Tables of results, from the metrics files alone.

Cells are enumerated from params, never globbed, so that nothing left over from an earlier run can
slip into a table.
"""

from typing import Any

import numpy as np

from sparc3.base.artifacts import METRICS, OUTPUTS, circuit_names, circuit_path, metrics_path
from sparc3.base.files import markdown, read_json
from sparc3.base.params import Behaviour, Params
from sparc3.measure import inference

FOLDER = OUTPUTS / "report"
TABLE = METRICS / "table.md"
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
            table.append(row | {"gap": gate["gap"], "drawn": drawn})
    tested = [row["differences"].get("reduction", {}) for row in table]
    tested = [difference for difference in tested if "p" in difference]
    for difference, p in zip(
        tested, inference.holm([difference["p"] for difference in tested]), strict=True
    ):
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
    found = row["differences"].get("reduction")
    if found is None:
        return "not measured"
    if "p_holm" not in found:
        return "control"
    if found["moved"] < inference.MIN_CLUSTERS:
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
        f"differential {interval(row['gap'])} %"
    )


def first_split(params: Params) -> str:
    """Held-out prompts where there are any, else those that the circuit was chosen on."""
    return "test" if params.prepare.splits["test"] > 0 else "in_sample"


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


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
