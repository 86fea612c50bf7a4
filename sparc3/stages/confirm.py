"""Confirm: the sealed sets, which no stage reads, measured once for a release.

What is estimated is the procedure: items of a set with blocks are measured by circuits chosen
without their group; those of groups that only served to choose are left out. There, `in_sample` is
of the circuit that is exported, whose neurons were chosen on other items of the same groups.
"""

import logging
import subprocess
import tomllib
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparc3.base.artifacts import OUTPUTS, circuit_path, held_out, metrics_path
from sparc3.base.errors import InputError
from sparc3.base.files import digest, read_json, read_text, write_csv, write_json
from sparc3.base.params import SPLITS, Params
from sparc3.model import loading
from sparc3.prompts.sampling import as_row, prompt_set
from sparc3.stages.evaluate import Rows, flat, group_table, measure
from sparc3.stages.prepare import load_tokenizer

log = logging.getLogger(__name__)
RECORD = metrics_path("confirm")


def sealed_rows(params: Params, behaviour: str) -> dict[str, Rows]:
    """The sealed prompts of a behaviour by the block that their group is tested in."""
    spec = params.behaviours[behaviour]
    assert spec.sealed is not None  # run
    shares = {split: float(split == "test") for split in SPLITS}
    tokenizer, _ = load_tokenizer(params.model)
    drawn = prompt_set(
        f"sealed_sets.{spec.sealed}", params.sealed_sets[spec.sealed], shares, tokenizer
    )
    rows = [as_row(prompt, "test") for prompt in drawn]
    if params.prompt_sets[spec.prompts].blocks is None:
        return {"": rows}
    by_block = held_out(spec.prompts)
    block_of = {row["group"]: block for block, there in by_block.items() for row in there}
    kept = {b: [row for row in rows if block_of.get(row["group"]) == b] for b in by_block}
    left_out = len(rows) - len(flat(kept))
    log.info("confirm %s: %d items of groups that are not tested are left out", behaviour, left_out)
    return {block: there for block, there in kept.items() if there}


def commit() -> str:
    """The commit that is checked out. InputError: what is tracked was changed since."""
    asked = ["git", "status", "--porcelain", "-uno", "--", ".", f":!{RECORD}"]
    said = subprocess.run(asked, capture_output=True, text=True)
    if said.returncode or said.stdout:
        problem = "not a clean commit" if said.stdout else "not in a git checkout"
        raise InputError(f"confirm: {problem}; commit first: what was frozen must be on record")
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return head.stdout.strip()


def measured(params: Params, behaviour: str) -> dict[str, Any]:
    """What the sealed prompts of a behaviour say of its own and other methods, and of controls."""
    spec, given = params.behaviours[behaviour], replace(params.evaluate, **vars(params.confirm))
    asked = replace(params, evaluate=replace(given, in_sample=(spec.method,)))
    by_block = sealed_rows(params, behaviour)
    exact = {} if "" in by_block else {"in_sample": {"": flat(by_block)}}
    methods = dict.fromkeys([spec.method, *(given.completed or ()), given.control])
    rows = {"test": by_block, **exact}
    setting, by_name, circuits = measure(
        asked, behaviour, rows, list(methods), loading.load(params.model)
    )
    for name, row in circuits.items():
        if (path := circuit_path(behaviour, name)).is_file():
            row["sha256"] = digest(path)  # of the list that this is true of
    grouped = group_table(spec, by_name, setting.first)
    columns = ["circuit", "group", "units", "mean"]
    write_csv(OUTPUTS / "confirm" / behaviour / "groups.csv", grouped, columns)
    kl = {key: estimate["value"] for key, estimate in circuits[spec.method]["kl"].items()}
    return {"circuits": circuits, "kl": kl}


def run(params: Params) -> dict[str, float]:
    """Write metrics/confirm.json, behaviour by behaviour, and outputs/confirm; one that was killed
    goes on. InputError: it was done for this release, or begun at another commit.
    """
    release = tomllib.loads(read_text(Path("pyproject.toml")))["project"]["version"]
    about = {"release": release, "commit": commit(), "profile": params.profile}
    sealed = [name for name, spec in params.behaviours.items() if spec.sealed]
    before: dict[str, Any] = read_json(RECORD) if RECORD.is_file() else {"release": None}
    found: dict[str, Any] = before["behaviours"] if before["release"] == release else {}
    same = all(before.get(key) == value for key, value in about.items())
    if found and (not same or {*sealed} <= {*found}):
        raise InputError(
            f"{RECORD}: the sealed sets were read for {release}; raise the version in "
            "pyproject.toml for another release"
        )
    for behaviour in sealed:
        if behaviour not in found:
            found[behaviour] = measured(params, behaviour)
            now = datetime.now(UTC).date().isoformat()
            write_json(RECORD, {**about, "date": now, "behaviours": found})
    log.info("confirm: %s measured for %s; make readme shows it", ", ".join(sealed), release)
    return {
        f"{behaviour}.{name}.{key}": change["value"]
        for behaviour, row in found.items()
        for name, circuit in row["circuits"].items()
        for key, change in circuit["test"].items()
        if key != "values"
    }
