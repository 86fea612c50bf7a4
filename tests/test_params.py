from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from sparc3.base.errors import InputError
from sparc3.base.params import Method, parse
from sparc3.base.profiles import TABLES, lay_over
from sparc3.commands import use
from sparc3.measure.generate import quality
from sparc3.prompts.sources import PAIRED, SOURCES
from sparc3.stages.checks import OF_COMPLETIONS, PARAMS, check, load

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


def row(table: str, name: str, **values: object) -> dict:
    """params.yaml with a row of a table changed, or added."""
    rows = TREE[table]
    return {**TREE, table: {**rows, name: {**rows.get(name, {}), **values}}}


def behaviour(**values: object) -> dict:
    return row("behaviours", "toxicity", **values)


def own(**values: object) -> dict:
    return row("prompt_sets", "mine", **{"source": "prompts/x.jsonl", "count": None, **values})


def steered(**values: object) -> dict:
    return changed("steer", "interventions", {"odd": values})


OWN_GROUPED = {
    **{"source": "prompts/y.jsonl", "count": None},
    "columns": {"text": "a", "group": "g"},
}


def method(**values: object) -> dict:
    return row("methods", "odd", **values)


def test_default_params_load_as_written() -> None:
    params = load()
    assert list(params.behaviours) == list(TREE["behaviours"])
    assert params.select.budget.perplexity == TREE["select"]["budget"]["perplexity"]
    assert params.prompt_sets["general"].seeds == tuple(TREE["prompt_sets"]["general"]["seeds"])
    assert isinstance(params.gate.threshold, float)  # written as 15
    assert params.profile is None


def test_a_row_that_is_made_in_code_is_checked_too() -> None:
    with pytest.raises(ValidationError, match="draws"):
        Method(score="random", draws=0)
    with pytest.raises(ValidationError, match="protect"):
        replace(load().overlap, protect=1.5)


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
        (
            changed("sweep", "texts", -1),
            "sweep.texts is -1; expected a whole number from 1 to 10^9",
        ),
        (changed("sweep", "num_neurons", [10, 0]), "sweep.num_neurons[1] is 0; expected a whole"),
        (changed("sweep", "protect", [1.5]), "sweep.protect[0] is 1.5; expected a number from 0"),
        (changed("sweep", "protect", [float("nan")]), "sweep.protect[0] is nan; expected"),
        (changed("gate", "threshold", float("inf")), "gate.threshold is inf; expected a number"),
        (changed("select", "num_neurons", 0), "from 1 to 10^9 or null"),
        (changed("attribute", "shard_prompts", 0), "attribute.shard_prompts is 0; expected"),
        ({**TREE, "behaviours": {}}, "behaviours is empty; expected at least one"),
        (behaviour(scorers=[]), "behaviours.toxicity.scorers is empty; completions need one of"),
        (behaviour(scorers=["no"]), "behaviours.toxicity.scorers 'no' is not in scorers; known:"),
        (behaviour(prompts="news"), "behaviours.toxicity.prompts 'news' is not in prompt_sets"),
        (behaviour(second="no"), "behaviours.toxicity.second 'no' is not in test_sets or prompt"),
        (
            behaviour(instruments=["pairs"]),
            "toxicity.instruments is 'pairs', but the source 'real-tox",
        ),
        (
            behaviour(second="news"),
            "toxicity.second is 'news', but the source 'news' of prompt",
        ),
        (changed("transfer", "texts", []), "transfer.texts is empty"),
        (changed("transfer", "texts", ["no"]), "transfer.texts 'no' is not in"),
        (changed("evaluate", "general", ["no"]), "evaluate.general 'no' is not in"),
        (changed("evaluate", "completed", ["no"]), "evaluate.completed 'no' is not in methods"),
        ("gate: {prompts: 1}\ngate: {prompts: 2}", "key gate is there twice"),
        (changed("methods", "lrp", 3), "methods.lrp is 3; expected a mapping"),
        (changed("methods", 3, {"score": "lrp"}), "key 3 must be text; put it in quotes"),
        ({k: v for k, v in TREE.items() if k != "gate"}, "missing key gate"),
        ({**TREE, "gates": {}}, "unknown key gates"),
        ([1], "expected a mapping"),
        ("a: [", "not valid YAML"),
        ("gate: !!set {a}", "{'a'} is neither text, number"),
        ("? [a, b]\n: 1", "not valid YAML"),
        (changed("evaluate", "temperature", 0), "temperature is 0; expected a number above 0"),
        (changed("evaluate", "top_p", 0.0), "evaluate.top_p is 0.0; expected a number above 0"),
        (changed("evaluate", "joined", 1), "evaluate.joined is 1; expected true or false"),
        (changed("select", "protect", True), "select.protect is True; expected a number from 0"),
        (changed("model", "revision", None), "unknown key model.revision; known here: path, dtype"),
        (row("prompt_sets", "race", keep={"top": 3}), "missing key prompt_sets.race.keep.scorer"),
        (row("prompt_sets", "race", count=0), "prompt_sets.race.count is 0; expected a whole"),
        (method(score="lrp", contrast="t", scale=1.0), "scale is 1.0; expected a number from 0, b"),
        (method(score="random", match="own", protect=1.5), "methods.odd.protect is 1.5; expected"),
        (method(score="lrp", draws=0), "methods.odd.draws is 0; expected a whole number from 1"),
    ],
)
def test_bad_params_are_named(tmp_path: Path, tree: object, expected: str) -> None:
    assert expected in refusal(tmp_path, tree)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        # Names
        (row("methods", "a/b", score="random"), "methods: the name 'a/b' becomes part of paths"),
        (row("methods", "-a", score="random"), "methods: the name '-a'"),
        (row("scorers", "a-", kind="profanity"), "scorers: the name 'a-'"),
        (row("test_sets", "..", source="news", count=1), "test_sets: the name '..'"),
        (row("prompt_sets", "", source="news", count=1), "prompt_sets: the name ''"),
        (row("behaviours", "ü", **TREE["behaviours"]["race"]), "behaviours: the name 'ü'"),
        (row("methods", "a" * 65, score="random"), "at most 64 letters, digits, _ and, inside, -"),
        (row("methods", "a\n", score="random"), "methods: the name 'a\\n'"),
        (row("test_sets", "race", source="news", count=1), "test_sets.race is in prompt_sets too"),
        (row("methods", "none", score="random"), "the name none stands for the unpruned model"),
        (row("methods", "own", score="random"), "the name own stands for a behaviour's own method"),
        (row("methods", "curves", score="random"), "the name curves stands for the curves of"),
        (
            row("methods", "random-layer-matched-0", score="random"),
            "the name random-layer-matched-0 stands for methods.random-layer-matched; choose",
        ),
        (row("scorers", "text", kind="profanity"), "scorers.text: the name is a column of the com"),
        (
            changed("transfer", "texts", ["news", "race"]),
            "transfer.texts 'race' is the name of a behaviour too",
        ),
        # Lists
        (row("prompt_sets", "general", seeds=[1, 1]), "general.seeds is [1, 1]; expected differ"),
        (row("prompt_sets", "general", seeds=[]), "prompt_sets.general.seeds is empty"),
        (behaviour(scorers=["profanity"] * 2), "behaviours.toxicity.scorers is ['profanity', "),
        (changed("sweep", "num_neurons", [9, 9]), "sweep.num_neurons is [9, 9]; expected differ"),
        (changed("evaluate", "in_sample", ["lrp", "lrp"]), "evaluate.in_sample is ['lrp', 'lrp']"),
        (changed("attribute", "scores", ["lrp", "lrp"]), "attribute.scores is ['lrp', 'lrp']"),
        # Pointers
        (
            row("test_sets", "news", keep={"scorer": "no", "top": 1}),
            "test_sets.news.keep.scorer 'no' is not in scorers",
        ),
        (
            row("prompt_sets", "toxicity", keep={"scorer": "profanity", "top": 261}),
            "prompt_sets.toxicity.keep.top is 261; expected at most 260, count x seeds",
        ),
        (changed("overlap", "method", "no"), "overlap.method 'no' is not in methods"),
        (changed("differential", "general", "news"), "differential.general 'news' is not in prom"),
        # Splits
        (changed("prepare", "splits", {"attribute": 1.0}), "prepare.splits is {'attribute': 1.0}"),
        (
            changed("prepare", "splits", {"attribute": 0.5, "tune": 0.2, "test": 0.4}),
            "prepare.splits sums to 1.1",
        ),
        (
            changed("prepare", "splits", {"attribute": 0, "tune": 0.5, "test": 0.5}),
            "prepare.splits.attribute is 0",
        ),
        (
            changed("prepare", "splits", {"attribute": 0.5, "tune": 0, "test": 0.5}),
            "prepare.splits.tune is 0, and the sweep reads that split",
        ),
        (
            changed("prepare", "splits", {"attribute": 0.5, "tune": 0.5, "test": 0}),
            "prepare.splits.test is 0, and evaluate.general reads general there",
        ),
        # Scores
        (changed("attribute", "scores", ["lpr"]), "attribute.scores names 'lpr'; expected any of"),
        (changed("attribute", "scores", ["lrp@"]), "attribute.scores names 'lrp@'; expected"),
        (changed("attribute", "scores", ["lrp@no"]), "or with one of @max-logit"),
        (row("prompt_sets", "race", scores=[]), "prompt_sets.race.scores is empty; give at least"),
        (row("prompt_sets", "race", scores=["no"]), "prompt_sets.race.scores names 'no'"),
        (
            row("prompt_sets", "toxicity", scores=["lrp@pair"]),
            "is 'lrp@pair', but the source 'real-toxicity-prompts' of prompt set toxicity has no",
        ),
        (changed("gate", "score", "wando"), "gate.score names 'wando'; expected any of lrp"),
        (
            changed("differential", "importance", "lrp"),
            "importance 'lrp' is not computed for the prompt set general, which has gradient",
        ),
        (
            row("prompt_sets", "race", scores=["lrp"]),
            "is not computed for the prompt set race, which has lrp; add it to prompt_sets.race",
        ),
        # Methods
        (method(score="lrp", contrast="median"), "methods.odd.contrast is 'median'; expected"),
        (method(score="lrp"), "methods.odd.contrast is None"),
        (method(score="wando", contrast="t"), "methods.odd.score names 'wando'; expected any of"),
        (method(score="random", contrast="t"), "methods.odd.contrast: a random score has no con"),
        (method(score="lrp", contrast="t", scale="auroc"), "needs contrast: auroc"),
        (method(score="lrp", contrast="t", draws=2), "methods.odd.draws: only for score: random"),
        (method(score="lrp", contrast="t", layers="own"), "methods.odd.layers: only for score: r"),
        (method(score="random", protect=0.5), "methods.odd.protect is 0.5; expected it only with"),
        (method(score="random", match="nobody"), "methods.odd: 'nobody' is not a method"),
        (method(score="random", layers="random-layer-matched"), "-matched' is not a method"),
        (method(score="random", match="lrp", layers="lrp"), "match or layers, not both"),
        (behaviour(method="random-layer-matched"), "behaviours.toxicity.method is 'random-layer"),
        (changed("overlap", "method", "random-layer-matched"), "-matched' is random; name one"),
        (method(score="lrp", contrast="t", all=True, match="lrp"), "methods.odd.all: takes what"),
        (method(score="random", all=True), "methods.odd.all: takes what its contrast says"),
        # What says nothing
        (
            changed("evaluate", "resamples", 1),
            "evaluate.resamples is 1; expected a whole number from",
        ),
        (
            changed("evaluate", "control", "lrp"),
            "evaluate.control 'lrp' is not random; name a meth",
        ),
        (changed("select", "seed", -1), "select.seed is -1; expected a whole number from 0"),
        (changed("confirm", "completions", 10**9), "confirm.completions is 1000000000; expected"),
        (changed("attribute", "batch_tokens", 10**30), "a whole number from 1 to 10^9"),
        (
            behaviour(reference="toxicity"),
            "behaviours.toxicity.reference is its prompts 'toxicity'",
        ),
        (row("behaviours", "race", second="race"), "behaviours.race.second 'race' is no other set"),
        (row("methods", "lrp", match=""), "methods.lrp.match is ''; expected text, or null where"),
        (changed("attribute", "scores", ["lrp", ""]), "attribute.scores[1] is ''; expected text"),
        # Questions
        (changed("evaluate", "choices", ["no"]), "evaluate.choices 'no' is not in test_sets"),
        (changed("evaluate", "choices", ["news"]), "the source 'news' of test set news has no ans"),
        (changed("sweep", "choices", ["race"]), "sweep.choices 'race' is not in test_sets; known"),
        (
            {
                **row("test_sets", "a", source="piqa", count=9),
                "evaluate": {**TREE["evaluate"], "choices": ["a"]},
                "sweep": {**TREE["sweep"], "choices": ["a"]},
            },
            "sweep.choices 'a': evaluate.choices has questions of piqa too; take others",
        ),
        (
            changed("select", "budget", {"perplexity": 1.0, "accuracy": 2.0}),
            "select.budget.accuracy needs questions that the sweep asks: name some, sweep.choices",
        ),
        (row("test_sets", "a", source="piqa", count=9, max_tokens=9), "'piqa' are never cut"),
        (
            behaviour(instruments=["accuracy"]),
            "instruments is 'accuracy', but the source 'real-toxicity-prompts' of prompt set "
            "toxicity has no answers; sources that have: piqa, openbookqa, commonsenseqa, siqa",
        ),
        # Blocks and sealed sets
        (
            row("prompt_sets", "general", **{**TREE["prompt_sets"]["general"], "blocks": 2}),
            "blocks",
        ),
        (
            row("test_sets", "news", **{**TREE["test_sets"]["news"], "blocks": 2}),
            "news.blocks: only",
        ),
        (row("test_sets", "s", source="sealed/stereoset", count=9), "expected none that is sealed"),
        (row("sealed_sets", "s", source="stereoset", count=9), "expected one of sealed/"),
        (row("sealed_sets", "race", source="sealed/stereoset", count=9), "is in prompt_sets too"),
        (behaviour(sealed="no"), "behaviours.toxicity.sealed 'no' is not in sealed_sets"),
        # Sizes
        (changed("sweep", "num_neurons", []), "select.num_neurons is null and sweep.num_neurons e"),
        (changed("sweep", "protect", []), "select.protect is null and sweep.protect empty"),
        (
            changed("select", "num_neurons", 25)
            | {"sweep": {**TREE["sweep"], "protect": [0.1, 0.2]}},
            "select.num_neurons is 25, which the sweep does not measure",
        ),
        (changed("select", "protect", 0.3), "select.protect is 0.3, which the sweep does not"),
        (
            {**TREE, "evaluate": {**TREE["evaluate"], "window": 2048, "stride": 4096}},
            "evaluate.stride is 4096; expected at most evaluate",
        ),
        # Faithfulness, steer, the machine
        (changed("faithfulness", "scores", []), "faithfulness.scores is empty; expected at least"),
        (changed("faithfulness", "num_neurons", []), "faithfulness.num_neurons is empty; expecte"),
        (changed("faithfulness", "num_neurons", [2, 9, 5]), "is [2, 9, 5]; expected ascending si"),
        (steered(kind="prompt", text=" "), "steer.interventions.odd.text is blank; expected the"),
        (steered(kind="prompt", text="Be kind.", strengths=[0.5]), "[0.5]; leave it out, a prompt"),
        (changed("model", "device", "gpu"), "model.device is 'gpu'; expected cpu, cuda, cuda:N o"),
        (changed("model", "threads", 10**6), "model.threads"),
        # Own prompts
        (
            own(columns={"text": "a", "group": "g"}, private=True)
            | {"test_sets": {**TREE["test_sets"], "b": OWN_GROUPED}},
            "prompt_sets.mine is private and test_sets.b is not, and both name their groups",
        ),
        (own(source="prompts/x.txt"), "prompt_sets.mine.source 'prompts/x.txt' is not known; cho"),
        (own(source="elsewhere/x.csv"), "is 'elsewhere/x.csv'; expected a file below prompts/"),
        (own(columns={}), "mine.columns names neither text nor pair"),
        (own(columns={"pair": ["a"]}), "mine.columns.pair is ['a']; expected two columns"),
        (own(columns={"texts": "a"}), "unknown key prompt_sets.mine.columns.texts; known here: te"),
        (own(where={"label": "rude"}), "where.label is not known; source 'prompts/x.jsonl' has"),
        (own(target="pair"), "target is 'pair', but the source 'prompts/x.jsonl'"),
        (
            row("prompt_sets", "race", columns={"text": "text"}),
            "race.columns: only for a file of your own, and 'stereoset' is none",
        ),
        # The model's folder
        (changed("model", "path", "models/a/b@main"), "expected the 40 digits of a commit after @"),
        (changed("model", "path", "a/b@main"), "expected a folder, or models/OWNER/NAME@COMMIT"),
        (changed("model", "path", f"models/a/b@{'0' * 40}"), "fetch.model or fetch.gguf is given"),
        # Scorers
        (row("scorers", "odd", kind="bert"), "scorers.odd.kind 'bert' is not in the kinds of sco"),
        (row("scorers", "odd", kind="profanity", label="x"), "scorers.odd.label: profanity has n"),
        (row("scorers", "odd", kind="hatesonar", path="x"), "scorers.odd.path: hatesonar has none"),
        (row("scorers", "odd", kind="python"), "scorers.odd.path: python has a path, module:func"),
        (
            row("scorers", "odd", kind="profanity", floor=1.5),
            "scorers.odd.floor is 1.5; expected a",
        ),
        (row("scorers", "odd", kind="classifier", path="x"), "scorers.odd.label is missing; a cl"),
    ],
)
def test_what_cannot_work_is_refused_when_params_are_loaded(
    tmp_path: Path, tree: object, expected: str
) -> None:
    assert expected in refusal(tmp_path, tree)


@pytest.mark.parametrize(
    "tree",
    [
        method(score="wanda", contrast="t"),  # whose score follows
        changed("evaluate", "window", None),
        changed("evaluate", "completed", None),
        changed("select", "num_neurons", 25),  # with one share: fixed, and the sweep is not asked
        changed("select", "num_neurons", 25) | {"sweep": {**TREE["sweep"], "num_neurons": []}},
        changed("evaluate", "stride", 2048),
        row("methods", "a_B-1", score="random"),
        row("test_sets", "toxic", **TREE["test_sets"]["news"])
        | {"transfer": {**TREE["transfer"], "texts": ["news", "toxic"]}},
    ],
)
def test_what_is_unusual_but_works_is_not_refused(tree: dict) -> None:
    check(parse(tree))


def test_no_scorer_is_called_like_a_column_of_the_completions() -> None:
    assert {*quality([1, 2, 3]), "circuit", "split", "prompt", "text"} <= set(OF_COMPLETIONS)


# Profiles

PROFILES = sorted(Path("profiles").glob("*.yaml"))


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
def test_a_profile_says_what_differs_and_nothing_else(path: Path) -> None:
    assert load(path, PARAMS).profile == path.stem
    for section, changes in yaml.safe_load(path.read_text()).items():
        if not set(TREE[section]) <= set(changes):  # else it gives the order of a table
            assert all(value != TREE[section].get(key, "none") for key, value in changes.items())


def laid(tmp_path: Path, changes: object, base: object = TREE) -> dict[str, Any]:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(changes, sort_keys=False))
    return lay_over(tmp_path / "mine.yaml", tmp_path / "base.yaml")


def test_sections_are_merged_by_key_and_tables_by_row(tmp_path: Path) -> None:
    changes = {
        "evaluate": {"items": 9},
        "prepare": {"splits": {"attribute": 1.0}},
        "prompt_sets": {"race": {"source": "stereoset", "count": 3}},
        "methods": {"gradient": None, "new": {"score": "random"}},
        "cluster": {"device": "CPU"},
    }
    tree = laid(tmp_path, changes)
    assert next(iter(tree)) == "profile"
    assert tree["profile"] == "mine"
    assert tree["evaluate"] == {**TREE["evaluate"], "items": 9}
    assert tree["prepare"] == {"splits": {"attribute": 1.0}}  # a value below a key is whole
    assert tree["prompt_sets"]["race"] == {"source": "stereoset", "count": 3}  # and so is a row
    assert tree["prompt_sets"]["gender"] == TREE["prompt_sets"]["gender"]
    assert list(tree["methods"]) == [
        *(n for n in TREE["methods"] if n != "gradient"),
        "new",
    ]
    assert tree["cluster"] == {"device": "CPU"}
    untouched = set(TREE) - set(changes)
    assert {key: tree[key] for key in untouched} == {key: TREE[key] for key in untouched}


def test_a_profile_that_names_every_row_gives_the_order(tmp_path: Path) -> None:
    backwards = dict(reversed(TREE["methods"].items())) | {"new": {"score": "random"}}
    assert list(laid(tmp_path, {"methods": backwards})["methods"]) == list(backwards)
    backwards["gradient"] = None
    assert list(laid(tmp_path, {"methods": backwards})["methods"]) == [
        name for name in backwards if name != "gradient"
    ]


def test_a_row_that_is_not_there_cannot_be_taken_away(tmp_path: Path) -> None:
    for table in TABLES:
        with pytest.raises(InputError, match=rf"params: {table}\.none is None, .* there are: "):
            laid(tmp_path, {table: {"none": None}})


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
def test_use_makes_params_those_of_the_profile(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, path = load(path, PARAMS), path.absolute()
    default = PARAMS.read_text()
    monkeypatch.chdir(tmp_path)
    PARAMS.write_text(default)
    use.run(path)
    assert load() == expected
    assert f"use {path}" in PARAMS.read_text().split("\n")[0]
    for table in TABLES:
        assert list(getattr(load(), table)) == list(getattr(expected, table))
    with pytest.raises(InputError, match=rf"holds profile {path.stem} already.* git checkout par"):
        use.run(path)
    with pytest.raises(InputError, match="holds profile"):
        load(path, PARAMS)


def test_a_profile_that_does_not_check_leaves_params_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = PARAMS.read_text()
    monkeypatch.chdir(tmp_path)
    PARAMS.write_text(default)
    Path("mine.yaml").write_text("gate: {score: wando}\n")
    with pytest.raises(InputError, match=r"gate\.score names 'wando'"):
        use.run(Path("mine.yaml"))
    assert PARAMS.read_text() == default


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes("# für\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"params\.yaml: not UTF-8"):
        load(tmp_path / "params.yaml")


def test_sources_of_pairs_are_those_whose_rows_are_pairs(fetched: Path) -> None:
    found = {
        name
        for name, source in SOURCES.items()
        if not name.startswith("hub/") and next(iter(source.rows({}))).pair
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
