"""A control that needs no neuron: the words that are typical of a behaviour made less likely."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparc3.measure.likelihood import Tokens


def typical_tokens(
    behaviour: Sequence[Tokens], reference: Sequence[Tokens], count: int
) -> list[int]:
    """The at most `count` tokens that are most typical of `behaviour`, the most typical first.

    By z of the log odds ratio with an informative Dirichlet prior (Monroe et al. 2008, "Fightin'
    Words", Political Analysis 16(4)), here the counts of both sets together: with y(w) of n tokens
    of `behaviour` and y'(w) of n' of `reference` being w, a(w) = y(w) + y'(w) and a0 = n + n',

        delta(w) = log((y + a) / (n + a0 - y - a)) - log((y' + a) / (n' + a0 - y' - a))
        z(w) = delta(w) / sqrt(1 / (y + a) + 1 / (y' + a))

    Only tokens of z above 0; of equal ones the smaller id first. Give tokens of the text alone:
    what a tokenizer puts in front is the more typical of the set whose texts are shorter.
    """
    seen, others = (Counter(chain.from_iterable(texts)) for texts in (behaviour, reference))
    tokens = sorted(seen)  # z of a token that only `reference` has is below 0
    y, y_ref = (np.array([of[t] for t in tokens], np.float64) for of in (seen, others))
    n, n_ref = seen.total(), others.total()
    a = y + y_ref
    with np.errstate(divide="ignore", invalid="ignore"):  # all tokens are one: nothing is typical
        log_odds, log_odds_ref = (
            np.log((own + a) / (total + n + n_ref - own - a))
            for own, total in ((y, n), (y_ref, n_ref))
        )
        z = (log_odds - log_odds_ref) / np.sqrt(1 / (y + a) + 1 / (y_ref + a))
    best = np.argsort(-z, kind="stable")
    return [tokens[place] for place in best if z[place] > 0][:count]


@contextmanager
def banned(model: PreTrainedModel, tokens: Sequence[int], bias: float) -> Iterator[PreTrainedModel]:
    """Within the block `model` gives each of `tokens` logits that are lower by `bias` nats.

    What leaves the output embedding is lowered, so likelihoods, completions and the model's own
    `forward` all see it; a cap on final logits comes after that and weakens it. Undone at the end,
    also after an exception.
    """

    def lower(module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
        logits[..., torch.tensor(tokens, dtype=torch.long, device=logits.device)] -= bias

    head = cast("nn.Module", model.get_output_embeddings())
    hook = head.register_forward_hook(lower)
    try:
        yield model
    finally:
        hook.remove()
