"""The shape of the code: rooms, short functions, few parameters, nothing private across modules."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path("sparc3")
MODULES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
LINES, PARAMETERS = 60, 7
LIGHT = ("gate", "differential", "select", "overlap", "report")  # stages without torch

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, Function]]:
    """Every function of the package, nested ones and methods too, as file:line name."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, Function):
                yield f"{path}:{node.lineno} {node.name}", node


def test_no_function_is_long() -> None:
    sizes = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions()}
    assert {name: size for name, size in sizes.items() if size > LINES} == {}


def test_no_function_has_many_parameters() -> None:
    """Keyword-only ones count, `self` and *rest do not: as ruff's PLR0913 counts."""
    counts = {}
    for name, node in functions():
        given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        counts[name] = len([argument for argument in given if argument not in ("self", "cls")])
    assert {name: count for name, count in counts.items() if count > PARAMETERS} == {}


def test_nothing_private_is_taken_from_another_module() -> None:
    """Neither `from module import _name` nor `module._name`."""
    taken = set()
    for path in MODULES:
        tree = ast.parse(path.read_text())
        modules = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparc3"):
                names = {alias.name for alias in node.names}
                modules |= {alias.asname or alias.name for alias in node.names}
                taken |= {(str(path), name) for name in names if name.startswith("_")}
        taken |= {
            (str(path), ast.unparse(node))
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr.startswith("_")
            and ast.unparse(node.value) in modules
        }
    assert taken == set()


def test_every_room_says_what_lives_there_and_is_in_the_contract() -> None:
    for room in ROOMS:
        assert ast.get_docstring(ast.parse((room / "__init__.py").read_text())), room
    settings = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = settings["contracts"]
    layers = [name.strip() for layer in contract["layers"] for name in layer.split("|")]
    assert sorted(layers) == sorted(["__main__", *(room.name for room in ROOMS)])
    assert {path.parent for path in MODULES} == {
        PACKAGE,
        *ROOMS,
        PACKAGE / "measure/instruments",
        PACKAGE / "circuits/interventions",
    }


@pytest.mark.parametrize("modules", [["sparc3.__main__"], [f"sparc3.stages.{s}" for s in LIGHT]])
def test_what_is_light_starts_without_torch_and_mlflow(modules: list[str]) -> None:
    heavy = {"torch", "transformers", "mlflow", "pandas", "matplotlib"}
    code = f"import sys, {', '.join(modules)}; print(*({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
