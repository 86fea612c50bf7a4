"""Leaderboard: behaviour x method x model, effect against cost, from the metrics of runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparc3.base.files import markdown, read_json
from sparc3.base.params import Params
from sparc3.circuits.methods import BAN, is_control
from sparc3.measure.instruments import primary_of
from sparc3.relevance.scores import SCORES
from sparc3.reporting.tables import first_split, in_percent, interval, summary

PLACE, FACTOR = 4, 4  # bytes of a neuron's layer and number, and of what is left of it


class Run(NamedTuple):
    """A finished run: what the page calls it, its params, and the folder of its metrics."""

    name: str
    params: Params
    folder: Path


def shipped(run: Run, behaviour: str, method: str, circuit: Mapping[str, Any]) -> int:
    """Bytes that turn the model into the changed one: of every neuron its layer and number in 16
    bits each and, where it is not zeroed, a float32; of every banned word its token; an
    intervention's file.
    """
    if method == BAN:
        return PLACE * len(circuit["tokens"])
    if method not in run.params.methods:
        return round(read_json(run.folder / "steer" / f"{behaviour}.json")[f"{method}.bytes"])
    dampened = run.params.methods[method].scale != 0
    return circuit["num_neurons"] * (PLACE + FACTOR * dampened)


def computed(run: Run, behaviour: str, method: str) -> str:
    """What the method's score reads, of the behaviour's prompts and its reference."""
    known = run.params.methods.get(method)
    if known is None or known.score == "random":
        return "-"
    spec = run.params.behaviours[behaviour]
    tokens = sum(
        read_json(run.folder / "attribute" / f"{name}.json")["tokens"]
        for name in (spec.prompts, spec.reference)
    )
    backward = SCORES[known.score.partition("@")[0]].gradient
    return f"{tokens:,.0f} tokens, forward{' and back' if backward else ''}"


def beyond(circuits: Sequence[Mapping[str, Any]], rival: str, value: str) -> list[dict[str, float]]:
    """A value against a rival, of each of a method's draws that was set against it."""
    against = (circuit.get(f"against_{rival}", {}) for circuit in circuits)
    return [changes[value] for changes in against if value in changes]


def entries(run: Run, behaviour: str) -> list[dict[str, Any]]:
    """A row for every method whose effect on the behaviour was measured, controls last."""
    params, primary = run.params, primary_of(run.params.behaviours[behaviour])
    assert primary is not None
    value, split = primary[1], first_split(params)
    found = read_json(run.folder / "evaluate" / f"{behaviour}.json")
    level = found["baseline"].get(f"{split}_{value.name}", 0.0)
    by_method: dict[str, list[dict[str, Any]]] = {}
    for circuit in found["circuits"].values():
        if value.name in circuit[split]:
            by_method.setdefault(circuit["method"], []).append(circuit)
    rows = []
    for method, circuits in by_method.items():
        first, known = circuits[0], params.methods.get(method)
        texts = first["texts"]
        worst = max(texts, key=lambda text: texts[text]["value"])
        changes = [circuit[split][value.name] for circuit in circuits]
        rows.append(
            {
                "method": method,
                "draws": len(circuits),
                "control": method == BAN or (known is not None and is_control(known)),
                "removed": in_percent(value, level, summary(changes)),
                "beyond": {
                    rival: in_percent(value, level, summary(changes))
                    for rival in ("control", "ban")
                    if (changes := beyond(circuits, rival, value.name))
                },
                "cost": texts[worst],
                "worst": worst,
                "kl": first.get("kl", {}).get("mean"),
                "accuracy": first.get("accuracy", {}).get("all", {}).get("accuracy"),
                "neurons": first["num_neurons"],
                "bytes": shipped(run, behaviour, method, first),
                "computed": computed(run, behaviour, method),
            }
        )
    return sorted(rows, key=lambda row: (row["control"], -row["removed"]["value"]))


HEADER = [
    *("model", "method", "removed, %", "beyond random, %", "beyond word ban, %"),
    *("perplexity %, worst text", "KL, nats", "accuracy, points", "neurons", "bytes"),
    "score computed from",
]


def line(run: Run, row: Mapping[str, Any]) -> list[str]:
    many = f" ({row['draws']} draws)" if row["draws"] > 1 else ""
    return [
        run.name,
        row["method"] + many,
        interval(row["removed"], 0),
        interval(row["beyond"].get("control"), 0),
        interval(row["beyond"].get("ban"), 0),
        f"{interval(row['cost'])} {row['worst']}",
        interval(row["kl"], 3),
        interval(row["accuracy"]),
        str(row["neurons"]),
        f"{row['bytes']:,}",
        row["computed"],
    ]


def said(rows: Sequence[Mapping[str, Any]]) -> str:
    """Who wins, as far as intervals tell: of one run's methods, controls apart."""
    methods = [row for row in rows if not row["control"]]
    if not methods:
        return "no method was measured."
    best = methods[0]
    removed = f"`{best['method']}` removes most, {interval(best['removed'], 0)} %"
    if best["removed"]["low"] <= 0:
        return f"{removed}, which may be nothing: no method wins."
    lower = [r["method"] for r in methods[1:] if r["removed"]["high"] < best["removed"]["low"]]
    alike = [r["method"] for r in methods[1:] if r["method"] not in lower]
    parts = [f"{removed}."]
    if lower:
        parts.append(f"That is more than {named(lower)}: their intervals lie below.")
    if alike:
        parts.append(f"From {named(alike)} the intervals do not tell it apart.")
    cheap = [r["method"] for r in methods if not any(_beats(other, r) for other in rows)]
    if len(methods) > 1 and cheap:
        parts.append(f"Nothing removes more at less perplexity than {named(cheap, 'or')}.")
    for rival, title in (("control", "random neurons"), ("ban", "a word ban")):
        beyond = best["beyond"].get(rival)
        if beyond is not None:
            more, less = beyond["low"] > 0, beyond["high"] < 0
            tells = "More than" if more else "Less than" if less else "Not to be told from"
            parts.append(f"{tells} {title}, prompt by prompt.")
    return " ".join(parts)


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether it removes more and costs less, both as measured, whatever the intervals."""
    return (
        one["removed"]["value"] > other["removed"]["value"]
        and one["cost"]["value"] < other["cost"]["value"]
    )


def named(methods: Sequence[str], joint: str = "and") -> str:
    *most, last = (f"`{method}`" for method in methods)
    return f"{', '.join(most)} {joint} {last}" if most else last


def leaderboard(runs: Sequence[Run]) -> str:
    """For every behaviour a sentence for each run that has it, and the table of all of them."""
    behaviours = dict.fromkeys(
        name for run in runs for name, spec in run.params.behaviours.items() if primary_of(spec)
    )
    text = []
    for behaviour in behaviours:
        sentences, lines = [], []
        for run in runs:
            if behaviour in run.params.behaviours:
                rows = entries(run, behaviour)
                sentences.append(f"- {run.name}: {said(rows)}\n")
                lines += [line(run, row) for row in rows]
        used = [at for at in range(len(HEADER)) if any(row[at] != "-" for row in lines)]
        table = markdown([HEADER[at] for at in used], [[row[at] for at in used] for row in lines])
        text.append(f"## {behaviour.capitalize()}\n\n{''.join(sentences)}\n{table}\n")
    return "".join(text).rstrip("\n") + "\n"
