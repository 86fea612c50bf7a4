"""Plan: what a profile costs, before its model is there: memory, operations, time and disk.

The model is known from its config.json alone. Where prompts are prepared their lengths are exact;
elsewhere they are what the profile says, or ASSUMED_TOKENS. Circuits are counted as if all began in
the first layer; those that do not cost less (`ablate.without_each`).
"""

import os
import statistics
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoConfig, PretrainedConfig

from sparc3.base.artifacts import circuit_names, prompts_path, read_prompts
from sparc3.base.errors import InputError
from sparc3.base.params import Behaviour, Keep, Model, Params, PromptSet, scores_of
from sparc3.base.secrets import first_line, hub_token
from sparc3.commands import cost
from sparc3.commands.cost import Shape, Work
from sparc3.measure import likelihood
from sparc3.measure.instrument import Instrument
from sparc3.measure.instruments import instruments_of
from sparc3.model import loading
from sparc3.stages import checks
from sparc3.stages.attribute import by_target

ASSUMED_TOKENS = 32  # of a prompt whose length the profile does not say
UNKNOWN = (1000, ASSUMED_TOKENS)  # texts of a source that is taken whole, and tokens of each
KNOWN = {"hub/wikitext-2": (60, 4800)}  # where they are far from that
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


class Device(NamedTuple):
    """Vendor's figures: GiB of memory, GB/s from it, and peak TFLOP/s (dense tensor-core products
    for 16 bits, plain float32 for 32); and the part of the peak that is assumed reached.
    """

    memory: float
    bandwidth: float
    half: float = 0
    full: float = 0
    bfloat16: bool = True  # whether it has units for that
    reached: float = 0.35


THIS_MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
CARDS = {
    "T4": Device(15, 320, 65, 8.1, bfloat16=False),
    "L4": Device(22, 300, 121, 30.3),
    "A10G": Device(22, 600, 70, 31.2),
    "A100-40": Device(39, 1555, 312, 19.5),
    "A100-80": Device(79, 2039, 312, 19.5),
    "H100": Device(79, 3350, 989, 66.9),
}
DEVICES = {"CPU": Device(THIS_MACHINE, 20, reached=0.8), **CARDS}


class Place(NamedTuple):
    """Where a profile is to run: so many of DEVICES[name]."""

    name: str
    cards: int = 1

    def __str__(self) -> str:
        return self.name if self.cards == 1 else f"{self.cards} x {self.name}"

    @property
    def device(self) -> Device:
        return DEVICES[self.name]

    @property
    def memory(self) -> float:
        """Bytes of one card."""
        return self.device.memory * 2**30

    def peak(self, dtype: str) -> float:
        """Operations per second: the vendor's figure, or this machine's, measured."""
        if self.name == "CPU":
            return product_rate(dtype)
        halved = dtype == "float16" or (dtype == "bfloat16" and self.device.bfloat16)
        return 1e12 * (self.device.half if halved else self.device.full)


@cache
def product_rate(dtype: str) -> float:
    """Operations per second of this machine's matrix products, of the size that an MLP's have."""
    loading.prefer_onednn()
    left, right = (torch.randn(1024, 1024, dtype=loading.DTYPES[dtype]) for _ in range(2))
    taken = timeit.repeat(lambda: torch.mm(left, right), number=1, repeat=20)
    return 2 * 1024**3 / statistics.median(taken)


# --- prompts ---------------------------------------------------------------------------------

Prompts = list[list[int]]  # lengths in tokens of each prompt's sequences
Kind = Literal["text", "pair", "packed"]  # packed: all sentences of a pair in one sequence
Sample = Callable[[str, str | None, Kind], Prompts]  # of a set and a split


def assumed(params: Params) -> Sample:
    """Lengths as far as the profile says them."""
    specs, shares = {**params.prompt_sets, **params.test_sets}, params.prepare.splits

    def length(spec: PromptSet) -> int:
        if spec.match_length is not None:
            return length(specs[spec.match_length])
        return spec.max_tokens or spec.min_tokens or KNOWN.get(spec.source, UNKNOWN)[1]

    def sample(name: str, split: str | None, kind: Kind) -> Prompts:
        spec = specs[name]
        each = KNOWN.get(spec.source, UNKNOWN)[0] if spec.count is None else spec.count
        count = spec.keep.top if spec.keep else each * len(spec.seeds)
        if split is not None:
            count = round(count * shares[split] / sum(shares.values()))
        tokens = length(spec)
        return [{"text": [tokens], "pair": [tokens] * 2, "packed": [2 * tokens]}[kind]] * count

    return sample


def prepared(tokenizer: Any) -> Sample:
    """Lengths of the prompts in outputs/prompts."""

    def sample(name: str, split: str | None, kind: Kind) -> Prompts:
        prompts = []
        for row in read_prompts(name, split):
            texts = [row["text"]] if kind == "text" else list(row["pair"])
            if kind == "packed" and row.get("unrelated"):
                texts.append(row["unrelated"])
            ids = loading.encode(tokenizer, texts)
            shared = likelihood.common_prefix(ids) if kind == "packed" else 0
            lengths = [len(sequence) - shared for sequence in ids]
            prompts.append([shared + sum(lengths)] if kind == "packed" else lengths)
        return prompts

    return sample


def are_prepared(params: Params, project: Params) -> bool:
    """Whether outputs/prompts, made with the project's params, are the prompts of `params`."""
    return all(
        getattr(params, key) == getattr(project, key)
        for key in ("model", "prompt_sets", "test_sets", "prepare")
    ) and all(prompts_path(name).is_file() for name in (*params.prompt_sets, *params.test_sets))


# --- stages ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What is planned: a profile, the shape of its model, and the lengths of its prompts."""

    params: Params
    model: Shape
    sample: Sample

    @cached_property
    def works(self) -> list[Work]:
        """Of every stage that runs the model, in order, and of those that hold scores."""
        sets, behaviours = self.params.prompt_sets, self.params.behaviours
        return [
            *(_elicit(self, name, spec.keep) for name, spec in sets.items() if spec.keep),
            *(_attribute(self, name) for name in sets),
            *(_contrast(self, stage) for stage in ("differential", "select")),
            *(_sweep(self, name) for name in behaviours),
            *(_evaluate(self, name) for name in behaviours),
            _transfer(self),
            _contrast(self, "overlap"),
        ]

    def lengths(self, name: str, split: str | None, kind: Kind, most: int) -> list[int]:
        """Tokens of each sequence of a set, at most so many prompts."""
        return [length for prompt in self.sample(name, split, kind)[:most] for length in prompt]

    def held_out(self, name: str, most: int) -> list[int]:
        """Tokens of each text of the test split; a set that is there for tests alone is whole."""
        split = None if name in self.params.test_sets else "test"
        return self.lengths(name, split, "text", most)

    def changed(self, **sections: Any) -> "Setup":
        """With other sections of params."""
        params = replace(self.params, **sections)
        model = replace(self.model, size=cost.BYTES[params.model.dtype])
        return replace(self, params=params, model=model)


def setup(params: Params, exact: bool) -> Setup:
    """A profile with the prompts in outputs/prompts, if they are exactly its own, or assumed ones.

    InputError: as `configuration`.
    """
    model = cost.shape(configuration(params), params.model.dtype)
    known = prepared(loading.tokenizer(params.model)) if exact else assumed(params)
    return Setup(params, model, known)


def _read(
    setup: Setup, behaviour: Behaviour, instrument: Instrument, split: str, most: int
) -> list[int]:
    """Lengths of what an instrument reads of a behaviour's prompts."""
    kind = "packed" if instrument.reads == "pair" else "text"
    return setup.lengths(behaviour.prompts, split, kind, most)


def _elicit(setup: Setup, name: str, keep: Keep) -> Work:
    """Every candidate completed once, of which the best are kept."""
    sets = setup.params.prompt_sets
    candidates = replace(setup.params, prompt_sets={**sets, name: replace(sets[name], keep=None)})
    lengths = [length for (length,) in assumed(candidates)(name, None, "text")]
    return replace(
        cost.generation(setup.model, 1, lengths, 1, keep.new_tokens), stage=f"prepare@{name}"
    )


def _attribute(setup: Setup, name: str) -> Work:
    params, model, parts = setup.params, setup.model, []
    names = scores_of(params, name)
    for target, scores in by_target(names, params.prompt_sets[name].target).items():
        prompts = setup.sample(name, "attribute", "pair" if target == "pair" else "text")
        batch, computed = params.attribute.batch_tokens, list(scores.values())
        parts.append(cost.attribution(model, prompts, computed, target, batch))
    work = cost.together(f"attribute@{name}", parts)
    shard = min(params.attribute.shard_prompts, work.prompts)
    return replace(
        work,
        held=cost.scores_size(model, shard, len(names)),
        disk=cost.scores_size(model, work.prompts, len(names)),
    )


def _contrast(setup: Setup, stage: str) -> Work:
    """Scores in memory: of one behaviour and its reference, or of all sets together."""
    sets = [(b.prompts, b.reference) for b in setup.params.behaviours.values()]
    names = {name for both in sets for name in both}
    counts = {name: len(setup.sample(name, "attribute", "text")) for name in names}
    most = max(counts[a] + counts[b] for a, b in sets)
    prompts = sum(counts.values()) if stage == "overlap" else most
    return Work(stage, prompts, held=2 * cost.scores_size(setup.model, prompts, 1))


def _sweep(setup: Setup, name: str) -> Work:
    params, sweep = setup.params, setup.params.sweep
    behaviour = params.behaviours[name]
    tuned = [m for m in params.methods.values() if m.match is None and m.layers is None]
    points = len(tuned) * len(sweep.protect) * len(sweep.num_neurons)
    texts = [setup.lengths(params.differential.general, "tune", "text", sweep.texts)]
    for instrument in instruments_of(behaviour).values():
        if instrument.swept:
            texts.append(_read(setup, behaviour, instrument, "tune", sweep.items))
    read = [cost.likelihood(setup.model, 1 + points, t, sweep.batch_tokens) for t in texts]
    return cost.together(f"sweep@{name}", read if points else [])


def _evaluate(setup: Setup, name: str) -> Work:
    params, evaluate, model = setup.params, setup.params.evaluate, setup.model
    behaviour, batch = params.behaviours[name], evaluate.batch_tokens
    circuits = {method: len(circuit_names(method, m)) for method, m in params.methods.items()}

    def without(*methods: str) -> int:
        """Times that the model runs: as it is, and without each of these methods' circuits."""
        return 1 + sum(circuits[method] for method in {*methods})

    every, in_sample = without(*circuits), without(*evaluate.in_sample)
    completed = without(behaviour.method, *evaluate.completed)
    texts = setup.held_out(evaluate.general, evaluate.texts)
    parts = [_windows(setup, every, [sum(texts)] if evaluate.joined else texts, batch)]
    if behaviour.second:
        packed = setup.lengths(behaviour.second, None, "packed", evaluate.items)
        parts.append(cost.likelihood(model, without(behaviour.method), packed, batch))
    times = {"test": (every, completed), "attribute": (in_sample, in_sample)}
    if params.prepare.splits["test"] == 0:
        times = {"attribute": (every, completed)}
    for split, (read, written) in times.items():
        for instrument in instruments_of(behaviour).values():
            most = evaluate.items if instrument.reads == "pair" else evaluate.prompts
            lengths = _read(setup, behaviour, instrument, split, most)
            if instrument.writes:
                drawn = evaluate.completions, evaluate.new_tokens
                parts.append(cost.generation(model, written, lengths, *drawn))
            else:
                parts.append(cost.likelihood(model, read, lengths, batch))
    return cost.together(f"evaluate@{name}", parts)


def _transfer(setup: Setup) -> Work:
    params, transfer, parts = setup.params, setup.params.transfer, []
    if params.prepare.splits["test"] == 0:
        return Work("transfer")
    times, batch = 1 + len(params.behaviours), transfer.batch_tokens
    for behaviour in params.behaviours.values():
        for instrument in instruments_of(behaviour).values():
            if instrument.swept:
                lengths = _read(setup, behaviour, instrument, "test", transfer.items)
                parts.append(cost.likelihood(setup.model, times, lengths, batch))
    for name in transfer.texts:
        texts = setup.held_out(name, transfer.items)
        parts.append(_windows(setup, times, texts, batch))
    return cost.together("transfer", parts)


def _windows(setup: Setup, times: int, texts: list[int], batch_tokens: int) -> Work:
    """Texts read through a sliding window: every token is scored once, most are read often."""
    window, stride = setup.params.evaluate.window, setup.params.evaluate.stride
    spans = [span for length in texts for span in likelihood.window_spans(length, window, stride)]
    lengths, scored = [end - begin for begin, end, _ in spans], sum(texts) - len(texts)
    read = cost.likelihood(setup.model, times, lengths, batch_tokens, scored)
    return replace(read, prompts=len(texts))


# --- devices ---------------------------------------------------------------------------------


class Needs(NamedTuple):
    """Peak bytes of each device, peak bytes of the process on the machine, and seconds."""

    device: float
    machine: float
    seconds: float


def needs(setup: Setup, work: Work, place: Place) -> Needs:
    """What one stage needs. Processes on several cards share out attribution's prompts and no other
    stage's; where model.device is auto the cards share the model, and are as fast as one, for they
    take turns.
    """
    cpu, weights = place.name == "CPU", setup.model.weights
    if not work.operations:
        light = LIGHT + work.held
        return Needs(light if cpu else 0.0, light, 0.0)
    spread = setup.params.model.device == "auto"
    rate = place.peak(setup.params.model.dtype) * place.device.reached
    reading = work.steps * weights / (place.device.bandwidth * 1e9)
    busy = work.passes / rate + max(work.drawn / (rate * DRAWING), reading)
    if work.stage.startswith("attribute") and not spread:
        busy /= place.cards
    seconds = START + weights / LOADING + busy
    machine = PROCESS + weights + work.held  # a card's weights come through it too
    if cpu:
        machine += HEAP * work.memory
        return Needs(machine, machine, seconds)
    device = CARD + (weights + work.memory) / (place.cards if spread else 1)
    if work.stage.startswith(("evaluate", "prepare")):
        device += sum(SCORER.get(scorer.kind, 0) for scorer in setup.params.scorers.values())
    return Needs(device, machine, seconds)


def in_all(setup: Setup, works: Sequence[Work], place: Place) -> Needs:
    """What stages that run one after the other need."""
    devices, machines, durations = zip(*(needs(setup, w, place) for w in works), strict=True)
    return Needs(max(devices), max(machines), sum(durations))


def fits(setup: Setup, works: Sequence[Work], place: Place) -> bool:
    return in_all(setup, works, place).device <= place.memory


def refuse(setup: Setup, works: Sequence[Work], place: Place) -> None:
    """InputError if one of the stages does not fit, with what would."""
    for work in works:
        needed = needs(setup, work, place).device
        if needed > place.memory:
            advice = "; or ".join(remedies(setup, place))
            raise InputError(
                f"{work.stage} needs {needed / 1e9:.1f} GB on {place}, which has "
                f"{place.memory / 1e9:.1f} GB; what would fit: "
                f"{advice or 'none of a smaller batch, bfloat16, more cards'}"
            )


def remedies(setup: Setup, place: Place) -> list[str]:
    """Single changes with which every stage fits, as the params to set; and then two together."""
    params, model = setup.params, setup.params.model

    def enough(place: Place, **sections: Any) -> bool:
        changed = setup.changed(**sections)
        return fits(changed, changed.works, place)

    def spread(model: Model, prefix: str) -> list[str]:
        auto = replace(model, device="auto")
        places = (Place(place.name, cards) for cards in range(2, MOST_CARDS + 1))
        fewest = next((several for several in places if enough(several, model=auto)), None)
        return [f"{prefix}model.device: auto over {fewest}"] if fewest else []

    advice = []
    batched = {key: getattr(params, key) for key in ("attribute", "sweep", "evaluate", "transfer")}
    tokens = params.attribute.batch_tokens
    while (tokens := tokens // 2) >= 64:
        smaller = {
            key: replace(section, batch_tokens=min(tokens, section.batch_tokens))
            for key, section in batched.items()
        }
        if enough(place, **smaller):
            advice.append(f"batch_tokens: {tokens} in {', '.join(batched)}")
            break
    half = replace(model, dtype="bfloat16" if place.device.bfloat16 else "float16")
    if model.dtype == "float32" and enough(place, model=half):
        advice.append(f"model.dtype: {half.dtype}")
    if place.name != "CPU":
        advice += spread(model, "")
        advice = advice or spread(half, f"model.dtype: {half.dtype} and ")
        larger = [name for name in CARDS if enough(Place(name, place.cards))]
        advice += [f"a larger device: {name}" for name in larger[:1]]
    return advice


# --- the command -----------------------------------------------------------------------------


def configuration(params: Params) -> PretrainedConfig:
    """config.json of model.path; where that is still to be fetched, the one that profiles/configs
    has for a folder of its name, or that of fetch.repository.

    InputError, naming the key, if none can be read.
    """
    key, path, revision, fetch = "model.path", params.model.path, None, params.fetch
    kept = CONFIGS / f"{Path(path).name}.json"
    if not Path(path).is_dir():
        if kept.is_file():
            path = str(kept)
        elif fetch.repository is not None:
            key, path, revision = "fetch.repository", fetch.repository, fetch.revision
        elif fetch.model or fetch.gguf:
            raise InputError(
                f"params: model.path: {path} is not there yet; with this profile as params.yaml, "
                "bring it by: python -m sparc3 fetch"
            )
    try:
        return AutoConfig.from_pretrained(path, revision=revision, token=hub_token())
    except (OSError, ValueError) as error:
        raise InputError(
            f"params: {key}: no config.json of {path} ({first_line(error)}); put the model's "
            f"config.json into the folder {params.model.path}, or plan where the hub can be reached"
        ) from None


def describe(setup: Setup, places: Sequence[Place]) -> list[str]:
    """The plan as lines of text: each stage on the first place, and all of them on each."""
    place, works, model, dtype = places[0], setup.works, setup.model, setup.params.model.dtype
    stages = [("stage", "prompts", "tokens", "TFLOP", "time", "GB there", "GB on disk")]
    for work in works:
        needed = needs(setup, work, place)
        stages.append(
            (
                work.stage,
                f"{work.prompts:,}",
                f"{work.tokens:,}",
                f"{work.operations / 1e12:,.1f}",
                _clock(needed.seconds) if work.operations else "-",
                f"{needed.device / 1e9:.1f}",
                f"{work.disk / 1e9:.2f}",
            )
        )
    devices = [("device", "GB needed", "time in all", "TFLOP/s assumed")]
    for each in places:
        memory = f"{in_all(setup, works, each).device / 1e9:.1f} of {each.memory / 1e9:.1f}"
        rate = f"{each.device.reached:.0%} of {each.peak(dtype) / 1e12:.3g}"
        devices.append((str(each), memory, _time(setup, each), rate))
    return [
        f"{setup.params.model.path}: {model.parameters:,} parameters, {model.layers} layers x "
        f"{model.width:,} neurons, {model.weights / 1e9:.2f} GB in {dtype}",
        "",
        f"on {place}:",
        *_columns(stages),
        "",
        f"scores on disk: {sum(work.disk for work in works) / 1e9:.2f} GB; memory of the machine "
        f"for each process: {in_all(setup, works, place).machine / 1e9:.1f} GB",
        "",
        *_columns(devices),
    ]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text with the first column to the left and all others to the right."""
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) for row in rows]


def _clock(duration: float) -> str:
    minutes = round(duration / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{max(1, minutes)} min"


def _time(setup: Setup, place: Place) -> str:
    """Of all stages, or that they do not fit."""
    needed = in_all(setup, setup.works, place)
    return _clock(needed.seconds) if needed.device <= place.memory else "does not fit"


def costs(profiles: Sequence[Path]) -> list[list[str]]:
    """A row for every device: GB and time that each profile needs on one of it, and on two where
    the model may be spread. First a header.
    """
    places = [Place(name, cards) for name in CARDS for cards in (1, 2)]
    rows = [["device"], *([str(place)] for place in places), ["scores on disk"]]
    for profile in profiles:
        planned = setup(checks.load(profile, checks.PARAMS), exact=False)
        cells = [[f"{profile.stem}: GB a card", f"{profile.stem}: time"]]
        for place in places:
            needed = in_all(planned, planned.works, place).device
            cells.append([f"{needed / 1e9:.0f}", _time(planned, place)])
        cells.append([f"{sum(work.disk for work in planned.works) / 1e9:.1f}", ""])
        rows = [row + own for row, own in zip(rows, cells, strict=True)]
    return rows


def place_of(key: str, name: str, cards: int) -> Place:
    """InputError, with the key that names it: an unknown device."""
    if name not in DEVICES:
        raise InputError(f"{key} {name!r} is not known; choose one of {', '.join(DEVICES)}")
    return Place(name, cards)


def of_stage(params: Params, job: str, name: str, cards: int) -> Needs:
    """What the stage `job` (attribute@general, prepare, ...) needs on so many of DEVICES[name].

    InputError: an unknown device, a model without config.json, or a stage that does not fit.
    """
    place = place_of("params: cluster.device", name, cards)
    planned = setup(params, are_prepared(params, params))
    works = [
        work
        for work in planned.works
        if work.stage in (job, job.partition("@")[0]) or work.stage.partition("@")[0] == job
    ] or [Work(job)]
    refuse(planned, works, place)
    return in_all(planned, works, place)


def run(project: Params, profile: Path | None, device: str | None, cards: int) -> None:
    """Print the plan of a profile (or of the project's own params).

    `device` is a key of DEVICES: without one a profile for the CPU is planned for this machine, and
    any other for every card of the table. InputError: the run cannot fit, with what would.
    """
    params = project if profile is None else checks.load(profile, checks.PARAMS)
    names = [device] if device else ["CPU"] if params.model.device == "cpu" else CARDS
    places = [place_of("--device", name, cards) for name in names]
    if cards < 1:
        raise InputError(f"--cards {cards}: expected at least 1")
    exact = are_prepared(params, project)
    planned = setup(params, exact)
    print("\n".join(describe(planned, places)))
    assumption = f"taken to have the lengths that the profile gives, else {ASSUMED_TOKENS} tokens"
    print("prompts: as prepared" if exact else f"prompts: not prepared; {assumption}")
    if not any(fits(planned, planned.works, place) for place in places):
        refuse(planned, planned.works, places[-1])
