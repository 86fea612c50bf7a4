"""Sources by name, the keys that `where` may have for each, and how they narrow its rows. Any other
name is that of a file of one's own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from sparc3.base.errors import InputError
from sparc3.base.params import PromptSet
from sparc3.prompts import embedded, hub, own
from sparc3.prompts.hub import PIN
from sparc3.prompts.row import Row, Source, Where

SOURCES = {
    "wikipedia": Source(embedded.wikipedia),
    "news": Source(embedded.news),
    "reviews": Source(embedded.reviews),
    "questions": Source(embedded.questions),
    "real-toxicity-prompts": Source(embedded.real_toxicity_prompts, ("min_toxicity", "first")),
    "stereoset": Source(embedded.stereoset, ("bias_type", "first"), paired=True),
    "neutral-pairs": Source(embedded.neutral_pairs, ("bias_type", "first"), paired=True),
    "crows-pairs": Source(embedded.crows_pairs, ("bias_type", "first"), paired=True),
    "winobias": Source(embedded.winobias, ("first",), paired=True),
    "gender-pairs": Source(embedded.gender_pairs, paired=True),
    "sealed/real-toxicity-prompts": Source(
        partial(embedded.real_toxicity_prompts, sealed=True), ("min_toxicity",), sealed=True
    ),
    "sealed/stereoset": Source(embedded.sealed_stereoset, ("bias_type",), paired=True, sealed=True),
    **{
        name: Source(partial(embedded.answers, name=name), ("first",), choices=True)
        for name in ("piqa", "openbookqa", "commonsenseqa", "siqa")
    },
    "hub/real-toxicity-prompts": Source(
        hub.hub_real_toxicity_prompts, (*PIN, "min_toxicity", "first")
    ),
    "hub/stereoset": Source(hub.hub_stereoset, (*PIN, "bias_type", "first"), paired=True),
    "hub/wikitext-2": Source(hub.hub_wikitext_2, (*PIN, "first")),
    "hub/stereotype-elicitation": Source(
        hub.hub_stereotype_elicitation, (*PIN, "bias_type", "first")
    ),
    "hub/c4": Source(hub.hub_c4, PIN, stream=True),
}
CHOICES = tuple(name for name, source in SOURCES.items() if source.choices)
PAIRED = tuple(name for name, source in SOURCES.items() if source.paired)
STREAMS = tuple(name for name, source in SOURCES.items() if source.stream)
SEALED = tuple(name for name, source in SOURCES.items() if source.sealed)

# The values that the keys of `where` may have.
VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "path": ("a local folder, or owner/name on the hub", lambda v: isinstance(v, str) and v != ""),
    "revision": ("a commit on the hub, as text", lambda v: isinstance(v, str) and v != ""),
    "bias_type": ("text", lambda v: isinstance(v, str)),
    "label": ("text", lambda v: isinstance(v, str)),
    "first": ("a whole number of at least 1", lambda v: type(v) is int and v > 0),
    "min_toxicity": ("a number from 0 to 1", lambda v: type(v) in (int, float) and 0 <= v <= 1),
}


def source_of(spec: PromptSet) -> Source:
    """A set's source, by its name."""
    if spec.source in SOURCES:
        return SOURCES[spec.source]
    columns = spec.columns
    where = ("label", "first") if columns and columns.label else ("first",)
    return Source(lambda _: own.rows(spec), where, columns is not None and columns.pair is not None)


def narrow(key: str, rows: list[Row], where: Where) -> list[Row]:
    """The rows that fit `where`, in their order; InputError for a class that is not there."""
    classes: dict[str, Callable[[Row], str]] = {
        "bias_type": lambda row: row.stratum,
        "label": lambda row: row.label,
    }
    for name, of in classes.items():
        if name in where:
            known = sorted({of(row) for row in rows})
            if where[name] not in known:
                problem = f"{key}.where.{name} {where[name]!r} is not in the data"
                raise InputError(f"params: {problem}; choose one of {', '.join(known)}")
            rows = [row for row in rows if of(row) == where[name]]
    if "min_toxicity" in where:
        least = where["min_toxicity"]
        rows = [row for row in rows if row.toxicity is not None and row.toxicity >= least]
    return rows[: where.get("first", len(rows))]
