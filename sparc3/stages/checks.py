"""Every check of params that takes more than one value, or names that other rooms know.

`load` runs them all, so that what cannot work is refused before anything is computed. Each error is
one line that names the key, what was expected and, where it helps, the remedy.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from sparc3.base.artifacts import circuit_names
from sparc3.base.errors import InputError
from sparc3.base.params import SPLITS, Method, Params, PromptSet, parse, read, scores_of, sets_of
from sparc3.base.profiles import TABLES, lay_over
from sparc3.circuits.methods import OWN, independent
from sparc3.measure.instruments import INSTRUMENTS, instruments_of
from sparc3.measure.scorers import SCORERS
from sparc3.prompts import sources
from sparc3.relevance.contrasts import CONTRASTS
from sparc3.relevance.scores import SCORES, TARGETS

PARAMS = Path("params.yaml")
NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}[A-Za-z0-9_])?")

# Names that stand for something else where a method's, or a scorer's, would stand.
OF_METHODS = {
    "none": "the unpruned model",
    OWN: "a behaviour's own method",
    "curves": "the curves of stability",
}
OF_COMPLETIONS = (  # columns and values that stand beside the scores
    *("circuit", "split", "prompt", "group", "completion", "text", "tokens", "nll"),
    *("length", "distinct_1", "distinct_2", "repetition", "degenerate"),
)


def load(path: Path = PARAMS, base: Path | None = None) -> Params:
    """The params of a file, or those of `base` with the changes of the profile `path`; checked.

    InputError: one line that names the file or the key.
    """
    params = parse(read(path) if base is None else lay_over(path, base))
    check(params)
    return params


def check(params: Params) -> None:
    """InputError for the first thing that cannot work."""
    for part in (
        check_names,
        check_lists,
        check_pointers,
        check_splits,
        check_sets,
        check_scores,
        check_methods,
        check_behaviours,
        check_sizes,
        check_scorers,
    ):
        part(params)


def _expect(fits: bool, key: str, problem: str) -> None:
    if not fits:
        raise InputError(f"params: {key}{problem}")


def _known(key: str, name: str, names: Collection[str], where: str) -> None:
    listed = ", ".join(names) or "none"
    _expect(name in names, key, f" {name!r} is not in {where}; known: {listed}")


def check_names(params: Params) -> None:
    """Names become paths, stages and metrics: they are short and plain, and none means two things.

    A transfer table's columns are behaviours and kinds of text; circuits are methods, or draws.
    """
    for table in TABLES:
        for name in getattr(params, table):
            _expect(
                NAME.fullmatch(name) is not None,
                table,
                f": the name {name!r} becomes part of paths; expected at most 64 letters, digits, "
                "_ and, inside, -",
            )
    for table in ("prompt_sets", "behaviours", "methods"):
        _expect(bool(getattr(params, table)), table, " is empty; expected at least one")
    for name in params.test_sets:
        _expect(
            name not in params.prompt_sets,
            f"test_sets.{name}",
            " is in prompt_sets too; rename one of them",
        )
    for name in params.transfer.texts:
        _expect(
            name not in params.behaviours,
            "transfer.texts",
            f" {name!r} is the name of a behaviour too; rename one of them",
        )
    for name in params.scorers:
        _expect(
            name not in OF_COMPLETIONS,
            f"scorers.{name}",
            ": the name is a column of the completions; choose another",
        )
    owners = dict(OF_METHODS)
    for name, method in params.methods.items():
        for circuit in {name, *circuit_names(name, method)}:
            _expect(
                circuit not in owners,
                f"methods.{name}",
                f": the name {circuit} stands for {owners.get(circuit)}; choose another",
            )
            owners[circuit] = f"methods.{name}"


def check_lists(params: Params) -> None:
    """No list holds a value twice; those that must are not empty."""
    rows: dict[str, Any] = {f.name: getattr(params, f.name) for f in fields(params)}
    del rows["cluster"]  # lines of shell may come again
    for table in TABLES:
        rows |= {f"{table}.{name}": row for name, row in rows.pop(table).items()}
    for section, row in rows.items():
        for name in getattr(row, "__dataclass_fields__", ()):
            values = getattr(row, name)
            if isinstance(values, tuple):
                key = f"{section}.{name}"
                twice = len(set(values)) < len(values)
                _expect(not twice, key, f" is {list(values)}; expected different values")
                needed = name in ("seeds", "texts")
                _expect(bool(values) or not needed, key, " is empty; expected at least one")


def check_pointers(params: Params) -> None:
    """Names that stand for a row of another section."""
    every = {**params.prompt_sets, **params.test_sets}
    tested = "test_sets or prompt_sets"
    for key, spec in sets_of(params).values():
        if spec.keep is not None:
            _known(f"{key}.keep.scorer", spec.keep.scorer, params.scorers, "scorers")
    for name, row in params.behaviours.items():
        key = f"behaviours.{name}"
        _known(f"{key}.prompts", row.prompts, params.prompt_sets, "prompt_sets")
        _known(f"{key}.reference", row.reference, params.prompt_sets, "prompt_sets")
        _known(f"{key}.method", row.method, params.methods, "methods")
        for scorer in row.scorers:
            _known(f"{key}.scorers", scorer, params.scorers, "scorers")
        if row.second is not None:
            _known(f"{key}.second", row.second, every, tested)
    _known("differential.general", params.differential.general, params.prompt_sets, "prompt_sets")
    _known("evaluate.general", params.evaluate.general, every, tested)
    for text in params.transfer.texts:
        _known("transfer.texts", text, every, tested)
    evaluate = params.evaluate
    for key, methods in {
        "evaluate.control": [evaluate.control],
        "evaluate.completed": evaluate.completed,
        "evaluate.in_sample": evaluate.in_sample,
        "overlap.method": [params.overlap.method],
        "report.method": [params.report.method],
    }.items():
        for method in methods:
            _known(key, method, params.methods, "methods")


def check_splits(params: Params) -> None:
    """Shares of the splits, each of which whoever reads it needs."""
    shares, key = params.prepare.splits, "prepare.splits"
    _expect(
        set(shares) == set(SPLITS),
        key,
        f" is {shares}; expected a share of at least 0 for each of {', '.join(SPLITS)}",
    )
    total = sum(shares.values())
    _expect(abs(total - 1) <= 1e-9, key, f" sums to {total}; expected 1")
    _expect(shares["attribute"] > 0, f"{key}.attribute", " is 0; expected prompts to attribute")
    if params.sweep.num_neurons and params.sweep.protect:
        _expect(
            shares["tune"] > 0,
            f"{key}.tune",
            " is 0, and the sweep reads that split; give it a share, or empty sweep.num_neurons "
            "and fix select.num_neurons and select.protect",
        )
    _expect(
        shares["test"] > 0 or params.evaluate.general in params.test_sets,
        f"{key}.test",
        f" is 0, and evaluate.general reads {params.evaluate.general} there; give it a share, or "
        "name a set of test_sets",
    )


def check_sets(params: Params) -> None:
    """What no source could satisfy."""
    every = sets_of(params)
    for key, spec in every.values():
        sources.check(key, spec.source, spec.where)
        stream, paired = spec.source in sources.STREAMS, spec.source in sources.PAIRED
        _expect(
            spec.count is not None
            or not (stream or spec.match_length or spec.keep or len(spec.seeds) > 1),
            f"{key}.count",
            " is null, which takes every row once; give a number with a stream, with several "
            "seeds, with match_length or keep",
        )
        if spec.target == "pair":
            _paired(f"{key}.target", "pair", key, spec)
        _expect(
            not paired or (spec.max_tokens is None and spec.match_length is None),
            key,
            f": the pairs of source {spec.source!r} are never cut; leave out max_tokens and "
            "match_length",
        )
        if spec.match_length is None:
            continue
        _expect(
            spec.match_length in every and every[spec.match_length][1].match_length is None,
            f"{key}.match_length",
            f" is {spec.match_length!r}; expected a prompt set that matches none",
        )
        _expect(
            not (spec.min_tokens or spec.max_tokens or stream),
            f"{key}.match_length",
            " replaces min_tokens and max_tokens, and needs a source that is no stream",
        )


def _paired(key: str, value: str, name: str, spec: PromptSet) -> None:
    _expect(
        spec.source in sources.PAIRED,
        key,
        f" is {value!r}, but the source {spec.source!r} of {name} has no pairs; sources that "
        f"have: {', '.join(sources.PAIRED)}",
    )


def check_scores(params: Params) -> None:
    """Scores of every set, and that those are computed which later stages read."""
    for name, spec in params.prompt_sets.items():
        key = "attribute.scores" if spec.scores is None else f"prompt_sets.{name}.scores"
        names = scores_of(params, name)
        _expect(bool(names), key, f": none for prompt set {name}; give at least one")
        for score in names:
            kind, at, target = score.partition("@")
            _expect(
                kind in SCORES and (not at or target in TARGETS),
                key,
                f" names {score!r}; expected any of {', '.join(SCORES)}, alone or with one of "
                f"@{', @'.join(TARGETS)}",
            )
            if target == "pair":
                _paired(key, score, f"prompt set {name}", spec)
    differential = params.differential
    _computed(params, "differential.importance", differential.importance, differential.general)
    for behaviour in params.behaviours.values():
        for prompt_set in (behaviour.reference, behaviour.prompts):
            _computed(params, "gate.score", params.gate.score, prompt_set)
            for name, method in params.methods.items():
                if method.score != "random":
                    _computed(params, f"methods.{name}.score", method.score, prompt_set)


def _computed(params: Params, key: str, score: str, prompt_set: str) -> None:
    computed = scores_of(params, prompt_set)
    _expect(
        score in computed,
        key,
        f" {score!r} is not computed for the prompt set {prompt_set}, which has "
        f"{', '.join(computed)}; add it to attribute.scores, or to the set's own",
    )


def check_methods(params: Params) -> None:
    """Rows of methods that contradict themselves, or follow what cannot be followed."""
    leaders = [OWN, *independent(params)]
    for name, method in params.methods.items():
        _check_method(f"methods.{name}", method, leaders)
    for name, behaviour in params.behaviours.items():
        _expect(
            behaviour.method in leaders[1:],
            f"behaviours.{name}.method",
            f" is {behaviour.method!r}; expected one of {', '.join(leaders[1:])}",
        )
    _expect(
        params.methods[params.overlap.method].contrast is not None,
        "overlap.method",
        f" {params.overlap.method!r} is random; name one that scores",
    )


def _check_method(key: str, method: Method, leaders: Iterable[str]) -> None:
    if method.score == "random":
        _expect(
            method.contrast is None,
            f"{key}.contrast",
            ": a random score has no contrast; remove the key",
        )
    else:
        _expect(
            method.contrast in CONTRASTS,
            f"{key}.contrast",
            f" is {method.contrast!r}; expected {' or '.join(CONTRASTS)}",
        )
        for control, value in (("draws", method.draws > 1), ("layers", bool(method.layers))):
            _expect(not value, f"{key}.{control}", ": only for score: random, as a control")
    _expect(
        method.scale != "auroc" or method.contrast == "auroc",
        f"{key}.scale",
        ": auroc needs contrast: auroc",
    )
    _expect(
        not (method.match and method.layers),
        key,
        ": give match or layers, not both (layers fixes the number too)",
    )
    leader = method.match or method.layers
    _expect(
        method.protect is None or leader is not None,
        f"{key}.protect",
        f" is {method.protect}; expected it only with match or layers",
    )
    _expect(
        leader is None or leader in leaders,
        key,
        f": {leader!r} is not a method that chooses its own neurons; expected one of "
        f"{', '.join(leaders)}",
    )


def check_behaviours(params: Params) -> None:
    """That a behaviour can be measured: by instruments that there are, one that a sweep reads among
    them, whose numbers have different names; with scorers for completions and pairs for pairs.
    """
    sets = sets_of(params)
    for name, row in params.behaviours.items():
        key = f"behaviours.{name}.instruments"
        for instrument in row.instruments:
            _known(key, instrument, INSTRUMENTS, "sparc3/measure/instruments")
        chosen = instruments_of(row)
        swept = [instrument for instrument, each in INSTRUMENTS.items() if each(row).swept]
        _expect(
            any(each.swept for each in chosen.values()),
            key,
            f" is {list(row.instruments)}; expected one of {', '.join(swept)}, which a sweep reads",
        )
        values = [value.name for each in chosen.values() for value in each.values]
        _expect(
            len(set(values)) == len(values),
            key,
            f" is {list(row.instruments)}, of which two give a number of one name; take one away",
        )
        _expect(
            "completions" not in chosen or bool(row.scorers),
            f"behaviours.{name}.scorers",
            f" is empty; completions need one of {', '.join(params.scorers)}",
        )
        for instrument, each in chosen.items():
            if each.reads == "pair":
                _paired(key, instrument, f"prompt set {row.prompts}", sets[row.prompts][1])
        if row.second is not None:
            key = f"behaviours.{name}.second"
            _paired(key, row.second, f"prompt set {row.second}", sets[row.second][1])


def check_sizes(params: Params) -> None:
    """Numbers that bound one another: the sweep's grid and select's choice, window and stride."""
    sweep, select, evaluate = params.sweep, params.select, params.evaluate
    grids = {
        "num_neurons": (select.num_neurons, sweep.num_neurons),
        "protect": (select.protect, sweep.protect),
    }
    points = 1
    for name, (chosen, grid) in grids.items():
        _expect(
            chosen is not None or bool(grid),
            f"select.{name}",
            f" is null and sweep.{name} empty; give one of them",
        )
        points *= len(grid) if chosen is None else 1
    for name, (chosen, grid) in grids.items():
        _expect(
            points == 1 or chosen is None or chosen in grid,
            f"select.{name}",
            f" is {chosen}, which the sweep does not measure; add it to sweep.{name}, or give both "
            "select.num_neurons and select.protect",
        )
    _expect(
        evaluate.stride <= evaluate.window,
        "evaluate.stride",
        f" is {evaluate.stride}; expected at most evaluate.window, {evaluate.window}",
    )


def check_scorers(params: Params) -> None:
    """Kinds of scorers, and the fields that each must have, or has not."""
    for name, row in params.scorers.items():
        key = f"scorers.{name}"
        _known(f"{key}.kind", row.kind, SCORERS, "the kinds of scorers")
        for field in ("path", "label", "revision"):
            given = getattr(row, field) is not None
            if row.kind == "profanity":
                _expect(not given, f"{key}.{field}", ": profanity has none; leave it out")
            if row.kind == "classifier" and field != "revision":
                _expect(given, f"{key}.{field}", " is missing; a classifier needs path and label")
