"""The wheel: what whoever installs it has, outside of a checkout."""

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like site-packages with the wheel's content."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("sparc3", "pyproject.toml", "README.md", "LICENSE"):
        (folder / "source").mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", str(ROOT / name), str(folder / "source")], check=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(folder), str(folder / "source")], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(site: Path, *command: str, forbidden: str = "") -> subprocess.CompletedProcess[str]:
    """Python there, without some packages."""
    block = f"import sys; sys.modules.update(dict.fromkeys({forbidden.split()})); "
    code = f"{block}sys.argv[:] = ['sparc3', *{list(command)!r}]; "
    code += "from sparc3.__main__ import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_file_of_the_package_is_in_it(installed: Path) -> None:
    here, there = (
        {
            path.relative_to(folder).as_posix()
            for path in folder.joinpath("sparc3").rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        for folder in (ROOT, installed)
    )
    assert here == there
    assert {"sparc3/reporting/published.json", "sparc3/stages/pins.yaml"} <= there


def test_it_has_the_command_and_the_extras(installed: Path) -> None:
    (found,) = importlib.metadata.distributions(name="sparc3", path=[str(installed)])
    (command,) = found.entry_points
    assert (command.name, command.group) == ("sparc3", "console_scripts")
    assert command.value == "sparc3.__main__:main"
    assert found.metadata.get_all("Provides-Extra") == ["lrp", "pipeline"]
    core = [line for line in found.requires or [] if "extra" not in line]
    assert not [line for line in core if line.startswith(("mlflow", "dvc", "lxt"))]


def test_the_command_runs_and_says_which_package_a_word_lacks(installed: Path) -> None:
    without = "mlflow dvc lxt torchvision datasets matplotlib peft gguf"
    done = run(installed, "--help", forbidden=without)
    assert done.returncode == 0, done.stderr
    assert "sparc3" in done.stdout
    done = run(installed, "ui", forbidden=without)
    assert done.returncode == 2
    assert done.stderr == (
        "sparc3: error: ui needs the package mlflow; pip install 'sparc3[pipeline,lrp]'\n"
    )
