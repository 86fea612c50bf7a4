"""Find the neurons behind a behaviour of a language model, prune them, and prove what that did."""

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparc3.library import (
        INTACT,
        Circuit,
        InputError,
        complete,
        differential,
        evaluate,
        score,
    )

__all__ = ["INTACT", "Circuit", "InputError", "complete", "differential", "evaluate", "score"]
STARTED = time.monotonic()  # before the slow imports, which are part of what a stage costs


def __getattr__(name: str) -> Any:
    """The names of `sparc3.library`, imported when one is asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'sparc3' has no attribute {name!r}")
    from sparc3 import library

    return getattr(library, name)
