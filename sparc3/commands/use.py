"""Use: params.yaml becomes that of a profile, whole, so that DVC sees every value."""

from pathlib import Path

import yaml

from sparc3.base.files import write_text
from sparc3.base.params import parse
from sparc3.base.profiles import lay_over
from sparc3.stages.checks import PARAMS, check


def run(profile: Path) -> None:
    """Write params.yaml with the profile's changes, or nothing where that does not check."""
    tree = lay_over(profile, PARAMS)
    check(parse(tree))
    header = (
        f"# The default with what {profile} changes, written by: python -m sparc3 use {profile}\n"
        f"# Back to the default: git checkout {PARAMS}\n\n"
    )
    text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=100)
    write_text(PARAMS, header + text)
