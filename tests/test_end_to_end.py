"""The whole pipeline on the real embedded model and data, with small parameters."""

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import yaml

from sparc3.base.files import read_csv, read_jsonl, read_tensors

SMALL: dict[str, Any] = {
    "prompt_sets": {
        "general": {"count": 12, "attributed": 12, "min_tokens": 32, "max_tokens": 32},
        "general-toxicity": {"count": 16},
        "toxicity": {"count": 40},
        "general-pairs": {"count": 48, "where": {"bias_type": "profession", "first": 48}},
        "gender": {"count": 60},
        "race": {"count": 72},
    },
    "test_sets": {
        "news": {"count": 40, "min_tokens": 32, "max_tokens": 32},
        "reviews": {"count": 8, "min_tokens": 32, "max_tokens": 32},
        "questions": {"count": 8},
        "crows-gender": {"count": 16},
        "crows-race": {"count": 16},
    },
    "attribute": {"shard_prompts": 128, "scores": ["lrp", "max-activation"]},
    "sweep": {"num_neurons": [20, 60], "protect": [0.2], "texts": 6, "items": 12},
    "select": {"resamples": 10},
    "evaluate": {
        "texts": 6,
        "prompts": 16,  # all of the test split, as transfer reads them
        "items": 36,
        "completions": 2,
        "completed": ["lrp", "aura", "random-layer-matched"],
        "in_sample": ["lrp"],
        "drawn": 2,
        "ban": [10],
        "new_tokens": 6,
        "resamples": 500,
    },
    "behaviours": {name: {"method": "lrp"} for name in ("toxicity", "gender", "race")},
    "report": {"method": "lrp"},
    "transfer": {"items": 30, "resamples": 500},
    "overlap": {"resamples": 200, "repeats": 2},
    "faithfulness": {
        **{"scores": ["lrp", "gradient"], "neurons": 60, "prompts": 6},
        **{"num_neurons": [3, 10], "resamples": 200},
    },
}


METHODS = {
    "lrp": {"score": "lrp", "contrast": "mean-difference"},
    "aura": {"score": "max-activation", "contrast": "auroc", "scale": "auroc"},
    "random-layer-matched": {"score": "random", "layers": "own", "draws": 2},
}


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return base | {
        key: merge(base[key], value) if isinstance(value, dict) and key in base else value
        for key, value in changes.items()
    }


def edit(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(merge(yaml.safe_load(path.read_text()), changes)))


def written(folder: Path) -> dict[Path, int]:
    """Products, and when each was written; locks are none."""
    files = {path for path in (folder / "outputs").rglob("*") if path.is_file()}
    return {path: path.stat().st_mtime_ns for path in files if path.suffix != ".lock"}


def ran(output: str) -> set[str]:
    """Stages that `dvc repro` ran."""
    return set(re.findall(r"Running stage '([^']+)'", output))


@pytest.fixture(scope="module")
def finished(project: Path, run_in: Any) -> tuple[Path, str]:
    tree = yaml.safe_load((project / "params.yaml").read_text())
    (project / "params.yaml").write_text(yaml.safe_dump({**merge(tree, SMALL), "methods": METHODS}))
    done = run_in(project, "dvc", "repro")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return project, done.stdout


def test_every_stage_ran_and_the_numbers_are_there(finished: tuple[Path, str]) -> None:
    folder, output = finished
    behaviours = ["toxicity", "gender", "race"]
    expected = {"prepare", "transfer", "overlap", "report"}
    expected |= {f"attribute@{name}" for name in SMALL["prompt_sets"]}
    steps = ("gate", "differential", "sweep", "select", "steer", "evaluate", "faithfulness")
    for stage in steps:
        expected |= {f"{stage}@{behaviour}" for behaviour in behaviours}
    assert ran(output) == expected
    for behaviour in behaviours:
        results = json.loads((folder / f"metrics/evaluate/{behaviour}.json").read_text())
        for name in ("lrp", "aura", "random-layer-matched-0"):
            row = results["circuits"][name]
            assert row["ppl_delta"]["low"] <= row["ppl_delta"]["value"] <= row["ppl_delta"]["high"]
            assert 0 <= row["test"]["reduction"]["p"] <= 1
        lists = folder / "outputs/circuits" / behaviour
        neurons = {(row["layer"], row["neuron"]) for row in read_csv(lists / "lrp.csv")}
        assert len(neurons) == results["circuits"]["lrp"]["num_neurons"] > 0
        matched = [row["layer"] for row in read_csv(lists / "random-layer-matched-0.csv")]
        assert sorted(matched) == sorted(layer for layer, _ in neurons)
    assert (folder / "metrics/table.md").read_text().count("| lrp |") == 3


Rows = list[dict[str, str]]


def metrics(folder: Path, name: str) -> Any:
    return json.loads((folder / f"metrics/{name}.json").read_text())


def measured(folder: Path, behaviour: str, circuit: str, split: str = "test") -> Rows:
    """What every prompt gave under a model; "none" is the unpruned one."""
    rows = read_csv(folder / f"outputs/evaluation/{behaviour}/prompts.csv")
    return [row for row in rows if (row["circuit"], row["split"]) == (circuit, split)]


def by_term(rows: Rows) -> dict[str, float]:
    """SS in percent and the margin in nats: means over items of a term, then over terms."""
    terms = defaultdict(list)
    for row in rows:
        terms[row["group"]].append(float(row["stereotype"]) - float(row["anti"]))
    preferred = [mean(50.0 * (1 + (m > 0) - (m < 0)) for m in term) for term in terms.values()]
    return {"ss": mean(preferred), "margin": mean(map(mean, terms.values()))}


def rise(before: Rows, after: Rows) -> float:
    """Of the negative log-likelihood, nats per token."""
    one, two = (sum(float(r["nll"]) for r in rows) for rows in (before, after))
    return (two - one) / sum(float(r["tokens"]) for r in before)


def less(before: float, after: float) -> float:
    """Percent of before; positive is less."""
    return 100 * (before - after) / before


def check_evaluation(folder: Path, behaviours: dict[str, Any], controls: list[str]) -> None:
    """Values and signs of metrics/evaluate, from what every prompt gave; a scorer's columns are
    there for circuits that wrote completions.
    """
    for behaviour, spec in behaviours.items():
        circuits = metrics(folder, f"evaluate/{behaviour}")["circuits"]
        columns = [f"{scorer}_mean" for scorer in spec.get("scorers", [])[:1]]
        for name, circuit in circuits.items():
            for split in {"test", "in_sample"} & circuit.keys():
                before, after = (measured(folder, behaviour, n, split) for n in ("none", name))
                assert [r["prompt"] for r in before] == [r["prompt"] for r in after]
                found = {key: d["value"] for key, d in circuit[split].items() if key != "values"}
                if columns:
                    general = math.log1p(circuit["ppl_delta"]["value"] / 100)
                    assert found["nll_shift"] == pytest.approx(rise(before, after) - general)
                    if "reduction" in found:
                        old, new = (mean(float(r[columns[0]]) for r in s) for s in (before, after))
                        assert found["reduction"] == pytest.approx(less(old, new))
                else:
                    old, new = by_term(before), by_term(after)
                    assert found["reduction"] == pytest.approx(less(old["ss"], new["ss"]))
                    for key in ("ss", "margin"):
                        assert found[key] == pytest.approx(new[key] - old[key], abs=1e-9)
            if "reduction" in circuit.get("against_control", {}):
                levels = [
                    mean(float(row[columns[0]]) for row in rows) if columns else by_term(rows)["ss"]
                    for rows in (measured(folder, behaviour, n) for n in (name, *controls))
                ]
                beyond = circuit["against_control"]["reduction"]["value"]
                assert beyond == pytest.approx(less(mean(levels[1:]), levels[0]))


def held_out_blocks(folder: Path, prompt_set: str) -> dict[str, list[dict[str, Any]]]:
    """Rows that are tested, by split or block."""
    blocks = defaultdict(list)
    for row in read_jsonl(folder / f"outputs/prompts/{prompt_set}.jsonl"):
        if row["split"] not in ("attribute", "tune", "block-0"):
            blocks[row["split"]].append(row)
    return blocks


def check_transfer(folder: Path, behaviours: dict[str, Any], params: dict[str, Any]) -> None:
    """The diagonal of metrics/transfer, from what the same prompts gave in evaluate, where general
    text rises as transfer's own perplexity says.
    """
    transfer = metrics(folder, "transfer")
    for behaviour, spec in behaviours.items():
        blocks = held_out_blocks(folder, spec["prompts"])
        most = math.ceil(params["items"] / len(blocks))
        tested = [row["id"] for rows in blocks.values() for row in rows[:most]]
        before, after = (
            [r for r in measured(folder, behaviour, name) if r["prompt"] in tested]
            for name in ("none", spec["method"])
        )
        assert len(before) == len(after) == len(tested)
        cells = transfer[behaviour]
        if spec.get("scorers"):
            general = math.log1p(cells[params["texts"][0]]["ppl_delta"]["value"] / 100)
            shift = rise(before, after) - general
            assert cells[behaviour]["nll_shift"]["value"] == pytest.approx(shift, rel=1e-3)
        else:
            old, new = by_term(before), by_term(after)
            for key in ("ss", "margin"):
                change = new[key] - old[key]
                assert cells[behaviour][key]["value"] == pytest.approx(change, rel=1e-3, abs=1e-5)


def test_values_and_signs_are_those_that_the_prompts_gave(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    params = yaml.safe_load((folder / "params.yaml").read_text())
    controls = ["random-layer-matched-0", "random-layer-matched-1"]
    check_evaluation(folder, params["behaviours"], controls)
    check_transfer(folder, params["behaviours"], params["transfer"])


def test_scores_are_those_of_the_prompts(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    rows = read_jsonl(folder / "outputs/prompts/toxicity.jsonl")
    own = [row["id"] for row in rows if row["split"] == "attribute"]
    found, values = [], []
    for shard in sorted((folder / "outputs/scores/toxicity/lrp").glob("*.safetensors")):
        tensors, metadata = read_tensors(shard)
        found += json.loads(metadata["ids"])
        values.append(tensors["scores"])
    assert found == own
    scores = np.concatenate(values)
    assert scores.shape == (len(own), 30, 1536)
    assert scores.dtype == np.float32


def test_no_circuit_saw_a_test_prompt(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    # The sweep chose the circuit's size on the tune split: not held out either.
    blocks = [f"block-{n}" for n in range(5)]
    order = {"toxicity": ["attribute", "tune", "test"], "gender": blocks, "race": blocks}
    for behaviour, splits in order.items():
        rows = read_jsonl(folder / f"outputs/prompts/{behaviour}.jsonl")
        assert {row["split"] for row in rows} == {*splits}
        for split in held_out_blocks(folder, behaviour):
            block = split if split != "test" else ""
            path = folder / "outputs/circuits" / behaviour / block / "lrp.json"
            used = json.loads(path.read_text())["chosen_on"][behaviour]
            before = [row for row in rows if splits.index(row["split"]) < splits.index(split)]
            assert {*used} == {row["id"] for row in before}
            tested = {row["group"] for row in rows if row["split"] == split}
            assert tested.isdisjoint(row["group"] for row in before)


def test_again_does_nothing_and_an_edit_only_its_own(
    finished: tuple[Path, str], run_in: Any
) -> None:
    folder, _ = finished
    again = run_in(folder, "dvc", "repro")
    assert again.returncode == 0
    assert ran(again.stdout) == set()
    # Git-ignored as a whole, the folder would be invisible to DVC, and so to `dvc exp run --temp`.
    assert "'models/smollm2-135m.dvc' didn't change" in again.stdout

    params = (folder / "params.yaml").read_text()
    edit(folder, {"behaviours": {"gender": {"on_fail": "stop"}}})
    planned = run_in(folder, "dvc", "repro", "--dry")
    (folder / "params.yaml").write_text(params)
    assert planned.returncode == 0, planned.stderr
    touched = ran(planned.stdout)
    assert {"gate@gender", "select@gender", "evaluate@gender", "report"} <= touched
    assert not {s for s in touched if s.startswith(("prepare", "attribute"))}
    assert not {s for s in touched if s.endswith(("@toxicity", "@race"))}


def test_runs_are_in_mlflow(finished: tuple[Path, str], run_in: Any) -> None:
    """One parent for the pipeline with a row per behaviour and method, and a run per stage."""
    from mlflow.tracking import MlflowClient

    folder, output = finished
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(experiments, max_results=1000)
    assert {run.info.status for run in runs} == {"FINISHED"}
    names = {run.data.tags.get("sparc3.name") for run in runs}
    assert ran(output) <= names
    parents = [run for run in runs if run.data.tags.get("sparc3.row") == "all"]
    assert len(parents) == 1
    rows = [run for run in runs if run.data.tags.get("sparc3.row") not in (None, "all")]
    shown = {(run.data.tags["behaviour"], run.data.tags["method"]): run for run in rows}
    assert len(shown) == 3 * len(METHODS) + 1  # toxicity's word ban
    row = shown["toxicity", "lrp"]
    assert {"reduction", "perplexity", "differential"} <= set(row.data.metrics)
    gate = next(run for run in runs if run.data.tags.get("sparc3.name") == "gate@toxicity")
    for run in (row, gate):
        assert run.inputs is not None
        read = {each.dataset.name for each in run.inputs.dataset_inputs}
        assert read >= {"toxicity", "general-toxicity"}
    artifacts = [a.path for a in client.list_artifacts(row.info.run_id)]
    assert "lrp.csv" in artifacts


def test_a_fourth_behaviour_needs_only_params(finished: tuple[Path, str], run_in: Any) -> None:
    folder, _ = finished
    edit(
        folder,
        {
            "prompt_sets": {
                "profession": {
                    "source": "stereoset",
                    "target": "pair",
                    "where": {"bias_type": "profession"},
                    "count": 180,
                },
            },
            "behaviours": {
                "profession": {
                    "prompts": "profession",
                    "reference": "general-pairs",
                    "method": "lrp",
                    "instruments": ["pairs"],
                    "on_fail": "warn",
                }
            },
        },
    )
    done = run_in(folder, "dvc", "repro", "select@profession")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    touched = ran(done.stdout)
    assert {"prepare", "attribute@profession", "gate@profession", "select@profession"} <= touched
    assert not {stage for stage in touched if stage.endswith(("@toxicity", "@race", "@gender"))}
    assert read_csv(folder / "outputs/circuits/profession/lrp.csv")


@pytest.mark.parametrize(
    ("changes", "stage", "expected"),
    [
        ({"select": {"num_neuron": 5}}, "select --behaviour race", "select.num_neuron"),
        ({}, "select --behaviour rage", "'rage' is not in params.behaviours"),
        ({"prompt_sets": {"race": {"source": "nowhere"}}}, "prepare", "nowhere"),
        ({"prompt_sets": {"race": {"count": 99999}}}, "prepare", "99999"),
        ({"attribute": {"scores": ["magic"]}}, "attribute --prompt-set race", "magic"),
        ({"model": {"path": "models/none"}}, "attribute --prompt-set race", "models/none"),
    ],
)
def test_bad_input_is_one_line_and_nothing_lost(
    finished: tuple[Path, str],
    run_in: Any,
    changes: dict[str, Any],
    stage: str,
    expected: str,
) -> None:
    folder, _ = finished
    params = (folder / "params.yaml").read_text()
    before = written(folder)
    edit(folder, changes)
    try:
        failed = run_in(folder, "python", "-m", "sparc3", *stage.split())
    finally:
        (folder / "params.yaml").write_text(params)
    assert failed.returncode == 2
    lines = [line for line in failed.stderr.splitlines() if line.startswith("sparc3: error:")]
    assert len(lines) == 1
    assert expected in lines[0]
    assert "Traceback" not in failed.stderr
    after = written(folder)
    assert after == before
