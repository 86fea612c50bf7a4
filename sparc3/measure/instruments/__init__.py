"""The instruments, by name: every module here is one, and offers `instrument(behaviour)`.

They are known without torch, which they import when they read a model.
"""

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules

from sparc3.base.params import Behaviour
from sparc3.measure.instrument import Instrument, Value

INSTRUMENTS: dict[str, Callable[[Behaviour], Instrument]] = {
    module.name: import_module(f"{__name__}.{module.name}").instrument
    for module in iter_modules(__path__)
}


def instruments_of(behaviour: Behaviour) -> dict[str, Instrument]:
    """The instruments that a behaviour names, in its order."""
    return {name: INSTRUMENTS[name](behaviour) for name in behaviour.instruments}


def primary_of(behaviour: Behaviour) -> tuple[str, Value] | None:
    """The value that a behaviour's verdict is of, and the name of its instrument: the first that
    has one.
    """
    for name, each in instruments_of(behaviour).items():
        for value in each.values:
            if value.name == each.primary:
                return name, value
    return None


def swept_of(behaviour: Behaviour) -> dict[str, Instrument]:
    """Those of them that sweep and transfer read."""
    return {name: each for name, each in instruments_of(behaviour).items() if each.swept}
