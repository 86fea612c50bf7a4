"""A control that needs no neuron: the words that a scorer calls bad made less likely."""

import re
from collections import Counter
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from sparc3.circuits.intervention import Intervention, as_tokens
from sparc3.measure.scorers import Scorer

BAD = 0.5  # a word is bad from this score on
BIAS = 5.0  # nats that a banned token loses


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


def word_ban(tokens: Sequence[int]) -> Intervention:
    """Each of `tokens` less likely by BIAS."""
    return Intervention("ban", {"tokens": as_tokens(tokens)}, BIAS)
