"""params.yaml as frozen dataclasses; an unknown key or a wrong type is an error that names it."""

import math
import types
from collections.abc import Hashable, Iterable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from sparc3.base.errors import InputError

Split = Literal["attribute", "tune", "test"]


# Sources whose rows are pairs, which `measure: pairs` needs.
PAIRED = (
    "stereoset",
    "hub/stereoset",
    "neutral-pairs",
    "crows-pairs",
    "winobias",
    "gender-pairs",
)


class Range(NamedTuple):
    """Of a number, both ends allowed."""

    low: float
    high: float = math.inf


Whole = Annotated[int, Range(0)]
Count = Annotated[int, Range(1)]
Share = Annotated[float, Range(0, 1)]
Size = Annotated[float, Range(0)]


@dataclass(frozen=True)
class Model:
    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"


@dataclass(frozen=True)
class Keep:
    """Second pass of a prompt set: complete every candidate once, keep the highest scores."""

    scorer: str
    top: Count
    new_tokens: Count = 50
    temperature: Size = 0.7
    top_p: Share = 0.9
    seed: int = 0


@dataclass(frozen=True)
class PromptSet:
    source: str
    count: Count | None  # null: every row, in the source's order
    seeds: tuple[int, ...] = (0,)
    target: Literal["max-logit", "likelihood", "pair"] = "max-logit"
    where: dict[str, Any] = field(default_factory=dict)
    min_tokens: Count | None = None
    max_tokens: Count | None = None
    match_length: str | None = None
    scores: tuple[str, ...] | None = None
    keep: Keep | None = None


@dataclass(frozen=True)
class Behaviour:
    prompts: str
    reference: str
    method: str
    instruments: tuple[str, ...]
    second: str | None = None
    scorers: tuple[str, ...] = ()
    on_fail: Literal["warn", "stop"] = "stop"


@dataclass(frozen=True)
class Method:
    score: str
    contrast: str | None = None
    scale: Share | Literal["auroc"] = 0.0
    match: str | None = None
    layers: str | None = None
    protect: Share | None = None
    draws: Count = 1


@dataclass(frozen=True)
class Scorer:
    kind: str
    path: str | None = None
    label: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Fetch:
    """Where the model comes from: embedded, out of a GGUF file, or a repository on the hub."""

    model: str | None
    gguf: str | None = None
    repository: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Prepare:
    splits: dict[str, Share]


@dataclass(frozen=True)
class Attribute:
    scores: tuple[str, ...]
    batch_tokens: Count
    shard_prompts: Count


@dataclass(frozen=True)
class Gate:
    score: str
    threshold: Size
    prompts: Count


@dataclass(frozen=True)
class Differential:
    general: str
    importance: str


@dataclass(frozen=True)
class Sweep:
    num_neurons: tuple[Count, ...]
    protect: tuple[Share, ...]
    texts: Count
    items: Count
    batch_tokens: Count


@dataclass(frozen=True)
class Select:
    num_neurons: Count | None
    protect: Share | None
    ppl_budget: Size
    resamples: Count
    seed: int


@dataclass(frozen=True)
class Evaluate:
    general: str
    texts: Count
    window: Count
    stride: Count
    joined: bool
    prompts: Count
    items: Count
    completions: Count
    completed: tuple[str, ...]
    in_sample: tuple[str, ...]
    control: str
    new_tokens: Count
    temperature: Size
    top_p: Share
    seed: int
    batch_tokens: Count
    resamples: Count


@dataclass(frozen=True)
class Transfer:
    texts: tuple[str, ...]
    items: Count
    batch_tokens: Count
    resamples: Count


@dataclass(frozen=True)
class Overlap:
    method: str
    num_neurons: Count
    protect: Share
    resamples: Count
    repeats: Count
    seed: int


@dataclass(frozen=True)
class Report:
    method: str


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Params:
    model: Model
    prompt_sets: dict[str, PromptSet]
    test_sets: dict[str, PromptSet]
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
    evaluate: Evaluate
    transfer: Transfer
    overlap: Overlap
    report: Report
    cluster: Cluster | None = None


def _describe(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        base, (low, high) = get_args(kind)
        limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        return f"{_describe(base)} {limits}"
    if get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_describe(part) for part in get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list of {_describe(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return "a mapping"
    if is_dataclass(kind):
        return "a mapping"
    return {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }[kind]


def _convert(value: Any, kind: Any, key: str) -> Any:
    """`value` from YAML as `kind`; InputError names `key`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        base, (low, high) = parts
        number = _convert(value, base, key)
        if low <= number <= high:
            return number
    elif origin in (Union, types.UnionType):
        for part in parts:
            if is_dataclass(part) and isinstance(value, dict):
                return _build(part, value, key)
            try:
                return _convert(value, part, key)
            except InputError:
                continue  # the next alternative may fit; none fitting is the error below
    elif origin is Literal:
        if value in parts:
            return value
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_convert(v, parts[0], f"{key}[{i}]") for i, v in enumerate(value))
    elif origin is dict:
        if isinstance(value, dict):
            for name in value:
                if not isinstance(name, str):
                    raise InputError(f"params: {key}: key {name!r} must be text; put it in quotes")
            return {k: _convert(v, parts[1], f"{key}.{k}") for k, v in value.items()}
    elif is_dataclass(kind):
        return _build(kind, value, key)
    elif kind is Any:
        return value
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif type(value) is kind:
        return value
    hint = ""
    if isinstance(value, str) and kind in (int, float):
        hint = " (YAML reads numbers such as 1e-3 as text: write 0.001)"
    raise InputError(f"params: {key} is {value!r}; expected {_describe(kind)}{hint}")


def _build(kind: Any, value: Any, key: str) -> Any:
    if not isinstance(value, dict):
        raise InputError(f"params: {key or 'the file'} is {value!r}; expected a mapping")
    hints = get_type_hints(kind, include_extras=True)
    known = {f.name: f for f in fields(kind)}
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in known:
            raise InputError(f"params: unknown key {prefix}{name}; known here: {', '.join(known)}")
    for name, f in known.items():
        required = f.default is MISSING and f.default_factory is MISSING
        if required and name not in value:
            raise InputError(
                f"params: missing key {prefix}{name}; expected {_describe(hints[name])}"
            )
    return kind(**{k: _convert(v, hints[k], f"{prefix}{k}") for k, v in value.items()})


def load(path: Path = Path("params.yaml")) -> Params:
    """Read and check a params file. Raises InputError: one line that names the key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: file not found; run from the project's folder") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8; save it as such") from None
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    params = _build(Params, tree, "")
    _check_names(params)
    return params


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key that is there twice, of which PyYAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key} is there twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


def _check_names(params: Params) -> None:
    """InputError for a name that the section it points to does not have."""

    def known(key: str, name: str, names: Iterable[str], where: str) -> None:
        if name not in names:
            raise InputError(
                f"params: {key} {name!r} is not in {where}; known: {', '.join(names) or 'none'}"
            )

    for section in ("prompt_sets", "behaviours", "methods"):
        if not getattr(params, section):
            raise InputError(f"params: {section} is empty; expected at least one")
    sets = {**params.prompt_sets, **params.test_sets}
    for name, made in params.prompt_sets.items():
        if made.keep is not None:
            known(f"prompt_sets.{name}.keep.scorer", made.keep.scorer, params.scorers, "scorers")
    for name, spec in params.behaviours.items():
        key = f"behaviours.{name}"
        known(f"{key}.prompts", spec.prompts, params.prompt_sets, "prompt_sets")
        known(f"{key}.reference", spec.reference, params.prompt_sets, "prompt_sets")
        known(f"{key}.method", spec.method, params.methods, "methods")
        for scorer in spec.scorers:
            known(f"{key}.scorers", scorer, params.scorers, "scorers")
        paired = [spec.prompts]
        if spec.second is not None:
            known(f"{key}.second", spec.second, sets, "test_sets or prompt_sets")
            paired.append(spec.second)
        if "completions" in spec.instruments and not spec.scorers:
            raise InputError(
                f"params: {key}.scorers is empty; completions need one of "
                f"{', '.join(params.scorers)}"
            )
        for part in paired if "pairs" in spec.instruments else paired[1:]:
            if sets[part].source not in PAIRED:
                raise InputError(
                    f"params: {key}: prompt set {part}, whose source is "
                    f"{sets[part].source!r}, has no pairs; sources that have: {', '.join(PAIRED)}"
                )
    known("differential.general", params.differential.general, params.prompt_sets, "prompt_sets")
    known("evaluate.general", params.evaluate.general, sets, "test_sets or prompt_sets")
    if not params.transfer.texts:
        raise InputError("params: transfer.texts is empty; expected at least one set of texts")
    for text in params.transfer.texts:
        known("transfer.texts", text, sets, "test_sets or prompt_sets")
    for key, method in (
        ("evaluate.control", params.evaluate.control),
        *(("evaluate.completed", name) for name in params.evaluate.completed),
        *(("evaluate.in_sample", name) for name in params.evaluate.in_sample),
        ("overlap.method", params.overlap.method),
        ("report.method", params.report.method),
    ):
        known(key, method, params.methods, "methods")


def scores_of(params: Params, prompt_set: str) -> tuple[str, ...]:
    """Names of the scores that attribute computes for a set: SCORE, or SCORE@TARGET."""
    own = params.prompt_sets[prompt_set].scores
    return params.attribute.scores if own is None else own
