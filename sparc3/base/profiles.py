"""Profiles: files that say only in what an experiment differs from params.yaml."""

from pathlib import Path

from sparc3.base.errors import InputError
from sparc3.base.params import Tree, read

FOLDER = Path("profiles")
TABLES = (  # rows by their names
    *("prompt_sets", "test_sets", "sealed_sets"),
    *("behaviours", "methods", "scorers"),
)


def lay_over(profile: Path, base: Path) -> Tree:
    """The params of `base` with a profile's changes; its `profile` is the file's name.

    A section is merged key by key; a value below a key, such as `prepare.splits`, is given whole.
    In the tables a row is given whole, and null takes it away. Rows keep the order of `base`, and
    new ones come last; a profile that names every row of `base` gives the order too.

    InputError: a file that cannot be read, a null for a row that is not there, or a `base` that is
    of a profile already.
    """
    changes, tree = read(profile), read(base)
    if tree.get("profile") is not None:
        problem = f"holds profile {tree['profile']} already, and only the default takes one"
        raise InputError(f"{base}: {problem}; get that back by: git checkout {base}")
    return {"profile": profile.stem, **merged(tree, changes)}


def merged(tree: Tree, changes: Tree) -> Tree:
    """Params with a profile's changes, as `lay_over` says."""
    found = {**tree, **changes}
    for section in tree.keys() & changes.keys():
        old, new = tree[section], changes[section]
        if isinstance(old, dict) and isinstance(new, dict):
            found[section] = _rows(section, old, new) if section in TABLES else {**old, **new}
    return found


def _rows(section: str, old: Tree, new: Tree) -> Tree:
    for name in new.keys() - old.keys():
        if new[name] is None:
            problem = f"{section}.{name} is None, which takes a row away"
            raise InputError(f"params: {problem}; there are: {', '.join(old)}")
    rows = new if old.keys() <= new.keys() else {**old, **new}
    return {name: row for name, row in rows.items() if row is not None}
