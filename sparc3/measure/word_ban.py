"""A control that needs no neuron: the words that a scorer calls bad made less likely."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparc3.measure.scorers import Scorer

BAD = 0.5  # a word is bad from this score on


def bad_tokens(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, score: Scorer
) -> list[int]:
    """Tokens that end the words of `texts` which `score` calls bad, the most frequent first.

    The last token of a word, so that a word of several is cut off before it is complete. Left out
    is one that ends other words of the texts more often than bad ones. Of equally frequent tokens
    the smaller id comes first.
    """
    words = Counter(word for text in texts for word in re.findall(r"[^\W\d_]+", text))
    names = sorted(words)
    ends = tokenizer([f" {word}" for word in names], add_special_tokens=False).input_ids
    bad, good = Counter[int](), Counter[int]()
    for word, ids, value in zip(names, ends, score(names).tolist(), strict=True):
        (bad if value >= BAD else good)[ids[-1]] += words[word]
    tokens = sorted(bad, key=lambda token: (-bad[token], token))
    return [token for token in tokens if bad[token] >= good[token]]


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
