"""Likelihood of the behaviour's own text, against that of general text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sparc3.base.files import Array
from sparc3.base.params import Behaviour
from sparc3.circuits.ablate import Edit
from sparc3.measure import inference
from sparc3.measure.inference import Estimate
from sparc3.measure.instrument import How, Instrument, Measured, Reading, Sample, Value
from sparc3.measure.instruments import perplexity
from sparc3.measure.instruments.perplexity import likelihood, mean_nll

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read(
    model: "PreTrainedModel", edits: Sequence[Edit], sample: Sample, how: How
) -> list[Reading]:
    """Likelihood of every text; its first token, which nothing precedes, is not scored."""
    from sparc3.measure.likelihood import token_nll

    texts = sample.tokens, sample.ids
    scored = token_nll(model, edits, *texts, how.batch_tokens, how.progress)
    return [likelihood(nlls, sample.groups) for nlls in scored]


def shift(before: Measured, after: Measured) -> float:
    """Rise of the behaviour's NLL beyond that of general text, nats per token."""
    behaviour, general = (
        mean_nll(new) - mean_nll(old) for old, new in zip(before, after, strict=True)
    )
    return behaviour - general


def shift_interval(before: Measured, after: Measured, resamples: int) -> Estimate:
    """`shift` with its interval: the two samples are independent and are resampled apart.

    No p-value, for nothing is exchangeable between them.
    """
    rises = [
        np.column_stack([new.columns["nll"] - old.columns["nll"], old.columns["tokens"]])
        for old, new in zip(before, after, strict=True)
    ]
    rises[0] = inference.cluster_sums(rises[0], before.reading.groups)
    count = len(rises[0])

    def of_weights(weights: Array) -> Array:
        behaviour, general = weights[:, :count] @ rises[0], weights[:, count:] @ rises[1]
        return behaviour[:, 0] / behaviour[:, 1] - general[:, 0] / general[:, 1]

    return inference.bootstrap(of_weights, [count, len(rises[1])], resamples)


def instrument(behaviour: Behaviour) -> Instrument:
    """Rise of the negative log-likelihood of held-out text of the behaviour: no sampling noise."""
    return Instrument(
        encode=perplexity.encode,
        read=read,
        values=(Value("nll_shift", shift_interval, "NLL shift, nats", digits=3),),
        levels=perplexity.levels,
        objective=shift,
        axis="rise of NLL, nats",
        cell="nll_shift",
        set_off=True,
    )
