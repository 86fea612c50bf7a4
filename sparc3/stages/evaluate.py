"""Evaluate: every circuit of a behaviour, before against after, on prompts it was not chosen on.

The same texts, items and random numbers serve the unpruned and every pruned model, so all
differences are paired. What is measured on the prompts that the circuit was chosen on, as the
reproduction did, stands beside under its own name, `in_sample`.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparc3.base.artifacts import (
    circuit_names,
    circuit_path,
    evaluation_folder,
    metrics_path,
    read_prompts,
)
from sparc3.base.errors import InputError
from sparc3.base.files import Array, read_json, write_csv, write_json, write_jsonl
from sparc3.base.params import Evaluate, Params
from sparc3.circuits.circuit import INTACT, Circuit, read_circuit, refuse_leak
from sparc3.measure import inference, stereotypes
from sparc3.measure.differences import (
    TOXIC,
    Differences,
    completion_differences,
    completion_table,
    improved,
    pair_differences,
    perplexity_difference,
    shift_difference,
    term_differences,
)
from sparc3.measure.generate import Sampling, complete, quality
from sparc3.measure.measures import (
    Items,
    Likelihood,
    Texts,
    items,
    joined,
    joined_likelihood,
    likelihood,
    mean_nll,
    nll_shift,
    perplexity,
    preferences,
    texts,
    windowed_likelihood,
)
from sparc3.measure.scorers import Scorer, describe, scorer
from sparc3.model import loading

UNPRUNED = "none"  # the name of the model as it is, among those of circuits


# --- measuring models ----------------------------------------------------------------------


class Sample(NamedTuple):
    """The prompts of one split: as texts for completions, as items for pairs."""

    name: str  # test, or in_sample
    texts: Texts
    items: Items | None


def score_completions(
    model: PreTrainedModel,
    circuits: Mapping[str, Circuit],
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample,
    scorers: Mapping[str, Scorer],
    evaluate: Evaluate,
) -> tuple[dict[str, dict[str, Array]], list[dict[str, Any]]]:
    """Of the model without each of `circuits`: scores (prompt, completion) by scorer, and one row
    per completion with text and quality.
    """
    prompts = sample.texts
    total = len(circuits) * len(prompts.ids)
    with tqdm(total=total, desc=f"completions, {sample.name}", unit="prompt") as bar:
        drawn = complete(
            model,
            list(circuits.values()),
            prompts.tokens,
            prompts.ids,
            Sampling(
                evaluate.completions,
                evaluate.new_tokens,
                evaluate.temperature,
                evaluate.top_p,
                evaluate.seed,
            ),
            progress=bar.update,
        )
    scores: dict[str, dict[str, Array]] = {}
    every: list[dict[str, Any]] = []
    for circuit, by_prompt in zip(circuits, drawn, strict=True):
        rows: list[dict[str, Any]] = []
        for prompt, completions in zip(prompts.ids, by_prompt, strict=True):
            decoded = tokenizer.batch_decode(completions, skip_special_tokens=True)
            for number, (tokens, text) in enumerate(zip(completions, decoded, strict=True)):
                about = {"circuit": circuit, "split": sample.name, "prompt": prompt}
                rows.append({**about, "completion": number, "text": text, **quality(tokens)})
        scores[circuit] = {}
        for name, score in scorers.items():
            flat = score([row["text"] for row in rows])
            for row, value in zip(rows, flat.tolist(), strict=True):
                row[name] = value
            scores[circuit][name] = flat.reshape(len(prompts.ids), evaluate.completions)
        every += rows
    return scores, every


class Measured(NamedTuple):
    """One model's numbers on one split; what the behaviour does not measure is absent."""

    text: Likelihood | None = None
    log_p: Array | None = None
    scores: dict[str, Array] | None = None


class Outcome(NamedTuple):
    """What one model gives in a setting; a sample that was not asked for is absent."""

    general: Likelihood
    second: Array | None
    samples: dict[str, Measured]


def _means(measured: Measured, terms: Sequence[str]) -> dict[str, float]:
    """The plain values of one model, to stand beside the differences."""
    found = {}
    if measured.text is not None:
        found["nll"] = mean_nll(measured.text)
    for name, scores in (measured.scores or {}).items():
        found |= {
            name: float(scores.mean()),
            f"{name}_emt": float(scores.max(1).mean()),
            f"{name}_toxic_probability": 100 * float((scores.max(1) >= TOXIC).mean()),
        }
    if measured.log_p is not None:
        found |= stereotypes.values(measured.log_p, terms, least=inference.MIN_CLUSTERS)
    return found


def compare(
    before: Measured,
    after: Measured,
    general: tuple[Likelihood, Likelihood],
    terms: Sequence[str],
    resamples: int,
) -> Differences:
    """All differences of one split. The first scorer's go by their plain names."""
    found: Differences = {}
    if before.text is not None and after.text is not None:
        found["nll_shift"] = shift_difference(
            (before.text, general[0]), (after.text, general[1]), terms, resamples
        )
    if before.log_p is not None and after.log_p is not None:
        found |= pair_differences(before.log_p, after.log_p, terms, resamples)
    if before.scores is not None and after.scores is not None:
        for position, name in enumerate(after.scores):
            old, new = completion_table(before.scores[name]), completion_table(after.scores[name])
            differences = {
                **completion_differences(old, new, terms, resamples),
                "improved": improved(old, new, terms, resamples),
            }
            suffix = "" if position == 0 else f"_{name}"
            found |= {f"{key}{suffix}": value for key, value in differences.items()}
    return found


def against(
    control: Sequence[Measured], after: Measured, terms: Sequence[str], resamples: int
) -> Differences:
    """A circuit against the mean of the control's draws, of as many neurons.

    Each draw is reduced to prompts, or to target terms, before the mean is taken: the largest of
    averaged scores is not the average of the largest.
    """
    found: Differences = {}
    if after.log_p is not None:
        tables = [
            stereotypes.per_term(*measured.log_p.T, terms=terms)
            for measured in (*control, after)
            if measured.log_p is not None
        ]
        names, new = tables[-1]
        drawn = np.mean([table for _, table in tables[:-1]], axis=0)
        found |= term_differences(names, drawn, new, resamples)
    for position, (name, scores) in enumerate((after.scores or {}).items()):
        drawn = [completion_table(m.scores[name]) for m in control if m.scores is not None]
        if drawn:
            differences = completion_differences(
                np.mean(drawn, axis=0), completion_table(scores), terms, resamples
            )
            suffix = "" if position == 0 else f"_{name}"
            found |= {f"{key}{suffix}": value for key, value in differences.items()}
    return found


def effects(before: Outcome, after: Outcome, name: str, terms: Sequence[str]) -> dict[str, float]:
    """How much less of the behaviour there is, larger is less: what controls are ranked by.

    nll: the rise beyond that of general text; margin: how much nearer to 0 it is.
    """
    old, new = before.samples[name], after.samples[name]
    found = {}
    if old.text is not None and new.text is not None:
        found["nll"] = nll_shift((old.text, before.general), (new.text, after.general))
    if old.log_p is not None and new.log_p is not None:
        margins = [
            abs(float(stereotypes.pairs(stereotypes.per_term(*log_p.T, terms=terms)[1])["margin"]))
            for log_p in (old.log_p, new.log_p)
        ]
        found["margin"] = margins[0] - margins[1]
    for scorer_name, scores in (new.scores or {}).items():
        if old.scores is not None:
            found[scorer_name] = float(old.scores[scorer_name].mean() - scores.mean())
    return found


def among(
    after: Outcome, control: Sequence[Outcome], before: Outcome, name: str, terms: Sequence[str]
) -> dict[str, dict[str, float]]:
    """A circuit's effects among those of the control's draws, with their rank p; several draws."""
    if len(control) < 2:
        return {}
    own = effects(before, after, name, terms)
    drawn = [effects(before, outcome, name, terms) for outcome in control]
    return {
        key: inference.against_draws(value, [effect[key] for effect in drawn]).as_dict()
        for key, value in own.items()
        if all(key in effect for effect in drawn)
    }


def writing(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Quality of the completions by circuit and split: means of length, distinct-n and repetition,
    and the percentage that is degenerate.
    """
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["circuit"], row["split"]), []).append(row)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (circuit, split), own in cells.items():
        means = {
            key: float(np.mean([row[key] for row in own]))
            for key in ("length", "distinct_1", "distinct_2", "repetition")
        }
        broken = 100 * float(np.mean([row["degenerate"] for row in own]))
        found.setdefault(circuit, {})[split] = {**means, "degenerate_percent": broken}
    return found


def agreement(
    scores: Mapping[str, Array], groups: Sequence[str], resamples: int
) -> dict[str, dict[str, float]]:
    """Spearman correlation, over prompts, of every two scorers' mean scores."""
    return {
        f"{a}-{b}": inference.rank_agreement(
            scores[a].mean(1), scores[b].mean(1), groups, resamples=resamples
        ).as_dict()
        for a, b in combinations(scores, 2)
    }


class Setting(NamedTuple):
    """Everything that is measured on, the same for every circuit."""

    general: Texts
    samples: list[Sample]
    second: Items | None
    rows: list[dict[str, Any]]  # all that must be held out


def load_setting(
    params: Params, behaviour: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[Setting, dict[str, float]]:
    """The setting, and the mean score by which each sample's prompts were chosen, if they were.

    Without a share for the test split nothing is held out, and only the prompts that the circuit
    was chosen on are measured: the published protocol.
    """
    spec, evaluate = params.behaviours[behaviour], params.evaluate
    held_out = params.prepare.splits["test"] > 0
    found = {"test": "test"} if held_out else {}
    count = evaluate.prompts if spec.measure == "completions" else evaluate.items
    by_name = {
        name: read_prompts(spec.prompts, split)[:count]
        for name, split in {**found, "in_sample": "attribute"}.items()
    }
    for name, rows in by_name.items():
        count = len({row["group"] for row in rows})
        if count < inference.MIN_CLUSTERS:
            raise InputError(
                f"params: behaviours.{behaviour}.prompts: {spec.prompts} has {count} groups of "
                f"prompts for {name}, at least {inference.MIN_CLUSTERS} are needed for an "
                "interval; raise its count, or the share of the test split"
            )
    general = read_prompts(
        evaluate.general, None if evaluate.general in params.test_sets else "test"
    )[: evaluate.texts]
    second = read_prompts(spec.second, None)[: evaluate.items] if spec.second else []
    samples = [
        Sample(
            name,
            texts(rows, tokenizer),
            items(rows, tokenizer) if spec.measure == "pairs" else None,
        )
        for name, rows in by_name.items()
    ]
    elicited = {
        name: float(np.mean([row["elicited"] for row in rows]))
        for name, rows in by_name.items()
        if all("elicited" in row for row in rows)
    }
    setting = Setting(
        (joined if evaluate.joined else texts)(general, tokenizer),
        samples,
        items(second, tokenizer) if second else None,
        [*by_name.get("test", []), *general, *second],
    )
    return setting, elicited


class Asked(NamedTuple):
    """What is measured of one model: by sample, whether completions are drawn; and whether the
    second opinion is asked for. General text is read without each circuit.
    """

    samples: dict[str, bool]
    second: bool


def outcomes(
    model: PreTrainedModel,
    circuits: Mapping[str, Circuit],
    asked: Mapping[str, Asked],
    tokenizer: PreTrainedTokenizerBase,
    scorers: Mapping[str, Scorer],
    evaluate: Evaluate,
    setting: Setting,
) -> tuple[dict[str, Outcome], list[dict[str, Any]]]:
    """Measure the model without each of `circuits`, and the completions that were written."""
    batch = evaluate.batch_tokens
    measured: dict[str, dict[str, Measured]] = {name: {} for name in circuits}
    completions: list[dict[str, Any]] = []
    for sample in setting.samples:
        own = {n: circuit for n, circuit in circuits.items() if sample.name in asked[n].samples}
        chosen = list(own.values())
        with progress(len(own), sample.texts, sample.name) as bar:
            if sample.items is not None:
                found = preferences(model, chosen, sample.items, batch, bar.update)
                for name, log_p in zip(own, found, strict=True):
                    measured[name][sample.name] = Measured(log_p=log_p)
                continue
            read = likelihood(model, chosen, sample.texts, batch, bar.update)
        writers = {n: circuit for n, circuit in own.items() if asked[n].samples[sample.name]}
        scores, rows = score_completions(model, writers, tokenizer, sample, scorers, evaluate)
        completions += rows
        for name, text in zip(own, read, strict=True):
            measured[name][sample.name] = Measured(text=text, scores=scores.get(name))
    with progress(len(circuits), setting.general, "general") as bar:
        general = (joined_likelihood if evaluate.joined else windowed_likelihood)(
            model,
            list(circuits.values()),
            setting.general,
            evaluate.window,
            evaluate.stride,
            batch,
            bar.update,
        )
    second: dict[str, Array] = {}
    if setting.second:
        own = {n: circuit for n, circuit in circuits.items() if asked[n].second}
        with progress(len(own), setting.second, "second") as bar:
            found = preferences(model, list(own.values()), setting.second, batch, bar.update)
        second = dict(zip(own, found, strict=True))
    return {
        name: Outcome(text, second.get(name), measured[name])
        for name, text in zip(circuits, general, strict=True)
    }, completions


def progress(circuits: int, texts: Texts | Items, name: str) -> "tqdm[Any]":
    return tqdm(total=circuits * len(texts.ids), desc=f"evaluate {name}", unit="text")


def result(
    before: Outcome,
    after: Outcome,
    control: Sequence[Outcome],
    setting: Setting,
    resamples: int,
) -> dict[str, Any]:
    """All differences of one circuit; `control`: outcomes of the draws of a control of its size."""
    pair = before.general, after.general
    found: dict[str, Any] = {"ppl_delta": perplexity_difference(*pair, resamples)}
    for sample in setting.samples:
        if sample.name in after.samples:
            old, new = before.samples[sample.name], after.samples[sample.name]
            terms = sample.texts.groups
            found[sample.name] = {
                **compare(old, new, pair, terms, resamples),
                "values": _means(new, terms),
            }
    first = setting.samples[0]
    if control:
        terms = first.texts.groups
        drawn = [outcome.samples[first.name] for outcome in control]
        found["among_controls"] = among(after, control, before, first.name, terms)
        found["against_control"] = against(drawn, after.samples[first.name], terms, resamples)
    if setting.second and before.second is not None and after.second is not None:
        groups = setting.second.groups
        found["second"] = pair_differences(before.second, after.second, groups, resamples)
    return found


def run(params: Params, behaviour: str) -> dict[str, float]:
    spec, evaluate = params.behaviours[behaviour], params.evaluate
    tokenizer = loading.tokenizer(params.model)
    setting, elicited = load_setting(params, behaviour, tokenizer)
    first = setting.samples[0].name
    circuits = {}
    for method, row in params.methods.items():
        for name in circuit_names(method, row):
            path = circuit_path(behaviour, name)
            refuse_leak(setting.rows, read_json(path.with_suffix(".json")), str(path))
            circuits[name] = (method, read_circuit(path))
    scorers = {name: scorer(params.scorers[name], params.model.device) for name in spec.scorers}
    model = loading.load(params.model)
    asked = {UNPRUNED: Asked({sample.name: True for sample in setting.samples}, second=True)}
    for name, (method, _) in circuits.items():
        own = method == spec.method  # of the behaviour: it alone is measured by all there is
        asked[name] = Asked({first: own or method in evaluate.completed}, second=own)
        if method in evaluate.in_sample:
            asked[name].samples["in_sample"] = True
    found_by, completions = outcomes(
        model,
        {UNPRUNED: INTACT, **{name: circuit for name, (_, circuit) in circuits.items()}},
        asked,
        tokenizer,
        scorers,
        evaluate,
        setting,
    )
    before = found_by[UNPRUNED]
    after = {name: found_by[name] for name in circuits}

    drawn = circuit_names(evaluate.control, params.methods[evaluate.control])
    size = len(circuits[drawn[0]][1])
    results = {}
    for name, (method, circuit) in circuits.items():
        of_size = method != evaluate.control and len(circuit) == size
        control = [after[draw] for draw in drawn] if of_size else []
        try:
            differences = result(before, after[name], control, setting, evaluate.resamples)
        except InputError as error:
            raise InputError(
                f"evaluate: {behaviour}, circuit {name}: {error}; evaluate.prompts and "
                "evaluate.items say how many are read"
            ) from None
        results[name] = {"method": method, "num_neurons": len(circuit), **differences}
    baseline = {"perplexity": perplexity(before.general)}
    for sample in setting.samples:
        values = _means(before.samples[sample.name], sample.texts.groups)
        baseline |= {f"{sample.name}_{key}": value for key, value in values.items()}
        if sample.name in elicited:
            gap = elicited[sample.name] - values[spec.scorers[0]]
            baseline[f"{sample.name}_elicited_gap"] = gap
    found: dict[str, Any] = {
        "baseline": baseline,
        "circuits": results,
        "completions": writing(completions),
    }
    scores = before.samples[first].scores
    if scores:
        groups = setting.samples[0].texts.groups
        found["scorer_agreement"] = agreement(scores, groups, evaluate.resamples)
        found["scorers"] = {name: describe(params.scorers[name]) for name in spec.scorers}
    folder = evaluation_folder(behaviour)
    write_jsonl(folder / "completions.jsonl", completions)
    write_csv(folder / "prompts.csv", *prompt_table(found_by, setting.samples))
    write_json(metrics_path("evaluate", behaviour), found)
    return {
        f"{name}.{key}": value
        for name, row in results.items()
        for key, value in (
            ("ppl_delta", row["ppl_delta"]["value"]),
            *((k, v["value"]) for k, v in row[first].items() if k != "values"),
        )
    }


def prompt_table(
    outcomes: Mapping[str, Outcome], samples: Sequence[Sample]
) -> tuple[list[dict[str, object]], list[str]]:
    """Rows (circuit, split, prompt) and their columns: what every prompt gave under every model."""
    rows: list[dict[str, object]] = []
    columns = ["circuit", "split", "prompt", "group"]
    for name, measured in outcomes.items():
        for sample in samples:
            if sample.name not in measured.samples:
                continue
            found = measured.samples[sample.name]
            values: dict[str, Array] = {}
            if found.text is not None:
                values |= {"nll": found.text.nll, "tokens": found.text.tokens}
            if found.log_p is not None:
                values |= dict(zip(("stereotype", "anti", "unrelated"), found.log_p.T, strict=True))
            for key, scores in (found.scores or {}).items():
                values |= {f"{key}_mean": scores.mean(1), f"{key}_max": scores.max(1)}
            columns += [key for key in values if key not in columns]
            for i, (prompt, group) in enumerate(
                zip(sample.texts.ids, sample.texts.groups, strict=True)
            ):
                row: dict[str, object] = {
                    "circuit": name,
                    "split": sample.name,
                    "prompt": prompt,
                    "group": group,
                }
                row |= {key: float(column[i]) for key, column in values.items()}
                rows.append(row)
    return rows, columns
