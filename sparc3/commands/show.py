"""Show: what the last report found, where it lies, and how to see the runs."""

import os
import sys

from sparc3.base.errors import InputError
from sparc3.base.files import read_json
from sparc3.base.store import public_uri
from sparc3.reporting.summary import SUMMARY, lines
from sparc3.reporting.tables import FOLDER, TABLE


def run() -> None:
    """Print metrics/summary.json in words. InputError: there is no report yet."""
    if not SUMMARY.is_file():
        raise InputError(f"{SUMMARY}: there is no report yet; make one by: make repro")
    print(
        "\n".join(lines(read_json(SUMMARY), sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    )
    page = next(iter(sorted(FOLDER.glob("report.*"))), "to be had by: dvc repro report")
    print(f"\nControls and every measure: {TABLE}\nReport: {page}")
    print(f"Runs: {public_uri()}, to be seen by: make ui")
