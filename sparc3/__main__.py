"""python -m sparc3 WORD: a stage of the pipeline inside its MLflow run, or a command.

A command is a module of sparc3.commands, its flags the arguments of that module's `run`. Nothing
slow is imported before it is known to be needed.
"""

import argparse
import errno
import importlib
import logging
import sys
from pathlib import Path

try:
    import sparc3
    from sparc3.base.errors import InputError
    from sparc3.base.secrets import masked
    from sparc3.commands import stage
    from sparc3.stages.checks import load
    from sparc3.stages.table import STAGES, axis_flag, traffic
except KeyboardInterrupt:  # they take a second
    raise SystemExit(130) from None

# A full disk and places that cannot be written: the user can mend them.
PLACES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
# Commands that take params; the others do without.
WITH_PARAMS = ("doctor", "plan", "submit", "verify")
READERS = ("compare", "export", "readme")  # of products, and of params


ABOUT = """%s

The pipeline: fetch, then the stages, each once for every prompt set or behaviour, where {} stands.
A stage reads the raw data, the model and what the stages before the arrow wrote, and writes below
outputs/; its small results go to metrics/, its run to MLflow. `make repro` runs them all."""
FLAGS = "Values, prompts, behaviours and methods are in params.yaml. WORD --help has the flags."


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="sparc3", description=ABOUT % sparc3.__doc__, epilog=FLAGS, formatter_class=narrow
    )
    words = top.add_subparsers(dest="word", required=True, metavar="WORD", title="words")
    fetch = words.add_parser("fetch", help="raw data and the model, verified -> data/, models/")
    fetch.add_argument("--update", action="store_true", help="pin data/ as it is in data.dvc")
    add_stages(words)
    words.add_parser("main", help="all of these: fetch, then dvc repro")
    words.add_parser("show", help="what the last report found, in words")
    compare = words.add_parser("compare", help="one prompt completed with and without a circuit")
    add_circuit(compare, own=True)
    compare.add_argument("--prompt", required=True, metavar="TEXT")
    compare.add_argument("--completions", type=int, default=3, metavar="N")
    ui = words.add_parser("ui", help="the runs in MLflow's UI on 127.0.0.1")
    ui.add_argument("--port", type=int, default=5000)
    words.add_parser("doctor", help="is everything there that a run needs? else what to do")
    words.add_parser("verify", help="is everything stored what it was when it was written?")
    check = words.add_parser("check", help="can the numbers of a model's folder be trusted?")
    check.add_argument("model", type=Path, metavar="MODEL")
    check.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    init = words.add_parser("init", help="a profile for your own model and prompts")
    add_own(init)
    use = words.add_parser("use", help="make another profile params.yaml, or list them")
    use.add_argument("profile", type=Path, nargs="?", metavar="PROFILE")
    plan = words.add_parser("plan", help="memory, operations, time and disk of a profile")
    plan.add_argument("--profile", type=Path, metavar="PATH", help="instead of params.yaml")
    plan.add_argument("--device", metavar="NAME", help="refuse what does not fit on it")
    plan.add_argument("--cards", type=int, default=1, metavar="N", help="of that device")
    submit = words.add_parser("submit", help="a stage as a Slurm job, by params.cluster")
    add_stages(submit.add_subparsers(dest="stage", required=True, metavar="STAGE"))
    export = words.add_parser("export", help="write a pruned model, or a circuit as an adapter")
    add_circuit(export)
    export.add_argument("--folder", type=Path, required=True, metavar="PATH")
    forms = {"choices": ("model", "adapter"), "default": "model"}
    export.add_argument("--as", dest="form", help="whole, or for peft: a few kilobytes", **forms)
    remeasure = words.add_parser("remeasure", help="does an exported folder give what it promises?")
    remeasure.add_argument("folder", type=Path, metavar="FOLDER")
    words.add_parser("confirm", help="measure the sealed sets, once for a release")
    words.add_parser("committed", help="do metrics/ equal those of git's HEAD?")
    words.add_parser("readme", help="renew the generated blocks of README.md and docs/")
    return top


def narrow(prog: str) -> argparse.HelpFormatter:
    """Descriptions as they are written, and words that leave room for what they mean."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=20)


def add_stages(words: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """A word for every stage, with its axis as a flag, and what it reads and writes."""
    for word, row in STAGES.items():
        reads, writes = traffic(word)
        about = f"{row.purpose}\n\nreads   {reads}\nwrites  {writes} (below outputs/)"
        short = f"{row.purpose}: {reads} -> {writes}"
        added = words.add_parser(word, help=short, description=about, formatter_class=narrow)
        if flag := axis_flag(row):
            added.add_argument(flag, required=True, metavar="NAME", help=f"of params.{row.axis}s")


def add_own(command: argparse.ArgumentParser) -> None:
    """The flags that name a model and files of prompts."""
    files = "JSONL, CSV, Parquet, or a folder that datasets saved"
    command.add_argument("name", metavar="NAME")
    command.add_argument("--model", required=True, metavar="FOLDER|OWNER/NAME@REVISION")
    command.add_argument("--prompts", type=Path, required=True, metavar="FILE", help=files)
    command.add_argument("--reference", type=Path, required=True, metavar="FILE", help=files)
    command.add_argument("--text", default="text", metavar="COLUMN", help="what has the prompt")
    command.add_argument("--group", metavar="COLUMN", help="what must not be in two splits")
    command.add_argument("--private", action="store_true", help="no text in MLflow or the report")


def add_circuit(command: argparse.ArgumentParser, own: bool = False) -> None:
    """The flags that name a circuit; with `own`, the behaviour's own unless another is named."""
    command.add_argument("--behaviour", required=True, metavar="NAME")
    also = "the behaviour's own unless given" if own else None
    command.add_argument("--method", required=not own, metavar="NAME", help=also)


def unraisable(error: "sys.UnraisableHookArgs") -> None:
    """A signal while a library cleans up, which Python ignores, needs no traceback."""
    if not issubclass(error.exc_type, (KeyboardInterrupt, SystemExit)):
        sys.__unraisablehook__(error)


def main(argv: list[str] | None = None) -> int:
    sys.unraisablehook = unraisable
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("sparc3").setLevel(logging.INFO)
    options = vars(parser().parse_args(argv))
    word = options.pop("word")
    try:
        if word in ("fetch", "confirm") or word in STAGES:
            stage.run(load(), word, options)
        elif word in READERS:
            stage.run_checked(load(), word, options)
        else:
            command = importlib.import_module(f"sparc3.commands.{word}")
            command.run(*([load()] if word in WITH_PARAMS else []), **options)
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in PLACES:
            raise
        print(f"sparc3: error: {masked(error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:  # the wheel alone brings what the library needs
        package = (error.name or "").partition(".")[0]
        if package == "sparc3":
            raise
        problem = f"{word} needs the package {package}; pip install 'sparc3[pipeline,lrp]'"
        print(f"sparc3: error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sparc3: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
