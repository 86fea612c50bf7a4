"""Perplexity of general text, and divergence from the unpruned model: what a circuit's removal
costs.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparc3.base.errors import InputError
from sparc3.base.files import Array
from sparc3.base.params import Behaviour
from sparc3.circuits.ablate import Edit
from sparc3.measure import inference
from sparc3.measure.inference import Difference, Estimate
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
    model: "PreTrainedModel", edits: Sequence[Edit], sample: Sample, how: How
) -> list[Reading]:
    """Likelihood and divergence of texts of any length, read through a sliding window, by default
    the context.

    A window of joined texts reaches across them, so a text is read after those before it. Column
    `kl` beside those of `likelihood`: the sum over a text's tokens of KL(unpruned || without the
    circuit), in nats.
    """
    from sparc3.measure.likelihood import Window, window_scores
    from sparc3.model.families import context

    texts, names = sample.tokens, sample.ids
    if sample.joined:
        texts, names = [[token for text in texts for token in text]], ["all, joined,"]
    whole = min(context(model.config.to_dict()), max(2, *map(len, texts)))
    length = how.evaluate.window or int(whole)
    window = Window(length, min(how.evaluate.stride, length))
    every = window_scores(model, edits, texts, names, window, how.batch_tokens, how.progress)
    if sample.joined:
        ends = np.cumsum([len(text) for text in sample.tokens])[:-1]
        every = [np.split(scores, ends, axis=1) for (scores,) in every]
    return [_reading(texts) for texts in every]


def _reading(texts: Sequence[Array]) -> Reading:
    """From NLL and divergence of each text's tokens, (2, token)."""
    found = likelihood([nll for nll, _ in texts])
    kl = np.array([np.nansum(each, dtype=np.float64) for _, each in texts])
    divergences = [each[np.isfinite(each)] for _, each in texts]
    return Reading({**found.columns, "kl": kl}, prompts=found.columns, divergences=divergences)


class Compared(NamedTuple):
    """General text without and with an edit, the same texts, and their groups."""

    before: Reading
    after: Reading
    groups: list[str]


def read_until(
    model: "PreTrainedModel",
    edits: Sequence[Edit],
    texts: Sequence[Mapping[str, Any]],
    how: How,
    error: float,
) -> list[Compared]:
    """General text under each edit, of which the first changes nothing: AT_ONCE texts after the
    other, until the standard error of its change of perplexity is at most `error` percent, or no
    text is left.
    """
    open_, every = list(range(len(edits))), [list[Reading]() for _ in edits]
    groups: list[str] = []
    for start in range(0, len(texts), AT_ONCE):
        sample = encode(texts[start : start + AT_ONCE], how.tokenizer)
        readings = read(model, [edits[place] for place in open_], sample, how)
        for place, reading in zip(open_, readings, strict=True):
            every[place].append(reading)
        groups += sample.groups
        before = joined(every[0])
        errors = {p: percent_error(before, joined(every[p]), groups) for p in open_[1:]}
        open_ = [0, *(place for place, found in errors.items() if found > error)]
        if len(open_) == 1:
            break
    return [
        Compared(joined(every[0][: len(own)]), joined(own), groups[: AT_ONCE * len(own)])
        for own in every
    ]


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


def percent_error(before: Reading, after: Reading, groups: Sequence[str] | None) -> float:
    """Standard error of `percent` over groups of texts, in percent; at least 2 groups (InputError).

    Delta method for a ratio of sums: the rise of a group's summed likelihood against its tokens.
    """
    old, new = before.columns, after.columns
    table = np.column_stack([new["nll"] - old["nll"], old["tokens"]])
    rise, tokens = inference.cluster_sums(table, groups).T
    mean = rise.sum() / tokens.sum()
    return 100 * float(np.exp(mean)) * ratio_error(rise, tokens)


def mean_kl(reading: Reading) -> float:
    """Divergence from the unpruned model, nats per token over all texts."""
    return float(reading.columns["kl"].sum() / reading.columns["tokens"].sum())


def kl_error(reading: Reading, groups: Sequence[str]) -> float:
    """Standard error of `mean_kl`, as `percent_error`."""
    table = np.column_stack([reading.columns["kl"], reading.columns["tokens"]])
    return ratio_error(*inference.cluster_sums(table, groups).T)


def ratio_error(sums: Array, tokens: Array) -> float:
    """Standard error of sum of sums / sum of tokens over groups; InputError for fewer than 2."""
    if len(sums) < 2:
        raise InputError(
            f"the standard error of perplexity needs 2 groups of texts, not {len(sums)}; "
            "raise sweep.texts"
        )
    mean = sums.sum() / tokens.sum()
    variance = len(sums) / (len(sums) - 1) * np.sum((sums - mean * tokens) ** 2)
    return float(np.sqrt(variance) / tokens.sum())


def costs(before: Reading, after: Reading, groups: Sequence[str]) -> dict[str, float]:
    """What a sweep records of general text: what `select.budget` may bound, and standard errors."""
    return {
        "ppl_delta": percent(before, after),
        "ppl_error": percent_error(before, after, groups),
        "kl": mean_kl(after),
        "kl_error": kl_error(after, groups),
    }


def divergence(reading: Reading, resamples: int) -> dict[str, Estimate]:
    """KL of the next token's distribution from the unpruned model's, nats per token: mean and 95th
    percentile over all tokens, with intervals over texts.
    """
    kl, tokens = reading.columns["kl"], reading.columns["tokens"]
    every = np.concatenate(reading.divergences)
    order = np.argsort(every, kind="stable")[::-1]
    text = np.repeat(np.arange(len(kl)), [len(each) for each in reading.divergences])[order]

    def mean(weights: Array) -> Array:
        return (weights @ kl) / (weights @ tokens)

    def percentile(weights: Array) -> Array:
        above = weights[:, text].cumsum(axis=1)
        return every[order][(above > 0.05 * above[:, -1:]).argmax(axis=1)]

    return {
        "mean": inference.bootstrap(mean, [len(kl)], resamples),
        "percentile_95": inference.bootstrap(percentile, [len(kl)], resamples, len(every)),
    }


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
