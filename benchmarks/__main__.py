"""All timings of the project, one after the other: `python -m benchmarks`, or `make bench`.

What they print goes to benchmarks/results.md, with the machine they ran on, and into an MLflow run.
"""

import subprocess
import sys
from pathlib import Path

from sparc3.base import runs
from sparc3.base.files import write_text

BENCHMARKS = ("attribution", "generation", "likelihood", "growth")
RESULTS = Path("benchmarks/results.md")


def output(name: str) -> str:
    """What a benchmark prints, shown while it runs; CalledProcessError if it fails."""
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None  # PIPE was asked for
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return "".join(lines)


def main() -> None:
    with runs.stage_run("bench", {}, {"benchmarks": list(BENCHMARKS)}) as run:
        sections = [f"## {name}\n\n```\n{output(name).strip()}\n```\n" for name in BENCHMARKS]
        write_text(RESULTS, "# Timings\n\n" + "\n".join(sections))
        run.log_artifact(RESULTS)


if __name__ == "__main__":
    main()
