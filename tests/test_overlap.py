"""The overlap stage: one key for a group of behaviours, and no number that hangs on their order."""

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sparc3.base.artifacts import differential_path
from sparc3.base.errors import InputError
from sparc3.base.files import read_csv, read_json, write_jsonl, write_tensors
from sparc3.circuits.choose import read_differential
from sparc3.circuits.overlap import joined
from sparc3.reporting.published import Claim, claims, measured
from sparc3.stages import checks, overlap

ROOT = Path(__file__).parent.parent
LAYERS, WIDTH, PROMPTS, CIRCUIT = 4, 50, 12, 40
Metrics = dict[str, Any]


def write_project(names: tuple[str, ...]) -> None:
    """Behaviours of these names in this order: their params, prompts, scores and differentials."""
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    some = tree["behaviours"]["toxicity"]
    sets = ["general", *sorted(f"of-{name}" for name in names)]
    tree |= {
        "test_sets": {},
        "prompt_sets": {name: {"source": "stereoset", "count": PROMPTS} for name in sets},
        "behaviours": {n: some | {"prompts": f"of-{n}", "reference": "general"} for n in names},
        "methods": {"lrp": tree["methods"]["lrp"], "random": {"score": "random"}},
        "attribute": tree["attribute"] | {"scores": ["lrp"]},
        "gate": tree["gate"] | {"score": "lrp"},
        "differential": {"general": "general", "importance": "lrp"},
        "evaluate": tree["evaluate"]
        | {
            "control": "random",
            "completed": [],
            "in_sample": [],
            "general": ["general"],
            "ban": [],
        },
        "transfer": tree["transfer"] | {"texts": ["general"]},
        "overlap": tree["overlap"] | {"num_neurons": CIRCUIT, "resamples": 100, "repeats": 2},
    }
    for row in tree["behaviours"].values():
        row["method"] = "lrp"
    Path("params.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    rng = np.random.default_rng(0)
    importance = rng.random((LAYERS, WIDTH)).astype(np.float32)
    common = rng.standard_normal((LAYERS, WIDTH))
    for name in sets:
        ids = [f"{name}-{i}" for i in range(PROMPTS)]
        rows = [{"id": i, "group": i, "text": i, "split": "attribute"} for i in ids]
        write_jsonl(Path(f"outputs/prompts/{name}.jsonl"), rows)
        scores = rng.standard_normal((PROMPTS, LAYERS, WIDTH)).astype(np.float32)
        if name != "general":
            scores += (common + rng.standard_normal((LAYERS, WIDTH))).astype(np.float32)
        path = Path(f"outputs/scores/{name}/lrp/00000.safetensors")
        write_tensors(path, {"scores": scores}, {"ids": json.dumps(ids)})
        if name != "general":
            write_tensors(
                differential_path(name.removeprefix("of-"), "lrp"),
                {"differential": -scores.mean(0), "importance": importance},
            )


def measure(names: tuple[str, ...]) -> tuple[Metrics, dict[str, float], list[Claim]]:
    """The metrics file, MLflow's scalars and the claims, of behaviours in this order."""
    write_project(names)
    params = checks.load()
    assert tuple(params.behaviours) == names
    scalars = overlap.run(params)
    return read_json(Path("metrics/overlap.json")), scalars, claims(measured(params, []))


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_one_key_for_any_order() -> None:
    assert joined(("b", "a-b", "a")) == joined(("a", "b", "a-b")) == "a.a-b.b"
    assert joined(("a-b",)) != joined(("a", "b"))
    assert joined(("a", "a")) == "a.a"


def test_the_order_of_behaviours_is_of_no_account() -> None:
    first = measure(("toxicity", "gender", "race"))
    for names in permutations(("toxicity", "gender", "race")):
        assert measure(names) == first, names
    metrics, scalars, judged = first
    by_id = {claim.row["id"]: claim for claim in judged}
    assert by_id["overlap-gender-race"].value == metrics["overlaps"]["gender.race"]["observed"]
    assert scalars["observed.gender.race"] == by_id["overlap-gender-race"].value
    toxicity, gender, race = (
        read_differential(name, "lrp")[0].ravel() for name in ("toxicity", "gender", "race")
    )
    only = 100 * np.mean((toxicity < 0) & (gender >= 0))
    assert by_id["quadrant-toxicity"].value == pytest.approx(only)
    apart = np.corrcoef(toxicity, race)[0, 1] - np.corrcoef(gender, race)[0, 1]
    found = metrics["corrected"]["differences"]["race.toxicity minus gender.race"]
    assert by_id["correlation-apart"].value == found["value"] == pytest.approx(apart, abs=0.2)
    for claim in judged:
        kind = claim.row["id"].split("-")[0]
        if kind in ("overlap", "region", "correlation", "quadrant", "enrichment", "late"):
            assert claim.value is not None, claim.row["id"]


def test_names_with_a_hyphen_do_not_collide() -> None:
    metrics, scalars, _ = measure(("a", "b", "a-b"))
    assert set(metrics["regions"]) == {"a", "b", "a-b", "a.b", "a.a-b", "a-b.b", "a.a-b.b"}
    assert set(metrics["overlaps"]) == {"a.b", "a.a-b", "a-b.b", "a.a-b.b"}
    assert len(scalars) == 3 * 4 + 3
    listed = read_csv(Path("outputs/overlap/regions.csv"))
    members = {
        name: {(r["layer"], r["neuron"]) for r in listed if name in r["behaviours"].split(".")}
        for name in ("a", "b", "a-b")
    }
    for name, neurons in members.items():
        assert len(neurons) == CIRCUIT, name
    for pair in ("a.b", "a.a-b", "a-b.b"):
        one, other = pair.split(".")
        assert metrics["overlaps"][pair]["observed"] == len(members[one] & members[other])
        assert set(metrics["quadrants"][pair]) == {
            "both",
            f"{one} only",
            f"{other} only",
            "neither",
        }


def test_a_size_beyond_the_model_is_blamed_on_its_own_key() -> None:
    write_project(("a", "b"))
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace(f"num_neurons: {CIRCUIT}", "num_neurons: 190"))
    with pytest.raises(InputError, match=r"params: overlap\.num_neurons: 190 .* only 160 of 200"):
        overlap.run(checks.load())
