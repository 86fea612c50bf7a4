"""A prompt that asks for what is wanted, in front of every text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sparc3.circuits.intervention import Intervention, as_tokens
from sparc3.circuits.responses import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def learn(model: "PreTrainedModel", prompts: Prompts) -> Sequence[Intervention]:
    arrays = {"tokens": as_tokens(prompts.instruction), "front": np.array([prompts.front])}
    return [Intervention("prefix", arrays)]
