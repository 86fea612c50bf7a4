from pathlib import Path

import pytest
import yaml

from sparc3.base.errors import InputError
from sparc3.base.params import PAIRED, load
from sparc3.circuits.methods import check_methods
from sparc3.prompts.sources import SOURCES

TREE = yaml.safe_load(Path("params.yaml").read_text())


def refusal(tmp_path: Path, tree: object) -> str:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(tree) if not isinstance(tree, str) else tree)
    with pytest.raises(InputError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(section: str, key: object, value: object) -> dict:
    return {**TREE, section: {**TREE[section], key: value}}


def behaviour(**values: object) -> dict:
    rows = TREE["behaviours"]
    return {**TREE, "behaviours": {**rows, "toxicity": {**rows["toxicity"], **values}}}


def test_default_params_load_as_written() -> None:
    params = load()
    assert list(params.behaviours) == list(TREE["behaviours"])
    assert params.select.ppl_budget == TREE["select"]["ppl_budget"]
    assert params.prompt_sets["general"].seeds == tuple(TREE["prompt_sets"]["general"]["seeds"])


@pytest.mark.parametrize("path", sorted(Path("profiles").glob("*.yaml")), ids=lambda p: p.stem)
def test_profiles_are_complete(path: Path) -> None:
    params = load(path)
    check_methods(params)
    assert params.report.method in params.methods


def test_the_default_is_a_profile() -> None:
    assert Path("profiles/smollm2-135m.yaml").read_text() == Path("params.yaml").read_text()


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (changed("select", "num_neuron", 3), "unknown key select.num_neuron"),
        (changed("gate", "threshold", "15"), "gate.threshold is '15'; expected a number"),
        (changed("gate", "threshold", "1e-3"), "write 0.001"),
        (changed("gate", "prompts", 2.5), "gate.prompts is 2.5; expected a whole number"),
        (changed("gate", "prompts", True), "gate.prompts is True; expected a whole number"),
        (changed("model", "dtype", "int8"), "model.dtype is 'int8'; expected 'float32' or"),
        (changed("sweep", "protect", 0.2), "sweep.protect is 0.2; expected a list of a number"),
        (changed("sweep", "texts", -1), "sweep.texts is -1; expected a whole number of at least 1"),
        (changed("sweep", "num_neurons", [10, 0]), "sweep.num_neurons[1] is 0; expected a whole"),
        (changed("sweep", "protect", [1.5]), "sweep.protect[0] is 1.5; expected a number from 0"),
        (changed("sweep", "protect", [float("nan")]), "sweep.protect[0] is nan; expected"),
        (changed("gate", "threshold", float("inf")), "gate.threshold is inf; expected a number"),
        (changed("select", "num_neurons", 0), "at least 1 or null"),
        (changed("attribute", "shard_prompts", 0), "attribute.shard_prompts is 0; expected"),
        ({**TREE, "behaviours": {}}, "behaviours is empty; expected at least one"),
        (behaviour(scorers=[]), "behaviours.toxicity.scorers is empty; completions need one of"),
        (behaviour(scorers=["no"]), "behaviours.toxicity.scorers 'no' is not in scorers; known:"),
        (behaviour(prompts="news"), "behaviours.toxicity.prompts 'news' is not in prompt_sets"),
        (behaviour(second="no"), "behaviours.toxicity.second 'no' is not in test_sets or prompt"),
        (behaviour(measure="pairs"), "prompt set toxicity whose source 'real-toxicity-prompts'"),
        (behaviour(second="news"), "prompt set news whose source 'news' has no pairs"),
        (changed("transfer", "texts", []), "transfer.texts is empty"),
        (changed("transfer", "texts", ["no"]), "transfer.texts 'no' is not in"),
        (changed("evaluate", "general", "no"), "evaluate.general 'no' is not in"),
        (changed("evaluate", "completed", ["no"]), "evaluate.completed 'no' is not in methods"),
        ("gate: {prompts: 1}\ngate: {prompts: 2}", "key gate is there twice"),
        (changed("methods", "lrp", 3), "methods.lrp is 3; expected a mapping"),
        (changed("methods", 3, {"score": "lrp"}), "methods: key 3 must be text"),
        ({k: v for k, v in TREE.items() if k != "gate"}, "missing key gate"),
        ({**TREE, "gates": {}}, "unknown key gates"),
        ([1], "expected a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_params_are_named(tmp_path: Path, tree: object, expected: str) -> None:
    assert expected in refusal(tmp_path, tree)


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes("# für\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"params\.yaml: not UTF-8"):
        load(tmp_path / "params.yaml")


def test_sources_of_pairs_are_those_whose_rows_are_pairs(fetched: Path) -> None:
    found = {
        name
        for name, source in SOURCES.items()
        if not name.startswith("hub/") and source.rows({})[0].pair
    }
    assert {*found, "hub/stereoset"} == set(PAIRED)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: file not found"):
        load(tmp_path / "none.yaml")


def test_no_key_is_one_that_the_run_cache_of_dvc_ignores() -> None:
    """It leaves out every key of these names, at any depth, when it looks for an earlier run."""

    def keys(tree: object) -> set[object]:
        if not isinstance(tree, dict):
            return set()
        return set(tree).union(*map(keys, tree.values()))

    for path in [Path("params.yaml"), *sorted(Path("profiles").glob("*.yaml"))]:
        assert not keys(yaml.safe_load(path.read_text())) & {"size", "nfiles"}
