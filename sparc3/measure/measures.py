"""What is measured on a model, pruned or not, without sampling anything.

Perplexity of general text, likelihood of the behaviour's text, and the preferences of paired items:
deterministic, so that the difference between two models has no noise but that of the choice of
texts. Each is measured without every one of some circuits, and comes as a list in their order.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparc3.base.errors import InputError
from sparc3.base.files import Array
from sparc3.circuits.circuit import Circuit
from sparc3.measure.inference import cluster_sums
from sparc3.measure.likelihood import (
    Progress,
    Window,
    continuation_nll,
    sentence_scores,
    token_nll,
    window_nll,
)
from sparc3.model.loading import encode, encode_pieces


class Texts(NamedTuple):
    """Texts of one prompt set, tokenised."""

    ids: list[str]
    groups: list[str]
    tokens: list[list[int]]


class Items(NamedTuple):
    """Paired items: stereotype, anti-stereotype and, for some, an unrelated text."""

    ids: list[str]
    groups: list[str]
    tokens: list[list[list[int]]]


class Likelihood(NamedTuple):
    """Summed negative log-likelihood in nats, and tokens scored; both of shape (text,)."""

    nll: Array
    tokens: Array


def texts(rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Texts:
    encoded = encode(tokenizer, [row["text"] for row in rows])
    return Texts([r["id"] for r in rows], [r["group"] for r in rows], encoded)


def items(rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Items:
    encoded = [
        encode(tokenizer, [*row["pair"], *([row["unrelated"]] if row.get("unrelated") else [])])
        for row in rows
    ]
    return Items([r["id"] for r in rows], [r["group"] for r in rows], encoded)


def likelihood(
    model: PreTrainedModel,
    circuits: Sequence[Circuit],
    sample: Texts,
    batch_tokens: int,
    progress: Progress | None = None,
) -> list[Likelihood]:
    """Likelihood of every text; its first token, which nothing precedes, is not scored."""
    scored = token_nll(model, circuits, sample.tokens, batch_tokens, progress)
    return [_summed(found) for found in scored]


def windowed_likelihood(
    model: PreTrainedModel,
    circuits: Sequence[Circuit],
    sample: Texts,
    window: int,
    stride: int,
    batch_tokens: int,
    progress: Progress | None = None,
) -> list[Likelihood]:
    """Likelihood of texts of any length through a sliding window.

    That of a text which fits the window is the one that `likelihood` gives.
    """
    scored = window_nll(
        model, circuits, sample.tokens, Window(window, stride), batch_tokens, progress
    )
    return [_summed(found) for found in scored]


def joined_likelihood(
    model: PreTrainedModel,
    circuits: Sequence[Circuit],
    pieces: Texts,
    window: int,
    stride: int,
    batch_tokens: int,
    progress: Progress | None = None,
) -> list[Likelihood]:
    """Likelihood of the pieces of one text (`joined`), which is read through a sliding window.

    A window reaches across pieces, so a piece is read after those before it.
    """
    tokens = [token for piece in pieces.tokens for token in piece]
    ends = np.cumsum([len(piece) for piece in pieces.tokens])
    scored = window_nll(model, circuits, [tokens], Window(window, stride), batch_tokens, progress)
    return [_summed(np.split(nll, ends[:-1])) for (nll,) in scored]


def _summed(found: Sequence[Array]) -> Likelihood:
    return Likelihood(
        np.array([np.nansum(nll, dtype=np.float64) for nll in found]),
        np.array([np.isfinite(nll).sum() for nll in found]),
    )


def joined(rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Texts:
    """All texts as one, two newlines between them: how WikiText-2's perplexity is reported."""
    whole = [*(f"{row['text']}\n\n" for row in rows[:-1]), rows[-1]["text"]]
    encoded = encode_pieces(tokenizer, whole)
    return Texts([r["id"] for r in rows], [r["group"] for r in rows], encoded)


def preferences(
    model: PreTrainedModel,
    circuits: Sequence[Circuit],
    sample: Items,
    batch_tokens: int,
    progress: Progress | None = None,
) -> list[Array]:
    """Mean log-probability per token, shape (item, 3): stereotype, anti-stereotype, unrelated.

    NaN where an item has no unrelated text.
    """
    tables = []
    for scored in continuation_nll(model, circuits, sample.tokens, batch_tokens, progress):
        table = np.full((len(sample.tokens), 3), np.nan)
        for row, sentences in enumerate(scored):
            table[row, : len(sentences)] = sentence_scores(sentences)
        tables.append(table)
    return tables


def mean_nll(measured: Likelihood) -> float:
    """Nats per token over all texts."""
    return float(measured.nll.sum() / measured.tokens.sum())


def nll_shift(before: tuple[Likelihood, Likelihood], after: tuple[Likelihood, Likelihood]) -> float:
    """Rise of the behaviour's NLL beyond that of general text, nats per token; each of `before`
    and `after` is (behaviour, general).
    """
    behaviour, general = (mean_nll(a) - mean_nll(b) for b, a in zip(before, after, strict=True))
    return behaviour - general


def perplexity(measured: Likelihood) -> float:
    """exp of the mean negative log-likelihood per token."""
    return float(np.exp(mean_nll(measured)))


def perplexity_percent(before: Likelihood, after: Likelihood) -> float:
    """Change of perplexity in percent of `before`."""
    return 100 * float(np.expm1(mean_nll(after) - mean_nll(before)))


def perplexity_error(before: Likelihood, after: Likelihood, groups: Sequence[str]) -> float:
    """Standard error of `perplexity_percent` over groups of texts, in percent; at least 2 groups.

    Delta method for a ratio of sums: the rise of a group's summed likelihood against its tokens.
    """
    rise, tokens = cluster_sums(np.column_stack([after.nll - before.nll, before.tokens]), groups).T
    if len(rise) < 2:
        raise InputError(
            f"the standard error of perplexity needs 2 groups of texts, not {len(rise)}; "
            "raise sweep.texts"
        )
    mean = rise.sum() / tokens.sum()
    variance = len(rise) / (len(rise) - 1) * np.sum((rise - mean * tokens) ** 2)
    return 100 * float(np.exp(mean) * np.sqrt(variance) / tokens.sum())
