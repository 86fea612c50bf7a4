"""The stages of the pipeline, in order, and what others than their own module know about them.

Stage word = module in stages/ = dvc.yaml stage = MLproject entry point = params section.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sparc3.base.artifacts import OUTPUTS, circuit_names, metrics_path
from sparc3.base.errors import InputError
from sparc3.base.params import Params


class Stage(NamedTuple):
    """One row of the table.

    `axis` is what the stage runs once for each of; `parallel`: it may run as several processes;
    `model`: its results depend on the model's files, and a job asks for cards; `reads`: the raw
    data, and stages whose products or metrics it reads; `products`: files or folders below outputs/
    ({} is the axis's value); `idle`: whether there is nothing to do for a value of the axis, so
    that folders and metrics are empty and torch, which takes seconds, is not imported.
    """

    purpose: str
    axis: Literal["prompt_set", "behaviour"] | None = None
    parallel: bool = False
    model: bool = False
    reads: tuple[str, ...] = ()
    products: tuple[str, ...] = ()
    idle: Callable[[Params, str], bool] | None = None


STAGES: dict[str, Stage] = {
    "prepare": Stage(
        "prompt sets out of the raw data",
        model=True,
        reads=("data",),
        products=("prompts", "wanted", "test-sets.json"),
    ),
    "attribute": Stage(
        "scores of every neuron for every prompt",
        "prompt_set",
        parallel=True,
        model=True,
        reads=("prepare",),
        products=("scores/{}",),
    ),
    "gate": Stage(
        "does the behaviour's relevance differ at all?",
        "behaviour",
        reads=("prepare", "attribute"),
        products=("gate/{}.csv",),
    ),
    "differential": Stage(
        "one number for every neuron and method",
        "behaviour",
        reads=("attribute", "gate"),
        products=("differential/{}",),
    ),
    "sweep": Stage(
        "circuits of every size on the tune split",
        "behaviour",
        model=True,
        reads=("prepare", "differential"),
        products=("sweep/{}.csv",),
    ),
    "select": Stage(
        "the circuits, and how stable they are",
        "behaviour",
        reads=("prepare", "attribute", "differential", "sweep"),
        products=("circuits/{}", "stability/{}"),
    ),
    "steer": Stage(
        "interventions that are no set of neurons",
        "behaviour",
        model=True,
        reads=("prepare",),
        products=("interventions/{}",),
        idle=lambda params, _: not params.steer.interventions,
    ),
    "evaluate": Stage(
        "what pruning does, on held-out prompts",
        "behaviour",
        model=True,
        reads=("prepare", "select", "steer"),
        products=("evaluation/{}",),
    ),
    "transfer": Stage(
        "every circuit on every behaviour and text",
        model=True,
        reads=("prepare", "select"),
        products=("transfer",),
    ),
    "overlap": Stage(
        "what the circuits have in common",
        reads=("prepare", "attribute", "differential"),
        products=("overlap",),
    ),
    "faithfulness": Stage(
        "do scores know what removing neurons does?",
        "behaviour",
        model=True,
        reads=("prepare",),
        products=("faithfulness/{}",),
        idle=lambda params, behaviour: not params.behaviours[behaviour].faithfulness,
    ),
    "report": Stage(
        "summary, tables, figures, published numbers",
        reads=(
            *("prepare", "gate", "sweep", "select", "steer", "evaluate", "transfer", "overlap"),
            "faithfulness",
        ),
        products=("report",),
    ),
}


def traffic(word: str) -> tuple[str, str]:
    """What a stage reads, and what it writes below outputs/: `model, prepare` and `scores/{}`."""
    row = STAGES[word]
    return ", ".join([*(["model"] if row.model else []), *row.reads]), ", ".join(row.products)


def axis_flag(stage: Stage) -> str | None:
    """The stage's axis as a flag of the command line: --prompt-set."""
    return stage.axis and f"--{stage.axis.replace('_', '-')}"


def check_axis(params: Params, word: str, axes: dict[str, str]) -> None:
    """InputError if the axis's value is not among those that params has."""
    for axis, name in axes.items():
        known = getattr(params, f"{axis}s")
        if name not in known:
            raise InputError(
                f"{axis_flag(STAGES[word])} {name!r} is not in params.{axis}s; "
                f"known: {', '.join(known)}"
            )


def idle(params: Params, word: str, axes: Mapping[str, Any]) -> bool:
    """Whether a stage has nothing to do for this value of its axis."""
    stage = STAGES.get(word)
    if stage is None or stage.axis is None or stage.idle is None:
        return False
    return stage.idle(params, axes[stage.axis])


def check_circuit(params: Params, method: str, others: Collection[str] = ()) -> None:
    """InputError if no circuit has this name, nor is it one of `others`; of a method with several
    draws each has its own.
    """
    known = [name for m, row in params.methods.items() for name in circuit_names(m, row)]
    if method not in (*known, *others):
        raise InputError(
            f"--method {method!r} is no circuit; known: {', '.join((*known, *others))}"
        )


def made(word: str, value: str | None) -> list[Path]:
    """What a stage leaves: the products of the table, then its metrics if it has any."""
    products = [OUTPUTS / product.format(value) for product in STAGES[word].products]
    metrics = metrics_path(word, value)
    return [*products, metrics] if metrics.is_file() else products


def shown_files(word: str, value: str | None) -> list[Path]:
    """Files that a stage made, for the MLflow UI: those of its folders' top, without tensors."""
    every = [
        f for path in made(word, value) for f in sorted(path.glob("*") if path.is_dir() else [path])
    ]
    return [file for file in every if file.is_file() and file.suffix != ".safetensors"]
