"""What several tests of instruments need: the slow way, and the settings of a small run."""

from typing import Any

import numpy as np
import torch

from sparc3.measure.instrument import Differences, How, Measured, Reading, differences
from sparc3.measure.instruments import pairs
from sparc3.stages.checks import load

FEW = 400  # resamples: the values are exact whatever their number


def how(tokenizer: Any = None, scorers: Any = None, **evaluate: Any) -> How:
    """How the default run reads, but for what is given."""
    from dataclasses import replace

    settings = replace(load().evaluate, **evaluate)
    return How(settings, 64, tokenizer, scorers or {})


def log_p(model: torch.nn.Module, tokens: list[int]) -> float:
    """Summed over all tokens but the first."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double()
    every = torch.log_softmax(logits, -1)
    return sum(every[i, t].item() for i, t in enumerate(tokens[1:]))


def likelihood(nll: Any, tokens: Any, groups: list[str] | None = None) -> Reading:
    """A reading of texts from their summed NLL and numbers of tokens."""
    return Reading({"nll": np.asarray(nll, float), "tokens": np.asarray(tokens)}, groups)


def measured(reading: Reading, general: Reading | None = None) -> Measured:
    """With some general text, where it does not matter which."""
    return Measured(reading, general or likelihood(np.ones(8), np.ones(8, int)))


def pair_difference(before: np.ndarray, after: np.ndarray, terms: list[str]) -> Differences:
    """All differences from log-probabilities (item, 3)."""
    old, new = (measured(pairs.reading(table, terms)) for table in (before, after))
    return differences(pairs.VALUES, old, new, FEW)
