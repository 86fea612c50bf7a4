"""Sources by name, the keys that `where` may have for each, and how they narrow its rows."""

from collections.abc import Callable
from functools import partial
from typing import Any

from sparc3.base.errors import InputError
from sparc3.prompts import embedded, hub
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
PAIRED = tuple(name for name, source in SOURCES.items() if source.paired)
STREAMS = tuple(name for name, source in SOURCES.items() if source.stream)
SEALED = tuple(name for name, source in SOURCES.items() if source.sealed)

# The values that the keys of `where` may have.
VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "path": ("a local folder, or owner/name on the hub", lambda v: isinstance(v, str) and v != ""),
    "revision": ("a commit on the hub, as text", lambda v: isinstance(v, str) and v != ""),
    "bias_type": ("text", lambda v: isinstance(v, str)),
    "first": ("a whole number of at least 1", lambda v: type(v) is int and v > 0),
    "min_toxicity": ("a number from 0 to 1", lambda v: type(v) in (int, float) and 0 <= v <= 1),
}


def narrow(key: str, rows: list[Row], where: Where) -> list[Row]:
    """The rows that fit `where`, in their order; InputError for a bias type that is not there."""
    if "bias_type" in where:
        known = sorted({row.stratum for row in rows})
        if where["bias_type"] not in known:
            problem = f"{key}.where.bias_type {where['bias_type']!r} is not in the data"
            raise InputError(f"params: {problem}; choose one of {', '.join(known)}")
        rows = [row for row in rows if row.stratum == where["bias_type"]]
    if "min_toxicity" in where:
        least = where["min_toxicity"]
        rows = [row for row in rows if row.toxicity is not None and row.toxicity >= least]
    return rows[: where.get("first", len(rows))]
