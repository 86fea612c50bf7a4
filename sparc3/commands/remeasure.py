"""Remeasure: does an exported folder, loaded anew, still give the numbers that it promises?

python -m sparc3 remeasure exported/toxicity
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from sparc3.base.artifacts import model_files
from sparc3.base.errors import InputError
from sparc3.base.files import digest, markdown, read_json
from sparc3.base.params import Params
from sparc3.circuits.adapter import CONFIG, read_adapter
from sparc3.circuits.circuit import INTACT
from sparc3.measure.instrument import How
from sparc3.measure.instruments import perplexity
from sparc3.measure.likelihood import token_nll
from sparc3.measure.setting import Chosen, outcomes
from sparc3.model import families, loading
from sparc3.reporting.tables import first_split
from sparc3.stages.checks import load
from sparc3.stages.evaluate import UNPRUNED, flat, levels, rows_of, scorers_of, setting_of

FOLDER = "reproduce"  # in an exported one: params, digests of what was read, promised numbers
PARAMS = f"{FOLDER}/params.yaml"
INPUTS, EXPECTED = f"{FOLDER}/inputs.json", f"{FOLDER}/expected.json"
PROBE, PROBED = "probe_nll", 64  # made-up tokens, which need no prompts
EXACT = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 1e-2}  # of a value, and of 1: rounding


def probe(model: PreTrainedModel) -> float:
    """Mean NLL, in nats, of PROBED made-up tokens."""
    length = int(min(PROBED, families.context(model.config.to_dict())))
    ids = (np.arange(1, length + 1) * 7919 % model.config.vocab_size).tolist()
    ((nll,),) = token_nll(model, [INTACT], [ids], [PROBE])
    return float(nll.mean(dtype=np.float64))


def promised(
    params: Params, behaviour: str, method: str, results: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """What `evaluate` measured of the circuit itself: perplexity of every kind of text, and the
    instruments' values on held-out prompts, or, of a set with blocks, on those that it has seen.

    `within`: how far another measurement may be off, for rounding; of a mean score of completions
    half its 95 % interval, since one other token changes all that follow.
    """
    base, row, exact = results["baseline"], results["circuits"][method], EXACT[params.model.dtype]
    found = {}
    for text, change in row.get("texts", {}).items():
        value = base[f"perplexity_{text}"] * (1 + change["value"] / 100)
        found[f"perplexity_{text}"] = {"value": value, "within": exact * value}
    split, scorers = _split(params, behaviour), params.behaviours[behaviour].scorers
    there = row.get(split, {})
    for name, value in there.get("values", {}).items():
        within = exact * max(1.0, abs(value))
        if name.startswith(scorers):
            if name not in scorers:  # extremes of completions
                continue
            reduction = there["reduction" if name == scorers[0] else f"reduction_{name}"]
            share = (reduction["high"] - reduction["low"]) / 200
            within = share * base[f"{split}_{name}"]
        found[name] = {"value": value, "within": within}
    return found


def _split(params: Params, behaviour: str) -> str:
    """On which prompts the circuit of all groups is measured."""
    blocks = params.prompt_sets[params.behaviours[behaviour].prompts].blocks
    return first_split(params) if blocks is None else "in_sample"


def prompt_sets(params: Params, behaviour: str) -> list[str]:
    """The sets that `measured` reads."""
    return [params.behaviours[behaviour].prompts, *params.evaluate.general]


def measured(
    params: Params, behaviour: str, model: PreTrainedModel, names: Collection[str]
) -> dict[str, float]:
    """What `promised` names, of a model; completions are written if one of `names` is theirs."""
    spec, split = params.behaviours[behaviour], _split(params, behaviour)
    tokenizer, rows = loading.tokenizer(params.model), rows_of(params, behaviour).get(split, {})
    setting = setting_of(params, behaviour, {split: {"": flat(rows)}}, tokenizer)
    asked = {
        name: each
        for name, each in setting.instruments.items()
        if rows and (not each.writes or {title for title, _ in each.headline} & {*names})
    }
    setting = setting._replace(instruments=asked, choices={}, second=None)
    scorers = scorers_of(params, spec) if any(each.writes for each in asked.values()) else {}
    how = How(params.evaluate, params.evaluate.batch_tokens, tokenizer, scorers)
    intact = {UNPRUNED: Chosen(None, {"": INTACT})}
    outcome = outcomes(spec, intact, setting, model, how)[UNPRUNED]
    texts = {f"perplexity_{n}": perplexity.perplexity(t) for n, t in outcome.texts.items()}
    return {**texts, **levels(setting, outcome.samples[split])}


def record(folder: Path, params: Params) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """What an exported folder promises, and what it was made from. InputError: not as `export`
    writes it.
    """
    expected, inputs = read_json(folder / EXPECTED), read_json(folder / INPUTS)
    numbers = isinstance(expected, dict) and all(
        isinstance(row, dict)
        and {type(row.get(key)) for key in ("value", "within")} <= {float, int}
        for row in expected.values()
    )
    if not numbers or PROBE not in expected:
        raise InputError(f"{folder / EXPECTED}: not as `export` wrote it; export anew")
    named = isinstance(inputs, dict) and isinstance(inputs.get("sha256"), dict)
    if not named or inputs.get("behaviour") not in params.behaviours:
        raise InputError(f"{folder / INPUTS}: not as `export` wrote it; export anew")
    return expected, inputs


def check_inputs(folder: Path, inputs: Mapping[str, Any], model: str, prompts: bool) -> None:
    """InputError: the circuit, the base model of an adapter, or prompts are not what they were."""
    now = {"circuit.csv": digest(folder / "circuit.csv")}
    if (folder / CONFIG).is_file():
        now |= {f"{model}/{name}": sha256 for name, sha256 in model_files(Path(model)).items()}
    if prompts:
        named = [name for name in inputs["sha256"] if name.startswith("outputs/prompts/")]
        now |= {name: digest(Path(name)) for name in named}
    for name, sha256 in now.items():
        if inputs["sha256"].get(name) != sha256:
            raise InputError(
                f"{name}: is not what {folder} was exported with; get that again (dvc checkout), "
                f"or export anew: its digest is in {folder / INPUTS}"
            )


def run(folder: Path) -> None:
    """Print what the folder promises, what it gives, and whether that holds; where it does not,
    SystemExit with 1. InputError: no exported folder, or made from other files than are there.
    """
    if not (folder / EXPECTED).is_file():
        problem = f"no folder with a model or an adapter that `export` wrote: it has no {EXPECTED}"
        raise InputError(f"{folder}: {problem}")
    params, adapter = load(folder / PARAMS), (folder / CONFIG).is_file()
    expected, inputs = record(folder, params)
    check_inputs(folder, inputs, params.model.path, prompts=len(expected) > 1)
    if not adapter:
        params = replace(params, model=replace(params.model, path=str(folder)))
    model = loading.load(params.model)
    if adapter:
        read_adapter(folder).apply(model)
    found = {PROBE: probe(model)}
    if len(expected) > 1:
        found |= measured(params, inputs["behaviour"], model, expected)
    rows, broken = [], 0
    for name, (promise, within) in ((n, (e["value"], e["within"])) for n, e in expected.items()):
        holds = name in found and abs(found[name] - promise) <= within
        broken += not holds
        now = f"{found[name]:.6g}" if name in found else "not measured"
        rows.append([name, f"{promise:.6g} ± {within:.2g}", now, "holds" if holds else "DOES NOT"])
    print(markdown(["value", "promised", "measured", ""], rows), end="")
    print(f"{folder}: {len(rows) - broken} of {len(rows)} numbers hold")
    if broken:
        raise SystemExit(1)
