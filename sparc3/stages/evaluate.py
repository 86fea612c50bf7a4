"""Evaluate: every circuit of a behaviour, before against after, on prompts it was not chosen on.

The same texts, items and random numbers serve the unpruned and every pruned model, so all
differences are paired. What is measured on the prompts that the circuit was chosen on, as the
reproduction did, stands beside under its own name, `in_sample`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparc3.base import artifacts
from sparc3.base.artifacts import circuit_names, circuit_path, read_prompts
from sparc3.base.errors import InputError
from sparc3.base.files import Array, read_json, write_csv, write_json, write_jsonl
from sparc3.base.params import Behaviour, Params
from sparc3.circuits.circuit import INTACT, Circuit, read_circuit, refuse_leak
from sparc3.measure import inference
from sparc3.measure.instrument import (
    Differences,
    How,
    Instrument,
    Measured,
    Reading,
    Sample,
    differences,
    effects,
    mean_reading,
)
from sparc3.measure.instruments import (
    completions,
    instruments_of,
    pairs,
    perplexity,
    primary_of,
)
from sparc3.measure.scorers import describe, scorer
from sparc3.model import loading

UNPRUNED = "none"  # the name of the model as it is, among those of circuits


class Setting(NamedTuple):
    """Everything that is measured on, the same for every circuit.

    samples: by split (test, in_sample), as each instrument takes it.
    rows: all that must be held out.
    elicited: by split, the mean score by which its prompts were chosen, if they were.
    """

    instruments: dict[str, Instrument]
    samples: dict[str, dict[str, Sample]]
    general: Sample
    second: Sample | None
    rows: list[dict[str, Any]]
    elicited: dict[str, float]

    @property
    def first(self) -> str:
        """The split that verdicts are of."""
        return next(iter(self.samples))


class Chosen(NamedTuple):
    """A circuit and the method that chose it; the unpruned model has none."""

    method: str | None
    circuit: Circuit


class Outcome(NamedTuple):
    """What one model gives in a setting; what was not asked for is absent."""

    general: Reading
    second: Reading | None
    samples: dict[str, dict[str, Reading]]

    def measured(self, split: str, instrument: str) -> Measured:
        return Measured(self.samples[split][instrument], self.general)


def load_setting(params: Params, behaviour: str, tokenizer: PreTrainedTokenizerBase) -> Setting:
    """The prompts of a behaviour by split, general text, and the second opinion's items.

    Without a share for the test split nothing is held out, and only the prompts that the circuit
    was chosen on are measured: the published protocol.
    """
    spec, evaluate = params.behaviours[behaviour], params.evaluate
    instruments = instruments_of(spec)
    paired = any(instrument.reads == "pair" for instrument in instruments.values())
    splits = {"test": "test"} if params.prepare.splits["test"] > 0 else {}
    by_split = {
        name: read_prompts(spec.prompts, split)[: evaluate.items if paired else evaluate.prompts]
        for name, split in {**splits, "in_sample": "attribute"}.items()
    }
    for name, rows in by_split.items():
        groups = len({row["group"] for row in rows})
        if groups < inference.MIN_CLUSTERS:
            raise InputError(
                f"params: behaviours.{behaviour}.prompts: {spec.prompts} has {groups} groups of "
                f"prompts for {name}, at least {inference.MIN_CLUSTERS} are needed for an "
                "interval; raise its count, or the share of the test split"
            )
    general = read_prompts(
        evaluate.general, None if evaluate.general in params.test_sets else "test"
    )[: evaluate.texts]
    second = read_prompts(spec.second, None)[: evaluate.items] if spec.second else []
    encode = perplexity.encode_joined if evaluate.joined else perplexity.encode
    return Setting(
        instruments,
        {
            split: {
                name: instrument.encode(rows, tokenizer) for name, instrument in instruments.items()
            }
            for split, rows in by_split.items()
        },
        encode(general, tokenizer),
        pairs.encode(second, tokenizer) if second else None,
        [*by_split.get("test", []), *general, *second],
        {
            split: float(np.mean([row["elicited"] for row in rows]))
            for split, rows in by_split.items()
            if all("elicited" in row for row in rows)
        },
    )


# --- measuring models ----------------------------------------------------------------------


def asked_of(
    params: Params, behaviour: str, method: str | None, setting: Setting
) -> dict[str, bool]:
    """By split that a circuit of `method` is measured on, whether it completes prompts there.

    All there is for the unpruned model, which has no method.
    """
    if method is None:
        return dict.fromkeys(setting.samples, True)
    leading, evaluate = params.behaviours[behaviour].method, params.evaluate
    asked = {setting.first: method == leading or method in evaluate.completed}
    if method in evaluate.in_sample:
        asked["in_sample"] = True
    return asked


def outcomes(
    params: Params,
    behaviour: str,
    circuits: Mapping[str, Chosen],
    setting: Setting,
    model: PreTrainedModel,
    how: How,
) -> dict[str, Outcome]:
    """Measure the model without each of `circuits`; the second opinion is asked of the unpruned
    model and of the behaviour's own method.
    """

    def read(
        instrument: Callable[..., list[Reading]], names: Sequence[str], sample: Sample, title: str
    ) -> dict[str, Reading]:
        total = len(names) * len(sample.ids)
        with tqdm(total=total, desc=f"evaluate {title}", unit="prompt") as bar:
            chosen = [circuits[name].circuit for name in names]
            readings = instrument(model, chosen, sample, how._replace(progress=bar.update))
        return dict(zip(names, readings, strict=True))

    methods = {name: chosen.method for name, chosen in circuits.items()}
    asked = {n: asked_of(params, behaviour, method, setting) for n, method in methods.items()}
    samples: dict[str, dict[str, dict[str, Reading]]] = {
        name: {split: {} for split in splits} for name, splits in asked.items()
    }
    for split, by_instrument in setting.samples.items():
        for key, sample in by_instrument.items():
            instrument = setting.instruments[key]
            names = [
                name
                for name, splits in asked.items()
                if splits.get(split, False) or (split in splits and not instrument.writes)
            ]
            for name, reading in read(instrument.read, names, sample, f"{key}, {split}").items():
                samples[name][split][key] = reading
    general = read(perplexity.read, list(circuits), setting.general, "general text")
    second: dict[str, Reading] = {}
    if setting.second is not None:
        own = params.behaviours[behaviour].method
        leading = [name for name, method in methods.items() if method in (None, own)]
        second = read(pairs.read, leading, setting.second, "second opinion")
    return {name: Outcome(general[name], second.get(name), samples[name]) for name in circuits}


# --- comparing them ------------------------------------------------------------------------


def result(
    before: Outcome,
    after: Outcome,
    control: Sequence[Outcome],
    setting: Setting,
    resamples: int,
) -> dict[str, Any]:
    """All differences of one circuit; `control`: outcomes of the draws of a control of its size."""
    found: dict[str, Any] = {
        "ppl_delta": perplexity.change(before.general, after.general, resamples)._asdict()
    }
    for split, readings in after.samples.items():
        changes: Differences = {}
        for key in readings:
            values = setting.instruments[key].values
            both = before.measured(split, key), after.measured(split, key)
            changes |= differences(values, *both, resamples)
        found[split] = {**changes, "values": levels(readings)}
    if control:
        found |= controlled(before, after, control, setting, resamples)
    if before.second is not None and after.second is not None:
        both = Measured(before.second, before.general), Measured(after.second, after.general)
        found["second"] = differences(pairs.VALUES, *both, resamples)
    return found


def levels(readings: Mapping[str, Reading]) -> dict[str, float]:
    """The plain values of one model, to stand beside the differences."""
    return {name: level for reading in readings.values() for name, level in reading.levels.items()}


def controlled(
    before: Outcome, after: Outcome, control: Sequence[Outcome], setting: Setting, resamples: int
) -> dict[str, dict[str, dict[str, float]]]:
    """A circuit against the mean of the draws of a control of as many neurons; and its effects
    among those of several draws, with their rank p.
    """
    split = setting.first
    against: Differences = {}
    among: Differences = {}
    for key in after.samples[split]:
        if key not in control[0].samples[split]:
            continue
        instrument = setting.instruments[key]
        start, end, *drawn = (each.measured(split, key) for each in (before, after, *control))
        mean = Measured(mean_reading([draw.reading for draw in drawn]), after.general)
        values = [value for value in instrument.values if value.controlled]
        against |= differences(values, mean, end, resamples)
        if len(control) > 1:
            rivals = [effects(instrument, start, draw) for draw in drawn]
            for name, value in effects(instrument, start, end).items():
                ranked = inference.against_draws(value, [rival[name] for rival in rivals])
                among[name] = ranked._asdict()
    return {"against_control": against, "among_controls": among}


# --- the stage -----------------------------------------------------------------------------


def read_circuits(
    params: Params, behaviour: str, held_out: Sequence[Mapping[str, Any]]
) -> dict[str, Chosen]:
    """Circuits of a behaviour by name. InputError: one was chosen on what is held out."""
    circuits = {}
    for method, row in params.methods.items():
        for name in circuit_names(method, row):
            path = circuit_path(behaviour, name)
            refuse_leak(held_out, read_json(path.with_suffix(".json")), str(path))
            circuits[name] = Chosen(method, read_circuit(path))
    return circuits


def baseline(params: Params, behaviour: str, before: Outcome, setting: Setting) -> dict[str, float]:
    """The unpruned model's own values, and by how much the score that chose a split's prompts
    exceeds what the same scorer gives to new completions of them.
    """
    found = {"perplexity": perplexity.perplexity(before.general)}
    keep = params.prompt_sets[params.behaviours[behaviour].prompts].keep
    for split, readings in before.samples.items():
        own = levels(readings)
        found |= {f"{split}_{name}": value for name, value in own.items()}
        if keep is not None and keep.scorer in own and split in setting.elicited:
            found[f"{split}_elicited_gap"] = setting.elicited[split] - own[keep.scorer]
    return found


def written(by_name: Mapping[str, Outcome], setting: Setting) -> list[dict[str, Any]]:
    """A row per completion: circuit, split and what the instrument says."""
    return [
        {"circuit": name, "split": split, **row}
        for split in setting.samples
        for name, outcome in by_name.items()
        for reading in outcome.samples.get(split, {}).values()
        for row in reading.written
    ]


def quality(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Quality of the completions by circuit and split."""
    cells: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        cells.setdefault(row["circuit"], {}).setdefault(row["split"], []).append(row)
    return {
        circuit: {split: completions.writing(members) for split, members in splits.items()}
        for circuit, splits in cells.items()
    }


def prompt_table(
    by_name: Mapping[str, Outcome], setting: Setting
) -> tuple[list[dict[str, object]], list[str]]:
    """Rows (circuit, split, prompt) and their columns: what every prompt gave under every model."""
    rows: list[dict[str, object]] = []
    columns = ["circuit", "split", "prompt", "group"]
    for name, outcome in by_name.items():
        for split, by_instrument in setting.samples.items():
            values: dict[str, Array] = {}
            for reading in outcome.samples.get(split, {}).values():
                values |= reading.prompts
            columns += [key for key in values if key not in columns]
            sample = next(iter(by_instrument.values()))
            for i, prompt in enumerate(sample.ids if values else ()):
                about = {"circuit": name, "split": split, "prompt": prompt}
                numbers = {key: float(column[i]) for key, column in values.items()}
                rows.append({**about, "group": sample.groups[i], **numbers})
    return rows, columns


def group_table(
    behaviour: Behaviour, by_name: Mapping[str, Outcome], split: str
) -> list[dict[str, object]]:
    """Rows (circuit, group): how many units a group has, and their mean of the column that the
    verdict is about. From these the report simulates what its tests can find.
    """
    primary = primary_of(behaviour)
    if primary is None:
        return []
    key, value = primary
    rows: list[dict[str, object]] = []
    for name, outcome in by_name.items():
        if key not in outcome.samples.get(split, {}):
            continue
        reading = outcome.samples[split][key]
        column = reading.columns[value.column]
        groups = reading.groups or [str(i) for i in range(len(column))]
        sums = inference.cluster_sums(np.column_stack([column, np.ones(len(column))]), groups)
        rows += [
            {"circuit": name, "group": group, "units": int(units), "mean": float(total / units)}
            for group, (total, units) in zip(sorted(set(groups)), sums, strict=True)
        ]
    return rows


def run(params: Params, behaviour: str) -> dict[str, float]:
    spec, evaluate = params.behaviours[behaviour], params.evaluate
    tokenizer = loading.tokenizer(params.model)
    setting = load_setting(params, behaviour, tokenizer)
    circuits = read_circuits(params, behaviour, setting.rows)
    specs = {name: params.scorers[name] for name in spec.scorers}
    scorers = {name: scorer(each, params.model.device) for name, each in specs.items()}
    how = How(evaluate, evaluate.batch_tokens, tokenizer, scorers)
    every = {UNPRUNED: Chosen(None, INTACT), **circuits}
    by_name = outcomes(params, behaviour, every, setting, loading.load(params.model), how)
    before = by_name[UNPRUNED]
    draws = circuit_names(evaluate.control, params.methods[evaluate.control])
    results = {}
    for name, (method, circuit) in circuits.items():
        of_size = method != evaluate.control and len(circuit) == len(circuits[draws[0]].circuit)
        control = [by_name[draw] for draw in draws] if of_size else []
        try:
            changes = result(before, by_name[name], control, setting, evaluate.resamples)
        except InputError as error:
            hint = "evaluate.prompts and evaluate.items say how many are read"
            raise InputError(f"evaluate: {behaviour}, circuit {name}: {error}; {hint}") from None
        results[name] = {"method": method, "num_neurons": len(circuit), **changes}
    rows = written(by_name, setting)
    found: dict[str, Any] = {
        "baseline": baseline(params, behaviour, before, setting),
        "circuits": results,
        "completions": quality(rows),
    }
    if "completions" in setting.instruments:
        scored = before.samples[setting.first]["completions"]
        found["scorer_agreement"] = completions.agreement(scored, list(specs), evaluate.resamples)
        found["scorers"] = {name: describe(each) for name, each in specs.items()}
    folder = artifacts.evaluation_folder(behaviour)
    write_jsonl(folder / "completions.jsonl", rows)
    write_csv(folder / "prompts.csv", *prompt_table(by_name, setting))
    grouped = group_table(spec, by_name, setting.first)
    write_csv(folder / "groups.csv", grouped, ["circuit", "group", "units", "mean"])
    write_json(artifacts.metrics_path("evaluate", behaviour), found)
    return {
        f"{name}.{key}": value
        for name, row in results.items()
        for key, value in (
            ("ppl_delta", row["ppl_delta"]["value"]),
            *((k, v["value"]) for k, v in row[setting.first].items() if k != "values"),
        )
    }
