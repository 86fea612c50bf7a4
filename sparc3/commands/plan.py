"""Plan: what a profile costs, before its model is there: memory, operations, time and disk.

The model is known from its config.json alone. Where prompts are prepared their lengths are exact;
elsewhere they are what the profile says, or ASSUMED_TOKENS. Circuits are counted as if all began in
the first layer; those that do not cost less (`ablate.without_each`).
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, PretrainedConfig

from sparc3.base import params as parameters
from sparc3.base.artifacts import circuit_names, prompts_path, read_prompts
from sparc3.base.errors import InputError
from sparc3.base.params import Params, PromptSet, scores_of
from sparc3.base.secrets import hub_token
from sparc3.commands import cost
from sparc3.commands.cost import Shape
from sparc3.model import loading
from sparc3.stages.attribute import by_target

ASSUMED_TOKENS = 32  # of a prompt whose length the profile does not say
ASSUMED_TEXTS = 1000  # of a source that is taken whole
KNOWN = {"hub/wikitext-2": (60, 4800)}  # texts and tokens of each, where that is far from it
PROCESS = 0.9e9  # bytes of a Python process with torch and transformers
LIGHT = 0.3e9  # and of one without
HEAP = 1.75  # resident bytes per byte in use on a CPU, where freed blocks are not given back
CARD = 1.0e9  # bytes of a card that the driver, its libraries and fragmentation take
START = 10.0  # seconds until a stage begins to load its model
LOADING = 1e9  # bytes of weights per second, from a disk to the device
SCORER = {"detoxify": 0.5e9, "classifier": 1.6e9}  # bytes on the device, up to a large encoder
DRAWING = 0.7  # of what whole sequences reach, when completions are drawn token by token
MOST_CARDS = 16
CONFIGS = Path("profiles/configs")


@dataclass(frozen=True)
class Device:
    """Vendor's figures: bytes of memory, bytes per second from it, and peak operations per second
    by dtype (none for the CPU: `product_rate`); and the part of the peak that is assumed reached.
    """

    memory: float
    bandwidth: float
    peak: dict[str, float]
    reached: float


def _card(
    memory: float, bandwidth: float, half: float, full: float, bfloat16: float | None = None
) -> Device:
    """From GiB, GB/s, and TFLOP/s in float16 and float32."""
    rates = {"float32": full, "bfloat16": bfloat16 or half, "float16": half}
    peak = {dtype: rate * 1e12 for dtype, rate in rates.items()}
    return Device(memory * 2**30, bandwidth * 1e9, peak, 0.35)


# Dense tensor-core peaks for 16 bits, plain float32 for 32. The CPU is this machine's, and how fast
# it multiplies is measured.
DEVICES = {
    "CPU": Device(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 20e9, {}, 0.8),
    "T4": _card(15, 320, 65, 8.1, bfloat16=8.1),  # without units for it
    "L4": _card(22, 300, 121, 30.3),
    "A10G": _card(22, 600, 70, 31.2),
    "A100-40": _card(39, 1555, 312, 19.5),
    "A100-80": _card(79, 2039, 312, 19.5),
    "H100": _card(79, 3350, 989, 66.9),
}


@dataclass(frozen=True)
class Work:
    """Of one stage. `passes`: operations on whole sequences; `drawn`: on completions, token by
    token; `steps`: times that all weights are read for those; `memory`: bytes beyond the weights on
    the device; `held`: bytes of scores in the process; `disk`: bytes written.
    """

    stage: str
    prompts: int = 0
    tokens: int = 0
    passes: float = 0
    drawn: float = 0
    steps: int = 0
    memory: float = 0
    held: float = 0
    disk: float = 0

    @property
    def operations(self) -> float:
        return self.passes + self.drawn


# --- prompts ---------------------------------------------------------------------------------

Prompts = list[list[int]]  # lengths in tokens of each prompt's sequences
Sample = Callable[[str, str | None, str], Prompts]  # of a set, a split, as text, pair or packed


def assumed(params: Params) -> Sample:
    """Lengths as far as the profile says them."""

    def spec_of(name: str) -> PromptSet:
        return {**params.prompt_sets, **params.test_sets}[name]

    def known(spec: PromptSet) -> tuple[int, int]:
        return KNOWN.get(spec.source, (ASSUMED_TEXTS, ASSUMED_TOKENS))

    def length(name: str) -> int:
        spec = spec_of(name)
        if spec.match_length is not None:
            return length(spec.match_length)
        return spec.max_tokens or spec.min_tokens or known(spec)[1]

    def sample(name: str, split: str | None, kind: str) -> Prompts:
        spec, shares = spec_of(name), params.prepare.splits
        each = known(spec)[0] if spec.count is None else spec.count
        count = spec.keep.top if spec.keep else each * len(spec.seeds)
        if split is not None:
            count = round(count * shares[split] / sum(shares.values()))
        one = {"text": [length(name)], "pair": [length(name)] * 2, "packed": [2 * length(name)]}
        return [one[kind]] * count

    return sample


def prepared(tokenizer: Any) -> Sample:
    """Lengths of the prompts in outputs/prompts."""

    def sample(name: str, split: str | None, kind: str) -> Prompts:
        found = []
        for row in read_prompts(name, split):
            texts = [row["text"]] if kind == "text" else list(row["pair"])
            if kind == "packed" and row.get("unrelated"):
                texts.append(row["unrelated"])
            ids = loading.encode(tokenizer, texts)
            if kind == "packed":
                columns = enumerate(zip(*ids, strict=False))
                differing = (i for i, column in columns if len(set(column)) > 1)
                shared = next(differing, min(map(len, ids)))
                found.append([shared + sum(len(i) - shared for i in ids)])
            else:
                found.append([len(i) for i in ids])
        return found

    return sample


def are_prepared(params: Params, project: Params) -> bool:
    """Whether outputs/prompts, made with the project's params, are the prompts of `params`."""
    return all(
        getattr(params, key) == getattr(project, key)
        for key in ("model", "prompt_sets", "test_sets", "prepare")
    ) and all(prompts_path(name).is_file() for name in (*params.prompt_sets, *params.test_sets))


def sample_of(params: Params, exact: bool) -> Sample:
    """Those of the prompts in outputs/prompts, or assumed ones."""
    if exact:
        return prepared(loading.tokenizer(params.model))
    return assumed(params)


def flat(prompts: Prompts) -> list[int]:
    return [length for prompt in prompts for length in prompt]


# --- stages ----------------------------------------------------------------------------------


def plan(params: Params, model: Shape, sample: Sample) -> list[Work]:
    """The work of every stage that runs the model, in order, and of those that hold scores."""
    return [
        *(_elicit(params, model, sample, name) for name, s in params.prompt_sets.items() if s.keep),
        *(_attribute(params, model, sample, name) for name in params.prompt_sets),
        *(_contrast(params, model, sample, stage) for stage in ("differential", "select")),
        *(_sweep(params, model, sample, name) for name in params.behaviours),
        *(_evaluate(params, model, sample, name) for name in params.behaviours),
        _transfer(params, model, sample),
        _contrast(params, model, sample, "overlap"),
    ]


def _attribute(params: Params, model: Shape, sample: Sample, name: str) -> Work:
    spec, names = params.prompt_sets[name], scores_of(params, name)
    every: list[int] = []
    passes, memory, prompts = 0.0, 0.0, []
    for target, own in by_target(names, spec.target).items():
        prompts = sample(name, "attribute", "pair" if target == "pair" else "text")
        computed = list(own.values())
        every += flat(prompts)
        passes += cost.attribution(model, prompts, computed, target)
        needed = cost.attribution_memory(
            model, prompts, computed, params.attribute.batch_tokens, params.model.dtype
        )
        memory = max(memory, needed)
    shard = min(params.attribute.shard_prompts, len(prompts))
    return Work(
        f"attribute@{name}",
        len(prompts),
        sum(every),
        passes=passes,
        memory=memory,
        held=cost.scores_size(model, shard, len(names)),
        disk=cost.scores_size(model, len(prompts), len(names)),
    )


def _contrast(params: Params, model: Shape, sample: Sample, stage: str) -> Work:
    """Scores in memory: of one behaviour and its reference, or of all sets together."""
    sets = [(b.prompts, b.reference) for b in params.behaviours.values()]
    counts = {name: len(sample(name, "attribute", "text")) for pair in sets for name in pair}
    most = max(counts[a] + counts[b] for a, b in sets)
    prompts = sum(counts.values()) if stage == "overlap" else most
    return Work(stage, prompts, held=2 * cost.scores_size(model, prompts, 1))


def _elicit(params: Params, model: Shape, sample: Sample, name: str) -> Work:
    spec = params.prompt_sets[name]
    assert spec.keep is not None  # the caller asks only for such sets
    every = replace(spec, keep=None)
    candidates = assumed(replace(params, prompt_sets={**params.prompt_sets, name: every}))
    lengths = flat(candidates(name, None, "text"))
    return _add(f"prepare@{name}", [_drawn(params, model, 1, lengths, 1, spec.keep.new_tokens)])


def _texts(
    params: Params, model: Shape, times: int, lengths: Sequence[int], batch_tokens: int
) -> Work:
    """Texts read by the model and without each of `times` - 1 circuits."""
    return Work(
        "",
        len(lengths),
        times * sum(lengths),
        passes=times * cost.likelihood(model, lengths),
        memory=cost.likelihood_memory(model, times - 1, batch_tokens, params.model.dtype),
    )


def _drawn(
    params: Params,
    model: Shape,
    times: int,
    lengths: Sequence[int],
    completions: int,
    new_tokens: int,
) -> Work:
    """Completions by the model and without each of `times` - 1 circuits."""
    each = len(lengths) * completions
    return Work(
        "",
        len(lengths),
        tokens=times * (sum(lengths) + each * new_tokens),
        drawn=times * cost.generation(model, lengths, completions, new_tokens),
        steps=-(-times * each // cost.COMPLETIONS_AT_ONCE) * new_tokens,
        memory=cost.generation_memory(
            model, times, lengths, completions, new_tokens, params.model.dtype
        ),
    )


def _add(stage: str, parts: Sequence[Work]) -> Work:
    """One stage of several parts, one after the other."""
    return Work(
        stage,
        prompts=max(part.prompts for part in parts),
        tokens=sum(part.tokens for part in parts),
        passes=sum(part.passes for part in parts),
        drawn=sum(part.drawn for part in parts),
        steps=sum(part.steps for part in parts),
        memory=max(part.memory for part in parts),
    )


def _behaviour_texts(
    params: Params,
    model: Shape,
    times: int,
    sample: Sample,
    behaviour: str,
    split: str,
    count: int,
    batch: int,
) -> Work:
    """A behaviour's texts or items, read by the model and without each of `times` - 1 circuits."""
    spec = params.behaviours[behaviour]
    kind = "packed" if spec.measure == "pairs" else "text"
    return _texts(params, model, times, flat(sample(spec.prompts, split, kind)[:count]), batch)


def _sweep(params: Params, model: Shape, sample: Sample, behaviour: str) -> Work:
    sweep = params.sweep
    tuned = [m for m in params.methods.values() if m.match is None and m.layers is None]
    points = len(tuned) * len(sweep.protect) * len(sweep.num_neurons)
    if not points:
        return Work(f"sweep@{behaviour}")
    times, batch = 1 + points, sweep.batch_tokens
    general = flat(sample(params.differential.general, "tune", "text")[: sweep.texts])
    parts = [
        _texts(params, model, times, general, batch),
        _behaviour_texts(params, model, times, sample, behaviour, "tune", sweep.items, batch),
    ]
    return _add(f"sweep@{behaviour}", parts)


def _evaluate(params: Params, model: Shape, sample: Sample, behaviour: str) -> Work:
    spec, evaluate = params.behaviours[behaviour], params.evaluate
    batch = evaluate.batch_tokens
    pairs = spec.measure == "pairs"
    count = evaluate.items if pairs else evaluate.prompts
    splits = ["test", "attribute"] if params.prepare.splits["test"] > 0 else ["attribute"]
    every = {n: len(circuit_names(n, method)) for n, method in params.methods.items()}
    own = every.get(spec.method, 0)
    in_sample = sum(n for name, n in every.items() if name in evaluate.in_sample)
    writing = sum(n for m, n in every.items() if m == spec.method or m in evaluate.completed)

    split = None if evaluate.general in params.test_sets else "test"
    texts = flat(sample(evaluate.general, split, "text")[: evaluate.texts])
    times = 1 + sum(every.values())
    parts = [_windows(params, model, times, [sum(texts)] if evaluate.joined else texts, batch)]
    if spec.second:
        packed = flat(sample(spec.second, None, "packed")[: evaluate.items])
        parts.append(_texts(params, model, 1 + own, packed, batch))
    for split, read, written in zip(
        splits, (times, 1 + in_sample), (1 + writing, 1 + in_sample), strict=False
    ):
        parts.append(_behaviour_texts(params, model, read, sample, behaviour, split, count, batch))
        if not pairs:
            lengths = flat(sample(spec.prompts, split, "text")[:count])
            drawn = lengths, evaluate.completions, evaluate.new_tokens
            parts.append(_drawn(params, model, written, *drawn))
    return _add(f"evaluate@{behaviour}", parts)


def window_lengths(length: int, window: int, stride: int) -> list[int]:
    """Tokens in each window over a text, up to the first window that reaches its end."""
    last = max(0, -(-(length - window) // stride))
    return [min(window, length - n * stride) for n in range(last + 1)]


def _windows(
    params: Params, model: Shape, times: int, lengths: Sequence[int], batch_tokens: int
) -> Work:
    """Perplexity through a sliding window: every token is scored once, most are read often."""
    window, stride = params.evaluate.window, params.evaluate.stride
    read = [n for length in lengths for n in window_lengths(length, window, stride)]
    scored = sum(lengths) - len(lengths)
    longest = max(batch_tokens, *read)
    return Work(
        "",
        len(lengths),
        times * sum(read),
        passes=times * cost.likelihood(model, read, scored),
        memory=cost.likelihood_memory(model, times - 1, longest, params.model.dtype),
    )


def _transfer(params: Params, model: Shape, sample: Sample) -> Work:
    transfer = params.transfer
    if params.prepare.splits["test"] == 0:
        return Work("transfer")
    times, batch = 1 + len(params.behaviours), transfer.batch_tokens
    parts = [
        _behaviour_texts(params, model, times, sample, name, "test", transfer.items, batch)
        for name in params.behaviours
    ]
    for name in transfer.texts:
        lengths = flat(sample(name, "test", "text")[: transfer.items])
        parts.append(_windows(params, model, times, lengths, batch))
    return _add("transfer", parts)


# --- devices ---------------------------------------------------------------------------------


def bytes_needed(work: Work, model: Shape, params: Params, name: str, cards: int) -> float:
    """Peak memory on each device; `cards` share the model where model.device is auto."""
    if not work.operations:
        return LIGHT + work.held if name == "CPU" else 0.0
    of_model = cost.weights(model, params.model.dtype)
    if name == "CPU":
        return PROCESS + of_model + work.held + HEAP * work.memory
    of_scorers = sum(SCORER.get(scorer.kind, 0) for scorer in params.scorers.values())
    if not work.stage.startswith(("evaluate", "prepare")):
        of_scorers = 0.0
    share = cards if params.model.device == "auto" else 1
    return CARD + (of_model + work.memory) / share + of_scorers


def bytes_on_machine(work: Work, model: Shape, params: Params, name: str) -> float:
    """Peak memory of the process itself, through which a card's weights come too."""
    if name == "CPU" or not work.operations:
        return bytes_needed(work, model, params, "CPU", 1)
    return PROCESS + work.held + cost.weights(model, params.model.dtype)


@cache
def product_rate(dtype: str) -> float:
    """Operations per second of this machine's matrix products, of the size that an MLP's have."""
    loading.prefer_onednn()
    left, right = (torch.randn(1024, 1024, dtype=loading.DTYPES[dtype]) for _ in range(2))
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(left, right)
        taken.append(time.perf_counter() - start)
    return 2 * 1024**3 / statistics.median(taken)


def peak_rate(name: str, dtype: str) -> float:
    """Operations per second of DEVICES[name]: the vendor's figure, or this machine's measured."""
    return product_rate(dtype) if name == "CPU" else DEVICES[name].peak[dtype]


def seconds(work: Work, model: Shape, params: Params, name: str, cards: int) -> float:
    """Expected time. Processes on several cards share out attribution's prompts and no other
    stage's; a model spread over cards is as fast as on one, for they take turns."""
    if not work.operations:
        return 0.0
    device, dtype = DEVICES[name], params.model.dtype
    rate = peak_rate(name, dtype) * device.reached
    of_model = cost.weights(model, dtype)
    reading = work.steps * of_model / device.bandwidth
    busy = work.passes / rate + max(work.drawn / (rate * DRAWING), reading)
    shared = cards if params.model.device != "auto" and work.stage.startswith("attribute") else 1
    return START + of_model / LOADING + busy / shared


def unfit(params: Params, model: Shape, works: Sequence[Work], name: str, cards: int) -> list[Work]:
    """The stages that need more memory than a device has."""
    limit = DEVICES[name].memory
    return [w for w in works if bytes_needed(w, model, params, name, cards) > limit]


def remedies(params: Params, model: Shape, sample: Sample, name: str, cards: int) -> list[str]:
    """Single changes with which every stage fits, as the params to set; and then two together."""

    def fits(changed: Params, count: int = cards, device: str = name) -> bool:
        return not unfit(changed, model, plan(changed, model, sample), device, count)

    found = []
    tokens = params.attribute.batch_tokens
    while (tokens := tokens // 2) >= 64:
        sections = ("attribute", "sweep", "evaluate", "transfer")
        smaller = {
            key: replace(section, batch_tokens=min(tokens, section.batch_tokens))
            for key in sections
            for section in [getattr(params, key)]
        }
        if fits(replace(params, **smaller)):
            found.append(f"batch_tokens: {tokens} in {', '.join(sections)}")
            break
    half = _with_model(params, dtype="float16" if name == "T4" else "bfloat16")
    if params.model.dtype == "float32" and fits(half):
        found.append(f"model.dtype: {half.model.dtype}")
    if name != "CPU":
        found += _spread(params, fits, name, "")
        if not found:
            found += _spread(half, fits, name, f"model.dtype: {half.model.dtype} and ")
        found += [f"a larger device: {other}" for other in DEVICES if fits(params, cards, other)][
            :1
        ]
    return found


def _spread(params: Params, fits: Callable[..., bool], name: str, prefix: str) -> list[str]:
    spread = _with_model(params, device="auto")
    enough = next((n for n in range(2, MOST_CARDS + 1) if fits(spread, n)), None)
    return [f"{prefix}model.device: auto over {enough} x {name}"] if enough else []


def _with_model(params: Params, **values: str) -> Params:
    return replace(params, model=replace(params.model, **values))


# --- the command -----------------------------------------------------------------------------


def configuration(params: Params) -> PretrainedConfig:
    """config.json of model.path; where that is still to be fetched, the one that profiles/configs
    has for a folder of its name, or that of fetch.repository.

    InputError, naming the key, if none can be read.
    """
    path, revision = params.model.path, params.model.revision
    key = "model.path"
    kept = CONFIGS / f"{Path(path).name}.json"
    if not Path(path).is_dir():
        if kept.is_file():
            path = str(kept)
        elif params.fetch.repository is not None:
            key, path, revision = "fetch.repository", params.fetch.repository, params.fetch.revision
        elif params.fetch.model or params.fetch.gguf:
            raise InputError(
                f"params: model.path: {path} is not there yet; with this profile as params.yaml, "
                "bring it by: python -m sparc3 fetch"
            )
    token = hub_token()
    try:
        return AutoConfig.from_pretrained(path, revision=revision, token=token)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        if token:
            reason = reason.replace(token, "***")
        raise InputError(
            f"params: {key}: no config.json of {path} ({reason}); put the model's config.json "
            f"into the folder {params.model.path}, or plan where the hub can be reached"
        ) from None


def describe(
    params: Params, model: Shape, works: Sequence[Work], names: Sequence[str], cards: int
) -> list[str]:
    """The plan as lines of text."""
    place = names[0]
    header = ("stage", "prompts", "tokens", "TFLOP", "time", "GB there", "GB on disk")
    rows = [
        (
            work.stage,
            f"{work.prompts:,}",
            f"{work.tokens:,}",
            f"{work.operations / 1e12:,.1f}",
            _clock(seconds(work, model, params, place, cards)) if work.operations else "-",
            f"{bytes_needed(work, model, params, place, cards) / 1e9:.1f}",
            f"{work.disk / 1e9:.2f}",
        )
        for work in works
    ]
    of_model = cost.weights(model, params.model.dtype) / 1e9
    machine = max(bytes_on_machine(work, model, params, place) for work in works)
    lines = [
        f"{params.model.path}: {model.parameters:,} parameters, {model.layers} layers x "
        f"{model.width:,} neurons, {of_model:.2f} GB in {params.model.dtype}",
        "",
        f"on {_count(place, cards)}:",
        *_columns([header, *rows]),
        "",
        f"scores on disk: {sum(work.disk for work in works) / 1e9:.2f} GB; memory of the machine "
        f"for each process: {machine / 1e9:.1f} GB",
        "",
    ]
    devices = []
    for name in names:
        device = DEVICES[name]
        most = max(bytes_needed(work, model, params, name, cards) for work in works)
        total = sum(seconds(work, model, params, name, cards) for work in works)
        devices.append(
            (
                _count(name, cards),
                f"{most / 1e9:.1f} of {device.memory / 1e9:.1f}",
                _clock(total) if most <= device.memory else "does not fit",
                f"{device.reached:.0%} of {peak_rate(name, params.model.dtype) / 1e12:.3g}",
            )
        )
    header = ("device", "GB needed", "time in all", "TFLOP/s assumed")
    return lines + _columns([header, *devices])


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text with the first column to the left and all others to the right."""
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) for row in rows]


def _count(name: str, cards: int) -> str:
    return name if cards == 1 else f"{cards} x {name}"


def _clock(duration: float) -> str:
    minutes = round(duration / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{max(1, minutes)} min"


def refuse(
    params: Params, model: Shape, sample: Sample, works: Sequence[Work], name: str, cards: int
) -> None:
    """InputError if one of the stages does not fit, with what would."""
    lacking = unfit(params, model, works, name, cards)
    if lacking:
        needed = bytes_needed(lacking[0], model, params, name, cards)
        would = remedies(params, model, sample, name, cards)
        raise InputError(
            f"{lacking[0].stage} needs {needed / 1e9:.1f} GB on {_count(name, cards)}, which has "
            f"{DEVICES[name].memory / 1e9:.1f} GB; what would fit: "
            f"{'; or '.join(would) or 'none of a smaller batch, bfloat16, more cards'}"
        )


def costs(profiles: Sequence[Path]) -> list[list[str]]:
    """A row for every device: GB and time that each profile needs on one of it, and on two where
    the model may be spread. First a header.
    """
    rows = [["device", *(f"{profile.stem}: {what}" for profile in profiles for what in _SHOWN)]]
    loaded = [parameters.load(profile) for profile in profiles]
    shapes = [cost.shape(configuration(params)) for params in loaded]
    works = [plan(p, m, sample_of(p, exact=False)) for p, m in zip(loaded, shapes, strict=True)]
    for name, device in DEVICES.items():
        for cards in () if name == "CPU" else (1, 2):
            row = [_count(name, cards)]
            for params, model, work in zip(loaded, shapes, works, strict=True):
                most = max(bytes_needed(w, model, params, name, cards) for w in work)
                total = sum(seconds(w, model, params, name, cards) for w in work)
                fits = most <= device.memory
                row += [f"{most / 1e9:.0f}", _clock(total) if fits else "does not fit"]
            rows.append(row)
    disk = [sum(w.disk for w in work) / 1e9 for work in works]
    return [*rows, ["scores on disk", *(cell for d in disk for cell in (f"{d:.1f}", ""))]]


_SHOWN = ("GB a card", "time")


class Needs(NamedTuple):
    """Of one stage on a device: bytes of the machine's memory for each process, and seconds."""

    machine: float
    seconds: float


def of_stage(params: Params, job: str, name: str, cards: int) -> Needs:
    """What the stage `job` (attribute@general, prepare, ...) needs on DEVICES[name].

    InputError: an unknown device, a model without config.json, or a stage that does not fit.
    """
    if name not in DEVICES:
        raise InputError(
            f"params: cluster.device {name!r} is not known; choose one of {', '.join(DEVICES)}"
        )
    model = cost.shape(configuration(params))
    sample = sample_of(params, exact=are_prepared(params, params))
    works = [
        work
        for work in plan(params, model, sample)
        if work.stage in (job, job.partition("@")[0]) or work.stage.partition("@")[0] == job
    ] or [Work(job)]
    refuse(params, model, sample, works, name, cards)
    return Needs(
        max(bytes_on_machine(work, model, params, name) for work in works),
        sum(seconds(work, model, params, name, cards) for work in works),
    )


def run(project: Params, profile: Path | None, device: str | None, cards: int) -> None:
    """Print the plan of a profile (or of the project's own params).

    `device` is a key of DEVICES: without one a profile for the CPU is planned for this machine, and
    any other for every card of the table. InputError: the run cannot fit, with what would.
    """
    params = project if profile is None else parameters.load(profile)
    if device is not None and device not in DEVICES:
        raise InputError(f"--device {device!r} is not known; choose one of {', '.join(DEVICES)}")
    if cards < 1:
        raise InputError(f"--cards {cards}: expected at least 1")
    model = cost.shape(configuration(params))
    exact = are_prepared(params, project)
    sample = sample_of(params, exact)
    works = plan(params, model, sample)
    if device is not None:
        names = [device]
    elif params.model.device == "cpu":
        names = ["CPU"]
    else:
        names = [name for name in DEVICES if name != "CPU"]
    print("\n".join(describe(params, model, works, names, cards)))
    print(
        "prompts: as prepared"
        if exact
        else f"prompts: not prepared; taken to have the lengths that the profile gives, else "
        f"{ASSUMED_TOKENS} tokens"
    )
    if all(unfit(params, model, works, name, cards) for name in names):
        refuse(params, model, sample, works, names[-1], cards)
