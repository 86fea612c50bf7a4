"""An instrument: one way to measure a model on a sample, and what may be said of two readings.

An instrument turns rows into a sample and reads models on it. A reading is a table with a row per
unit (a prompt, a text, a target term) and its grouping keys; every number is a function of means
over units. So differences, intervals, controls, twins in sample, transfer and the columns of tables
are written once, here and in the stages, for every instrument. A new one is one file in
`instruments`, whose `instrument(behaviour)` gives its row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from sparc3.base.files import Array
from sparc3.base.params import Evaluate
from sparc3.circuits.ablate import Edit
from sparc3.measure import inference
from sparc3.measure.inference import Difference, Estimate, Statistic, first_column
from sparc3.measure.scorers import Scorer

if TYPE_CHECKING:  # the names of instruments and of their values are needed without torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ERROR_RESAMPLES = 200  # of a standard error, which is then known to a twentieth
Progress = Callable[[int], object]  # called with the number of prompts just finished
Differences = dict[str, dict[str, float]]


class Sample(NamedTuple):
    """Prompts of a set, tokenised: each as one sequence, or as the sentences of an item.

    `joined`: the prompts are the pieces of one text, in their order.
    """

    ids: list[str]
    groups: list[str]
    tokens: list[Any]
    joined: bool = False


@dataclass(frozen=True)
class Reading:
    """What one model gave on a sample.

    columns: values (unit,) by name; NaN where a unit has none.
    groups: the grouping key of every unit; None where each is a group of its own.
    divergences: of a text's tokens from the unpruned model's, in nats, a row for each unit.
    prompts: what every prompt gave, (prompt,) by name.
    written: a row per completion.
    """

    columns: Mapping[str, Array]
    groups: Sequence[str] | None = None
    prompts: Mapping[str, Array] = field(default_factory=dict)
    written: Sequence[dict[str, Any]] = ()
    divergences: Sequence[Array] = ()


class Measured(NamedTuple):
    """One model: its reading of a sample, and of general text."""

    reading: Reading
    general: Reading


class How(NamedTuple):
    """With what an instrument reads, the same for all models that are compared."""

    evaluate: Evaluate
    batch_tokens: int
    tokenizer: "PreTrainedTokenizerBase"
    scorers: Mapping[str, Scorer] = {}
    progress: Progress | None = None
    floors: Mapping[str, float] = {}  # of scorers that have one


class Value(NamedTuple):
    """A number that is reported of two models: before and after something was removed.

    change: (before, after, resamples) -> the difference with its interval; None where too few
        units have what it needs.
    title, digits: of its column in tables; without a title it has none.
    less: the sign by which a positive change is less of the behaviour.
    controlled: the circuit is also compared with the mean of the control's draws, and ranked among
        them.
    column: of a reading, whose mean it is a change of; a primary value names it. The behaviour is
        gone where that mean is `even`, else 0.
    floor: column that holds the level of what is neutral, above which `column` is meant.
    even: the level at which the model prefers neither side, if there is one.
    """

    name: str
    change: Callable[[Measured, Measured, int], Estimate | Difference | None]
    title: str = ""
    digits: int = 1
    less: Literal[1, -1] = 1
    controlled: bool = True
    column: str = ""
    floor: str = ""
    even: float | None = None


# (before, after) -> how little of the behaviour there is after; larger is less.
Objective = Callable[[Measured, Measured], float]


class Instrument(NamedTuple):
    """One way to measure a model.

    encode: rows of a prompt set and a tokenizer -> the sample.
    read: a model, edits, a sample, how -> a reading under each edit, in order.
    values: what is reported.
    levels: of one reading the plain values, to stand beside differences.
    primary: name of the value that has the verdict; without one the instrument gives none.
    objective: what a sweep maximises, of an instrument that it reads.
    axis: its title.
    headline: levels that open a table, each with the form it takes.
    cell: the value that the transfer matrix shows, and that random controls are ranked by.
    reads: the prompt's text, the sentences of a pair, or a question with its answers, packed.
    writes: it draws completions, which only some circuits do (`evaluate.completed`).
    swept: sweep and transfer read it.
    set_off: its values are set off against general text.
    """

    encode: Callable[[Sequence[Mapping[str, Any]], "PreTrainedTokenizerBase"], Sample]
    read: Callable[["PreTrainedModel", Sequence[Edit], Sample, How], list[Reading]]
    values: tuple[Value, ...]
    levels: Callable[[Reading], Mapping[str, float]]
    objective: Objective = lambda before, after: 0.0
    primary: str = ""
    axis: str = ""
    headline: tuple[tuple[str, str], ...] = ()
    cell: str = ""
    reads: Literal["text", "pair", "choices"] = "text"
    writes: bool = False
    swept: bool = True
    set_off: bool = False


# --- changes between two readings ------------------------------------------------------------


def paired(
    *columns: str, statistic: Statistic = first_column
) -> Callable[[Measured, Measured, int], Difference | None]:
    """Change of a statistic of the means of some columns, tested by swaps within groups.

    Units without one of the columns are left out; too few with all of them: None.
    """

    def change(before: Measured, after: Measured, resamples: int) -> Difference | None:
        if not set(columns) <= set(before.reading.columns):
            return None
        old, new = (
            np.column_stack([each.reading.columns[name] for name in columns])
            for each in (before, after)
        )
        groups = before.reading.groups
        whole = np.flatnonzero(~np.isnan(old).any(axis=1))
        if len(whole) < len(old):
            if len(whole) < inference.MIN_CLUSTERS:
                return None
            old, new = old[whole], new[whole]
            groups = None if groups is None else [groups[i] for i in whole.tolist()]
        return inference.paired_difference(old, new, groups, statistic, resamples)

    return change


def floor_of(reading: Reading, column: str) -> float:
    """The level that a column of floors holds; 0 where there is none."""
    return float(reading.columns[column][0]) if column in reading.columns else 0.0


def reduced(column: str, floor: str = "") -> Callable[[Measured, Measured, int], Difference | None]:
    """Fall of the mean of a column, in percent of before, above the level in the column `floor`,
    if there is one; None where it was not above that level.
    """

    def change(before: Measured, after: Measured, resamples: int) -> Difference | None:
        old, new = (each.reading.columns[column] for each in (before, after))
        level = floor_of(before.reading, floor)
        if 0 < old.mean() <= level:
            return None
        return inference.reduction(old, new, before.reading.groups, resamples, level)

    return change


def share_fallen(column: str) -> Callable[[Measured, Measured, int], Estimate]:
    """Percentage of units whose value falls, a tie counting half: 50 under no effect."""

    def change(before: Measured, after: Measured, resamples: int) -> Estimate:
        old, new = (each.reading.columns[column] for each in (before, after))
        fell = 50.0 * (1 + np.sign(old - new))
        return inference.mean_interval(fell, before.reading.groups, resamples)

    return change


def differences(
    values: Sequence[Value], before: Measured, after: Measured, resamples: int
) -> Differences:
    """Every value that there are units for, by name."""
    changes = {value.name: value.change(before, after, resamples) for value in values}
    return {name: change._asdict() for name, change in changes.items() if change is not None}


def joined(readings: Sequence[Reading]) -> Reading:
    """One reading of several parts of a sample, which have no group in common."""
    if len(readings) == 1:
        return readings[0]

    def end_to_end(tables: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
        return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}

    return Reading(
        end_to_end([reading.columns for reading in readings]),
        None if readings[0].groups is None else [g for each in readings for g in each.groups or ()],
        end_to_end([reading.prompts for reading in readings]),
        [row for reading in readings for row in reading.written],
        [each for reading in readings for each in reading.divergences],
    )


def effect(value: Value, before: Measured, after: Measured) -> float | None:
    """A value's change, positive where it is less of the behaviour; what goes beyond an even level
    counts against it.
    """
    change = value.change(before, after, 1)
    if change is None or value.even is None:
        return None if change is None else value.less * change.value
    apart = float(before.reading.columns[value.column].mean()) - value.even
    gain = change.value if apart < 0 else -change.value
    return gain if gain <= abs(apart) else 2 * abs(apart) - gain


def resampled(reading: Reading, rng: np.random.Generator) -> Reading:
    """Units of as many groups as there are, drawn with replacement."""
    count = len(next(iter(reading.columns.values())))
    names = range(count) if reading.groups is None else reading.groups
    codes = np.unique(np.asarray(names), return_inverse=True)[1]
    drawn = rng.integers(0, codes.max() + 1, codes.max() + 1)
    units = np.concatenate([np.flatnonzero(codes == code) for code in drawn])
    return Reading({name: column[units] for name, column in reading.columns.items()})


def objective_error(objective: Objective, before: Measured, after: Measured) -> float:
    """Standard error of an objective: its spread over bootstraps of the groups, in which both
    models read the same. Sample and general text are independent, and drawn apart.
    """
    drawn = []
    for seed in range(ERROR_RESAMPLES):
        both = [
            Measured(*(resampled(part, rng) for part, rng in zip(each, streams, strict=True)))
            for each in (before, after)
            for streams in [[np.random.default_rng((seed, place)) for place in range(2)]]
        ]
        drawn.append(objective(both[0], both[1]))
    return float(np.std(drawn, ddof=1))


def mean_reading(readings: Sequence[Reading]) -> Reading:
    """The mean of the draws of a control, unit by unit.

    Each draw was reduced to units before: the largest of averaged scores is not the average of the
    largest.
    """
    first = readings[0]
    columns = {
        name: np.mean([reading.columns[name] for reading in readings], axis=0)
        for name in first.columns
    }
    return Reading(columns, first.groups)
