"""Tables of results, from the files that the stages wrote.

Cells are enumerated from params, never globbed, so that nothing left over from an earlier run can
slip into a table.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparc3.base.artifacts import (
    METRICS,
    OUTPUTS,
    circuit_path,
    evaluation_folder,
    intervention_path,
    metrics_path,
    names_of,
)
from sparc3.base.files import markdown, read_csv, read_json
from sparc3.base.params import Behaviour, Params
from sparc3.circuits.methods import BAN, is_control
from sparc3.measure import inference
from sparc3.measure.instrument import Instrument, Value
from sparc3.measure.instruments import instruments_of, primary_of, swept_of

FOLDER = OUTPUTS / "report"
TABLE = METRICS / "table.md"
PREFIXES = {  # of a circuit's differences, by where they were measured
    "test": "",
    "in_sample": "in_sample_",
    "against_control": "against_control_",
    "against_ban": "against_ban_",
    "second": "second_",
}
CONFIRMATORY, EXPLORATORY, CONTROL = "confirmatory", "exploratory", "control"
ENDS, THIRDS = ("value", "low", "high"), ("early", "middle", "late")
ALPHA = 0.05  # of each family of tests, and of a rank among random draws
BROKEN = 5.0  # points that the share of degenerate completions may rise by


def first_split(params: Params) -> str:
    """Held-out prompts where there are any, else those that the circuit was chosen on."""
    return "test" if params.prepare.splits["test"] > 0 else "in_sample"


def swept(spec: Behaviour) -> Instrument:
    """The instrument that the sweep maximises, and the transfer matrix shows."""
    return next(iter(swept_of(spec).values()))


def cell(params: Params, behaviour: str, method: str, results: dict[str, Any]) -> dict[str, Any]:
    """One (behaviour, method): every difference it reports, by name.

    A method with several draws is summarised by the mean over draws, with their range as low and
    high and no p-value: the draws are the distribution that the others are held against. What it
    costs, on every kind of text, is the first draw's.
    """
    names = names_of(params, method)
    split = first_split(params)
    circuits, completions = [results["circuits"][name] for name in names], results["completions"]
    broken = [
        completions[name][split]["degenerate_percent"]
        for name in ("none", *names)
        if split in completions.get(name, {})
    ]
    read = next(c["texts"] for c in circuits if c["texts"])  # of draws the first reads every kind
    texts = {text: read[text] for text in params.evaluate.general if text in read}
    worst = max(texts, key=lambda text: texts[text]["value"])
    differences: dict[str, Any] = {
        "ppl_delta": summary([c["ppl_delta"] for c in circuits if "ppl_delta" in c]),
        "ppl_worst": texts[worst],
    }
    if "kl" in circuits[0]:
        differences["kl"] = circuits[0]["kl"]["mean"]
        differences["kl_95"] = circuits[0]["kl"]["percentile_95"]
    if "accuracy" in circuits[0]:
        differences["questions"] = circuits[0]["accuracy"]["all"]["accuracy"]
    for part, prefix in PREFIXES.items():
        for name in circuits[0].get(part, {}):
            if name != "values":
                there = [c[part][name] for c in circuits if name in c.get(part, {})]
                differences[prefix + name] = summary(there)
    primary = primary_of(params.behaviours[behaviour])
    change = primary[1].name if primary else ""
    degenerate = float(np.mean(broken[1:])) if broken[1:] else None
    return {
        "behaviour": behaviour,
        "method": method,
        "family": family(params, behaviour, method),
        "draws": len(circuits),
        "num_neurons": circuits[0]["num_neurons"],
        "strength": circuits[0].get("strength"),
        "differences": differences,
        "change": differences.get(change),
        "against": differences.get(f"against_control_{change}"),
        "against_ban": differences.get(f"against_ban_{change}"),
        "among": circuits[0].get("among_controls", {}),
        "worst": worst,
        "degenerate": degenerate,
        "broken": degenerate is not None and degenerate > broken[0] + BROKEN,
        "circuit": _file(params, behaviour, names[0]),
    }


def _file(params: Params, behaviour: str, name: str) -> Path | None:
    """The circuit's, or the description of an intervention, whose tensors lie beside it."""
    if name in params.steer.interventions:
        return intervention_path(behaviour, name).with_suffix(".json")
    return None if name == BAN else circuit_path(behaviour, name)


def family(params: Params, behaviour: str, method: str) -> str:
    """Which tests a method's is one of: of the behaviours' own methods, of all others, of none."""
    if method == BAN or (method in params.methods and is_control(params.methods[method])):
        return CONTROL
    return CONFIRMATORY if method == params.behaviours[behaviour].method else EXPLORATORY


def summary(differences: list[dict[str, float]]) -> dict[str, float]:
    """The difference itself, or mean and range of the differences of several draws."""
    if len(differences) == 1:
        return differences[0]
    values = [difference["value"] for difference in differences]
    return {"value": float(np.mean(values)), "low": min(values), "high": max(values)}


def overshot(even: float, before: float, change: float) -> bool:
    """Whether a level ends up at least as far from the even one as it was before."""
    return abs(before + change - even) >= abs(before - even)


def removal(value: Value, groups: Sequence[Mapping[str, str]], circuit: str) -> dict[str, Any]:
    """What a circuit's removal does to the mean that the verdict is of, from `groups.csv`.

    sign: that a change has which is less of the behaviour. left: what there is to remove, down to
    nothing or to an even level. rise: of every group, summed over its units, in percent of that.
    """
    (units, old), (_, new) = (
        np.array([(g["units"], g["mean"]) for g in groups if g["circuit"] == name], float).T
        for name in ("none", circuit)
    )
    before, after = (float(np.average(means, weights=units)) for means in (old, new))
    left = before - (value.even or 0.0)
    return {
        "sign": value.less * (1 if left >= 0 else -1),
        "overshot": value.even is not None and overshot(value.even, before, after - before),
        "left": abs(left),
        "rise": 100 * units * (old - new) / left if left else None,
        "units": units,
    }


def share(
    value: Value, groups: Sequence[Mapping[str, str]], change: Mapping[str, float]
) -> dict[str, float]:
    """A change of the value that the verdict is of, in percent of complete removal, as `removal`
    has it: of the unpruned model's level, which is taken as it was measured.
    """
    units, means = np.array(
        [(g["units"], g["mean"]) for g in groups if g["circuit"] == "none"], float
    ).T
    return in_percent(value, float(np.average(means, weights=units)), change)


def in_percent(value: Value, level: float, change: Mapping[str, float]) -> dict[str, float]:
    """A change in percent of complete removal, from the unpruned model's level."""
    left = level - (value.even or 0.0)
    factor: float = value.less  # of a change that is in percent of the level already
    if "%" not in value.title:
        factor = -100 / left if left else math.nan
    low, high = sorted(factor * change[end] for end in ("low", "high"))
    return {"value": factor * change["value"], "low": low, "high": high}


def oriented(value: Value, change: Mapping[str, float]) -> dict[str, float]:
    """A change with the sign by which more is less of the behaviour."""
    low, high = sorted(0 + value.less * change[end] for end in ("low", "high"))  # no -0.0
    return {"value": 0 + value.less * change["value"], "low": low, "high": high}


def fall(value: Value) -> str:
    """The title of an `oriented` change."""
    return value.title if value.less > 0 else f"fall of {value.title}"


def cells(params: Params) -> list[dict[str, Any]]:
    """All cells in the order of params, each family of tests judged."""
    table = []
    for behaviour, spec in params.behaviours.items():
        results = read_json(metrics_path("evaluate", behaviour))
        gate = read_json(metrics_path("gate", behaviour))
        groups = read_csv(evaluation_folder(behaviour) / "groups.csv")
        banned = [BAN] if BAN in results["circuits"] else []
        for method in (*params.methods, *params.steer.interventions, *banned):
            row = cell(params, behaviour, method, results) | {"gap": gate["gap"]}
            primary = primary_of(spec)
            if primary and row["change"] and row["family"] != CONTROL:
                row |= removal(primary[1], groups, method)
            if primary and row["change"]:
                row["share"] = share(primary[1], groups, row["change"])
            table.append(row)
    for each in (CONFIRMATORY, EXPLORATORY):
        judge([r for r in table if r["family"] == each and r["change"]], params.evaluate.resamples)
    return table


def judge(rows: Sequence[dict[str, Any]], resamples: int) -> None:
    """Add to the rows of one family Holm's p; the least p that swaps can give and the level that it
    has to reach; and the minimum detectable effect, in percent of complete removal.
    """
    level = ALPHA / max(1, len(rows))
    adjusted = inference.holm([row["change"]["p"] for row in rows])
    for row, p in zip(rows, adjusted, strict=True):
        least, rise = inference.least_p(row["change"]["moved"], resamples), row["rise"]
        mde = math.inf if rise is None else inference.detectable(rise, row["units"], level)
        row |= {"p": p, "least": least, "level": level, "mde": mde}


def verdict(params: Params, row: dict[str, Any]) -> str:
    """What the change of the primary value shows, in words, and whether it breaks the budget.

    "reduced" alone is what no control of equal size or cost refuses (`refused_by`).
    """
    words = shown(params, row)
    budget, found = params.select.budget, row["differences"]
    if words.startswith("reduced") and found["ppl_worst"]["value"] > budget.perplexity:
        words += f"; over the perplexity budget on {row['worst']}"
    if words.startswith("reduced") and budget.kl is not None and found["kl"]["value"] > budget.kl:
        words += "; over the KL budget"
    if words.startswith("reduced") and budget.accuracy is not None and "questions" in found:
        words += "; over the accuracy budget" * (-found["questions"]["value"] > budget.accuracy)
    return words


def shown(params: Params, row: dict[str, Any]) -> str:
    """The verdict without the budget."""
    change = row["change"]
    if row["family"] == CONTROL:
        return CONTROL
    if change is None:
        return "not measured"
    if row["p"] >= ALPHA:
        if row["least"] > row["level"]:
            moved = f"{change['moved']} of {change['n']} groups changed"
            return f"cannot be shown: {moved}, so p is at least {row['least']:.2g}"
        if row["mde"] > 100:
            return "not shown; even complete removal could not have been"
        return f"not shown; {row['mde']:.0f} % would have been"
    if row["sign"] * change["value"] < 0:
        return "increased"
    if row["broken"]:
        return "degenerate"
    if row["overshot"]:
        return "overshot"
    if row["against"] is None:
        return "reduced; no control of its size"
    beyond, refused = controls(params, row)
    parts = [("beyond", beyond), ("not beyond", refused)]
    return ", ".join(["reduced", *(f"{w} {' and '.join(names)}" for w, names in parts if names)])


def controls(params: Params, row: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The controls that an effect is beyond, and those that refuse it.

    Random draws of its size refuse where the interval against their mean reaches 0, where their
    number or the rank on the quantity without sampling noise leaves p above ALPHA, and where
    completions change no more than another draw's might (prediction interval). A word ban of the
    same budget refuses where the interval against it reaches 0.
    """
    spec, sign = params.behaviours[row["behaviour"]], row["sign"]
    primary, ranked = primary_of(spec), row["among"].get(swept(spec).cell)
    assert primary is not None  # the row has a change of it
    draws = row["among"][primary[1].name]
    n = ranked["n"] if ranked else draws["n"]
    writes = instruments_of(spec)[primary[0]].writes
    beyond = [
        bound(row["against"], sign) > 0,
        ranked is None or ranked["p"] <= ALPHA,
        not writes or draws["value"] > draws["most"],
    ]
    fewer = f" ({draws['n']} in completions)" if writes and draws["n"] < n else ""
    judged = {f"{n} random draws{fewer}": all(beyond)}
    if row["against_ban"] is not None:
        judged["a word ban"] = bound(row["against_ban"], sign) > 0
    return [c for c, held in judged.items() if held], [c for c, held in judged.items() if not held]


def bound(difference: Mapping[str, float], sign: int) -> float:
    """The end of an interval that is nearest to more of the behaviour."""
    return min(sign * difference["low"], sign * difference["high"])


def interval(difference: dict[str, float] | None, digits: int = 1, gap: str = " ") -> str:
    """`-3.2 [-5.0, -1.4]`, or a dash where nothing was measured."""
    if difference is None:
        return "-"
    value, low, high = (f"{difference[k]:+.{digits}f}" for k in ("value", "low", "high"))
    return f"{value}{gap}[{low}, {high}]"


def size(row: Mapping[str, Any]) -> str:
    """How many neurons, or how strong an intervention."""
    steered = row["strength"] is not None
    return f"strength {row['strength']:g}" if steered else str(row["num_neurons"])


def level(estimate: Mapping[str, float] | None) -> str:
    """`0.010 [0.009, 0.012]`, or a dash where nothing was measured."""
    if estimate is None:
        return "-"
    value, low, high = (f"{estimate[key]:.3f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def number(value: float | None, digits: int = 4) -> str:
    """A number of so many significant digits, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}g}"


def result_table(params: Params, table: list[dict[str, Any]]) -> str:
    """The table of all methods, which docs/results.md shows."""
    text = [
        "Held-out prompts" if first_split(params) == "test" else "In sample: nothing is held out",
        "; 95 % intervals by cluster bootstrap. The verdict is of the first change after "
        "perplexity; its p is by sign flips, Holm-adjusted within its family: confirmatory are the "
        "behaviours' own methods, exploratory all others; controls are not tested. Not shown: so "
        f"many percent of complete removal would have been, with {100 * inference.POWER:.0f} % "
        "power. Perplexity is of the kind of text on which it changes most for the worse; KL, from "
        "the unpruned model per token, of all kinds. Where a "
        "set has blocks, the change is that of circuits chosen without the block; neurons and "
        "perplexity are those of the circuit of all. Rows with several draws show their mean and "
        "range, of completions that of the draws which wrote them, and the first draw's cost.\n",
    ]
    for behaviour in params.behaviours:
        rows = [row for row in table if row["behaviour"] == behaviour]
        text.append(f"\n**{behaviour}**: {headline(params, behaviour, rows[0])}\n\n")
        text.append(markdown(*behaviour_table(params, behaviour, rows)))
        text.append(second_opinion(params, behaviour, rows))
    return "".join(text)


def behaviour_table(
    params: Params, behaviour: str, rows: list[dict[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Header, and a line per method; after columns of all behaviours those of its instruments."""
    instruments = instruments_of(params.behaviours[behaviour]).values()
    beyond = "beyond control" + (", in sample" if first_split(params) == "in_sample" else "")

    def difference(name: str, digits: int = 1) -> Callable[[dict[str, Any]], str]:
        return lambda row: interval(row["differences"].get(name), digits)

    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("method", lambda r: r["method"] + (f" ({r['draws']} draws)" if r["draws"] > 1 else "")),
        ("family", lambda row: row["family"]),
        ("neurons", size),
        ("perplexity %, worst text", lambda r: f"{difference('ppl_worst')(r)} {r['worst']}"),
        ("KL, nats", lambda r: level(r["differences"].get("kl"))),
        ("KL, 95th percentile", lambda r: level(r["differences"].get("kl_95"))),
        ("accuracy, points", difference("questions")),
    ]
    primary = primary_of(params.behaviours[behaviour])
    first = primary[1] if primary else None
    if first:
        columns += [
            (first.title, difference(first.name, first.digits)),
            (beyond, difference(f"against_control_{first.name}", first.digits)),
            ("beyond word ban", difference(f"against_ban_{first.name}", first.digits)),
            ("in sample", difference(f"in_sample_{first.name}", first.digits)),
        ]
    for each in instruments:
        others = (v for v in each.values if v.title and (first is None or v.name != first.name))
        columns += [(v.title, difference(v.name, v.digits)) for v in others]
    if any(each.writes for each in instruments):
        columns.append(("degenerate %", lambda row: number(row["degenerate"], 2)))
    columns += [
        ("p", lambda row: number(row.get("p"), 3)),
        ("verdict", lambda row: verdict(params, row)),
    ]
    every = [[write(row) for _, write in columns] for row in rows]
    used = [at for at in range(len(columns)) if any(line[at] != "-" for line in every)]
    return [columns[at][0] for at in used], [[line[at] for at in used] for line in every]


def confirm_table(params: Params, record: Mapping[str, Any]) -> str:
    """What the sealed sets gave, from metrics/confirm.json: a line for each method."""
    lines, own = [], []
    for behaviour, found in record["behaviours"].items():
        spec, primary = params.behaviours[behaviour], primary_of(params.behaviours[behaviour])
        assert primary is not None  # of a behaviour with sealed prompts
        value = primary[1]
        for method in dict.fromkeys(row["method"] for row in found["circuits"].values()):
            row = cell(params, behaviour, method, {**found, "completions": {}})
            differences, change = row["differences"], row["change"]
            if change is None:
                continue
            ranked = row["among"].get(swept(spec).cell)
            line = [
                *(behaviour, method + (f" ({row['draws']} draws)" if row["draws"] > 1 else "")),
                number(differences[value.name].get("n"), 6),
                f"{interval(change, value.digits)} {value.title}",
                interval(differences.get(f"against_control_{value.name}"), value.digits),
                number(ranked and ranked["p"], 2),
                interval(differences.get(f"against_ban_{value.name}"), value.digits),
                interval(differences.get(f"in_sample_{value.name}"), value.digits),
                f"{interval(differences['ppl_worst'])} {row['worst']}",
                "-",
                "-" if row["family"] == CONTROL else number(change.get("p"), 3),
            ]
            if method == spec.method:
                line[-2] = f"{found['kl']['mean']:.4f} ({found['kl']['percentile_95']:.4f})"
                own.append((line, change["p"]))
            lines.append(line)
    for (line, _), p in zip(own, inference.holm([p for _, p in own]), strict=True):
        line[-1] = f"{p:.3g} (Holm)"
    header = [
        *("behaviour", "method", "groups", "change", "beyond random draws", "rank p"),
        *("beyond word ban", "this exact list", "perplexity %", "KL, nats (95th percentile)", "p"),
    ]
    return (
        f"Release {record['release']}, commit {record['commit'][:12]}, {record['date']}.\n\n"
        f"{markdown(header, lines)}"
    )


def second_opinion(params: Params, behaviour: str, rows: list[dict[str, Any]]) -> str:
    """A line on items of another data set: the unpruned model's margin, and its change without the
    circuit of the behaviour's own method.
    """
    spec = params.behaviours[behaviour]
    row = next(row for row in rows if row["method"] == spec.method)
    if spec.second is None or "second_margin" not in row["differences"]:
        return ""
    before = read_json(metrics_path("evaluate", behaviour))["circuits"][spec.method]["second"]
    changes = ", ".join(
        f"{name} {interval(row['differences'][f'second_{key}'], digits)}"
        for name, key, digits in (("margin", "margin", 3), ("SS", "ss", 1))
    )
    levels = before["values"]
    return (
        f"\nSecond opinion, {spec.second}: unpruned margin {levels['margin']:.3f} nats, "
        f"SS {levels['ss']:.1f}; without the neurons of {spec.method}: {changes} "
        f"({row['differences']['second_margin']['n']} groups).\n"
    )


def group_table(params: Params, behaviour: str) -> tuple[list[str], list[list[str]]] | None:
    """What every group gives, without and with pruning by the behaviour's own method, most reduced
    first; of values that have an even level, whose groups have names.
    """
    own, primary = params.behaviours[behaviour].method, primary_of(params.behaviours[behaviour])
    groups = read_csv(evaluation_folder(behaviour) / "groups.csv")
    if primary is None or primary[1].even is None:
        return None
    means = {(g["circuit"], g["group"]): float(g["mean"]) for g in groups}
    names = [g["group"] for g in groups if g["circuit"] == "none"]
    lines = [[n, means["none", n], means[own, n], means[own, n] - means["none", n]] for n in names]
    lines.sort(key=lambda line: line[3])
    title = primary[1].title
    header = ["group", f"{title}, unpruned", f"without the neurons of {own}", "change"]
    return header, [[str(name), *(f"{v:+.3f}" for v in values)] for name, *values in lines]


def unpruned(params: Params, behaviour: str, results: dict[str, Any]) -> list[str]:
    """The unpruned model's own numbers, of what evaluate measured, the behaviour's first."""
    levels, split = results["baseline"], first_split(params)
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
    for pair, rank in results.get("scorer_agreement", {}).items():
        shown.append(f"rank correlation of the scorers {pair} {interval(rank, 2)}")
    return shown


def headline(params: Params, behaviour: str, row: dict[str, Any]) -> str:
    """The unpruned model's own numbers, and the gate's."""
    results = read_json(metrics_path("evaluate", behaviour))
    return (
        f"unpruned {', '.join(unpruned(params, behaviour, results))}, "
        f"perplexity {results['baseline']['perplexity']:.2f}; "
        f"relevance gap {interval(row['gap'])} %"
    )


def transfer_matrix(params: Params) -> tuple[dict[str, int], list[list[dict[str, float]]]]:
    """Titles of the columns with their digits, and a row of effects for every behaviour's own
    circuit: more is less of the behaviour measured, or of general text's perplexity.
    """
    transfer = read_json(metrics_path("transfer"))
    columns: dict[str, tuple[str, Value]] = {}  # what was measured, and which value of it
    for name, spec in params.behaviours.items():
        instrument = swept(spec)
        value = next(value for value in instrument.values if value.name == instrument.cell)
        columns[f"{name}\n{fall(value)}"] = name, value
    cost = Value("ppl_delta", lambda *_: None, "perplexity, %", digits=2, less=-1)
    columns |= {f"{name}\n{fall(cost)}": (name, cost) for name in params.transfer.texts}
    rows = [
        [oriented(value, transfer[pruned][name][value.name]) for name, value in columns.values()]
        for pruned in params.behaviours
    ]
    return {title: value.digits for title, (_, value) in columns.items()}, rows


def most_faithful(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Scores and their agreement with true effects, of the metrics; the most faithful first."""
    agreement = found.get("agreement", {})
    return sorted(agreement.items(), key=lambda item: -item[1]["all"]["spearman"]["value"])


def faithfulness_table(behaviour: str) -> tuple[list[str], list[list[str]]]:
    """A line for every score: how far it agrees with true effects; without prompts none."""
    found = read_json(metrics_path("faithfulness", behaviour))
    header = ["score", "Spearman", "Pearson", "early", "middle", "late", "same sign, %"]
    header += ["precision of the top tenth, %", "high scores' effect - low scores'"]
    lines = []
    for name, parts in most_faithful(found):
        whole = parts["all"]
        shares = [{k: 100 * whole[key][k] for k in ENDS} for key in ("sign", "precision")]
        lines.append(
            [
                name,
                interval(whole["spearman"], 2),
                interval(whole["pearson"], 2),
                *(f"{parts[part]['spearman']['value']:.2f}" for part in THIRDS),
                *(interval(share, 0) for share in shares),
                interval(found["area"][name], 2),
            ]
        )
    return header, lines
