"""The table of stages, dvc.yaml and MLproject say the same, and DVC sees what decides results."""

import ast
import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparc3.base.params import Params
from sparc3.base.products import MANIFESTS, manifest_path
from sparc3.stages import attribute, select, sweep
from sparc3.stages.table import STAGES, axis_flag

PIPELINE = yaml.safe_load(Path("dvc.yaml").read_text())["stages"]
ENTRIES = yaml.safe_load(Path("MLproject").read_text())["entry_points"]
ROWS: dict[str, Any] = {word: row.get("do", row) for word, row in PIPELINE.items()}

RESULTS = ("outputs", "metrics")
# What no number depends on: how errors are named, processes joined, runs logged.
ASIDE = {Path(f"sparc3/base/{name}.py") for name in ("errors", "parallel", "secrets")}


def test_one_word_names_a_stage_everywhere() -> None:
    """Stage word = module = dvc.yaml stage = MLproject entry point = params section, in order."""
    words = list(STAGES)
    assert list(PIPELINE) == words
    assert list(ENTRIES) == ["main", "fetch", *words, "confirm"]
    assert all(Path("sparc3/stages", f"{word}.py").is_file() for word in words)
    sections = [f.name for f in fields(Params) if f.name in words]
    assert sections == words
    assert [key for key in yaml.safe_load(Path("params.yaml").read_text()) if key in words] == words


def test_commands_are_the_same_in_dvc_and_mlproject() -> None:
    for word, stage in STAGES.items():
        entry, expected = ENTRIES[word], f"python -m sparc3 {word}"
        if stage.axis is None:
            assert PIPELINE[word]["cmd"] == entry["command"] == expected
        else:
            assert PIPELINE[word]["foreach"] == f"${{{stage.axis}s}}"
            assert PIPELINE[word]["do"]["cmd"] == f"{expected} {axis_flag(stage)} ${{key}}"
            assert entry["command"] == f"{expected} {axis_flag(stage)} {{{stage.axis}}}"
            assert list(entry["parameters"]) == [stage.axis]


@pytest.mark.parametrize("word", STAGES)
def test_products_and_their_manifest_are_what_dvc_keeps(word: str) -> None:
    row = ROWS[word]
    kept = [out if isinstance(out, str) else next(iter(out)) for out in row.get("outs", [])]
    made = [f"outputs/{product.format('${key}')}" for product in STAGES[word].products]
    made.append(str(manifest_path(word, "${key}" if STAGES[word].axis else None)))
    assert sorted(made) == sorted(out for out in kept if not out.startswith("metrics/"))
    model = {"${model.path}"} <= set(row["deps"])
    assert model == STAGES[word].model


def owner(dep: str) -> str:
    """Who wrote it: a stage; or the raw data."""
    home = {product.partition("/")[0]: word for word, s in STAGES.items() for product in s.products}
    first, *rest = Path(dep).parts
    if first == "outputs":
        return rest[1] if rest[0] == MANIFESTS.name else home[rest[0]]
    return Path(rest[0]).stem if first == "metrics" else first


@pytest.mark.parametrize("word", STAGES)
def test_a_stage_reads_what_its_row_says(word: str) -> None:
    deps = [dep for dep in ROWS[word]["deps"] if Path(dep).parts[0] in ("data", *RESULTS)]
    assert {owner(dep) for dep in deps} == set(STAGES[word].reads)
    words = ["data", *STAGES]
    assert list(STAGES[word].reads) == sorted(STAGES[word].reads, key=words.index)


def test_the_summary_is_the_only_metric_and_all_small_results_are_in_git() -> None:
    (metric,) = [m for row in ROWS.values() for m in row.get("metrics", [])]
    assert metric == {"metrics/summary.json": {"cache": False}}
    for word, row in ROWS.items():
        small = [out for out in row["outs"] if isinstance(out, dict)]
        assert all(path.startswith("metrics/") for out in small for path in out)
        assert all(how == {"cache": False} for out in small for how in out.values())
        name = f"{word}/${{key}}.json" if STAGES[word].axis else f"{word}.json"
        tables = ["metrics/table.md", "metrics/published.md"]
        expected = tables if word == "report" else [f"metrics/{name}"]
        assert [path for out in small for path in out] == expected


def test_plots_are_images_which_need_no_network() -> None:
    plots = [Path(path) for path in yaml.safe_load(Path("dvc.yaml").read_text())["plots"]]
    assert {path.parent for path in plots} == {Path("outputs/report")}
    assert {path.suffix for path in plots} <= {".png", ".svg"}


def imported(module: Path) -> set[Path]:
    """Files of the package that a file imports, in functions too, but not for types only; and
    those beside it, of data, that it names.
    """
    text = module.read_text()
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    found = {p for p in module.parent.iterdir() if p.suffix in (".json", ".yaml", ".csv", ".jinja")}
    found = {path for path in found if path.name in text}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparc3"):
            home = Path(str(node.module).replace(".", "/"))
            files = {home.with_suffix(".py"), *(home / f"{a.name}.py" for a in node.names)}
            found |= {file for file in files if file.is_file()}
    return found


def used_by(module: Path) -> set[Path]:
    """The file itself and what it imports, directly or not."""
    used = new = {module}
    while new:
        new = set().union(*(imported(file) for file in new if file.suffix == ".py")) - used
        used |= new
    return used


def test_data_of_the_package_are_seen_as_used() -> None:
    assert Path("sparc3/reporting/published.json") in used_by(Path("sparc3/stages/report.py"))


@pytest.mark.parametrize("word", STAGES)
def test_a_stage_runs_again_when_code_that_it_uses_changes(word: str) -> None:
    used = used_by(Path("sparc3/stages", f"{word}.py"))
    deps = {Path(dep) for dep in ROWS[word]["deps"]}
    needed = used - ASIDE
    assert all(deps & {file, *file.parents} for file in needed), needed
    assert Path("requirements.txt") in deps
    code = {dep for dep in deps if dep.parts[0] == "sparc3"}
    idle = {dep for dep in code if not any(dep in {file, *file.parents} for file in used)}
    assert idle == set()


def test_byte_code_is_no_change_of_code() -> None:
    """Nor are the caches of tools, which no dependency on a folder may see."""
    names = ("sparc3/model/__pycache__/gguf.cpython-311.pyc", "sparc3/.ruff_cache/x")
    command = [sys.executable, "-m", "dvc", "check-ignore", *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == list(names), done.stderr


def test_attribution_goes_on_only_with_shards_of_the_same_code() -> None:
    """What else it imports decides prompts and names, which its key holds themselves."""
    used = used_by(Path("sparc3/stages/attribute.py")) - ASIDE
    used -= {Path(f"sparc3/base/{name}.py") for name in ("artifacts", "params")}
    assert {path.resolve() for path in used} == set(attribute.CODE)


@pytest.mark.parametrize("word", STAGES)
def test_a_stage_runs_again_when_a_section_that_it_reads_changes(word: str) -> None:
    code = Path("sparc3/stages", f"{word}.py").read_text()
    if word == "report":
        for name in ("tables.py", "published.py", "page.py", "page.html.jinja"):
            code += Path("sparc3/reporting", name).read_text()
    if word == "steer":  # of two other stages it calls a function each
        code += inspect.getsource(sweep.measure) + inspect.getsource(select.chosen_on)
    read = set(re.findall(r"\bparams\.(\w+)", code)) & {f.name for f in fields(Params)}
    assert {key.partition(".")[0] for key in ROWS[word]["params"]} == read
