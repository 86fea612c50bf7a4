"""Perplexity of general text: what a circuit's removal costs."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparc3.base.errors import InputError
from sparc3.base.files import Array
from sparc3.base.params import Behaviour
from sparc3.circuits.circuit import Circuit
from sparc3.measure import inference
from sparc3.measure.inference import Difference
from sparc3.measure.instrument import (
    How,
    Instrument,
    Measured,
    Reading,
    Sample,
    Value,
    joined,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AT_ONCE = 64  # texts that `read_until` reads before it looks


def encode(rows: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> Sample:
    """Each text on its own."""
    from sparc3.model import loading

    encoded = loading.encode(tokenizer, [row["text"] for row in rows])
    return Sample([row["id"] for row in rows], [row["group"] for row in rows], encoded)


def encode_joined(
    rows: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase"
) -> Sample:
    """All texts as one, two newlines between them: how WikiText-2's perplexity is reported."""
    from sparc3.model import loading

    pieces = [*(f"{row['text']}\n\n" for row in rows[:-1]), rows[-1]["text"]]
    encoded = loading.encode_pieces(tokenizer, pieces)
    return Sample([row["id"] for row in rows], [row["group"] for row in rows], encoded, joined=True)


def read(
    model: "PreTrainedModel", circuits: Sequence[Circuit], sample: Sample, how: How
) -> list[Reading]:
    """Likelihood of texts of any length, read through a sliding window, by default the context.

    A window of joined texts reaches across them, so a text is read after those before it.
    """
    from sparc3.measure.likelihood import Window, window_nll
    from sparc3.model.families import context

    texts, names = sample.tokens, sample.ids
    if sample.joined:
        texts, names = [[token for text in texts for token in text]], ["all, joined,"]
    whole = min(context(model.config.to_dict()), max(2, *map(len, texts)))
    length = how.evaluate.window or int(whole)
    window = Window(length, min(how.evaluate.stride, length))
    scored = window_nll(model, circuits, texts, names, window, how.batch_tokens, how.progress)
    if sample.joined:
        ends = np.cumsum([len(text) for text in sample.tokens])[:-1]
        scored = [np.split(nll, ends) for (nll,) in scored]
    return [likelihood(nlls) for nlls in scored]


def read_until(
    read_all: Callable[[Sample], list[Reading]],
    texts: Sequence[Mapping[str, Any]],
    how: How,
    error: float,
) -> tuple[list[Reading], list[str]]:
    """General text as `read_all` reads it, the unpruned model first, and its groups: AT_ONCE texts
    after the other, until the standard error of every change of perplexity is at most `error`
    percent, or no text is left.
    """
    every: list[Reading] = []
    groups: list[str] = []
    for start in range(0, len(texts), AT_ONCE):
        sample = encode(texts[start : start + AT_ONCE], how.tokenizer)
        more = read_all(sample)
        every = [joined(both) for both in zip(every, more, strict=True)] if every else more
        groups += sample.groups
        if max(percent_error(every[0], each, groups) for each in every[1:]) <= error:
            break
    return every, groups


def likelihood(nlls: Sequence[Array], groups: Sequence[str] | None = None) -> Reading:
    """The reading of texts from the NLL of their tokens in nats, NaN for one that is not scored.

    Columns `nll`, the sum over a text's tokens, and `tokens`, how many were scored.
    """
    columns = {
        "nll": np.array([np.nansum(nll, dtype=np.float64) for nll in nlls]),
        "tokens": np.array([np.isfinite(nll).sum() for nll in nlls]),
    }
    return Reading(columns, groups, prompts=columns)


def mean_nll(reading: Reading) -> float:
    """Nats per token over all texts."""
    return float(reading.columns["nll"].sum() / reading.columns["tokens"].sum())


def levels(reading: Reading) -> dict[str, float]:
    return {"nll": mean_nll(reading)}


def perplexity(reading: Reading) -> float:
    """exp of the mean negative log-likelihood per token."""
    return float(np.exp(mean_nll(reading)))


def percent(before: Reading, after: Reading) -> float:
    """Change of perplexity in percent of `before`."""
    return 100 * float(np.expm1(mean_nll(after) - mean_nll(before)))


def percent_error(before: Reading, after: Reading, groups: Sequence[str]) -> float:
    """Standard error of `percent` over groups of texts, in percent; at least 2 groups (InputError).

    Delta method for a ratio of sums: the rise of a group's summed likelihood against its tokens.
    """
    old, new = before.columns, after.columns
    table = np.column_stack([new["nll"] - old["nll"], old["tokens"]])
    rise, tokens = inference.cluster_sums(table, groups).T
    if len(rise) < 2:
        raise InputError(
            f"the standard error of perplexity needs 2 groups of texts, not {len(rise)}; "
            "raise sweep.texts"
        )
    mean = rise.sum() / tokens.sum()
    variance = len(rise) / (len(rise) - 1) * np.sum((rise - mean * tokens) ** 2)
    return 100 * float(np.exp(mean) * np.sqrt(variance) / tokens.sum())


def change(before: Reading, after: Reading, resamples: int) -> Difference:
    """Change of perplexity in percent, paired by text."""
    old, new = before.columns, after.columns
    return inference.perplexity_change(old["nll"], new["nll"], old["tokens"], resamples)


def _change(before: Measured, after: Measured, resamples: int) -> Difference:
    return change(before.reading, after.reading, resamples)


def instrument(behaviour: Behaviour) -> Instrument:
    """Perplexity of a behaviour's own texts, for one that is measured by it."""
    return Instrument(
        encode=encode,
        read=read,
        values=(Value("ppl_delta", _change, "perplexity %", controlled=False),),
        levels=levels,
        objective=lambda before, after: mean_nll(after.reading),
        axis="NLL, nats",
        cell="ppl_delta",
    )
