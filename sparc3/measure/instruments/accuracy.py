"""Accuracy on questions with several answers, as lm-evaluation-harness scores them: the answer that
is likeliest after the question counts. `accuracy` takes the log-probability of the whole answer,
`accuracy_norm` that per character, which does not favour short answers.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparc3.base.errors import InputError
from sparc3.base.files import Array
from sparc3.base.params import Behaviour
from sparc3.circuits.ablate import Edit
from sparc3.measure import inference
from sparc3.measure.instrument import How, Instrument, Measured, Reading, Sample, Value, paired
from sparc3.measure.instruments.perplexity import ratio_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COLUMNS = ("accuracy", "accuracy_norm")


class Question(NamedTuple):
    """The question followed by each answer, the right one first; how many tokens the question
    itself has, and how many characters each answer.
    """

    sequences: list[list[int]]
    asked: int
    characters: list[int]


def encode(rows: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> Sample:
    """Rows with `choices`. InputError: an answer that adds no token of its own."""
    from sparc3.model import loading

    questions = []
    for row in rows:
        texts = [row["text"], *(f"{row['text']} {choice}" for choice in row["choices"])]
        alone, *sequences = loading.encode(tokenizer, texts)
        if min(map(len, sequences)) <= len(alone):
            raise InputError(f"prompt {row['id']} has an answer without a token of its own")
        questions.append(Question(sequences, len(alone), [len(each) for each in row["choices"]]))
    return Sample([row["id"] for row in rows], [row["group"] for row in rows], questions)


def read(
    model: "PreTrainedModel", edits: Sequence[Edit], sample: Sample, how: How
) -> list[Reading]:
    """COLUMNS, 100 where the right answer is the likeliest, else 0; a tie is not right."""
    from sparc3.measure.likelihood import continuation_nll

    questions: list[Question] = sample.tokens
    items = [question.sequences for question in questions], sample.ids
    readings = []
    for scored in continuation_nll(model, edits, *items, how.batch_tokens, how.progress):
        table = np.zeros((len(questions), len(COLUMNS)))
        for row, question, nlls in zip(table, questions, scored, strict=True):
            log_p = [-nll[question.asked - 1 :].sum(dtype=np.float64) for nll in nlls]
            for at, lengths in enumerate(([1] * len(log_p), question.characters)):
                right, *wrong = np.divide(log_p, lengths)
                row[at] = 100.0 * (right > max(wrong))
        columns: dict[str, Array] = dict(zip(COLUMNS, table.T, strict=True))
        readings.append(Reading(columns, sample.groups, prompts=columns))
    return readings


def levels(reading: Reading) -> dict[str, float]:
    return {name: float(reading.columns[name].mean()) for name in COLUMNS}


def costs(
    model: "PreTrainedModel", edits: Sequence[Edit], rows: Sequence[Mapping[str, Any]], how: How
) -> list[dict[str, float]]:
    """By edit, of which the first changes nothing: the points of accuracy that are lost, which
    `select.budget` may bound, and their standard error over groups; without questions nothing.
    """
    if not rows:
        return [{} for _ in edits]
    before, *others = read(model, edits, encode(rows, how.tokenizer), how)
    found = []
    for after in (before, *others):
        lost = before.columns["accuracy"] - after.columns["accuracy"]
        table = np.column_stack([lost, np.ones(len(lost))])
        error = ratio_error(*inference.cluster_sums(table, before.groups).T)
        found.append({"accuracy_loss": float(lost.mean()), "accuracy_error": error})
    return found


def _lost(before: Measured, after: Measured) -> float:
    return -float(after.reading.columns["accuracy"].mean())


VALUES = (
    Value("accuracy", paired("accuracy"), "accuracy, points", less=-1),
    Value("accuracy_norm", paired("accuracy_norm"), "normalised accuracy, points", less=-1),
)


def instrument(behaviour: Behaviour) -> Instrument:
    """Accuracy on a behaviour's own questions, for one that is measured by it."""
    return Instrument(
        encode=encode,
        read=read,
        values=VALUES,
        levels=levels,
        objective=_lost,
        axis="-accuracy, percent",
        cell="accuracy",
        reads="choices",
    )
