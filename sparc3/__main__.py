"""python -m sparc3 STAGE [--prompt-set NAME | --behaviour NAME]: the only caller of tracking."""

import argparse
import dataclasses
import importlib
import logging
import sys
from pathlib import Path

from sparc3.errors import InputError
from sparc3.params import Params, load

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


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="sparc3", description=(sys.modules["sparc3"].__doc__))
    commands = top.add_subparsers(dest="command", required=True, metavar="STAGE")
    for stage, axis in STAGES.items():
        command = commands.add_parser(stage)
        if axis is not None:
            command.add_argument(f"--{axis.replace('_', '-')}", required=True, metavar="NAME")
    commands.add_parser("fetch", help="raw data and the embedded model, verified")
    commands.add_parser("main", help="fetch, then dvc repro")
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
    """What an MLflow run records: the stage's section, the axis's row and the model, flattened."""
    tree = {"model": dataclasses.asdict(params.model)}
    tree[stage] = dataclasses.asdict(getattr(params, stage))
    for axis, name in axes.items():
        tree[axis] = {"name": name, **dataclasses.asdict(getattr(params, f"{axis}s")[name])}
    return {f"{section}.{k}": v for section, values in tree.items() for k, v in values.items()}


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("sparc3").setLevel(logging.INFO)
    arguments = parser().parse_args(argv)
    stage: str = arguments.command
    try:
        params = load(Path("params.yaml"))
        axes = axis_of(params, stage, arguments)
        module = importlib.import_module(f"sparc3.{stage}")
        from sparc3 import tracking

        with tracking.stage_run(stage, axes, parameters(params, stage, axes)) as run:
            metrics = module.run(params, **axes)
            run.log_metrics(metrics)
    except InputError as error:
        print(f"sparc3: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
