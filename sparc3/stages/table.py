"""The stages of the pipeline, in order, and what others than their own module know about them.

Stage word = module in stages/ = dvc.yaml stage = MLproject entry point = params section.
"""

from pathlib import Path
from typing import Literal, NamedTuple

from sparc3.base.artifacts import OUTPUTS, metrics_path
from sparc3.base.errors import InputError
from sparc3.base.params import Params


class Stage(NamedTuple):
    """One row of the table.

    `axis` is what the stage runs once for each of; `parallel`: it may run as several processes;
    `model`: its results depend on the model's files, and a job asks for cards; `shown`: products
    below outputs/, files or folders, that are worth a look in the MLflow UI ({} is the axis's
    value), never tensors.
    """

    purpose: str
    axis: Literal["prompt_set", "behaviour"] | None = None
    parallel: bool = False
    model: bool = False
    shown: tuple[str, ...] = ()


STAGES: dict[str, Stage] = {
    "prepare": Stage("prompt sets out of the raw data", model=True, shown=("prompts",)),
    "attribute": Stage(
        "scores of every neuron for every prompt", "prompt_set", parallel=True, model=True
    ),
    "gate": Stage(
        "does the behaviour's relevance differ at all?", "behaviour", shown=("gate/{}.csv",)
    ),
    "differential": Stage("one number for every neuron and method", "behaviour"),
    "sweep": Stage(
        "circuits of every size on the tune split",
        "behaviour",
        model=True,
        shown=("sweep/{}.csv",),
    ),
    "select": Stage(
        "the circuits, and how stable they are",
        "behaviour",
        shown=("circuits/{}", "stability/{}"),
    ),
    "evaluate": Stage(
        "what pruning does, on held-out prompts", "behaviour", model=True, shown=("evaluation/{}",)
    ),
    "transfer": Stage("every circuit on every behaviour and text", model=True, shown=("transfer",)),
    "overlap": Stage("what the circuits have in common", shown=("overlap",)),
    "report": Stage("result table, figures, published numbers", shown=("report",)),
}


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


def shown_files(word: str, value: str | None) -> list[Path]:
    """Files of a stage for the MLflow UI: those of the table, then its metrics if it has any."""
    shown: list[Path] = []
    for product in STAGES[word].shown:
        path = OUTPUTS / product.format(value)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        shown += [file for file in files if not file.is_dir()]
    metrics = metrics_path(word, value)
    return [*shown, metrics] if metrics.is_file() else shown
