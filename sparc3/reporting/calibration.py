"""Calibration of scorers: against stored scores of the same texts, each other, and neutral text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparc3.base.files import Array, markdown
from sparc3.measure import inference
from sparc3.measure.scorers import Scorer
from sparc3.reporting.tables import interval

TRUTH = "toxicity"
KINDS = (TRUTH, "profanity", "insult", "threat", "identity_attack", "sexually_explicit")
BINS = 5  # of equal width
RESAMPLES = 2000


def cut(neutral: Sequence[str], like: Sequence[str]) -> list[str]:
    """The first neutral texts, each cut to as many words as its counterpart has."""
    pairs = zip(neutral, like, strict=False)
    return [" ".join(text.split()[: len(other.split())]) for text, other in pairs]


def reliability(scores: Array, truth: Array, bins: int = BINS) -> list[tuple[int, float, float]]:
    """For equal ranges of the score: texts, their mean score and their mean `truth`, NaN without
    any. `scores`, `truth`: (text,), in [0, 1].
    """
    places = np.minimum((scores * bins).astype(int), bins - 1)
    counts = np.bincount(places, minlength=bins)
    means = [
        np.divide(sums, counts, out=np.full(bins, np.nan), where=counts > 0)
        for sums in (np.bincount(places, each, bins) for each in (scores, truth))
    ]
    return list(zip(counts.tolist(), *(mean.tolist() for mean in means), strict=True))


def agreement(x: Array, y: Array) -> str:
    """Spearman correlation with its interval."""
    return interval(inference.rank_agreement(x, y, None, RESAMPLES)._asdict(), 2)


def calibration(
    scorers: Mapping[str, Scorer],
    rows: Sequence[Mapping[str, Any]],
    neutral: Mapping[str, Sequence[str]],
) -> str:
    """Tables of every scorer: rank correlations, reliability, and means on `neutral` texts by kind.

    rows: of RealToxicityPrompts, `text` and Perspective's scores, KINDS.
    """
    texts = [row["text"] for row in rows]
    truth = {kind: np.array([row[kind] for row in rows], float) for kind in KINDS}
    scores = {name: score(texts) for name, score in scorers.items()}
    against = {kind.replace("_", " "): truth[kind] for kind in KINDS}
    against |= {f"`{name}`": own for name, own in scores.items()}
    ranks = [
        [name, *(agreement(own, other) for own in scores.values())]
        for name, other in against.items()
    ]
    curves = [reliability(own, truth[TRUTH]) for own in scores.values()]
    curve = [
        [
            f"{at / BINS:.1f} to {(at + 1) / BINS:.1f}",
            *(f"{mean:.2f} ({count})" for count, _, mean in places),
        ]
        for at, places in enumerate(zip(*curves, strict=True))
    ]
    floors = [
        [f"{kind} ({len(found)})", *(f"{score(found).mean():.3f}" for score in scorers.values())]
        for kind, found in ((kind, cut(every, texts)) for kind, every in neutral.items())
    ]
    names = [f"`{name}`" for name in scorers]
    return (
        f"Rank correlation with Perspective's scores, and with each other, on {len(texts)} "
        f"prompts:\n\n{markdown(['', *names], ranks)}\n"
        "Reliability, Perspective's mean toxicity of the prompts (so many) to which a scorer gives "
        f"a score in the range:\n\n{markdown(['score', *names], curve)}\n"
        "Floor, the mean score of (so many) neutral texts, cut to as many words as the prompts:\n\n"
        f"{markdown(['', *names], floors)}"
    )
