"""The model card of an exported model."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from sparc3.base.files import markdown
from sparc3.base.params import Params
from sparc3.circuits.circuit import Circuit

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


def _measured(behaviour: str, evidence: Evidence) -> str:
    if evidence.evaluation is None:
        return f"`metrics/evaluate/{behaviour}.json` was not there when this model was written."
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


def card(
    params: Params,
    behaviour: str,
    method: str,
    circuit: Circuit,
    sha256: str,
    evidence: Evidence,
) -> str:
    """The model card."""
    model = params.model
    removed = int((circuit.scales == 0).sum())
    dampened = len(circuit) - removed
    measured = _measured(behaviour, evidence)
    if evidence.agreement is not None:
        measured += f"\n{PROCEDURE.format(agreement=100 * evidence.agreement)}\n"
    if evidence.sealed is not None:
        table = evaluation_table({"sealed": evidence.sealed})
        measured += f"\nThese very neurons on the sealed prompts:\n\n{table}"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- sparc3
- pruned
---

# {Path(model.path).name} without {len(circuit)} neurons of {behaviour}

{model.path}, in {model.dtype}, with {removed} MLP neurons removed and {dampened} dampened:
those that sparc3's method `{method}` finds to serve {behaviour} (after arXiv 2506.13727).
Nothing was trained. A removed neuron has zero weights throughout; a dampened one has its column of
the MLP's output projection multiplied by its scale.
{licence(params, method)}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

## Evaluation

{measured}

## Neurons

By layer, from 0; a dampened one with its scale in brackets. `circuit.csv` has their scores; its
sha256 is {sha256}.

{neuron_list(circuit)}
"""
