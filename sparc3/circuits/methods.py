"""Methods of params: random ones' noise, and who takes the number of neurons from whom."""

from collections.abc import Mapping

import numpy as np

from sparc3.base.files import Array, digest_text
from sparc3.base.params import Method, Params


def noise(seed: int, name: str, shape: tuple[int, int]) -> Array:
    """Normal numbers that only `seed` and `name` decide: a random method's differential."""
    key = int(digest_text(f"{seed}/{name}")[:16], 16)
    return np.random.default_rng(key).standard_normal(shape, dtype=np.float32)


OWN = "own"  # in match and layers: the method that the behaviour itself names
BAN = "word-ban"  # a control that is no method of params, and prunes nothing


def leader(name: str, method: Method, own: str) -> str | None:
    """The method that another takes its number of neurons from; `own` is the behaviour's, which
    does not follow itself.
    """
    followed = method.match or method.layers
    if followed == OWN:
        return None if name == own else own
    return followed


def is_control(method: Method) -> bool:
    """Whether a method prunes what should not matter to the behaviour: it has no verdict."""
    return method.score == "random" or method.contrast in ("reversed-difference", "reference-only")


def completed(params: Params) -> tuple[str, ...]:
    """Methods that write completions, beside the behaviour's own: where `evaluate.completed` is
    null, all that are no controls, and the control that they are compared with.
    """
    asked, control = params.evaluate.completed, params.evaluate.control
    every = (n for n, m in params.methods.items() if n == control or not is_control(m))
    return tuple(every) if asked is None else asked


def swept(methods: Mapping[str, Method], own: str) -> dict[str, Method]:
    """The methods that choose their own number of neurons for a behaviour, in their order."""
    return {n: m for n, m in methods.items() if not m.all and leader(n, m, own) is None}


def independent(params: Params) -> list[str]:
    """Methods that choose once, whatever the behaviour: whom others can follow by name."""
    return [name for name, method in swept(params.methods, "").items() if method.draws == 1]


def can_lead(params: Params) -> list[str]:
    """Methods that a behaviour can have for its own, which `match: own` follows."""
    methods = params.methods
    return [n for n, m in methods.items() if m.draws == 1 and n in swept(methods, n)]
