"""params.yaml as frozen dataclasses; an unknown key or a wrong type is an error that names it."""

import types
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from sparc3.errors import InputError

Split = Literal["attribute", "tune", "test"]


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
    top: int
    new_tokens: int = 50
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0


@dataclass(frozen=True)
class PromptSet:
    source: str
    count: int | None  # null: every row, in the source's order
    seeds: tuple[int, ...] = (0,)
    target: Literal["max-logit", "likelihood", "pair"] = "max-logit"
    where: dict[str, Any] = field(default_factory=dict)
    min_tokens: int | None = None
    max_tokens: int | None = None
    match_length: str | None = None
    scores: tuple[str, ...] | None = None
    keep: Keep | None = None


@dataclass(frozen=True)
class Behaviour:
    prompts: str
    reference: str
    method: str
    measure: Literal["completions", "pairs"]
    second: str | None = None
    scorers: tuple[str, ...] = ()
    on_fail: Literal["warn", "stop"] = "stop"


@dataclass(frozen=True)
class Method:
    score: str
    contrast: str | None = None
    scale: float | Literal["auroc"] = 0.0
    match: str | None = None
    layers: str | None = None
    protect: float | None = None
    draws: int = 1


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
    splits: dict[str, float]


@dataclass(frozen=True)
class Attribute:
    scores: tuple[str, ...]
    batch_tokens: int
    shard_prompts: int


@dataclass(frozen=True)
class Gate:
    score: str
    threshold: float
    prompts: int


@dataclass(frozen=True)
class Differential:
    general: str
    importance: str


@dataclass(frozen=True)
class Sweep:
    num_neurons: tuple[int, ...]
    protect: tuple[float, ...]
    ceiling: float
    texts: int
    items: int
    batch_tokens: int


@dataclass(frozen=True)
class Select:
    num_neurons: int | None
    protect: float | None
    ppl_budget: float
    resamples: int
    seed: int


@dataclass(frozen=True)
class Evaluate:
    general: str
    texts: int
    window: int
    stride: int
    joined: bool
    prompts: int
    items: int
    completions: int
    completed: tuple[str, ...]
    in_sample: tuple[str, ...]
    control: str
    new_tokens: int
    temperature: float
    top_p: float
    seed: int
    batch_tokens: int
    resamples: int


@dataclass(frozen=True)
class Transfer:
    texts: tuple[str, ...]
    items: int
    batch_tokens: int
    resamples: int


@dataclass(frozen=True)
class Overlap:
    method: str
    num_neurons: int
    protect: float
    resamples: int
    repeats: int
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
    nodes: int = 1
    tasks: int = 1
    gpus: int = 0
    cpus: int = 1  # per task
    memory: int | None = None
    minutes: int | None = None
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
    if origin in (Union, types.UnionType):
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
    hints = get_type_hints(kind)
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
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    return _build(Params, tree, "")


def scores_of(params: Params, prompt_set: str) -> tuple[str, ...]:
    """Names of the scores that attribute computes for a set: SCORE, or SCORE@TARGET."""
    own = params.prompt_sets[prompt_set].scores
    return params.attribute.scores if own is None else own
