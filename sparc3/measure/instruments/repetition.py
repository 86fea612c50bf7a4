"""Repetition: how much of a greedy completion repeats itself."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from sparc3.base.params import Behaviour
from sparc3.circuits.ablate import Edit
from sparc3.measure.instrument import (
    How,
    Instrument,
    Reading,
    Sample,
    Value,
    paired,
    reduced,
    share_fallen,
)
from sparc3.measure.instruments import completions, perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GREEDY = 1e-9  # a nucleus that holds the most probable token alone


def of_texts(texts: list[str]) -> list[float]:
    """A scorer of texts, by their words: share of 4-grams that were there before, in [0, 1]."""
    from sparc3.measure.generate import repeated

    return [repeated(text.split()) for text in texts]


def read(
    model: "PreTrainedModel", edits: Sequence[Edit], sample: Sample, how: How
) -> list[Reading]:
    """Column `rep_4`, in [0, 1], of every prompt's greedy completion: no sampling noise."""
    greedy = how._replace(evaluate=replace(how.evaluate, completions=1, top_p=GREEDY))
    readings = []
    for rows in completions.write(model, edits, sample, greedy):
        columns = {"rep_4": np.array([row["rep_4"] for row in rows], float)}
        readings.append(Reading(columns, sample.groups, columns, rows))
    return readings


def levels(reading: Reading) -> dict[str, float]:
    return {"rep_4": float(reading.columns["rep_4"].mean())}


def instrument(behaviour: Behaviour) -> Instrument:
    """rep_4; its reduction in percent of before has the verdict."""
    return Instrument(
        encode=perplexity.encode,
        read=read,
        values=(
            Value("reduction", reduced("rep_4"), "repetition reduction %", column="rep_4"),
            Value("rep_4", paired("rep_4"), "rep-4", digits=3, less=-1),
            Value("improved", share_fallen("rep_4"), controlled=False),
        ),
        levels=levels,
        primary="reduction",
        headline=(("rep_4", "rep-4 {:.3f}"),),
        writes=True,
        swept=False,
    )
