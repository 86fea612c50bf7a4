"""The summary: what pruning did, in a small file that DVC compares, and in lines for a terminal."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from sparc3.base.artifacts import METRICS
from sparc3.base.files import read_json
from sparc3.base.params import Params
from sparc3.measure.instruments import primary_of
from sparc3.reporting.tables import CONFIRMATORY, CONTROL, first_split, verdict

SUMMARY = METRICS / "summary.json"
WIDTH = 100  # columns of a line
COLOURS = {"reduced": 32, "reduced, but": 33, "increased": 31, "degenerate": 31, "overshot": 31}


def summary(params: Params, table: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What metrics/summary.json holds, from the table's cells.

    `reduction` by behaviour, of its own method, and `perplexity`, the worst of theirs, are what
    DVC shows; `methods`, a list, which it does not, has every row but the controls'.
    """
    tested = [row for row in table if row["family"] != CONTROL]
    rows = [_row(params, row) for row in sorted(tested, key=lambda r: r["family"] != CONFIRMATORY)]
    own = [row for row in rows if row["own"]]
    return {
        "reduction": {r["behaviour"]: r["reduction"]["value"] for r in own if r["reduction"]},
        "perplexity": max(row["perplexity"]["value"] for row in own),
        "methods": rows,
    }


def _row(params: Params, row: dict[str, Any]) -> dict[str, Any]:
    """One method; `reduction` is in percent of what the unpruned model has, larger is less."""
    behaviour, about = row["behaviour"], read_json(row["circuit"].with_suffix(".json"))
    primary, change, reduction = primary_of(params.behaviours[behaviour]), row["change"], None
    if primary and change and row["left"]:
        percent = primary[1].title.endswith("%")
        scale = row["sign"] * (1 if percent else 100 / row["left"])
        ends = sorted(scale * change[key] for key in ("low", "high"))
        reduction = {"value": scale * change["value"], "low": ends[0], "high": ends[1]}
    return {
        "behaviour": behaviour,
        "method": row["method"],
        "own": row["family"] == CONFIRMATORY,
        "split": first_split(params),
        "neurons": row["num_neurons"],
        "strength": row["strength"],
        "of": about["layers"] * about["width"],
        "quantity": primary[1].title.split()[0].strip(",") if primary else "",
        "reduction": reduction,
        "p": row.get("p"),
        "perplexity": {k: row["differences"]["ppl_worst"][k] for k in ("value", "low", "high")},
        "text": row["worst"],
        "kl": row["differences"].get("kl"),
        "verdict": verdict(params, row),
    }


def short(words: str) -> str:
    """A verdict's first words; "reduced, but" where a control or the budget refuses it."""
    first = words.partition(";")[0].partition(",")[0].partition(":")[0]
    refused = any(part in words for part in ("not beyond", "over the", "no control"))
    return "reduced, but" if first == "reduced" and refused else first


def lines(found: Mapping[str, Any], coloured: bool = False) -> list[str]:
    """A line for every method, verdict first, those of the behaviours themselves on top; and their
    verdicts in full.
    """
    rows = found["methods"]
    where = "on held-out prompts" if rows[0]["split"] == "test" else "in sample: nothing held out"
    head = (
        f"What pruning did, {where}; of {rows[0]['of']:,} neurons. Changes are in percent of what "
        "the unpruned model shows of a behaviour, with 95 % intervals; perplexity is that of the "
        "kind of text that pruning hurts most. The behaviours' own methods come first."
    )
    text = textwrap.wrap(head, WIDTH)
    cells = [_cells(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    own = sum(row["own"] for row in rows)
    for place, (word, *others) in enumerate(cells):
        if place in (0, own):
            text.append("")
        begin = word.ljust(widths[0])
        if coloured and word in COLOURS:
            begin = f"\033[{COLOURS[word]}m{begin}\033[0m"
        pads = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust)
        rest = [pad(cell, n) for pad, cell, n in zip(pads, others, widths[1:], strict=True)]
        text.append("  ".join([begin, *rest]))
    text.append("")
    for row in rows[:own]:
        whole = f"{row['behaviour']} ({row['quantity']}) by {row['method']}: {row['verdict']}"
        text += textwrap.wrap(whole, WIDTH, subsequent_indent="  ")
    return text


def _cells(row: Mapping[str, Any]) -> list[str]:
    change, effect = row["reduction"], "-"
    if change:
        value, low, high = (f"{round(-change[key]):+d}" for key in ("value", "high", "low"))
        effect = f"{value} % [{low}, {high}]"
    return [
        short(row["verdict"]),
        row["behaviour"],
        row["method"],
        f"strength {row['strength']:g}" if row.get("strength") else f"{row['neurons']:,} neurons",
        effect,
        f"perplexity {row['perplexity']['value']:+.1f} %",
    ]
