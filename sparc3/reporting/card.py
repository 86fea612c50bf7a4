"""The model card of an exported model, or adapter, with the metadata that the hub reads."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sparc3.base.files import markdown
from sparc3.base.params import Params
from sparc3.circuits.circuit import Circuit
from sparc3.reporting.terms import DUTIES, Base

LEGEND = """\
Differences between this model and the unpruned one, with 95 % intervals. ppl_delta and reduction
are in percent of the unpruned model; ss, lms, icat and toxic_probability in points; margin and
nll_shift in nats per token, as `kl`, how far predictions on general text are from the unpruned
model's. `test` is held out; `in_sample` was measured on the prompts that the
neurons were chosen on, or, where groups were tested in blocks, on the same prompts as `test` but
without these very neurons; `against_control` compares with as many random neurons, `against_ban`
with a ban of typical words at the same perplexity; `texts` are kinds of general text, `second` is
another data set. A second table sets the effect, larger is less of the behaviour, beside those of
the random draws."""
PROCEDURE = """\
Groups of prompts were tested block by block, each by neurons chosen on the groups before it. So
`test` is an estimate of what the procedure does; the neurons listed here are its result on all
groups. The neurons chosen for the blocks hold {agreement:.0f} % of them on average."""
LRP = """\
The neurons were found by LRP, with lxt, whose licence (Clear BSD) grants no patent rights. Its
authors allow LRP free of charge for personal and scientific purposes only.
"""
LIMITS = """\
It was measured on the prompts named here, in their language and length, as plain text without a
chat template, and the scorer sees one kind of the behaviour. Nothing was measured of other tasks,
of longer texts, of what a user may coax out of the model, or of what finetuning brings back. An
interval is of these prompts, not of other models."""
AGAIN = """\
`reproduce/` has the params, the lock, the digests of what was read and the numbers of this very
folder. In a checkout of sparc3 with the same data and base model,
`python -m sparc3 remeasure FOLDER` measures again and says whether they hold."""
UNMERGE = """\
Merged for good (`merge_and_unload`), it is the pruned model. peft's `unmerge_adapter` divides by
the scales and cannot bring a removed neuron (scale 0) back: load the base model again, or leave the
adapter unmerged and switch it off with `disable_adapter`. Active together with another behaviour's
adapter (`model.base_model.set_adapter([...])`), the scales multiply."""
LOAD = {
    "model": """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH")""",
    "adapter": """\
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained("{base}", dtype="{dtype}")
model = PeftModel.from_pretrained(base, "PATH")""",
}
HUB = {  # data sets on the hub, by source
    "real-toxicity-prompts": "allenai/real-toxicity-prompts",
    "stereoset": "McGill-NLP/stereoset",
    "neutral-pairs": "McGill-NLP/stereoset",
    "gender-pairs": "McGill-NLP/stereoset",
    "crows-pairs": "nyu-mll/crows_pairs",
    "wikipedia": "google/boolq",
    "news": "EdinburghNLP/xsum",
    "reviews": "stanfordnlp/imdb",
    "questions": "allenai/social_i_qa",
}


class Edit(NamedTuple):
    """What is exported: the circuit of a behaviour that a method found, the sha256 of its file, as
    a model or as an adapter of its base.
    """

    behaviour: str
    method: str
    circuit: Circuit
    sha256: str
    form: str
    base: Base


class Evidence(NamedTuple):
    """What is known of a circuit: differences of `evaluate`; those of `confirm` for this very list
    on the sealed prompts; and the share of its neurons that the blocks' circuits have too. None
    where it was not measured.
    """

    evaluation: Mapping[str, Any] | None = None
    sealed: Mapping[str, Any] | None = None
    agreement: float | None = None


AMONG = "among_controls"  # effects among draws: not differences with an interval


def differences(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, difference) of every difference in a tree of metrics, names joined by dots."""
    for key, value in tree.items():
        if isinstance(value, dict) and key != AMONG:
            if {"value", "low", "high"} <= value.keys():
                yield prefix + key, value
            else:
                yield from differences(value, f"{prefix}{key}.")


def evaluation_table(tree: Mapping[str, Any]) -> str:
    """Markdown: a row per difference, with its interval, p-value and number of clusters; then,
    where there are controls, a row per effect, beside those of the control's draws.
    """
    header = ["measure", "change", "low", "high", "p", "clusters"]
    text = _table(header, "value low high p n", differences(tree))
    if tree.get(AMONG):
        header = ["effect", "of this model", "mean of the draws", "least", "largest", "rank p"]
        among = tree[AMONG].items()
        text += "\n" + _table([*header, "draws"], "value mean low high p n", among)
    return text


def _table(header: list[str], keys: str, named: Iterable[tuple[str, Mapping[str, float]]]) -> str:
    return markdown(
        header,
        (
            [name, *(f"{row[key]:.4g}" if key in row else "" for key in keys.split())]
            for name, row in named
        ),
    )


def neuron_list(circuit: Circuit) -> str:
    """Markdown: one line per layer, its neurons in order; a dampened one with its scale."""
    rows = sorted(circuit.rows())
    lines = []
    for layer, members in groupby(rows, key=lambda row: row[0]):
        names = [f"{n} ({s:.3g})" if s else str(n) for _, n, _, s in members]
        lines.append(f"- layer {layer}: {', '.join(names)}")
    return "\n".join(lines) or "none"


def licence(params: Params, method: str) -> str:
    """What whoever ships the model must know of how its neurons were found."""
    spec = params.methods.get(method)  # a draw of a control is none
    return LRP if spec and spec.score.startswith("lrp") else ""


def title(edit: Edit) -> str:
    name = edit.base.name.rpartition("/")[2]
    return f"{name} without {len(edit.circuit)} neurons of {edit.behaviour}"


def metadata(params: Params, edit: Edit, evidence: Evidence) -> dict[str, Any]:
    """What the hub reads of a card: https://huggingface.co/docs/hub/model-cards."""
    spec, adapter = params.behaviours[edit.behaviour], edit.form == "adapter"
    sets = {**params.prompt_sets, **params.test_sets}
    read = [spec.prompts, spec.reference, *([spec.second] if spec.second else ())]
    named = [HUB.get(sets[name].source) for name in [*read, *params.evaluate.general]]
    other = {"license_name": "as-the-base-model", "license_link": "LICENSE"}
    return {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": edit.base.name,
        "base_model_relation": "adapter" if adapter else "finetune",
        "license": edit.base.licence,
        **(other if edit.base.licence == "other" else {}),
        "datasets": sorted({name for name in named if name}),
        "tags": ["sparc3", "pruned", edit.behaviour, *(["ia3"] if adapter else [])],
        **_index(params, edit, evidence),
    }


def _index(params: Params, edit: Edit, evidence: Evidence) -> dict[str, Any]:
    """`model-index`: every difference from the unpruned model that is this circuit's."""
    spec = params.behaviours[edit.behaviour]
    prompts = {"test": spec.prompts, "in_sample": f"{spec.prompts}, in sample"}
    prompts |= {"second": spec.second or "", "texts": ""}
    results = []
    for name, row in differences(evidence.evaluation or {}):
        part, _, key = name.rpartition(".")
        if part not in prompts:
            continue
        read, value = (key, "ppl_delta") if part == "texts" else (prompts[part], key)
        number, *ends = (float(row[end]) for end in ("value", "low", "high"))
        metric = {
            "type": value,
            "name": f"change, 95 % interval [{ends[0]:.4g}, {ends[1]:.4g}]",
            "value": number,
        }
        results.append(
            {
                "task": {"type": "text-generation"},
                "dataset": {"type": read, "name": read},
                "metrics": [metric],
            }
        )
    return {"model-index": [{"name": title(edit), "results": results}]} if results else {}


def _measured(behaviour: str, evidence: Evidence) -> str:
    if evidence.evaluation is None:
        return f"`metrics/evaluate/{behaviour}.json` was not there when this was written."
    return f"{LEGEND}\n\n{evaluation_table(evidence.evaluation)}"


def intervention_card(
    params: Params, behaviour: str, method: str, strength: float, evidence: Evidence
) -> str:
    """The card of an intervention, which leaves the model's weights as they are."""
    path = params.model.path
    return f"""# {method} against {behaviour}, for {Path(path).name}

What sparc3's method `{method}` ({params.steer.interventions[method].kind}) learnt for {path}, in
{params.model.dtype}, at strength {strength:g}. No weight is changed; within the block the model is:

```python
from pathlib import Path

from sparc3.circuits.intervention import read_intervention

with read_intervention(Path("intervention.safetensors")).on(model):
    ...
```

## Evaluation

{_measured(behaviour, evidence)}
"""


def card(params: Params, edit: Edit, evidence: Evidence) -> str:
    """The model card."""
    behaviour, method, circuit = edit.behaviour, edit.method, edit.circuit
    model, base, adapter = params.model, edit.base, edit.form == "adapter"
    removed = int((circuit.scales == 0).sum())
    dampened = len(circuit) - removed
    measured = _measured(behaviour, evidence)
    if evidence.agreement is not None:
        measured += f"\n{PROCEDURE.format(agreement=100 * evidence.agreement)}\n"
    if evidence.sealed is not None:
        table = evaluation_table({"sealed": evidence.sealed})
        measured += f"\nThese very neurons on the sealed prompts:\n\n{table}"
    how = (
        "This is an IA3 adapter of peft: a vector of scales on the input of the MLP's output\n"
        "projection, of the layers that hold these neurons. The base model stays as it is."
        if adapter
        else "A removed neuron has zero weights throughout; a dampened one has its column of\n"
        "the MLP's output projection multiplied by its scale."
    )
    load = LOAD[edit.form].format(base=base.repository or model.path, dtype=model.dtype)
    duties = f"\n{DUTIES[base.licence]}\n" if base.licence in DUTIES else ""
    about = yaml.safe_dump(metadata(params, edit, evidence), sort_keys=False, allow_unicode=True)
    return f"""---
{about}---

# {title(edit)}

{model.path}, in {model.dtype}, with {removed} MLP neurons removed and {dampened} dampened:
those that sparc3's method `{method}` finds to serve {behaviour} (after arXiv 2506.13727).
Nothing was trained. {how}
{_weights(params, base)}{duties}{licence(params, method)}
```python
{load}
```
{f"{chr(10)}{UNMERGE}{chr(10)}" if adapter else ""}
## Evaluation

{measured}

## What this does not show

{LIMITS}

## To measure again

{AGAIN}

## Neurons

By layer, from 0; a dampened one with its scale in brackets. `circuit.csv` has their scores; its
sha256 is {edit.sha256}.

{neuron_list(circuit)}
"""


def _weights(params: Params, base: Base) -> str:
    """Which weights were measured, where the name alone would not say it."""
    if base.repository is not None:
        return f"The weights are those of {base.repository} at {base.revision}.\n"
    return (
        f"All numbers are of the weights in {params.model.path} (digests in\n"
        f"`reproduce/inputs.json`); another version of {base.name} may give others.\n"
    )
