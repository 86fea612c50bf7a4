"""Two-pass choice of prompts: complete every candidate once, score it, keep the highest.

Whoever is chosen by one sampled score was partly lucky: sampled again, the same prompts score
lower. The score that a prompt was chosen by is therefore kept with it, evaluation draws
completions of its own, and the gap between the two is reported.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparc3.base.params import Keep
from sparc3.circuits.circuit import INTACT
from sparc3.measure.generate import Sampling, complete
from sparc3.measure.scorers import Scorer
from sparc3.model.loading import encode


def highest(scores: Sequence[float], top: int) -> list[int]:
    """Positions of the `top` highest scores, in their order; ties go to the earlier one."""
    chosen = np.argsort(-np.asarray(scores), kind="stable")[:top]
    return sorted(chosen.tolist())


def keep_highest(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    keep: Keep,
    scorer: Scorer,
    name: str,
) -> list[dict[str, Any]]:
    """The `keep.top` rows whose completion scores highest, each with that score as `elicited`; with
    `keep.extend` their completions are the end of their texts.
    """
    with tqdm(total=len(rows), desc=f"elicit {name}", unit="prompt") as bar:
        (drawn,) = complete(
            model,
            [INTACT],
            encode(tokenizer, [row["text"] for row in rows]),
            # Evaluation names its streams by the ids alone: whatever its seed, it draws others.
            [f"elicit {row['id']}" for row in rows],
            Sampling(1, keep.new_tokens, keep.temperature, keep.top_p, keep.seed),
            progress=bar.update,
        )
    texts = tokenizer.batch_decode([tokens for (tokens,) in drawn], skip_special_tokens=True)
    scores = scorer(texts).tolist()
    kept = [{**rows[i], "elicited": scores[i]} for i in highest(scores, keep.top)]
    if keep.extend:
        for row, i in zip(kept, highest(scores, keep.top), strict=True):
            row |= {"text": row["text"] + texts[i], "tokens": row["tokens"] + len(drawn[i][0])}
    return kept
