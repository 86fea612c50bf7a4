"""Evaluate: every circuit of a behaviour, before against after, on prompts it was not chosen on.

What is measured on the prompts that the circuit was chosen on, as the reproduction did, stands
beside under its own name, `in_sample`. Of a set with blocks every block is measured without the
circuits that were chosen on the blocks before it, and `in_sample` are the same prompts without the
circuit of all; that one is whose cost in perplexity is measured.
"""

import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparc3.base import artifacts
from sparc3.base.artifacts import circuit_names, circuit_path, read_prompts
from sparc3.base.errors import InputError
from sparc3.base.files import Array, read_json, write_csv, write_json, write_jsonl
from sparc3.base.params import Behaviour, Params, private_of
from sparc3.circuits import choose
from sparc3.circuits.ablate import Edit
from sparc3.circuits.circuit import INTACT, Circuit, read_circuit, refuse_leak
from sparc3.circuits.intervention import Intervention, read_intervention
from sparc3.circuits.methods import BAN
from sparc3.measure import inference, neurons, word_ban
from sparc3.measure.instrument import (
    Differences,
    How,
    Measured,
    Reading,
    differences,
    effect,
    floor_of,
    joined,
    mean_reading,
)
from sparc3.measure.instruments import (
    accuracy,
    completions,
    instruments_of,
    pairs,
    perplexity,
    primary_of,
)
from sparc3.measure.scorers import Scorer, describe, scorer
from sparc3.measure.setting import Chosen, Outcome, Setting, outcomes
from sparc3.model import loading

log = logging.getLogger(__name__)

UNPRUNED = "none"  # the name of the model as it is, among those of circuits
DESCRIBED, READ = 10, 50  # neurons that are described, by the first prompts of each set

Rows = list[dict[str, Any]]


# --- what is measured on -------------------------------------------------------------------


def rows_of(params: Params, behaviour: str) -> dict[str, dict[str, Rows]]:
    """A behaviour's prompts by split and block.

    Prompts that the circuit was chosen on are read if `evaluate.in_sample` names a method, and
    without a share for the test split: then nothing is held out, as in the published protocol.
    """
    spec, evaluate = params.behaviours[behaviour], params.evaluate
    if params.prompt_sets[spec.prompts].blocks is not None:
        held_out = artifacts.held_out(spec.prompts)
        seen = {"in_sample": {"": flat(held_out)}} if evaluate.in_sample else {}
        return {"test": held_out, **seen}
    paired = any(instrument.reads == "pair" for instrument in instruments_of(spec).values())
    most = evaluate.items if paired else evaluate.prompts
    splits = {"test": "test"} if params.prepare.splits["test"] > 0 else {}
    if evaluate.in_sample or not splits:
        splits["in_sample"] = "attribute"
    return {name: {"": read_prompts(spec.prompts, split)[:most]} for name, split in splits.items()}


def flat(by_block: Mapping[str, Rows]) -> Rows:
    return list(chain.from_iterable(by_block.values()))


def general_rows(params: Params) -> dict[str, Rows]:
    """Texts of every kind of general text."""
    texts, tested = params.evaluate.texts, params.test_sets
    return {
        name: read_prompts(name, None if name in tested else "test")[:texts]
        for name in params.evaluate.general
    }


def choices_rows(params: Params) -> dict[str, Rows]:
    """Questions with answers, of every set that is asked."""
    return {name: read_prompts(name, None) for name in params.evaluate.choices}


def second_rows(params: Params, behaviour: str) -> Rows:
    """Items of the second opinion, if there is one."""
    second = params.behaviours[behaviour].second
    return read_prompts(second, None) if second else []


def check_groups(params: Params, behaviour: str, rows: Mapping[str, Mapping[str, Rows]]) -> None:
    """InputError for prompts of too few groups for an interval."""
    for split, by_block in rows.items():
        groups = len({row["group"] for block in by_block.values() for row in block})
        if groups < inference.MIN_CLUSTERS:
            prompts = params.behaviours[behaviour].prompts
            raise InputError(
                f"params: behaviours.{behaviour}.prompts: {prompts} has {groups} groups of "
                f"prompts for {split}, at least {inference.MIN_CLUSTERS} are needed for an "
                "interval; raise its count, or the share of the test split"
            )


def setting_of(
    params: Params,
    behaviour: str,
    rows: Mapping[str, Mapping[str, Rows]],
    tokenizer: PreTrainedTokenizerBase,
) -> Setting:
    """The prompts of a behaviour, general text and the second opinion's items, tokenised."""
    instruments = instruments_of(params.behaviours[behaviour])
    encode = perplexity.encode_joined if params.evaluate.joined else perplexity.encode
    texts, second = general_rows(params), second_rows(params, behaviour)
    return Setting(
        instruments,
        {
            split: {
                block: {name: each.encode(there, tokenizer) for name, each in instruments.items()}
                for block, there in by_block.items()
            }
            for split, by_block in rows.items()
        },
        {
            name: (perplexity.encode if place else encode)(there, tokenizer)
            for place, (name, there) in enumerate(texts.items())
        },
        {name: accuracy.encode(there, tokenizer) for name, there in choices_rows(params).items()},
        pairs.encode(second, tokenizer) if second else None,
    )


def read_circuits(
    params: Params, behaviour: str, held_out: Mapping[str, Rows], methods: Sequence[str]
) -> dict[str, Chosen]:
    """Circuits of a behaviour by name. `held_out`: by block, what its circuits may not have seen;
    general text, questions and the second opinion are added. InputError: one was chosen on it.
    """
    asked = {**general_rows(params), **choices_rows(params)}
    others = [*flat(asked), *second_rows(params, behaviour)]
    circuits = {}
    for method in methods:
        steers = method in params.steer.interventions
        path_of, read = (
            (artifacts.intervention_path, read_intervention)
            if steers
            else (circuit_path, read_circuit)
        )
        for draw, name in enumerate(artifacts.names_of(params, method)):
            by_block: dict[str, Edit] = {}
            for block in {"": [], **held_out}:
                path = path_of(behaviour, name, block)
                rows = [*held_out.get(block, []), *others]
                refuse_leak(rows, read_json(path.with_suffix(".json")), str(path))
                by_block[block] = read(path)
            circuits[name] = Chosen(method, by_block, draw)
    return circuits


def fitted_ban(params: Params, spec: Behaviour, model: PreTrainedModel, how: How) -> list[int]:
    """Tokens of the words that the first scorer calls bad in attribute prompts: as many as keep to
    the budget on the sweep's texts and questions, read and chosen by the rule that circuits are.
    """
    seen = [
        row["text"]
        for name in (spec.prompts, spec.reference)
        for row in read_prompts(name, "attribute")
    ]
    ranked = word_ban.bad_tokens(seen, how.tokenizer, how.scorers[spec.scorers[0]])
    texts = read_prompts(params.differential.general, "tune")[: params.sweep.texts]
    counts = sorted({min(count, len(ranked)) for count in params.evaluate.ban})

    edits = [INTACT, *(word_ban.word_ban(ranked[:count]) for count in counts)]
    _, *found = perplexity.read_until(model, edits, texts, how, params.sweep.error)
    asked = [row for name in params.sweep.choices for row in read_prompts(name, None)]
    _, *lost = accuracy.costs(model, edits, asked, how)
    within = [
        count
        for count, each, points in zip(counts, found, lost, strict=True)
        if choose.keeps(params.select.budget, perplexity.costs(*each) | points)
    ]
    return ranked[: max(within, default=0)]


# --- comparing models ----------------------------------------------------------------------


def result(
    by_name: Mapping[str, Outcome],
    name: str,
    rivals: Sequence[str],
    setting: Setting,
    resamples: int,
) -> dict[str, Any]:
    """All differences of a circuit. `rivals`: draws of a control of its size, and the word ban."""
    before, after = by_name[UNPRUNED], by_name[name]
    found: dict[str, Any] = {
        "texts": {
            name: perplexity.change(before.texts[name], reading, resamples)._asdict()
            for name, reading in after.texts.items()
        },
    }
    if found["texts"]:
        found["ppl_delta"] = next(iter(found["texts"].values()))
    if after.texts.keys() == before.texts.keys():
        every = perplexity.divergence(joined(list(after.texts.values())), resamples)
        found["kl"] = {key: estimate._asdict() for key, estimate in every.items()}
    for split, readings in after.samples.items():
        changes: Differences = {}
        for key in readings:
            values = setting.instruments[key].values
            both = before.measured(split, key), after.measured(split, key)
            changes |= differences(values, *both, resamples)
        found[split] = {**changes, "values": levels(setting, readings)}
    if after.choices:
        found["accuracy"] = accuracies(before, after, resamples)
    if draws := [by_name[rival] for rival in rivals if rival != BAN]:
        found |= against(before, after, draws, setting, resamples)
    if BAN in rivals:
        ban = against(before, after, [by_name[BAN]], setting, resamples)
        found["against_ban"] = ban["against_control"]
    if before.second is not None and after.second is not None:
        both = Measured(before.second, before.general), Measured(after.second, after.general)
        found["second"] = {
            **differences(pairs.VALUES, *both, resamples),
            "values": pairs.levels(before.second),
        }
    return found


def accuracies(before: Outcome, after: Outcome, resamples: int) -> dict[str, Differences]:
    """Changes of accuracy on each set of questions, and on all of them together."""
    sets = {
        name: (Measured(old, before.general), Measured(after.choices[name], after.general))
        for name, old in before.choices.items()
    }
    old, new = (joined([pair[at].reading for pair in sets.values()]) for at in range(2))
    every = Measured(old, before.general), Measured(new, after.general)
    return {
        name: differences(accuracy.VALUES, *both, resamples)
        for name, both in {"all": every, **sets}.items()
    }


def levels(setting: Setting, readings: Mapping[str, Reading]) -> dict[str, float]:
    """The plain values of one model, to stand beside the differences."""
    found: dict[str, float] = {}
    for key, reading in readings.items():
        found |= setting.instruments[key].levels(reading)
    return found


def against(
    before: Outcome, after: Outcome, rivals: Sequence[Outcome], setting: Setting, resamples: int
) -> dict[str, dict[str, Any]]:
    """A circuit against the mean of some rivals; and its effects, larger is less of the behaviour,
    among those of them, with rank p and the interval in which another would be expected.
    """
    split = setting.first
    difference: Differences = {}
    among: dict[str, dict[str, float]] = {}
    for key in after.samples[split]:
        there = [rival for rival in rivals if key in rival.samples[split]]
        if not there:
            continue
        instrument = setting.instruments[key]
        start, end, *drawn = (each.measured(split, key) for each in (before, after, *there))
        values = [value for value in instrument.values if value.controlled]
        general = [each.general for each in drawn if each.general.columns]
        mean = Measured(mean_reading([each.reading for each in drawn]), mean_reading(general))
        difference |= differences(values, mean, end, resamples)
        for value in values:
            own, *theirs = (effect(value, start, each) for each in (end, *drawn))
            if own is not None:
                others = [each for each in theirs if each is not None]
                among[value.name] = inference.against_draws(own, others)._asdict()
    return {"against_control": difference, "among_controls": among}


# --- the stage -----------------------------------------------------------------------------


def baseline(
    params: Params,
    behaviour: str,
    before: Outcome,
    setting: Setting,
    rows: Mapping[str, Mapping[str, Rows]],
) -> dict[str, float]:
    """The unpruned model's own values, and by how much the score that chose a split's prompts
    exceeds what the same scorer gives to new completions of them.
    """
    found = {"perplexity": perplexity.perplexity(before.general)}
    found |= {f"perplexity_{n}": perplexity.perplexity(text) for n, text in before.texts.items()}
    for name, reading in before.choices.items():
        found |= {f"{key}_{name}": value for key, value in accuracy.levels(reading).items()}
    keep = params.prompt_sets[params.behaviours[behaviour].prompts].keep
    for split, readings in before.samples.items():
        own = levels(setting, readings)
        found |= {f"{split}_{name}": value for name, value in own.items()}
        elicited = [row["elicited"] for row in flat(rows[split]) if "elicited" in row]
        if keep is not None and keep.scorer in own and elicited:
            found[f"{split}_elicited_gap"] = float(np.mean(elicited)) - own[keep.scorer]
    return found


def written(by_name: Mapping[str, Outcome], setting: Setting) -> Rows:
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
    by_name: Mapping[str, Outcome], rows: Mapping[str, Mapping[str, Rows]]
) -> tuple[list[dict[str, object]], list[str]]:
    """Rows (circuit, split, prompt) and their columns: what every prompt gave under every model."""
    table: list[dict[str, object]] = []
    columns = ["circuit", "split", "prompt", "group"]
    for name, outcome in by_name.items():
        for split, by_block in rows.items():
            values: dict[str, Array] = {}
            for reading in outcome.samples.get(split, {}).values():
                values |= reading.prompts
            columns += [key for key in values if key not in columns]
            for i, prompt in enumerate(flat(by_block) if values else ()):
                about = {"circuit": name, "split": split, "prompt": prompt["id"]}
                numbers = {key: float(column[i]) for key, column in values.items()}
                table.append({**about, "group": prompt["group"], **numbers})
    return table, columns


def group_table(
    behaviour: Behaviour, by_name: Mapping[str, Outcome], split: str
) -> list[dict[str, object]]:
    """Rows (circuit, group): how many units a group has, and their mean of the column that the
    verdict is about, above its floor. From these the report simulates what its tests can find.
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
        column = reading.columns[value.column] - floor_of(reading, value.floor)
        groups = reading.groups or [str(i) for i in range(len(column))]
        sums = inference.cluster_sums(np.column_stack([column, np.ones(len(column))]), groups)
        rows += [
            {"circuit": name, "group": group, "units": int(units), "mean": float(total / units)}
            for group, (total, units) in zip(sorted(set(groups)), sums, strict=True)
        ]
    return rows


def scorers_of(params: Params, spec: Behaviour) -> dict[str, Scorer]:
    return {name: scorer(params.scorers[name], params.model.device) for name in spec.scorers}


def measure(
    params: Params,
    behaviour: str,
    rows: Mapping[str, Mapping[str, Rows]],
    methods: Sequence[str],
    model: PreTrainedModel,
) -> tuple[Setting, dict[str, Outcome], dict[str, dict[str, Any]]]:
    """What the model gives on `rows`, by split and block, with and without circuits, and all
    differences of each circuit of `methods`. InputError: a circuit was chosen on rows of the test
    split.
    """
    spec, evaluate = params.behaviours[behaviour], params.evaluate
    check_groups(params, behaviour, rows)
    tokenizer = loading.tokenizer(params.model)
    setting = setting_of(params, behaviour, rows, tokenizer)
    held_out = rows.get("test", {})
    circuits = read_circuits(params, behaviour, held_out, methods)
    floors = {name: params.scorers[name].floor for name in spec.scorers}
    scorers = scorers_of(params, spec)
    how = How(evaluate, evaluate.batch_tokens, tokenizer, scorers, floors=floors)
    intact = Chosen(None, dict.fromkeys(["", *held_out], INTACT))
    asked = {UNPRUNED: intact, **circuits}
    writes = any(each.writes for each in setting.instruments.values())
    ban: list[int] | None = None
    if writes and evaluate.ban and spec.scorers:
        ban = fitted_ban(params, spec, model, how)
        asked[BAN] = Chosen(BAN, dict.fromkeys(["", *held_out], word_ban.word_ban(ban)))
    by_name = outcomes(spec, asked, setting, model, how)
    results: dict[str, dict[str, Any]] = {}
    if ban is not None:
        about = {
            "method": BAN,
            "num_neurons": 0,
            "tokens": []
            if private_of(params, behaviour)
            else tokenizer.batch_decode([[t] for t in ban]),
        }
        results[BAN] = about | result(by_name, BAN, [], setting, evaluate.resamples)
    sizes = {n: len(e) if isinstance(e := c.edits[""], Circuit) else 0 for n, c in circuits.items()}
    draws = circuit_names(evaluate.control, params.methods[evaluate.control])
    for name, (method, by_block, _) in circuits.items():
        count = sizes[name]
        of_size = method != evaluate.control and count == sizes[draws[0]]
        rivals = [*(draws if of_size else ()), *([BAN] if BAN in by_name else ())]
        try:
            changes = result(by_name, name, rivals, setting, evaluate.resamples)
        except InputError as error:
            hint = "evaluate.prompts and evaluate.items say how many are read"
            raise InputError(f"evaluate: {behaviour}, circuit {name}: {error}; {hint}") from None
        about = {"method": method, "num_neurons": count}
        if isinstance(edit := by_block[""], Intervention):
            about["strength"] = edit.strength
        results[name] = about | changes
    return setting, by_name, results


def outcome_of(spec: Behaviour, row: Mapping[str, Any], split: str) -> str:
    """What the behaviour's own circuit did, in a line."""

    def change(title: str, found: Mapping[str, float], digits: int) -> str:
        value, low, high = (f"{found[key]:+.{digits}f}" for key in ("value", "low", "high"))
        return f"{title} {value} [{low}, {high}]"

    parts, primary = [f"without {row['num_neurons']} neurons of {spec.method}"], primary_of(spec)
    if primary and primary[1].name in row[split]:
        parts.append(change(primary[1].title, row[split][primary[1].name], primary[1].digits))
    if texts := row["texts"]:
        worst = max(texts, key=lambda name: texts[name]["value"])
        parts.append(change(f"perplexity % of {worst}", texts[worst], 1))
    return "; ".join(parts)


def described(params: Params, behaviour: str, model: PreTrainedModel) -> Rows:
    """What the first neurons of the own method's circuit do, on texts that it was chosen on; of
    private sets none.
    """
    spec = params.behaviours[behaviour]
    circuit = read_circuit(circuit_path(behaviour, spec.method)).first(DESCRIBED)
    texts = {
        name: [
            text
            for row in read_prompts(name, "attribute")[:READ]
            for text in row.get("pair", [row["text"]])
        ]
        for name in (spec.prompts, spec.reference)
        if not params.prompt_sets[name].private
    }
    return neurons.describe(model, loading.tokenizer(params.model), circuit, texts)


def run(params: Params, behaviour: str) -> dict[str, float]:
    spec, rows = params.behaviours[behaviour], rows_of(params, behaviour)
    model = loading.load(params.model)
    methods = [*params.methods, *params.steer.interventions]
    setting, by_name, results = measure(params, behaviour, rows, methods, model)
    before, lines = by_name[UNPRUNED], written(by_name, setting)
    found: dict[str, Any] = {
        "baseline": baseline(params, behaviour, before, setting, rows),
        "circuits": results,
        "completions": quality(lines),
    }
    if "completions" in setting.instruments:
        scored = before.samples[setting.first]["completions"]
        names = list(spec.scorers)
        found["scorer_agreement"] = completions.agreement(scored, names, params.evaluate.resamples)
        found["scorers"] = {name: describe(params.scorers[name]) for name in names}
    folder = artifacts.evaluation_folder(behaviour)
    write_jsonl(folder / "completions.jsonl", lines)
    write_csv(folder / "prompts.csv", *prompt_table(by_name, rows))
    grouped = group_table(spec, by_name, setting.first)
    write_csv(folder / "groups.csv", grouped, ["circuit", "group", "units", "mean"])
    write_json(folder / "neurons.json", described(params, behaviour, model))
    write_json(artifacts.metrics_path("evaluate", behaviour), found)
    log.info("evaluate %s: %s", behaviour, outcome_of(spec, results[spec.method], setting.first))
    return {
        f"{name}.{key}": value
        for name, row in results.items()
        for key, value in (
            *([("ppl_delta", row["ppl_delta"]["value"])] if "ppl_delta" in row else []),
            *((k, v["value"]) for k, v in row[setting.first].items() if k != "values"),
        )
    }
