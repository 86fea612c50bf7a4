"""Interventions that are learnt, a file for each; their names are known without torch.

A module offers `learn(model, prompts)`, which returns one intervention or several, of which a sweep
takes the best; each at strength 1.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from sparc3.circuits.intervention import Intervention
from sparc3.circuits.responses import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Learner = Callable[["PreTrainedModel", Prompts], Sequence[Intervention]]
LEARNERS: dict[str, Learner] = {
    module.name.replace("_", "-"): import_module(f"{__name__}.{module.name}").learn
    for module in iter_modules(__path__)
}
