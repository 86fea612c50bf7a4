"""python -m sparc3 STAGE [--prompt-set NAME | --behaviour NAME]: the only caller of tracking."""

import argparse
import dataclasses
import gc
import importlib
import json
import logging
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import sparc3
from sparc3.base import comparison, parallel, runs
from sparc3.base.artifacts import logged_files, metrics_path, model_digest
from sparc3.base.errors import InputError
from sparc3.base.files import digest, digest_text, markdown
from sparc3.base.params import Params
from sparc3.commands import ui
from sparc3.stages.checks import load

# Stage word = module = dvc.yaml stage = MLproject entry point = params section; with its axis.
STAGES: dict[str, str | None] = {
    "prepare": None,
    "attribute": "prompt_set",
    "gate": "behaviour",
    "differential": "behaviour",
    "sweep": "behaviour",
    "select": "behaviour",
    "evaluate": "behaviour",
    "transfer": None,
    "overlap": None,
    "report": None,
}


LARGE = ("llama3-8b", "llama3-8b-sound")  # profiles whose costs README foretells


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="sparc3", description=sparc3.__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="STAGE")
    submit = commands.add_parser("submit", help="one stage as a Slurm job, by params.cluster")
    for under in (commands, submit.add_subparsers(dest="stage", required=True, metavar="STAGE")):
        for stage, axis in STAGES.items():
            command = under.add_parser(stage)
            if axis is not None:
                command.add_argument(f"--{axis.replace('_', '-')}", required=True, metavar="NAME")
    fetch = commands.add_parser("fetch", help="raw data and the embedded model, verified")
    fetch.add_argument("--update", action="store_true", help="pin data/ as it is in data.dvc")
    commands.add_parser("main", help="fetch, then dvc repro")
    plan = commands.add_parser("plan", help="memory, operations, time and disk of a profile")
    plan.add_argument("--profile", type=Path, metavar="PATH", help="instead of params.yaml")
    plan.add_argument("--device", metavar="NAME", help="refuse what does not fit on it")
    plan.add_argument("--cards", type=int, default=1, metavar="N", help="of that device")
    ui = commands.add_parser("ui", help="the tracking UI on 127.0.0.1")
    ui.add_argument("--port", type=int, default=5000)
    commands.add_parser("readme", help="put the result table into README.md")
    export = commands.add_parser("export", help="write a pruned model as a Hugging Face folder")
    for flag in ("behaviour", "method", "folder"):
        export.add_argument(f"--{flag}", required=True)
    return top


def axis_of(params: Params, stage: str, arguments: argparse.Namespace) -> dict[str, str]:
    """The axis given on the command line, checked against params."""
    axis = STAGES.get(stage)
    if axis is None:
        return {}
    name = getattr(arguments, axis)
    section = f"{axis}s"
    known = getattr(params, section)
    if name not in known:
        raise InputError(
            f"--{axis.replace('_', '-')} {name!r} is not in params.{section}; "
            f"known: {', '.join(known)}"
        )
    return {axis: name}


def parameters(params: Params, stage: str, axes: dict[str, str]) -> dict[str, object]:
    """What an MLflow run records: the stage's section, the axis's row and the model."""
    tree: dict[str, object] = {stage: dataclasses.asdict(getattr(params, stage))}
    if stage not in ("fetch", "report"):
        tree["model"] = dataclasses.asdict(params.model)
    for axis, name in axes.items():
        tree[f"{axis}s"] = dataclasses.asdict(getattr(params, f"{axis}s")[name])
    return tree


def digests(params: Params, stage: str) -> dict[str, str]:
    """Digests of the raw data's pin and, for stages that load it, of the model."""
    found = {"data": digest(Path("data.dvc"))}
    if stage in ("attribute", "sweep", "evaluate", "transfer"):
        found["model"] = model_digest(Path(params.model.path))
    return {f"sparc3.digest.{name}": value for name, value in found.items()}


def run_stage(params: Params, stage: str, axes: dict[str, str], **options: bool) -> None:
    """One stage inside its MLflow run: scalars, files and digests are logged, tensors never."""
    gc.disable()  # it would search what is imported, a million objects, again and again
    module = importlib.import_module(f"sparc3.stages.{stage}")
    gc.freeze()
    gc.enable()
    here = parallel.place()
    if here.world > 1 and stage != "attribute":
        raise InputError(f"{stage}: runs in one process, not {here.world}; start it with python -m")
    if here.rank > 0:  # rank 0 has the run
        module.run(params, **axes)
        return
    with runs.stage_run(
        stage, axes, parameters(params, stage, axes), digests(params, stage)
    ) as run:
        metrics = module.run(params, **axes, **options)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        cost = {"seconds": time.monotonic() - sparc3.STARTED, "peak_megabytes": memory}
        run.log_metrics({**metrics, **cost})
        axis = next(iter(axes.values()), None)
        for path in logged_files(stage, axis):
            run.log_artifact(path)
        if stage == "report":
            compare(params, run)
        elif stage in STAGES:
            run.set_product(digest(metrics_path(stage, axis)))


def compare(params: Params, run: runs.Run) -> None:
    """Log the comparison: a parent run for this state of the pipeline, a row for every cell."""
    from sparc3.reporting.tables import cells

    table = cells(params)
    rows = [
        comparison.Row(
            behaviour=row["behaviour"],
            method=row["method"],
            metrics={
                **runs.interval("differential", row["gap"]),
                "num_neurons": row["num_neurons"],
                **{
                    name: value
                    for key, difference in row["differences"].items()
                    for name, value in runs.interval(key, difference).items()
                },
            },
            artifacts=[row["circuit"]],
            stages=[f"{stage}@{row['behaviour']}" for stage in ("gate", "select", "evaluate")],
        )
        for row in table
    ]
    names = {"prompt_set": params.prompt_sets, "behaviour": params.behaviours, None: [None]}
    files = {
        stage if name is None else f"{stage}@{name}": digest(metrics_path(stage, name))
        for stage, axis in STAGES.items()
        if stage != "report"
        for name in names[axis]
    }
    everything = dataclasses.asdict(params)
    state = digest_text(json.dumps([everything, files], sort_keys=True))
    comparison.pipeline_run(run, state, everything, rows, files, logged_files("report", None))


def run_pipeline(params: Params) -> int:
    """fetch, then dvc repro, whose stages nest under the run that `mlflow run` opened."""
    environment = runs.hand_down(os.environ)
    for command in ([sys.executable, "-m", "sparc3", "fetch"], ["dvc", "repro"]):
        done = subprocess.run(command, env=environment, check=False)
        if done.returncode:
            return done.returncode
    return 0


def export_model(params: Params, arguments: argparse.Namespace) -> None:
    """The model without a circuit, as a folder that transformers loads."""
    from sparc3.commands import export  # here, as below: a light stage should not wait for torch

    export.run(params, arguments.behaviour, arguments.method, Path(arguments.folder))


def print_plan(params: Params, arguments: argparse.Namespace) -> None:
    """What a profile costs, before its model is there."""
    from sparc3.commands import plan

    plan.run(params, arguments.profile, arguments.device, arguments.cards)


def submit_stage(params: Params, arguments: argparse.Namespace) -> None:
    """A stage as a Slurm job."""
    from sparc3.commands import submit

    axes = axis_of(params, arguments.stage, arguments)
    job = submit.submit(params, arguments.stage, axes)
    print(f"job {job}: follow it with squeue, and in outputs/slurm")


def write_readme(params: Params, arguments: argparse.Namespace) -> None:
    """README's blocks of numbers: the result table, what the latest runs of the stages cost, and
    what the experiment on LLaMA-3-8B is expected to.
    """
    from sparc3.commands import plan, readme

    costs = comparison.latest_metrics(("seconds", "peak_megabytes"))
    header, *rows = plan.costs([Path(f"profiles/{name}.yaml") for name in LARGE])
    readme.write_readme(
        {"costs": readme.cost_table(list(STAGES), costs), "plan": markdown(header, rows)}
    )


def serve_ui(params: Params, arguments: argparse.Namespace) -> None:
    """The tracking UI, until Ctrl-C."""
    ui.serve(arguments.port)


# What is no stage and leaves no run in MLflow.
COMMANDS = {
    "export": export_model,
    "plan": print_plan,
    "readme": write_readme,
    "submit": submit_stage,
    "ui": serve_ui,
}


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("sparc3").setLevel(logging.INFO)
    arguments = parser().parse_args(argv)
    stage: str = arguments.command
    try:
        params = load(Path("params.yaml"))
        if stage == "main":
            return run_pipeline(params)
        if stage in COMMANDS:
            COMMANDS[stage](params, arguments)
            return 0
        options = {"update": arguments.update} if stage == "fetch" else {}
        run_stage(params, stage, axis_of(params, stage, arguments), **options)
    except (InputError, PermissionError) as error:
        print(f"sparc3: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sparc3: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
