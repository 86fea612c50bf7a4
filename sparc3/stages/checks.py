"""Every check of params that takes more than one value, or names that other rooms know.

`load` runs them all, so that what cannot work is refused before anything is computed. A check
yields its problems, each one line that names the key, what was expected and, where it helps, the
remedy; the first one is the error.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from sparc3.base.artifacts import circuit_names
from sparc3.base.errors import InputError
from sparc3.base.params import (
    SPLITS,
    Method,
    Params,
    PromptSet,
    hub_of,
    parse,
    read,
    scores_of,
    sets_of,
)
from sparc3.base.profiles import TABLES, lay_over
from sparc3.circuits.interventions import LEARNERS
from sparc3.circuits.methods import BAN, OWN, can_lead, completed, independent
from sparc3.measure.instruments import INSTRUMENTS, instruments_of
from sparc3.measure.scorers import SCORERS
from sparc3.prompts import own
from sparc3.prompts.sources import CHOICES, PAIRED, PIN, SEALED, SOURCES, STREAMS, VALUES, source_of
from sparc3.relevance.contrasts import CONTRASTS
from sparc3.relevance.scores import SCORES, TARGETS

PARAMS = Path("params.yaml")
NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}[A-Za-z0-9_])?")

# Names that stand for something else where a method's, or a scorer's, would stand.
OF_METHODS = {
    "none": "the unpruned model",
    BAN: "the ban of words",
    OWN: "a behaviour's own method",
    "curves": "the curves of stability",
}
OF_COMPLETIONS = (  # columns and values that stand beside the scores
    *("circuit", "split", "prompt", "group", "completion", "text", "tokens", "nll", "kl"),
    *("length", "distinct_1", "distinct_2", "repetition", "rep_4", "degenerate"),
)

NEEDED = ("seeds", "texts", "general")  # lists that are not empty, nor are those of faithfulness
Problems = Iterator[str]


def load(path: Path = PARAMS, base: Path | None = None) -> Params:
    """The params of a file, or those of `base` with the changes of the profile `path`; checked, and
    with the methods that complete where `evaluate.completed` is null.

    InputError: one line that names the file or the key.
    """
    params = parse(read(path) if base is None else lay_over(path, base))
    check(params)
    return replace(params, evaluate=replace(params.evaluate, completed=completed(params)))


def check(params: Params) -> None:
    """InputError for the first thing that cannot work."""
    checks = (
        check_model,
        check_names,
        check_lists,
        check_pointers,
        check_questions,
        check_splits,
        check_sets,
        check_scores,
        check_methods,
        check_interventions,
        check_behaviours,
        check_sizes,
        check_scorers,
    )
    refuse(chain.from_iterable(part(params) for part in checks))


def refuse(problems: Problems) -> None:
    """InputError for the first problem, if there is one."""
    for problem in problems:
        raise InputError(f"params: {problem}")


def _known(key: str, name: str, names: Collection[str], where: str) -> Problems:
    if name not in names:
        yield f"{key} {name!r} is not in {where}; known: {', '.join(names) or 'none'}"


def check_model(params: Params) -> Problems:
    """The device, and the name of the model's folder, where fetch is to fill it from the hub."""
    path, hub, device = params.model.path, hub_of(params.model.path), params.model.device
    if not re.fullmatch(r"cpu|auto|cuda(:\d+)?", device):
        yield f"model.device is {device!r}; expected cpu, cuda, cuda:N or auto"
    if hub and not re.fullmatch("[0-9a-f]{40}", hub[1]):
        yield (
            f"model.path is {path!r}; expected the 40 digits of a commit after @, for a branch or "
            "a tag moves"
        )
    if not hub and "@" in path and not Path(path).exists():
        expected = "models/OWNER/NAME@COMMIT, a folder that fetch fills from the hub"
        yield f"model.path is {path!r}; expected a folder, or {expected}"
    if hub and (params.fetch.model or params.fetch.gguf):
        yield "fetch.model or fetch.gguf is given, and model.path is of the hub; set both to null"


def check_names(params: Params) -> Problems:
    """Names become paths, stages and metrics: they are short and plain, and none means two things.

    A transfer table's columns are behaviours and kinds of text; circuits are methods, or draws.
    """
    for table in TABLES:
        for name in getattr(params, table):
            if not NAME.fullmatch(name):
                yield (
                    f"{table}: the name {name!r} becomes part of paths; expected at most 64 "
                    "letters, digits, _ and, inside, -"
                )
    for table in ("prompt_sets", "behaviours", "methods"):
        if not getattr(params, table):
            yield f"{table} is empty; expected at least one"
    for table, others in (("test_sets", "prompt_sets"), ("sealed_sets", "prompt_sets")):
        for name in getattr(params, table):
            if name in getattr(params, others):
                yield f"{table}.{name} is in {others} too; rename one of them"
    for name in params.transfer.texts:
        if name in params.behaviours:
            yield f"transfer.texts {name!r} is the name of a behaviour too; rename one of them"
    for name in params.scorers:
        if name in OF_COMPLETIONS:
            yield f"scorers.{name}: the name is a column of the completions; choose another"
    owners = dict(OF_METHODS)
    rows = {f"methods.{n}": {n, *circuit_names(n, m)} for n, m in params.methods.items()}
    for name in params.steer.interventions:
        rows[f"steer.interventions.{name}"] = {name}
        if not NAME.fullmatch(name):
            yield f"steer.interventions: the name {name!r} becomes part of paths; see methods"
    for key, circuits in rows.items():
        for circuit in circuits:
            if circuit in owners:
                yield f"{key}: the name {circuit} stands for {owners[circuit]}; choose another"
            owners[circuit] = key


def check_lists(params: Params) -> Problems:
    """No list holds a value twice; those that must are not empty."""
    rows: dict[str, Any] = {f.name: getattr(params, f.name) for f in fields(params)}
    del rows["cluster"]  # lines of shell may come again
    for table in TABLES:
        rows |= {f"{table}.{name}": row for name, row in rows.pop(table).items()}
    for section, row in rows.items():
        for name in getattr(row, "__dataclass_fields__", ()):
            values = getattr(row, name)
            if isinstance(values, tuple):
                if len(set(values)) < len(values):
                    yield f"{section}.{name} is {list(values)}; expected different values"
                if not values and (name in NEEDED or section == "faithfulness"):
                    yield f"{section}.{name} is empty; expected at least one"


def check_pointers(params: Params) -> Problems:
    """Names that stand for a row of another section."""
    sets, scorers, methods = params.prompt_sets, params.scorers, params.methods
    evaluate, every, tested = params.evaluate, sets_of(params), "test_sets or prompt_sets"
    for key, spec in every.values():
        if spec.keep is not None:
            yield from _known(f"{key}.keep.scorer", spec.keep.scorer, scorers, "scorers")
    for name, row in params.behaviours.items():
        key = f"behaviours.{name}"
        yield from _known(f"{key}.prompts", row.prompts, sets, "prompt_sets")
        yield from _known(f"{key}.reference", row.reference, sets, "prompt_sets")
        yield from _known(f"{key}.method", row.method, methods, "methods")
        for scorer in row.scorers:
            yield from _known(f"{key}.scorers", scorer, scorers, "scorers")
        if row.second is not None:
            yield from _known(f"{key}.second", row.second, every, tested)
        if row.sealed is not None:
            yield from _known(f"{key}.sealed", row.sealed, params.sealed_sets, "sealed_sets")
    yield from _known("differential.general", params.differential.general, sets, "prompt_sets")
    for text in evaluate.general:
        yield from _known("evaluate.general", text, every, tested)
    for text in params.transfer.texts:
        yield from _known("transfer.texts", text, every, tested)
    for key, names in _questions(params).items():
        for name in names:
            yield from _known(key, name, params.test_sets, "test_sets")
    for key, names in {
        "evaluate.control": [evaluate.control],
        "evaluate.completed": evaluate.completed or (),
        "evaluate.in_sample": evaluate.in_sample,
        "overlap.method": [params.overlap.method],
        "report.method": [params.report.method],
    }.items():
        for name in names:
            yield from _known(key, name, methods, "methods")


def _questions(params: Params) -> dict[str, tuple[str, ...]]:
    return {"evaluate.choices": params.evaluate.choices, "sweep.choices": params.sweep.choices}


def check_questions(params: Params) -> Problems:
    """Sets of questions, with answers; none of those that a circuit is chosen on is tested on."""
    asked: dict[str, str] = {}
    for key, names in _questions(params).items():
        for name in names:
            source = params.test_sets[name].source
            yield from _with(key, name, f"test set {name}", params.test_sets[name], "choices")
            if asked.setdefault(source, key) != key:
                yield f"{key} {name!r}: {asked[source]} has questions of {source} too; take others"
    if params.select.budget.accuracy is not None and not params.sweep.choices:
        yield "select.budget.accuracy needs questions that the sweep asks: name some, sweep.choices"


def check_splits(params: Params) -> Problems:
    """Shares of the splits, each of which whoever reads it needs."""
    shares, key = params.prepare.splits, "prepare.splits"
    if set(shares) != set(SPLITS):
        yield f"{key} is {shares}; expected a share of at least 0 for each of {', '.join(SPLITS)}"
    total = sum(shares.values())
    if abs(total - 1) > 1e-9:
        yield f"{key} sums to {total}; expected 1"
    if not shares["attribute"]:
        yield f"{key}.attribute is 0; expected prompts to attribute"
    if not shares["tune"] and params.sweep.num_neurons and params.sweep.protect:
        yield (
            f"{key}.tune is 0, and the sweep reads that split; give it a share, or empty "
            "sweep.num_neurons and fix select.num_neurons and select.protect"
        )
    if not shares["tune"] and params.evaluate.ban:
        yield f"{key}.tune is 0, where the ban is fitted; give it a share, or empty evaluate.ban"
    for general in params.evaluate.general:
        if not shares["test"] and general not in params.test_sets:
            yield (
                f"{key}.test is 0, and evaluate.general reads {general} there; give it a share, or "
                "name a set of test_sets"
            )


def check_sets(params: Params) -> Problems:
    """What no source could satisfy."""
    every = sets_of(params)
    yield from check_uses(params)
    grouped = [each for each in every.values() if each[1].columns and each[1].columns.group]
    hidden = {spec.private: key for key, spec in grouped}
    if len(hidden) > 1:
        yield (
            f"{hidden[True]} is private and {hidden[False]} is not, and both name their groups, "
            "which could not be compared: make both private, or none"
        )
    for key, spec in every.values():
        stream, like = spec.source in STREAMS, spec.match_length
        if spec.count is None and (stream or like or spec.keep or len(spec.seeds) > 1):
            yield (
                f"{key}.count is null, which takes every row once; give a number with a stream, "
                "with several seeds, with match_length or keep"
            )
        candidates = (spec.count or 0) * len(spec.seeds)
        if spec.keep is not None and spec.keep.top > candidates:
            yield f"{key}.keep.top is {spec.keep.top}; expected at most {candidates}, count x seeds"
        if spec.target == "pair":
            yield from _with(f"{key}.target", "pair", key, spec)
        whole = source_of(spec).paired or source_of(spec).choices
        if whole and (spec.max_tokens is not None or like is not None):
            yield (
                f"{key}: the rows of source {spec.source!r} are never cut; leave out max_tokens "
                "and match_length"
            )
        if like is None:
            continue
        if like not in every or every[like][1].match_length is not None:
            yield f"{key}.match_length is {like!r}; expected a prompt set that matches none"
        if spec.min_tokens or spec.max_tokens or stream:
            yield (
                f"{key}.match_length replaces min_tokens and max_tokens, and needs a source that "
                "is no stream"
            )


def check_uses(params: Params) -> Problems:
    """Sources of sets, sealed ones for sealed sets alone; blocks for prompts of behaviours."""
    sealed = {name: (f"sealed_sets.{name}", spec) for name, spec in params.sealed_sets.items()}
    rows, general = params.behaviours.values(), params.evaluate.general
    others = {params.differential.general, *general, *params.transfer.texts}
    others |= {row.reference for row in rows}
    blocked = {row.prompts for row in rows} - others
    for name, (key, spec) in {**sets_of(params), **sealed}.items():
        yield from check_source(key, spec)
        if (spec.source in SEALED) != (name in sealed):
            expected = f"one of {', '.join(SEALED)}" if name in sealed else "none that is sealed"
            yield f"{key}.source is {spec.source!r}; expected {expected}"
        if spec.blocks is not None and (spec.source in STREAMS or name not in blocked):
            yield f"{key}.blocks: only for prompts of a behaviour, out of no stream; remove it"


def check_source(key: str, spec: PromptSet) -> Problems:
    """The source of the set at `key`, and what its `where` may have."""
    source, where = spec.source, spec.where
    if source not in SOURCES:
        yield from _check_own(key, spec)
    elif spec.columns is not None:
        yield f"{key}.columns: only for a file of your own, and {source!r} is none; remove it"
    known = source_of(spec).where
    for name, value in where.items():
        if name not in known:
            keys = ", ".join(known) or "no keys"
            yield f"{key}.where.{name} is not known; source {source!r} has {keys}"
        expected, fits = VALUES[name]
        if not fits(value):
            yield f"{key}.where.{name} is {value!r}; expected {expected}"
    path = Path(where["path"]) if "path" in where else None
    local = path is not None and path.is_dir()
    if path and local and not path.resolve().is_relative_to(Path("data").resolve()):
        yield (
            f"{key}.where.path is {str(path)!r}; expected a folder in data/, whose changes the "
            "pipeline sees: put it there and pin it with: python -m sparc3 fetch --update"
        )
    if known[:2] == PIN and "revision" not in where and not local:
        yield f"{key}.where.revision is missing; pin the hub's data set by its commit"


def _check_own(key: str, spec: PromptSet) -> Problems:
    """A file as a source, and its columns."""
    path, columns = Path(spec.source), spec.columns
    if path.suffix not in own.FORMATS and not path.is_dir():
        files = f"a file {', '.join(own.FORMATS)} or a folder that datasets saved"
        known = ", ".join(SOURCES)
        yield f"{key}.source {spec.source!r} is not known; choose one of {known}, or {files}"
    places = [place.resolve() for place in own.PLACES]
    if not any(path.resolve().is_relative_to(place) for place in places):
        yield f"{key}.source is {spec.source!r}; expected a file below prompts/; put it there"
    if columns is not None:
        if columns.pair is None and columns.text is None:
            yield f"{key}.columns names neither text nor pair; give one of them"
        if columns.pair is not None and len(columns.pair) != 2:
            expected = "two columns, the preferred sentence and the other"
            yield f"{key}.columns.pair is {list(columns.pair)}; expected {expected}"
        if columns.split is not None and spec.blocks is not None:
            yield f"{key}.blocks: the file gives the splits; leave out blocks or columns.split"


def _with(
    key: str, value: str, name: str, spec: PromptSet, what: Literal["pair", "choices"] = "pair"
) -> Problems:
    """That a set's rows are pairs, or questions with answers."""
    source = source_of(spec)
    if what == "pair" and not source.paired:
        lacking, others = "pairs", f"{', '.join(PAIRED)}, or a file with columns.pair"
    elif what == "choices" and not source.choices:
        lacking, others = "answers", ", ".join(CHOICES)
    else:
        return
    yield (
        f"{key} is {value!r}, but the source {spec.source!r} of {name} has no {lacking}; sources "
        f"that have: {others}"
    )


def check_scores(params: Params) -> Problems:
    """Names of scores, and that a set that has its own has those which later stages read."""
    methods = params.methods.items()
    named = [
        ("gate.score", params.gate.score),
        ("differential.importance", params.differential.importance),
        *((f"methods.{n}.score", m.score) for n, m in methods if m.score != "random"),
        *(("attribute.scores", score) for score in params.attribute.scores),
        *(("faithfulness.scores", score) for score in params.faithfulness.scores),
    ]
    for name, spec in params.prompt_sets.items():
        if spec.scores == ():
            yield f"prompt_sets.{name}.scores is empty; give at least one, or leave it out"
        named += [(f"prompt_sets.{name}.scores", score) for score in spec.scores or ()]
    for key, score in named:
        kind, at, target = score.partition("@")
        if kind not in SCORES or (at and target not in TARGETS):
            yield (
                f"{key} names {score!r}; expected any of {', '.join(SCORES)}, alone or with "
                f"one of @{', @'.join(TARGETS)}"
            )
    read = [(name, score) for name in params.prompt_sets for score in scores_of(params, name)]
    scores = params.faithfulness.scores
    read += [(spec.prompts, score) for spec in params.behaviours.values() for score in scores]
    for name, score in read:
        if score.endswith("@pair"):
            yield from _with("a score", score, f"prompt set {name}", params.prompt_sets[name])
    general, importance = params.differential.general, params.differential.importance
    yield from _computed(params, "differential.importance", importance, general)
    for behaviour in params.behaviours.values():
        for prompt_set in (behaviour.reference, behaviour.prompts):
            yield from _computed(params, "gate.score", params.gate.score, prompt_set)
            for name, method in params.methods.items():
                if method.score != "random":
                    yield from _computed(params, f"methods.{name}.score", method.score, prompt_set)


def _computed(params: Params, key: str, score: str, prompt_set: str) -> Problems:
    computed = scores_of(params, prompt_set)
    if score not in computed:
        yield (
            f"{key} {score!r} is not computed for the prompt set {prompt_set}, which has "
            f"{', '.join(computed)}; add it to prompt_sets.{prompt_set}.scores, or leave those out"
        )


def check_methods(params: Params) -> Problems:
    """Rows of methods that contradict themselves, or follow what cannot be followed."""
    leaders = independent(params)
    for name, method in params.methods.items():
        yield from _check_method(f"methods.{name}", method, [OWN, *leaders])
    for name, behaviour in params.behaviours.items():
        if behaviour.method not in can_lead(params):
            expected = f"expected one of {', '.join(can_lead(params))}"
            yield f"behaviours.{name}.method is {behaviour.method!r}; {expected}"
    followed, control = params.overlap.method, params.evaluate.control
    if params.methods[followed].contrast is None:
        yield f"overlap.method {followed!r} is random; name one that scores"
    if params.methods[control].contrast is not None:
        yield f"evaluate.control {control!r} is not random; name a method of score: random"


def _check_method(key: str, method: Method, leaders: list[str]) -> Problems:
    leader = method.match or method.layers
    if method.score == "random":
        if method.contrast is not None:
            yield f"{key}.contrast: a random score has no contrast; remove the key"
    elif method.contrast not in CONTRASTS:
        yield f"{key}.contrast is {method.contrast!r}; expected {' or '.join(CONTRASTS)}"
    elif method.draws > 1:
        yield f"{key}.draws: only for score: random, as a control"
    elif method.layers:
        yield f"{key}.layers: only for score: random, as a control"
    if method.scale == "auroc" and method.contrast != "auroc":
        yield f"{key}.scale: auroc needs contrast: auroc"
    if method.all and (leader is not None or method.contrast is None):
        yield f"{key}.all: takes what its contrast says; remove match and layers, give a contrast"
    if method.match and method.layers:
        yield f"{key}: give match or layers, not both (layers fixes the number too)"
    if method.protect is not None and leader is None and not method.all:
        yield f"{key}.protect is {method.protect}; expected it only with match, layers or all"
    if leader is not None and leader not in leaders:
        yield (
            f"{key}: {leader!r} is not a method that chooses its own neurons; expected one of "
            f"{', '.join(leaders)}"
        )


def check_interventions(params: Params) -> Problems:
    """Kinds that there are, with a text if and only if they are prompts."""
    for name, row in params.steer.interventions.items():
        key = f"steer.interventions.{name}"
        yield from _known(f"{key}.kind", row.kind, LEARNERS, "sparc3/circuits/interventions")
        if (row.kind == "prompt") != (row.text is not None):
            yield f"{key}.text is {row.text!r}; expected one with kind prompt, and only there"
        if row.text is not None and not row.text.strip():
            yield f"{key}.text is blank; expected the words that are put in front"
        if not row.strengths or len(set(row.strengths)) < len(row.strengths):
            yield f"{key}.strengths is {list(row.strengths)}; expected different ones, at least one"
        if row.kind == "prompt" and tuple(row.strengths) != (1.0,):
            yield f"{key}.strengths is {list(row.strengths)}; leave it out, a prompt has none"


def check_behaviours(params: Params) -> Problems:
    """That a behaviour can be measured: by instruments that there are, one that a sweep reads among
    them, whose numbers have different names; with scorers for completions and pairs for pairs.
    """
    sets = sets_of(params)
    for name, row in params.behaviours.items():
        key, named = f"behaviours.{name}.instruments", list(row.instruments)
        for instrument in named:
            yield from _known(key, instrument, INSTRUMENTS, "sparc3/measure/instruments")
        chosen = instruments_of(row)
        if not any(each.swept for each in chosen.values()):
            swept = ", ".join(name for name, each in INSTRUMENTS.items() if each(row).swept)
            yield f"{key} is {named}; expected one of {swept}, which a sweep reads"
        values = [value.name for each in chosen.values() for value in each.values]
        if len(set(values)) < len(values):
            yield f"{key} is {named}, of which two give a number of one name; take one away"
        if "completions" in chosen and not row.scorers:
            known = ", ".join(params.scorers)
            yield f"behaviours.{name}.scorers is empty; completions need one of {known}"
        for instrument, each in chosen.items():
            if each.reads != "text":
                prompts = sets[row.prompts][1]
                about = f"prompt set {row.prompts}"
                yield from _with(key, instrument, about, prompts, each.reads)
        if row.prompts == row.reference:
            yield f"behaviours.{name}.reference is its prompts {row.prompts!r}; give another set"
        if row.second is not None:
            if row.second in (row.prompts, row.reference):
                yield f"behaviours.{name}.second {row.second!r} is no other set; give another"
            key, second = f"behaviours.{name}.second", sets[row.second][1]
            yield from _with(key, row.second, f"prompt set {row.second}", second)


def check_sizes(params: Params) -> Problems:
    """Numbers that bound one another: the sweep's grid and select's choice, window and stride."""
    sweep, select, evaluate = params.sweep, params.select, params.evaluate
    grids = {
        "num_neurons": (select.num_neurons, sweep.num_neurons),
        "protect": (select.protect, sweep.protect),
    }
    points = 1
    for name, (chosen, grid) in grids.items():
        if chosen is None and not grid:
            yield f"select.{name} is null and sweep.{name} empty; give one of them"
        points *= len(grid) if chosen is None else 1
    for name, (chosen, grid) in grids.items():
        if points > 1 and chosen is not None and chosen not in grid:
            yield (
                f"select.{name} is {chosen}, which the sweep does not measure; add it to "
                f"sweep.{name}, or give both select.num_neurons and select.protect"
            )
    together = params.faithfulness.num_neurons
    if list(together) != sorted(together):
        yield f"faithfulness.num_neurons is {list(together)}; expected ascending sizes"
    if evaluate.window is not None and evaluate.stride > evaluate.window:
        at_most = f"expected at most evaluate.window, {evaluate.window}"
        yield f"evaluate.stride is {evaluate.stride}; {at_most}"


def check_scorers(params: Params) -> Problems:
    """Kinds of scorers, and the fields that each must have, or has not."""
    for name, row in params.scorers.items():
        key = f"scorers.{name}"
        yield from _known(f"{key}.kind", row.kind, SCORERS, "the kinds of scorers")
        for field in ("path", "label", "revision"):
            given = getattr(row, field) is not None
            if given and row.kind in ("profanity", "hatesonar"):
                yield f"{key}.{field}: {row.kind} has none; leave it out"
            if row.kind == "python" and given != (field == "path"):
                yield f"{key}.{field}: python has a path, module:function, and nothing else"
            if row.kind == "classifier" and field != "revision" and not given:
                yield f"{key}.{field} is missing; a classifier needs path and label"
