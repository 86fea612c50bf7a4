"""Methods of params: who takes the number of neurons from whom, and which rows cannot work."""

import numpy as np

from sparc3.base.errors import InputError
from sparc3.base.files import Array, digest_text
from sparc3.base.params import Method, Params, scores_of
from sparc3.relevance.contrasts import CONTRASTS


def noise(seed: int, name: str, shape: tuple[int, int]) -> Array:
    """Normal numbers that only `seed` and `name` decide: a random method's differential."""
    key = int(digest_text(f"{seed}/{name}")[:16], 16)
    return np.random.default_rng(key).standard_normal(shape, dtype=np.float32)


OWN = "own"  # in match and layers: the method that the behaviour itself names


def leader(method: Method, own: str) -> str | None:
    """The method that another takes its number of neurons from; `own` is the behaviour's."""
    name = method.match or method.layers
    return own if name == OWN else name


def check_methods(params: Params) -> None:
    """InputError where a method's row in params cannot work; called before anything is computed."""
    for name, method in params.methods.items():
        key = f"params: methods.{name}"
        if name == OWN:
            raise InputError(f"{key}: the name stands for a behaviour's own method; choose another")
        if method.score == "random":
            if method.contrast is not None:
                raise InputError(f"{key}.contrast: a random score has no contrast; remove the key")
        elif method.contrast not in CONTRASTS:
            raise InputError(
                f"{key}.contrast is {method.contrast!r}; expected {' or '.join(CONTRASTS)}"
            )
        if method.scale == "auroc" and method.contrast != "auroc":
            raise InputError(f"{key}.scale: auroc needs contrast: auroc")
        if isinstance(method.scale, float) and not 0 <= method.scale < 1:
            raise InputError(f"{key}.scale is {method.scale}; expected 0 <= scale < 1")
        if method.draws < 1 or (method.draws > 1 and method.score != "random"):
            raise InputError(
                f"{key}.draws is {method.draws}; expected 1, or more with score: random"
            )
        if method.protect is not None and not (
            0 <= method.protect <= 1 and (method.match or method.layers)
        ):
            raise InputError(
                f"{key}.protect is {method.protect}; expected 0 to 1, and with it match or layers"
            )
        if method.match and method.layers:
            raise InputError(f"{key}: give match or layers, not both (layers fixes the number too)")
        if method.layers and method.score != "random":
            raise InputError(f"{key}.layers: only for score: random, as a control")
        for taken in (method.match, method.layers):
            if taken not in (None, OWN, *independent(params)):
                raise InputError(
                    f"{key}: {taken!r} is not a method that chooses its own neurons; "
                    f"expected {OWN} or one of {', '.join(independent(params))}"
                )
    for name, behaviour in params.behaviours.items():
        if behaviour.method not in independent(params):
            raise InputError(
                f"params: behaviours.{name}.method is {behaviour.method!r}; expected one of "
                f"{', '.join(independent(params))}"
            )
        for key in ("prompts", "reference"):
            check_scored(params, f"behaviours.{name}.{key}", getattr(behaviour, key))


def check_scored(params: Params, key: str, prompt_set: str) -> None:
    """InputError unless every method's score is computed for the set that a params key names."""
    computed = scores_of(params, prompt_set)
    for name, method in params.methods.items():
        if method.score not in ("random", *computed):
            raise InputError(
                f"params: methods.{name}.score {method.score!r} is not computed for the prompt set "
                f"{prompt_set}, which has {', '.join(computed)}; add it to attribute.scores"
            )


def independent(params: Params) -> list[str]:
    """The methods that choose their own number of neurons, once."""
    return [
        name
        for name, method in params.methods.items()
        if method.match is None and method.layers is None and method.draws == 1
    ]
