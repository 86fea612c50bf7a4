"""CONTRIBUTING.md is true: what it says suffices, done in a copy, and what it names is there."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import whole
import yaml

from sparc3.base.files import read_csv, read_json

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()

# The rows of a family like LLaMA: table, file, row, and what the row needs imported.
FAMILY = {
    "FAMILIES": ("sparc3/model/families.py", '"smollm3": _LLAMA,', ""),
    "CONFIGS": (
        "tests/tiny.py",
        '"smollm3": lambda: SmolLM3Config(**_GATED, pad_token_id=0, no_rope_layer_interval=2),',
        "from transformers import SmolLM3Config",
    ),
}


INSTRUMENT = '''"""How surprising the most surprising token of a text is, in nats."""

import numpy as np

from sparc3.measure.instrument import Instrument, Reading, Value, paired
from sparc3.measure.instruments import perplexity


def read(model, circuits, sample, how):
    from sparc3.measure.likelihood import token_nll

    nlls = token_nll(model, circuits, sample.tokens, sample.ids, how.batch_tokens, how.progress)
    return [
        Reading({"longest": top}, sample.groups, {"longest": top})
        for top in (np.array([each.max() for each in found], float) for found in nlls)
    ]


def levels(reading):
    return {"longest": float(reading.columns["longest"].mean())}


def instrument(behaviour):
    return Instrument(
        encode=perplexity.encode,
        read=read,
        values=(Value("longest", paired("longest"), "surprise, nats", digits=2),),
        levels=levels,
        objective=lambda before, after: levels(after.reading)["longest"],
        axis="surprise, nats",
        cell="longest",
    )
'''


def add_row(path: Path, table: str, row: str, imported: str) -> None:
    """Put a row first into a table of a source file, and an import after the docstring's end."""
    text, count = re.subn(
        rf"^({table}\b.*= \{{.*\n)", rf"\1    {row}\n", path.read_text(), flags=re.M
    )
    assert count == 1, table
    path.write_text(re.sub(r"^(import|from) ", f"{imported}\n\\1 ", text, count=1, flags=re.M))


def test_a_family_is_one_row_of_each_table(tmp_path: Path, run_in: Callable[..., Any]) -> None:
    """Its patches are undone, relevance is conserved, and it is pruned, in a copy."""
    shutil.copytree(ROOT / "sparc3", tmp_path / "sparc3")
    (tmp_path / "tests").mkdir()
    for name in ("tests/tiny.py", "tests/test_lrp.py", "tests/test_prune.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    for table, (path, row, imported) in FAMILY.items():
        assert f"`{table}` in `{path}`" in TEXT
        add_row(tmp_path / path, table, row, imported)
    done = run_in(tmp_path, "python", "-m", "pytest", "-q", "-k", "smollm3", "tests")
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= 10


def test_an_instrument_is_one_file(tmp_path: Path, run_in: Callable[..., Any]) -> None:
    """Put into a copy of the package, its name works in params and its numbers come out."""
    shutil.copytree(ROOT / "sparc3", tmp_path / "sparc3")
    for name in ("tests/whole.py", "tests/tiny.py", "params.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    assert "`sparc3/measure/instruments/NAME.py`" in TEXT
    (tmp_path / "sparc3/measure/instruments/longest.py").write_text(INSTRUMENT)
    folder = tmp_path / "project"
    whole.write_project(folder)
    tree = yaml.safe_load((folder / "params.yaml").read_text())
    tree["behaviours"]["rude"]["instruments"].append("longest")
    (folder / "params.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    code = f"import whole, pathlib; whole.run(pathlib.Path({str(folder)!r}), 'rude')"
    done = run_in(tmp_path, "python", "-c", code, PYTHONPATH=f"{tmp_path}:{tmp_path / 'tests'}")
    assert done.returncode == 0, done.stderr[-2000:]
    results = read_json(folder / "metrics/evaluate/rude.json")
    assert results["baseline"]["test_longest"] > 0
    for name, row in results["circuits"].items():
        change = row["test"]["longest"]
        assert change["low"] <= change["value"] <= change["high"], name
        assert row["method"] != "lrp" or "longest" in row["in_sample"]


def test_a_method_is_one_row(tmp_path: Path) -> None:
    """From its score to its differences: swept, chosen, and measured without any code."""
    whole.write_project(tmp_path)
    tree = yaml.safe_load((tmp_path / "params.yaml").read_text())
    tree["methods"] = {
        name: tree["methods"][name] for name in ("lrp", "gradient-t", "random-layer-matched")
    } | {"wanda-t": {"score": "wanda", "contrast": "t", "scale": 0.5}}
    tree["attribute"]["scores"].append("wanda")
    tree["evaluate"]["completed"] = ["wanda-t", "random-layer-matched"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    whole.run(tmp_path, "rude")

    points = [r for r in read_csv(tmp_path / "outputs/sweep/rude.csv") if r["method"] == "wanda-t"]
    assert len(points) == 4
    assert 0.0 not in {float(point["objective"]) for point in points}
    circuit = read_csv(tmp_path / "outputs/circuits/rude/wanda-t.csv")
    assert {row["scale"] for row in circuit} == {"0.5"}
    found = read_json(tmp_path / "metrics/evaluate/rude.json")["circuits"]["wanda-t"]
    assert found["num_neurons"] == len(circuit)
    assert {"reduction", "nll_shift"} <= found["test"].keys()
    assert found["ppl_delta"]["value"] != 0


def test_every_file_that_it_names_is_there() -> None:
    named = set(re.findall(r"`([\w./]+\.(?:py|md|yaml|lock)|sparc3/[\w/]+/)`", TEXT))
    assert len(named) > 10
    named = {name for name in named if "NAME" not in name}  # which stands for a new one
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_every_way_of_adding_is_five_lines() -> None:
    sections = {
        title: re.findall(r"^\d\. .+", body, re.M)
        for title, body in re.findall(r"^## To add an? (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
    }
    kinds = ("behaviour", "method", "intervention", "instrument", "scorer", "family of models")
    assert tuple(sections) == (*kinds, "stage")
    assert {len(lines) for lines in sections.values()} == {5}
