"""params.yaml as frozen dataclasses; an unknown key or a wrong type is an error that names it.

The types are checked by pydantic: strictly (text is no number), and whenever a row is made. What
more than one key decides is checked by `sparc3.stages.checks`, which also loads the file.
"""

import json
import re
import types
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from sparc3.base.errors import InputError

Tree = dict[str, Any]  # of a params file: sections of keys, or of rows
SPLITS = ("attribute", "tune", "test")  # what a circuit is chosen on, tuned on, measured on
FIRST = 1 / 3  # share of the groups of a set with blocks that is chosen on alone

Whole = Annotated[int, Field(ge=0, description="a whole number of at least 0")]
Count = Annotated[int, Field(ge=1, le=10**9, description="a whole number from 1 to 10^9")]
Few = Annotated[int, Field(ge=1, le=1000, description="a whole number from 1 to 1000")]
Resamples = Annotated[int, Field(ge=100, le=10**6, description="a whole number from 100 to 10^6")]
Seed = Annotated[int, Field(ge=0, lt=2**32, description="a whole number from 0, below 2^32")]
Share = Annotated[float, Field(ge=0, le=1, description="a number from 0 to 1")]
Size = Annotated[float, Field(ge=0, description="a number of at least 0")]
Damping = Annotated[float, Field(ge=0, lt=1, description="a number from 0, below 1")]
Positive = Annotated[float, Field(gt=0, description="a number above 0")]
Nucleus = Annotated[float, Field(gt=0, le=1, description="a number above 0, at most 1")]

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, config=_STRICT)
class Model:
    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    threads: Few | None = None  # sums depend on it, in the last digits


@dataclass(frozen=True, config=_STRICT)
class Keep:
    """Second pass of a prompt set: complete every candidate once, keep the highest scores."""

    scorer: str
    top: Count
    new_tokens: Count = 50
    temperature: Positive = 0.7
    top_p: Nucleus = 0.9
    seed: Seed = 0
    extend: bool = False  # the completion becomes part of the text


@dataclass(frozen=True, config=_STRICT)
class Columns:
    """Which columns of a file of one's own hold what; `pair`: the preferred sentence, the other."""

    text: str | None = None
    pair: tuple[str, ...] | None = None
    unrelated: str | None = None
    group: str | None = None  # null: every text is a group of its own
    label: str | None = None
    split: str | None = None


@dataclass(frozen=True, config=_STRICT)
class PromptSet:
    source: str
    count: Count | None  # null: every row, in the source's order
    seeds: tuple[Seed, ...] = (0,)
    target: Literal["max-logit", "contrast-logit", "likelihood", "pair"] = "max-logit"
    where: dict[str, Any] = field(default_factory=dict)
    min_tokens: Count | None = None
    max_tokens: Count | None = None
    match_length: str | None = None
    scores: tuple[str, ...] | None = None
    keep: Keep | None = None
    attributed: Count | None = None  # null: all of the attribute split, else its first so many
    blocks: Count | None = None  # that are tested one by one, each by circuits of all before it
    columns: Columns | None = None  # of a file of one's own
    private: bool = False  # no text of it in MLflow, logs or the report


@dataclass(frozen=True, config=_STRICT)
class Behaviour:
    prompts: str
    reference: str
    method: str
    instruments: tuple[str, ...]
    second: str | None = None
    sealed: str | None = None
    scorers: tuple[str, ...] = ()
    faithfulness: bool = False  # whether scores are set beside true effects of its neurons
    on_fail: Literal["warn", "stop"] = "stop"


@dataclass(frozen=True, config=_STRICT)
class Method:
    score: str
    contrast: str | None = None
    scale: Damping | Literal["auroc"] = 0.0
    match: str | None = None
    layers: str | None = None
    protect: Share | None = None
    draws: Few = 1
    all: bool = False  # every neuron of negative differential, whatever that costs


@dataclass(frozen=True, config=_STRICT)
class Scorer:
    kind: str
    path: str | None = None
    label: str | None = None
    revision: str | None = None
    floor: Share = 0.0  # mean score of neutral text, above which a reduction is taken


@dataclass(frozen=True, config=_STRICT)
class Fetch:
    """What the model is made from: an embedded one, or a GGUF file. A null for both leaves the
    folder `model.path`, or the repository of the hub that its name is of.
    """

    model: str | None
    gguf: str | None = None


@dataclass(frozen=True, config=_STRICT)
class Prepare:
    splits: dict[str, Share]


@dataclass(frozen=True, config=_STRICT)
class Attribute:
    batch_tokens: Count
    shard_prompts: Count
    first_token: bool = True  # false: scores with a gradient leave out the first of every text
    scores: tuple[str, ...] = ()  # beside those that are read


@dataclass(frozen=True, config=_STRICT)
class Gate:
    score: str
    threshold: Size
    prompts: Count


@dataclass(frozen=True, config=_STRICT)
class Differential:
    general: str
    importance: str


@dataclass(frozen=True, config=_STRICT)
class Sweep:
    num_neurons: tuple[Count, ...]
    protect: tuple[Share, ...]
    texts: Count
    error: Size
    choices: tuple[str, ...]
    items: Count
    batch_tokens: Count


@dataclass(frozen=True, config=_STRICT)
class Budget:
    """What a circuit may cost on general text, its standard error included."""

    perplexity: Size  # rise, in percent
    kl: Size | None = None  # from the unpruned model, nats a token
    accuracy: Size | None = None  # lost on questions of sweep.choices, in points


@dataclass(frozen=True, config=_STRICT)
class Select:
    num_neurons: Count | None
    protect: Share | None
    budget: Budget
    resamples: Count
    seed: Seed


@dataclass(frozen=True, config=_STRICT)
class Learnt:
    """An intervention of a kind of `sparc3/circuits/interventions`; its strength, and which of what
    is learnt, are those that do best on the tune split within `select.budget`.
    """

    kind: str
    strengths: tuple[Positive, ...] = (1.0,)
    text: str | None = None  # of a prompt


@dataclass(frozen=True, config=_STRICT)
class Steer:
    interventions: dict[str, Learnt]


@dataclass(frozen=True, config=_STRICT)
class Evaluate:
    general: tuple[str, ...]
    choices: tuple[str, ...]
    texts: Count
    window: Count | None  # null: the model's context
    stride: Count
    joined: bool
    prompts: Count
    items: Count
    completions: Few
    completed: tuple[str, ...] | None  # null: all but controls, and the one control
    in_sample: tuple[str, ...]
    control: str
    drawn: Count
    ban: tuple[Count, ...]
    new_tokens: Count
    temperature: Positive
    top_p: Nucleus
    seed: Seed
    batch_tokens: Count
    resamples: Resamples


@dataclass(frozen=True, config=_STRICT)
class Transfer:
    texts: tuple[str, ...]
    items: Count
    batch_tokens: Count
    resamples: Resamples


@dataclass(frozen=True, config=_STRICT)
class Overlap:
    method: str
    num_neurons: Count
    protect: Share
    resamples: Resamples
    repeats: Count
    seed: Seed


@dataclass(frozen=True, config=_STRICT)
class Faithfulness:
    scores: tuple[str, ...]
    neurons: Count
    prompts: Count
    num_neurons: tuple[Count, ...]
    batch_tokens: Count
    resamples: Resamples
    seed: Seed


@dataclass(frozen=True, config=_STRICT)
class Report:
    method: str


@dataclass(frozen=True, config=_STRICT)
class Confirm:
    """How much of the sealed sets is read, as `evaluate` says of the others."""

    prompts: Count
    completions: Few


@dataclass(frozen=True, config=_STRICT)
class Cluster:
    """What a Slurm job asks for. Per node: tasks (processes of attribution), gpus and memory in GB.

    Memory and minutes that are null come from the plan for `device`, a name of its table.
    """

    device: str
    partition: str | None = None
    nodes: Count = 1
    tasks: Count = 1
    gpus: Whole = 0
    cpus: Count = 1  # per task
    memory: Count | None = None
    minutes: Count | None = None
    options: tuple[str, ...] = ()  # of sbatch, as on its command line
    setup: tuple[str, ...] = ()  # lines of shell that come first


@dataclass(frozen=True, config=_STRICT)
class Params:
    model: Model
    prompt_sets: dict[str, PromptSet]
    test_sets: dict[str, PromptSet]
    sealed_sets: dict[str, PromptSet]
    behaviours: dict[str, Behaviour]
    methods: dict[str, Method]
    scorers: dict[str, Scorer]
    fetch: Fetch
    prepare: Prepare
    attribute: Attribute
    gate: Gate
    differential: Differential
    sweep: Sweep
    select: Select
    steer: Steer
    evaluate: Evaluate
    transfer: Transfer
    overlap: Overlap
    faithfulness: Faithfulness
    report: Report
    confirm: Confirm
    cluster: Cluster | None = None
    profile: str | None = None  # which one `use` made the file of


_PARAMS = TypeAdapter(Params)
_UNKNOWN = "unexpected_keyword_argument"  # pydantic's name of that error


def read(path: Path) -> Tree:
    """A params file, or a profile, as it is written. InputError names the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: file not found; run from the project's folder") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; expected a file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8; save it as such") from None
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: the file is {tree!r}; expected a mapping")
    return tree


class _Loader(yaml.SafeLoader):
    """YAML without dates, which are text here; refuses a key that is no text, or there twice."""

    yaml_implicit_resolvers: ClassVar = {
        first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        built = super().construct_mapping(node, deep)
        twice = [f"key {key} is there twice" for key in keys if keys.count(key) > 1]
        other = [f"key {k!r} must be text; put it in quotes" for k in built if type(k) is not str]
        for problem in (*twice, *other):  # PyYAML keeps the last of two, and any key
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
        return built


def parse(tree: Tree) -> Params:
    """The tree's values by their types. InputError: one line that names the key.

    An unknown key is named before a missing one, which it may be meant for.
    """
    for key in _blank(tree, ""):
        raise InputError(f"params: {key} is ''; expected text, or null where there is none")
    try:
        # As JSON, of which pydantic takes lists for tuples and 15 for 15.0, but no more.
        return _PARAMS.validate_json(json.dumps(tree, default=_refuse))
    except ValidationError as error:
        found = sorted(error.errors(include_url=False), key=lambda e: e["type"] != _UNKNOWN)
        raise InputError(f"params: {_reason(found[0])}") from None


def _blank(tree: object, key: str) -> Iterator[str]:
    """Keys whose value is an empty text, which would pass for one that is not given."""
    if tree == "":
        yield key
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _blank(value, f"{key}.{name}" if key else name)
    if isinstance(tree, list):
        for place, value in enumerate(tree):
            yield from _blank(value, f"{key}[{place}]")


def _refuse(value: object) -> object:
    raise InputError(f"params: {value!r} is neither text, number, true, false, null, list nor map")


def _reason(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors in this project's words, with the key's path."""
    path, kind = "", Params
    for step in error["loc"]:
        inner = _inner(kind, step)
        if inner is None:  # a key that is unknown, or pydantic's name of an alternative
            break
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
        kind = inner
    if error["type"] == _UNKNOWN:
        row = next(part for part in _alternatives(kind) if is_dataclass(part))
        known = ", ".join(f.name for f in fields(row))
        return f"unknown key {path and path + '.'}{error['loc'][-1]}; known here: {known}"
    value, expected = error["input"], _describe(kind)
    if error["type"] == "missing":
        return f"missing key {path}; expected {expected}"
    if isinstance(value, str) and "number" in expected:
        expected += " (YAML reads numbers such as 1e-3 as text: write 0.001)"
    return f"{path} is {value!r}; expected {expected}"


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _inner(kind: Any, step: int | str) -> Any:
    """The type of a key, row or element; None if there is none of that name."""
    for part in _alternatives(kind):
        if is_dataclass(part):
            return get_type_hints(part, include_extras=True).get(str(step))
        if get_origin(part) in (dict, tuple):
            return get_args(part)[1 if get_origin(part) is dict else 0]
    return None


def _describe(kind: Any) -> str:
    parts = _alternatives(kind)
    if len(parts) > 1:
        return " or ".join(map(_describe, parts))
    if get_origin(kind) is Annotated:
        return get_args(kind)[1].description
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a list of {_describe(get_args(kind)[0])}"
    words = {int: "a whole number", str: "text", bool: "true or false", type(None): "null"}
    return words.get(kind, "a mapping")


def shares_of(spec: PromptSet, splits: Mapping[str, float]) -> Mapping[str, float]:
    """What shares its groups out: `prepare.splits`, or its own blocks, the first of which is for
    choosing alone.
    """
    if spec.blocks is None:
        return splits
    rest = {f"block-{n}": (1 - FIRST) / spec.blocks for n in range(1, spec.blocks + 1)}
    return {"block-0": FIRST, **rest}


def scores_of(params: Params, prompt_set: str) -> tuple[str, ...]:
    """Names of the scores that attribute computes for a set: SCORE, or SCORE@TARGET. The set's own,
    else what gate, methods and, of general text, protection read, and what `attribute` adds.
    """
    own, general = params.prompt_sets[prompt_set].scores, params.differential.general
    read = [m.score for m in params.methods.values() if m.score != "random"]
    protect = [params.differential.importance] if prompt_set == general else []
    every = [params.gate.score, *read, *protect, *params.attribute.scores]
    return tuple(dict.fromkeys(every)) if own is None else own


def hub_of(path: str) -> tuple[str, str] | None:
    """Repository and commit of a folder that fetch fills from the hub: models/OWNER/NAME@COMMIT."""
    found = re.fullmatch(r"models/([^/@]+/[^/@]+)@([^/@]+)", path)
    return (found[1], found[2]) if found else None


def private_of(params: Params, behaviour: str) -> bool:
    """Whether a behaviour's prompts, or its reference's, are private."""
    spec = params.behaviours[behaviour]
    return any(params.prompt_sets[name].private for name in (spec.prompts, spec.reference))


def sets_of(params: Params) -> dict[str, tuple[str, PromptSet]]:
    """Name -> key in params and set, of those that are attributed and those only tested on."""
    return {
        name: (f"{section}.{name}", spec)
        for section in ("prompt_sets", "test_sets")
        for name, spec in getattr(params, section).items()
    }
