"""A setting: everything that a behaviour is measured on, and what models give there.

The same texts, items and random numbers serve the unpruned and every pruned model, so all
differences are paired. Prompts come by block, each of which is read without circuits of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from sparc3.base.params import Behaviour, Evaluate
from sparc3.circuits.ablate import Edit
from sparc3.circuits.circuit import Circuit
from sparc3.measure.instrument import How, Instrument, Measured, Reading, Sample, joined
from sparc3.measure.instruments import accuracy, pairs, perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Setting(NamedTuple):
    """What is measured on, the same for every circuit.

    samples: by split (test, in_sample), block and instrument. The first split is what verdicts are
        of.
    texts: kinds of general text; from the first, shifts are set off.
    choices: questions with answers, by set.
    second: items of the second opinion.
    """

    instruments: Mapping[str, Instrument]
    samples: Mapping[str, Mapping[str, Mapping[str, Sample]]]
    texts: Mapping[str, Sample]
    choices: Mapping[str, Sample]
    second: Sample | None = None

    @property
    def first(self) -> str:
        return next(iter(self.samples))


class Chosen(NamedTuple):
    """A method's edits, by block ("": of all that may be seen), and which of its draws they are;
    the unpruned model has no method.
    """

    method: str | None
    edits: Mapping[str, Edit]
    draw: int = 0

    @property
    def steers(self) -> bool:
        """Whether they are interventions, which always write completions."""
        return not isinstance(self.edits[""], Circuit)


class Outcome(NamedTuple):
    """What one model gives in a setting; what was not asked for is absent, or empty."""

    texts: Mapping[str, Reading]
    samples: Mapping[str, Mapping[str, Reading]]
    choices: Mapping[str, Reading]
    second: Reading | None

    @property
    def general(self) -> Reading:
        return next(iter(self.texts.values()), Reading({}))

    def measured(self, split: str, instrument: str) -> Measured:
        return Measured(self.samples[split][instrument], self.general)


def asked_of(evaluate: Evaluate, own: str, chosen: Chosen, setting: Setting) -> dict[str, bool]:
    """By split that a circuit is measured on, whether it completes prompts there: all there is for
    the unpruned model, and of a method's draws only the first `evaluate.drawn` complete.
    """
    method, completing = chosen.method, chosen.draw < evaluate.drawn
    if method is None:
        return dict.fromkeys(setting.samples, True)
    writes = chosen.steers or method in (own, *(evaluate.completed or ()))
    asked = {setting.first: completing and writes}
    if completing and method in evaluate.in_sample:
        asked["in_sample"] = True
    return {split: writes for split, writes in asked.items() if split in setting.samples}


def outcomes(
    spec: Behaviour,
    circuits: Mapping[str, Chosen],
    setting: Setting,
    model: "PreTrainedModel",
    how: How,
) -> dict[str, Outcome]:
    """Measure the model under each of `circuits`, by name.

    Of a method's draws the first reads all general text and answers questions, `evaluate.drawn`,
    and all where an instrument sets off values against it, read the first kind. The second opinion
    is asked of the unpruned model and of the behaviour's own method.
    """

    def read(
        instrument: Callable[..., list[Reading]],
        names: Sequence[str],
        samples: Mapping[str, Sample],
        title: str,
    ) -> dict[str, Reading]:
        total = len(names) * sum(len(sample.ids) for sample in samples.values())
        with tqdm(total=total, desc=f"evaluate {title}", unit="prompt") as bar:
            asked = how._replace(progress=bar.update)
            parts = [
                instrument(model, [circuits[n].edits[block] for n in names], sample, asked)
                for block, sample in samples.items()
            ]
        return {name: joined([part[at] for part in parts]) for at, name in enumerate(names)}

    asked = {n: asked_of(how.evaluate, spec.method, c, setting) for n, c in circuits.items()}
    samples: dict[str, dict[str, dict[str, Reading]]] = {
        name: {split: {} for split in splits} for name, splits in asked.items()
    }
    for split, by_block in setting.samples.items():
        for key, instrument in setting.instruments.items():
            names = [
                name
                for name, splits in asked.items()
                if splits.get(split, False) or (split in splits and not instrument.writes)
            ]
            parts = {block: by_instrument[key] for block, by_instrument in by_block.items()}
            for name, reading in read(instrument.read, names, parts, f"{key}, {split}").items():
                samples[name][split][key] = reading
    texts, choices = ({name: dict[str, Reading]() for name in circuits} for _ in range(2))
    once = [name for name, chosen in circuits.items() if chosen.draw < 1]
    every = any(instrument.set_off for instrument in setting.instruments.values())
    drawn = [n for n, chosen in circuits.items() if every or chosen.draw < how.evaluate.drawn]
    for place, (text, sample) in enumerate(setting.texts.items()):
        who = once if place else drawn
        for name, reading in read(perplexity.read, who, {"": sample}, text).items():
            texts[name][text] = reading
    for questions, sample in setting.choices.items():
        for name, reading in read(accuracy.read, once, {"": sample}, questions).items():
            choices[name][questions] = reading
    second: dict[str, Reading] = {}
    if setting.second is not None:
        names = [name for name, chosen in circuits.items() if chosen.method in (None, spec.method)]
        second = read(pairs.read, names, {"": setting.second}, "second opinion")
    return {n: Outcome(texts[n], samples[n], choices[n], second.get(n)) for n in circuits}
