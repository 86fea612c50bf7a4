"""Plan: what a profile costs, before its model is there: memory, operations, time and disk.

The model is known from its config.json alone. Where prompts are prepared their lengths are known;
elsewhere they are what the profile says, or ASSUMED_TOKENS. A pair counts as twice its longest
sentence. Circuits are counted as if all began in the first layer; those that do not cost less
(`ablate.without_each`).
"""

import os
import statistics
import timeit
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, PretrainedConfig

from sparc3.base.artifacts import circuit_names, prompts_path, read_prompts
from sparc3.base.errors import InputError
from sparc3.base.params import (
    FIRST,
    Params,
    PromptSet,
    Sweep,
    Transfer,
    scores_of,
    sets_of,
)
from sparc3.base.secrets import first_line, hub_token
from sparc3.circuits.methods import swept
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
REACHED = 0.35  # of a card's peak
REACHED_CPU = 0.8  # of this machine's own products
DRAWING = 0.7  # of what whole sequences reach, when completions are drawn token by token
MOST_CARDS = 16
BATCHED = ("attribute", "sweep", "evaluate", "transfer")  # sections with batch_tokens
CONFIGS = Path("profiles/configs")


class Device(NamedTuple):
    """Cards of one kind, or this machine. For one, by its vendor: GiB of memory, GB/s from it, and
    peak TFLOP/s (dense tensor-core products for 16 bits, plain float32 for 32).
    """

    name: str
    gibibytes: float
    bandwidth: float
    half: float = 0
    full: float = 0
    bfloat16: bool = True  # whether it has units for that
    cards: int = 1

    def __str__(self) -> str:
        return self.name if self.cards == 1 else f"{self.cards} x {self.name}"

    @property
    def memory(self) -> float:
        """Bytes of one card."""
        return self.gibibytes * 2**30

    def rate(self, dtype: str) -> float:
        """Operations per second that one is assumed to reach."""
        if self.name == "CPU":
            return product_rate(dtype) * REACHED_CPU
        halved = dtype == "float16" or (dtype == "bfloat16" and self.bfloat16)
        return 1e12 * (self.half if halved else self.full) * REACHED


CPU = Device("CPU", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 20)
CARDS = (
    Device("T4", 15, 320, 65, 8.1, bfloat16=False),
    Device("L4", 22, 300, 121, 30.3),
    Device("A10G", 22, 600, 70, 31.2),
    Device("A100-40", 39, 1555, 312, 19.5),
    Device("A100-80", 79, 2039, 312, 19.5),
    Device("H100", 79, 3350, 989, 66.9),
)


@cache
def product_rate(dtype: str) -> float:
    """Operations per second of this machine's matrix products, of the size that an MLP's have."""
    loading.prefer_onednn()
    left, right = (torch.randn(1024, 1024, dtype=loading.DTYPES[dtype]) for _ in range(2))
    taken = timeit.repeat(lambda: torch.mm(left, right), number=1, repeat=20)
    return 2 * 1024**3 / statistics.median(taken)


def candidates(spec: PromptSet) -> int:
    """Prompts of a set, before a second pass keeps some."""
    each = KNOWN.get(spec.source, UNKNOWN)[0] if spec.count is None else spec.count
    return each * len(spec.seeds)


def are_prepared(params: Params, project: Params) -> bool:
    """Whether outputs/prompts, made with the project's params, are the prompts of `params`."""
    return all(
        getattr(params, key) == getattr(project, key)
        for key in ("model", "prompt_sets", "test_sets", "prepare")
    ) and all(prompts_path(name).is_file() for name in sets_of(params))


class Needs(NamedTuple):
    """Peak bytes of each device, peak bytes of the process on the machine, and seconds."""

    device: float
    machine: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """A profile, the shape of its model, and whether its prompts lie in outputs/prompts. With a
    `job` (attribute@general, prepare, ...) it is of that alone.
    """

    params: Params
    model: Shape
    exact: bool
    job: str | None = None

    @cached_property
    def works(self) -> dict[str, Work]:
        """Of what is planned, by stage."""
        if self.job is None:
            return self._every
        kind, _, axis = self.job.partition("@")
        return {
            stage: work
            for stage, work in self._every.items()
            if stage in (self.job, kind) or (not axis and stage.startswith(f"{kind}@"))
        } or {self.job: Work()}

    @property
    def _every(self) -> dict[str, Work]:
        """Of every stage that runs the model, in order, and of those that hold scores."""
        sets, behaviours = self.params.prompt_sets, self.params.behaviours
        elicited = [name for name, spec in sets.items() if spec.keep]
        return {
            **{f"prepare@{name}": self._elicit(name) for name in elicited},
            **{f"attribute@{name}": self._attribute(name) for name in sets},
            **{stage: self._contrast() for stage in ("differential", "select", "overlap")},
            **{f"sweep@{name}": self._sweep(name) for name in behaviours},
            **{f"evaluate@{name}": self._evaluate(name) for name in behaviours},
            "transfer": self._transfer(),
        }

    def tokens(self, name: str, split: str | None, most: int | None = None) -> list[int]:
        """Of each prompt of a set and a split (None: of all), at most so many."""
        if self.exact:
            return [row["tokens"] for row in read_prompts(name, split)[:most]]
        _, spec = sets_of(self.params)[name]
        count, shares = spec.keep.top if spec.keep else candidates(spec), self.params.prepare.splits
        if split is not None:
            if spec.blocks is not None:
                shares = {"attribute": 1.0, "test": 1 - FIRST}
            count = round(count * shares[split])
        return ([self._assumed(name)] * count)[:most]

    def _assumed(self, name: str) -> int:
        """Tokens of a prompt of a set, as far as the profile says."""
        sets = sets_of(self.params)
        _, spec = sets[sets[name][1].match_length or name]
        return spec.max_tokens or spec.min_tokens or KNOWN.get(spec.source, UNKNOWN)[1]

    def held_out(self, name: str, most: int) -> list[int]:
        """Tokens of each text of the test split; a set that is there for tests alone is whole."""
        return self.tokens(name, None if name in self.params.test_sets else "test", most)

    def changed(self, **sections: Any) -> "Plan":
        """With other sections of params."""
        params = replace(self.params, **sections)
        model = replace(self.model, size=loading.DTYPES[params.model.dtype].itemsize)
        return replace(self, params=params, model=model)

    def _elicit(self, name: str) -> Work:
        """Every candidate completed once, of which the best are kept."""
        spec = self.params.prompt_sets[name]
        assert spec.keep is not None
        lengths = [self._assumed(name)] * candidates(spec)
        return cost.generation(self.model, 1, lengths, 1, spec.keep.new_tokens)

    def _attribute(self, name: str) -> Work:
        params, parts = self.params, []
        most = params.prompt_sets[name].attributed
        names, tokens = scores_of(params, name), self.tokens(name, "attribute", most)
        for target, scores in by_target(names, params.prompt_sets[name].target).items():
            prompts = [[n, n] if target == "pair" else [n] for n in tokens]
            batch, computed = params.attribute.batch_tokens, list(scores.values())
            parts.append(cost.attribution(self.model, prompts, computed, target, batch))
        held = self.model.scores(min(params.attribute.shard_prompts, len(tokens)), len(names))
        disk = self.model.scores(len(tokens), len(names))
        return replace(cost.together(parts), held=held, disk=disk)

    def _contrast(self) -> Work:
        """Scores in memory, of all behaviours and their references at most."""
        names = {n for b in self.params.behaviours.values() for n in (b.prompts, b.reference)}
        prompts = sum(len(self.tokens(name, "attribute")) for name in names)
        return Work(held=2 * self.model.scores(prompts))

    def _sweep(self, name: str) -> Work:
        params, sweep = self.params, self.params.sweep
        spec = params.behaviours[name]
        methods = len(swept(params.methods, spec.method))
        points = methods * len(sweep.protect) * len(sweep.num_neurons)
        if not points:
            return Work()
        texts = self.tokens(params.differential.general, "tune", sweep.texts)
        parts = [cost.likelihood(self.model, 1 + points, texts, sweep.batch_tokens)]
        if params.prompt_sets[spec.prompts].blocks is None:
            parts += self._swept(name, "tune", 1 + points, sweep)
        return cost.together(parts)

    def _transfer(self) -> Work:
        params, transfer = self.params, self.params.transfer
        if params.prepare.splits["test"] == 0:
            return Work()
        times, batch, parts = 1 + len(params.behaviours), transfer.batch_tokens, []
        for name in params.behaviours:
            parts += self._swept(name, "test", times, transfer)
        for name in transfer.texts:
            parts.append(self._windows(times, self.held_out(name, transfer.items), batch))
        return cost.together(parts)

    def _evaluate(self, name: str) -> Work:
        params, evaluate = self.params, self.params.evaluate
        behaviour, batch = params.behaviours[name], evaluate.batch_tokens
        circuits = {method: len(circuit_names(method, m)) for method, m in params.methods.items()}
        drawn = {method: min(n, evaluate.drawn) for method, n in circuits.items()}

        every, once = 1 + sum(circuits.values()), 1 + len(circuits)
        in_sample = 1 + sum(drawn[method] for method in evaluate.in_sample)
        instruments = instruments_of(behaviour).values()
        banned = bool(evaluate.ban) and any(each.writes for each in instruments)
        completed = 1 + banned + sum(drawn[m] for m in {behaviour.method, *evaluate.completed})
        parts = []
        for place, name_of_text in enumerate(evaluate.general):
            texts = self.held_out(name_of_text, evaluate.texts)
            joined = evaluate.joined and not place
            lengths = [sum(texts)] if joined else texts
            parts.append(self._windows(banned + (once if place else every), lengths, batch))
        if banned:
            tuned = self.tokens(params.differential.general, "tune", params.sweep.texts)
            parts += [self._windows(1, tuned, batch)] * (1 + len(evaluate.ban))
        if behaviour.second:
            packed = [2 * n for n in self.tokens(behaviour.second, None)]
            parts.append(cost.likelihood(self.model, 2, packed, batch))
        blocked = params.prompt_sets[behaviour.prompts].blocks is not None
        times = {
            "test": (banned + every, completed),
            "attribute": (banned + in_sample, banned + in_sample),
        }
        if blocked:
            times = {"test": (every + in_sample, completed + in_sample)}
        elif params.prepare.splits["test"] == 0:
            times = {"attribute": (every, completed)}
        for split, (read, written) in times.items():
            for instrument in instruments:
                most = evaluate.items if instrument.reads == "pair" else evaluate.prompts
                ran = written if instrument.writes else read
                tokens = self.tokens(behaviour.prompts, split, None if blocked else most)
                parts.append(self._measured(instrument, ran, tokens, batch))
        return cost.together(parts)

    def _swept(self, name: str, split: str, times: int, section: Sweep | Transfer) -> list[Work]:
        """Of each of a behaviour's instruments that the sweep reads, and transfer too."""
        behaviour = self.params.behaviours[name]
        tokens = self.tokens(behaviour.prompts, split, section.items)
        return [
            self._measured(instrument, times, tokens, section.batch_tokens)
            for instrument in instruments_of(behaviour).values()
            if instrument.swept
        ]

    def _measured(self, instrument: Instrument, times: int, tokens: list[int], batch: int) -> Work:
        evaluate = self.params.evaluate
        if instrument.writes:
            drawn = evaluate.completions, evaluate.new_tokens
            return cost.generation(self.model, times, tokens, *drawn)
        packed = [2 * n for n in tokens] if instrument.reads == "pair" else tokens
        return cost.likelihood(self.model, times, packed, batch)

    def _windows(self, times: int, texts: list[int], batch_tokens: int) -> Work:
        """Texts read through a sliding window: a token is scored once, most are read often."""
        window, stride = self.params.evaluate.window, self.params.evaluate.stride
        spans = [s for length in texts for s in likelihood.window_spans(length, window, stride)]
        lengths, scored = [end - begin for begin, end, _ in spans], sum(texts) - len(texts)
        return cost.likelihood(self.model, times, lengths, batch_tokens, scored)

    @property
    def disk(self) -> float:
        """Bytes of all scores."""
        return sum(work.disk for work in self.works.values())

    def needs(self, stage: str, work: Work, device: Device) -> Needs:
        """What one stage needs. Processes on several cards share out attribution's prompts and no
        other stage's; where model.device is auto the cards share the model, and are as fast as
        one, for they take turns.
        """
        cpu, weights, spec = device.name == "CPU", self.model.weights, self.params.model
        if not work.operations:
            light = LIGHT + work.held
            return Needs(light if cpu else 0.0, light, 0.0)
        rate = device.rate(spec.dtype)
        reading = work.steps * weights / (device.bandwidth * 1e9)
        busy = work.passes / rate + max(work.drawn / (rate * DRAWING), reading)
        if stage.startswith("attribute") and spec.device != "auto":
            busy /= device.cards
        seconds = START + weights / LOADING + busy
        machine = PROCESS + weights + work.held  # a card's weights come through it too
        if cpu:
            machine += HEAP * work.memory
            return Needs(machine, machine, seconds)
        card = CARD + (weights + work.memory) / (device.cards if spec.device == "auto" else 1)
        if stage.startswith(("evaluate", "prepare")):
            card += sum(SCORER.get(scorer.kind, 0) for scorer in self.params.scorers.values())
        return Needs(card, machine, seconds)

    def in_all(self, device: Device) -> Needs:
        """What the stages need, one after the other."""
        each = [self.needs(stage, work, device) for stage, work in self.works.items()]
        devices, machines, durations = zip(*each, strict=True)
        return Needs(max(devices), max(machines), sum(durations))

    def fits(self, device: Device) -> bool:
        return self.in_all(device).device <= device.memory


def plan(params: Params, project: Params | None = None) -> Plan:
    """Of a profile, with the prompts that are prepared for `project` if they are its own.

    InputError: as `configuration`.
    """
    exact = project is not None and are_prepared(params, project)
    return Plan(params, cost.shape(configuration(params), params.model.dtype), exact)


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
        return AutoConfig.from_pretrained(
            path, revision=revision, token=hub_token(), trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"params: {key}: no config.json of {path} ({first_line(error)}); put the model's "
            f"config.json into the folder {params.model.path}, or plan where the hub can be reached"
        ) from None


def refuse(planned: Plan, device: Device) -> None:
    """InputError if one of the stages does not fit, with what would."""
    for stage, work in planned.works.items():
        needed = planned.needs(stage, work, device).device
        if needed > device.memory:
            advice = "; or ".join(remedies(planned, device))
            raise InputError(
                f"{stage} needs {needed / 1e9:.1f} GB on {device}, which has "
                f"{device.memory / 1e9:.1f} GB; what would fit: "
                f"{advice or 'none of a smaller batch, bfloat16, more cards'}"
            )


def remedies(planned: Plan, device: Device) -> list[str]:
    """Single changes with which every stage fits, as the params to set: of each kind the least."""
    params, model = planned.params, planned.params.model
    half = replace(model, dtype="bfloat16" if device.bfloat16 else "float16")
    auto = planned.changed(model=replace(model, device="auto"))

    smaller = []
    for tokens in (2**n for n in reversed(range(6, params.attribute.batch_tokens.bit_length()))):
        sections = {name: getattr(params, name) for name in BATCHED}
        for name, section in sections.items():
            sections[name] = replace(section, batch_tokens=min(tokens, section.batch_tokens))
        advice = f"batch_tokens: {tokens} in {', '.join(BATCHED)}"
        smaller.append((advice, planned.changed(**sections), device))
    kinds: list[list[tuple[str, Plan, Device]]] = [smaller]
    if model.dtype == "float32":
        kinds.append([(f"model.dtype: {half.dtype}", planned.changed(model=half), device)])
    if device.name != "CPU":
        several = [device._replace(cards=cards) for cards in range(2, MOST_CARDS + 1)]
        others = [card._replace(cards=device.cards) for card in CARDS]
        kinds.append([(f"model.device: auto over {each}", auto, each) for each in several])
        kinds.append([(f"a larger device: {each}", planned, each) for each in others])
    enough = ((name for name, changed, place in kind if changed.fits(place)) for kind in kinds)
    return [name for names in enough for name in islice(names, 1)]


def describe(planned: Plan, devices: Sequence[Device]) -> list[str]:
    """The plan as lines of text: each stage on the first device, and all of them on each."""
    first, model, spec = devices[0], planned.model, planned.params.model
    stages = [("stage", "tokens", "TFLOP", "time", "GB there", "GB on disk")]
    for stage, work in planned.works.items():
        needed = planned.needs(stage, work, first)
        time = _clock(needed.seconds) if work.operations else "-"
        done, disk = f"{work.operations / 1e12:,.1f}", f"{work.disk / 1e9:.2f}"
        stages.append((stage, f"{work.tokens:,}", done, time, f"{needed.device / 1e9:.1f}", disk))
    totals = [("device", "GB needed", "time in all", "TFLOP/s assumed")]
    for device in devices:
        needed = planned.in_all(device)
        memory = f"{needed.device / 1e9:.1f} of {device.memory / 1e9:.1f}"
        rate = f"{device.rate(spec.dtype) / 1e12:.3g}"
        totals.append((str(device), memory, _time(needed, device), rate))
    return [
        f"{spec.path}: {model.parameters:,} parameters, {model.layers} layers x "
        f"{model.width:,} neurons, {model.weights / 1e9:.2f} GB in {spec.dtype}\n",
        f"on {first}:",
        *_columns(stages),
        f"\nscores on disk: {planned.disk / 1e9:.2f} GB; memory of the machine "
        f"for each process: {planned.in_all(first).machine / 1e9:.1f} GB\n",
        *_columns(totals),
    ]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text with the first column to the left and all others to the right."""
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) for row in rows]


def _clock(duration: float) -> str:
    minutes = round(duration / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{max(1, minutes)} min"


def _time(needed: Needs, device: Device) -> str:
    return _clock(needed.seconds) if needed.device <= device.memory else "does not fit"


def costs(profiles: Sequence[Path]) -> list[list[str]]:
    """A row for every device: GB and time that each profile needs on one of it, and on two where
    the model may be spread. First a header.
    """
    devices = [card._replace(cards=cards) for card in CARDS for cards in (1, 2)]
    rows = [["device"], *([str(device)] for device in devices), ["scores on disk"]]
    for profile in profiles:
        planned = plan(checks.load(profile, checks.PARAMS))
        rows[0] += [f"{profile.stem}: GB a card", f"{profile.stem}: time"]
        for row, device in zip(rows[1:-1], devices, strict=True):
            needed = planned.in_all(device)
            row += [f"{needed.device / 1e9:.0f}", _time(needed, device)]
        rows[-1] += [f"{planned.disk / 1e9:.1f}", ""]
    return rows


def named(key: str, name: str, cards: int) -> Device:
    """So many of a device of the table. InputError, with the key that names it: none of it."""
    table = {device.name: device for device in (CPU, *CARDS)}
    if name not in table:
        raise InputError(f"{key} {name!r} is not known; choose one of {', '.join(table)}")
    return table[name]._replace(cards=cards)


def of_stage(params: Params, job: str, name: str, cards: int) -> Needs:
    """What the stage `job` (attribute@general, prepare, ...) needs on so many devices of that name.

    InputError: an unknown device, a model without config.json, or a stage that does not fit.
    """
    device = named("params: cluster.device", name, cards)
    planned = replace(plan(params, project=params), job=job)
    refuse(planned, device)
    return planned.in_all(device)


def run(project: Params, profile: Path | None, device: str | None, cards: int) -> None:
    """Print the plan of a profile (or of the project's own params).

    Without the name of a device, a profile for the CPU is planned for this machine, and any other
    for every card of the table. InputError: the run cannot fit, with what would.
    """
    params = project if profile is None else checks.load(profile, checks.PARAMS)
    every = ["CPU"] if params.model.device == "cpu" else [card.name for card in CARDS]
    devices = [named("--device", name, cards) for name in ([device] if device else every)]
    if cards < 1:
        raise InputError(f"--cards {cards}: expected at least 1")
    planned = plan(params, project)
    print("\n".join(describe(planned, devices)))
    assumption = f"taken to have the lengths that the profile gives, else {ASSUMED_TOKENS} tokens"
    print("prompts: as prepared" if planned.exact else f"prompts: not prepared; {assumption}")
    if not any(planned.fits(each) for each in devices):
        refuse(planned, devices[-1])
