"""Use: params.yaml becomes that of a profile, whole, so that DVC sees every value."""

from pathlib import Path

import yaml

from sparc3.base.files import read_text, write_text
from sparc3.base.params import parse, read
from sparc3.base.profiles import FOLDER, lay_over
from sparc3.stages.checks import PARAMS, check


def run(profile: Path | None) -> None:
    """Write params.yaml with the profile's changes, or nothing where that does not check. Without a
    profile: list those that there are.
    """
    if profile is None:
        show()
        return
    tree = lay_over(profile, PARAMS)
    check(parse(tree))
    header = (
        f"# The default with what {profile} changes, written by: python -m sparc3 use {profile}\n"
        f"# Back to the default: git checkout {PARAMS}\n\n"
    )
    text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=100)
    write_text(PARAMS, header + text)


def show() -> None:
    """Print every profile with the first line of what it says, and mark the current one."""
    current = read(PARAMS).get("profile")
    files: dict[str | None, str] = {None: f"README's; back to it: git checkout {PARAMS}"}
    for path in sorted(FOLDER.glob("*.yaml")):
        files[path.stem] = read_text(path).partition("\n")[0].removeprefix("# ")
    for name, about in files.items():
        print(f"{'*' if name == current else ' '} {name or 'default'}: {about}")
