"""One declaration of dependencies, and every way to an environment comes to the same one."""

import ast
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import parse

ROOT = Path(__file__).parent.parent
FROM_MAKE = {"VENV", "PYTHON", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"}  # what `make test` hands down
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CORE = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
EXTRAS = {
    name: [Requirement(line) for line in lines]
    for name, lines in PROJECT["project"]["optional-dependencies"].items()
}
RUNTIME = [*CORE, *EXTRAS["lrp"], *EXTRAS["pipeline"]]
DEVELOPMENT = [Requirement(line) for line in PROJECT["dependency-groups"]["dev"]]
LOCK_TEXT = (ROOT / "requirements.txt").read_text()
LOCK = [Requirement(line) for line in LOCK_TEXT.splitlines() if not line.startswith("#")]


def pinned(requirement):
    """The version of NAME==VERSION; any other specifier fails."""
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", requirement
    assert not specifier.version.endswith("*"), requirement
    return specifier.version


def applies(requirement, extra=""):
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def installed(name):
    return importlib.metadata.version(name)


def make(*arguments, folder=ROOT, **variables):
    """Return code, standard output and standard error of make, started from no other make."""
    environment = {k: v for k, v in os.environ.items() if k not in FROM_MAKE}
    done = subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_lock_is_exact_and_within_what_is_declared_once():
    declared = [canonicalize_name(r.name) for r in RUNTIME + DEVELOPMENT]
    assert len(declared) == len(set(declared))
    locked = {canonicalize_name(r.name): pinned(r) for r in LOCK}
    assert len(locked) == len(LOCK)
    for requirement in RUNTIME + DEVELOPMENT:
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)])


def test_what_a_wheel_is_installed_with_is_bounded_on_both_sides():
    for requirement in RUNTIME:
        assert sorted(s.operator for s in requirement.specifier) == ["<", ">="], requirement
    for requirement in DEVELOPMENT:
        assert pinned(requirement)


def test_every_file_that_is_installed_is_the_locks_by_its_digest():
    """So pip takes nothing else, whatever serves it."""
    text = (ROOT / "requirements-hashed.txt").read_text().replace("\\\n", "")
    lines = [re.split(r"\s+--hash=", line) for line in text.splitlines() if line[0] != "#"]
    assert [Requirement(line) for line, *_ in lines] == LOCK
    for _, *hashes in lines:
        assert hashes
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64} ?", each) for each in hashes)


def test_the_lock_is_what_is_installed_and_lacks_nothing():
    here = {canonicalize_name(r.name): r for r in LOCK if applies(r)}
    assert {n: installed(n) for n in here} == {n: pinned(r) for n, r in here.items()}
    # From the declared ones, following what each installed package asks for, all is in the lock.
    reached, open_ends = set(), [(r, extra) for r in RUNTIME for extra in ("", *r.extras)]
    while open_ends:
        requirement, extra = open_ends.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in reached:
            continue
        reached.add((name, extra))
        assert name in here, f"{name} is needed and not in requirements.txt: make lock"
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if applies(needed, extra):
                assert needed.specifier.contains(installed(needed.name), prereleases=True), line
                open_ends += [(needed, e) for e in ("", *needed.extras)]


def test_conda_yaml_is_the_lock_for_every_environment_manager():
    text = (ROOT / "conda.yaml").read_text()
    content = yaml.safe_load(text)
    python, pip, section = content["dependencies"]
    assert (pip, section) == ("pip", {"pip": ["-r requirements.txt"]})
    version = python.removeprefix("python=")
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(version)
    assert len(version.split(".")) == 3, "pyenv takes the newest of a series, and compiles it"
    # MLflow names a conda environment by this file's digest: a new lock must change the file.
    digest = hashlib.sha256(LOCK_TEXT.encode()).hexdigest()
    assert f"# sha256 of requirements.txt: {digest}\n" in text, "make lock"


def test_mlflow_resolves_conda_yaml_to_the_lock():
    """As `mlflow run --env-manager virtualenv` and `uv` do."""
    from mlflow.utils.environment import _PythonEnv
    from mlflow.utils.requirements_utils import _parse_requirements

    environment = _PythonEnv.from_conda_yaml(ROOT / "conda.yaml")
    resolved = _parse_requirements(environment.dependencies, is_constraint=False, base_dir=ROOT)
    assert [Requirement(r.req_str) for r in resolved] == LOCK
    assert environment.build_dependencies == ["pip"]
    assert environment.python == "3.11.7"


def test_the_makefile_installs_the_lock_and_nothing_else():
    code, output, error = make("--dry-run", "env")
    assert code == 0, error
    installs = re.findall(r"pip install (.*?)\s*\\?$", output, re.MULTILINE)
    assert installs == ["--no-input --no-deps -r requirements-hashed.txt"]


def test_an_environment_that_is_given_is_used_as_it_is(tmp_path):
    code, output, _ = make("--dry-run", "env", f"VENV={sys.prefix}")
    assert code == 0
    assert "install" not in output
    code, _, error = make("env", f"VENV={sys.prefix}")
    assert (code, error) == (0, "")
    code, _, error = make("env", f"VENV={tmp_path}")
    assert code != 0
    assert f"VENV={tmp_path} is no environment" in error


def test_the_pipeline_runs_by_main_which_gives_dvc_a_private_site_cache():
    code, output, error = make("--dry-run", "repro", f"VENV={sys.prefix}")
    assert code == 0, error
    assert "python -m sparc3 main" in output
    assert "dvc" not in output


def launcher(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def fresh(tmp_path):
    """A checkout with nothing to install, and a PATH without Python."""
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for name in ("requirements.txt", "requirements-hashed.txt"):
        (tmp_path / name).write_text("# first\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("sh", "make", "cmp", "cp"):
        found = shutil.which(tool)
        assert found
        (tools / tool).symlink_to(found)
    launcher(tools, "python3.11", "echo 'python3.11: command not found' >&2; exit 127")
    launcher(tools, "python3", "echo 0")  # an old one finds itself unsuitable
    return tmp_path


def test_without_a_fit_interpreter_make_says_what_to_do(fresh):
    code, _, error = make("env", folder=fresh, PATH=str(fresh / "tools"))
    assert code != 0
    assert "no Python 3.11 or 3.12 that can make an environment" in error
    assert "PYTHON=/path/to/python3.11" in error
    assert not (fresh / ".venv").exists()


def test_the_first_interpreter_that_runs_makes_the_environment_once(fresh):
    launcher(fresh / "tools", "python3.12", f'exec {sys.executable} "$@"')
    path = {"folder": fresh, "PATH": str(fresh / "tools")}
    code, output, error = make("env", **path)
    assert code == 0, error
    assert "Installing into .venv" in output
    assert "minutes" in output
    configuration = (fresh / ".venv" / "pyvenv.cfg").read_text()
    assert f"home = {sys.base_prefix}/bin\n" in configuration  # its base, not the launcher

    (fresh / "requirements.txt").touch()
    assert make("env", **path) == (0, "", "")  # the same contents, a later date

    (fresh / "requirements.txt").write_text("# second\n")
    (fresh / ".venv" / "stale").touch()
    code, output, _ = make("env", **path)
    assert (code, "Installing" in output) == (0, True)
    assert not (fresh / ".venv" / "stale").exists()


def imports(path):
    """Top-level names of what a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize(
    ("folder", "declared"), [("sparc3", RUNTIME), ("tests", RUNTIME + DEVELOPMENT)]
)
def test_what_is_imported_is_declared(folder, declared):
    names = {canonicalize_name(r.name) for r in declared}
    modules = {path.stem for path in (ROOT / folder).rglob("*.py")} | {"sparc3", "benchmarks"}
    owners = importlib.metadata.packages_distributions()
    for path in (ROOT / folder).rglob("*.py"):
        for module in set(imports(path)) - sys.stdlib_module_names - modules:
            of = {canonicalize_name(owner) for owner in owners.get(module, [])}
            assert of & names, (
                f"{path.name} imports {module}, which pyproject.toml does not declare"
            )


def test_only_tracking_imports_mlflow_and_only_lrp_imports_lxt():
    homes = {
        "mlflow": {
            *("base/store.py", "base/runs.py", "base/comparison.py"),
            *("base/registry.py", "base/served.py"),
        },
        "lxt": {"relevance/lrp.py"},
    }
    package = ROOT / "sparc3"
    for module, home in homes.items():
        importers = {
            str(p.relative_to(package)) for p in package.rglob("*.py") if module in imports(p)
        }
        assert importers == home


def test_ci_runs_what_make_does():
    script = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^make .*", script, re.MULTILINE) == [
        "make lint",
        "make test",
        "make test-next",
    ]
    assert "set -euo pipefail" in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_next_environment_is_newer_and_tests_what_there_is():
    """`make test-next`: every line exact, none older than the lock, and every named test there."""
    lines = [line for line in (ROOT / "requirements-next.txt").read_text().splitlines()]
    newer = {r.name: pinned(r) for r in map(Requirement, lines[1:])}
    locked = {canonicalize_name(r.name): pinned(r) for r in LOCK}
    assert (
        parse(newer["transformers"])
        >= parse("5")
        > parse(locked[canonicalize_name("transformers")])
    )
    for name, version in newer.items():
        assert parse(version) > parse(locked.get(canonicalize_name(name), "0"))
    (names,) = re.findall(r"^NEXT_TESTS := (.*)", (ROOT / "Makefile").read_text(), re.M)
    assert all((ROOT / f"tests/test_{name}.py").is_file() for name in names.split())
