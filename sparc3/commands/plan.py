"""Plan: what a profile costs, before its model is there: memory, operations, time and disk.

The model is known from its config.json alone. Where prompts are prepared their lengths are known;
elsewhere they are what the profile says, or ASSUMED_TOKENS. A pair counts as twice its longest
sentence. Circuits are counted as if all began in the first layer; those that do not cost less
(`ablate.without_each`).
"""

import os
import statistics
import timeit
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, PretrainedConfig

from sparc3.base.artifacts import names_of, prompts_path, read_prompts
from sparc3.base.errors import InputError
from sparc3.base.params import (
    FIRST,
    Evaluate,
    Params,
    Sweep,
    Transfer,
    hub_of,
    scores_of,
    sets_of,
)
from sparc3.base.secrets import first_line, hub_token
from sparc3.circuits.methods import swept
from sparc3.circuits.responses import DEPTHS
from sparc3.commands import cost
from sparc3.commands.cost import Shape, Work
from sparc3.measure import likelihood
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
BATCHED = (
    "attribute",
    "sweep",
    "evaluate",
    "transfer",
    "faithfulness",
)  # sections with batch_tokens
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


class Needs(NamedTuple):
    device: float  # peak bytes of each
    machine: float  # peak bytes of the process on it
    seconds: float
    disk: float = 0  # bytes of scores


@dataclass(frozen=True)
class Plan:
    """A profile, the shape of its model, and whether its prompts lie in outputs/prompts. With a
    `job` (attribute@general, prepare, ...) it is of that alone.
    """

    params: Params
    model: Shape
    exact: bool
    job: str = ""

    @cached_property
    def works(self) -> dict[str, Work]:
        """Of every stage that runs the model, in order, and of those that hold scores."""
        sets, behaviours = self.params.prompt_sets, self.params.behaviours
        every = {
            **{f"prepare@{name}": self._elicit(name) for name, spec in sets.items() if spec.keep},
            **{f"attribute@{name}": self._attribute(name) for name in sets},
            **{stage: self._contrast() for stage in ("differential", "select", "overlap")},
            **{f"sweep@{name}": self._sweep(name) for name in behaviours},
            **{f"steer@{name}": self._steer(name) for name in behaviours},
            **{f"evaluate@{name}": self._evaluate(name) for name in behaviours},
            "transfer": self._transfer(),
            **{f"faithfulness@{name}": self._faithfulness(name) for name in behaviours},
        }
        kind = self.job.partition("@")[0]
        return {
            stage: work
            for stage, work in every.items()
            if self.job in ("", stage, stage.partition("@")[0]) or stage == kind
        } or {self.job: Work()}

    def tokens(self, name: str, split: str | None, most: int | None = None) -> list[int]:
        """Of each prompt of a set and a split (None: of all), at most so many."""
        if self.exact:
            return [row["tokens"] for row in read_prompts(name, split)[:most]]
        _, spec = sets_of(self.params)[name]
        lengths, shares = self._candidates(name), self.params.prepare.splits
        count = spec.keep.top if spec.keep else len(lengths)
        if spec.keep and spec.keep.extend:
            lengths = [length + spec.keep.new_tokens for length in lengths]
        if spec.blocks is not None:
            shares = {"attribute": 1.0, "test": 1 - FIRST}
        return lengths[: count if split is None else round(count * shares[split])][:most]

    def _candidates(self, name: str) -> list[int]:
        """Tokens of each prompt of a set, before a second pass, as far as the profile says."""
        sets = sets_of(self.params)
        _, spec = sets[name]
        _, like = sets[spec.match_length or name]
        count = KNOWN.get(spec.source, UNKNOWN)[0] if spec.count is None else spec.count
        length = like.max_tokens or like.min_tokens or KNOWN.get(like.source, UNKNOWN)[1]
        return [length] * (count * len(spec.seeds))

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
        keep = self.params.prompt_sets[name].keep
        assert keep is not None
        return cost.generation(self.model, 1, self._candidates(name), 1, keep.new_tokens)

    def _attribute(self, name: str) -> Work:
        params, spec, parts = self.params, self.params.prompt_sets[name], []
        names, tokens = scores_of(params, name), self.tokens(name, "attribute", spec.attributed)
        for target, scores in by_target(names, spec.target).items():
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
        params, sweep, spec = self.params, self.params.sweep, self.params.behaviours[name]
        methods = len(swept(params.methods, spec.method))
        return self._tuned(name, methods * len(sweep.protect) * len(sweep.num_neurons))

    def _steer(self, name: str) -> Work:
        """As if each intervention had a variant for every depth; learning them costs less."""
        rows = self.params.steer.interventions.values()
        return self._tuned(name, sum(len(DEPTHS) * len(row.strengths) for row in rows))

    def _tuned(self, name: str, points: int) -> Work:
        params, sweep = self.params, self.params.sweep
        spec = params.behaviours[name]
        if not points:
            return Work()
        texts = self.tokens(params.differential.general, "tune", sweep.texts)
        parts = [cost.likelihood(self.model, 1 + points, texts, sweep.batch_tokens)]
        if params.prompt_sets[spec.prompts].blocks is None:
            parts += self._measured(name, "tune", sweep, 1 + points)
        parts += self._questions(sweep.choices, 1 + points, sweep.batch_tokens)
        return cost.together(parts)

    def _transfer(self) -> Work:
        params, transfer, parts = self.params, self.params.transfer, []
        if params.prepare.splits["test"] == 0:
            return Work()
        times = 1 + len(params.behaviours)
        for name in params.behaviours:
            parts += self._measured(name, "test", transfer, times)
        for name in transfer.texts:
            texts = self.held_out(name, transfer.items)
            parts.append(self._windows(times, texts, transfer.batch_tokens))
        return cost.together(parts)

    def _evaluate(self, name: str) -> Work:
        params, evaluate = self.params, self.params.evaluate
        behaviour, batch, parts = params.behaviours[name], evaluate.batch_tokens, []
        writes = any(instrument.writes for instrument in instruments_of(behaviour).values())
        banned = bool(evaluate.ban) and writes
        steered = params.steer.interventions
        draws = {method: len(names_of(params, method)) for method in (*params.methods, *steered)}

        def models(methods: Iterable[str], most: int | None) -> int:
            drawn = (draws[method] for method in methods)
            return 1 + banned + sum(n if most is None else min(n, most) for n in drawn)

        every = models(draws, None)
        again = models(evaluate.in_sample, evaluate.drawn) if evaluate.in_sample else 0
        written = {behaviour.method, *(evaluate.completed or ()), *steered}
        completed = models(written, evaluate.drawn)
        set_off = any(instrument.set_off for instrument in instruments_of(behaviour).values())
        first = every if set_off else models(draws, evaluate.drawn)
        for place, general in enumerate(evaluate.general):
            texts = self.held_out(general, evaluate.texts)
            joined = [sum(texts)] if evaluate.joined and not place else texts
            parts.append(self._windows(models(draws, 1) if place else first, joined, batch))
        parts += self._questions(evaluate.choices, models(draws, 1), batch)
        if banned:
            tuned = self.tokens(params.differential.general, "tune", params.sweep.texts)
            parts.append(self._windows(1 + len(evaluate.ban), tuned, batch))
        if behaviour.second:
            packed = [2 * n for n in self.tokens(behaviour.second, None)]
            parts.append(cost.likelihood(self.model, 2, packed, batch))
        blocked = params.prompt_sets[behaviour.prompts].blocks is not None
        held_out = "test" if blocked or params.prepare.splits["test"] else "attribute"
        parts += self._measured(name, held_out, evaluate, every, completed)
        if held_out == "test":
            seen = "test" if blocked else "attribute"
            parts += self._measured(name, seen, evaluate, again, again)
        return cost.together(parts)

    def _faithfulness(self, name: str) -> Work:
        """Scores, each neuron of the sample alone, and circuits of every size."""
        settings, prompt_set = self.params.faithfulness, self.params.behaviours[name].prompts
        spec, shares = self.params.prompt_sets[prompt_set], self.params.prepare.splits
        split = "test" if spec.blocks is not None or not shares["tune"] else "tune"
        tokens, parts = self.tokens(prompt_set, split, settings.prompts), []
        if not tokens or not self.params.behaviours[name].faithfulness:
            return Work()
        for target, scores in by_target(settings.scores, spec.target).items():
            prompts = [[n, n] if target == "pair" else [n] for n in tokens]
            batch = settings.batch_tokens
            parts.append(cost.attribution(self.model, prompts, [*scores.values()], target, batch))
        circuits = (3 * len(settings.scores) + 1) * len(settings.num_neurons)
        packed = [2 * n for n in tokens] if spec.target == "pair" else tokens
        times = 2 + settings.neurons + circuits
        parts.append(cost.likelihood(self.model, times, packed, settings.batch_tokens))
        return cost.together(parts)

    def _measured(
        self, name: str, split: str, of: Evaluate | Sweep | Transfer, read: int, written: int = 0
    ) -> list[Work]:
        """Of each of a behaviour's instruments, for so many models that read and that write."""
        evaluate, behaviour, parts = self.params.evaluate, self.params.behaviours[name], []
        blocked = self.params.prompt_sets[behaviour.prompts].blocks is not None
        for instrument in instruments_of(behaviour).values():
            pair = instrument.reads == "pair"
            most = of.items if pair or not isinstance(of, Evaluate) else of.prompts
            tokens = self.tokens(behaviour.prompts, split, None if blocked and written else most)
            if instrument.writes and written:
                drawn = evaluate.completions, evaluate.new_tokens
                parts.append(cost.generation(self.model, written, tokens, *drawn))
            elif not instrument.writes and (instrument.swept or written):
                packed = [2 * n for n in tokens] if pair else tokens
                parts.append(cost.likelihood(self.model, read, packed, of.batch_tokens))
        return parts

    def _questions(self, names: Iterable[str], times: int, batch_tokens: int) -> list[Work]:
        """As if a question's answers had together as many tokens as it has with one of them."""
        packed = [2 * n for name in names for n in self.tokens(name, None)]
        return [cost.likelihood(self.model, times, packed, batch_tokens)] if packed else []

    def _windows(self, times: int, texts: list[int], batch_tokens: int) -> Work:
        """Texts read through a sliding window: a token is scored once, most are read often."""
        whole = int(min(self.model.context, max([2, *texts])))
        window = self.params.evaluate.window or whole
        stride = min(self.params.evaluate.stride, window)
        spans = [s for length in texts for s in likelihood.window_spans(length, window, stride)]
        lengths, scored = [end - begin for begin, end, _ in spans], sum(texts) - len(texts)
        return cost.likelihood(self.model, times, lengths, batch_tokens, scored)

    def needs(self, stage: str, work: Work, device: Device) -> Needs:
        # Several cards share out attribution's prompts, or, with auto, taking turns, the model.
        cpu, weights, spec = device.name == "CPU", self.model.weights, self.params.model
        if not work.operations:
            light = LIGHT + work.held
            return Needs(light if cpu else 0.0, light, 0.0, 0.0)
        rate = device.rate(spec.dtype)
        reading = work.steps * weights / (device.bandwidth * 1e9)
        busy = work.passes / rate + max(work.drawn / (rate * DRAWING), reading)
        if stage.startswith("attribute") and spec.device != "auto":
            busy /= device.cards
        seconds = START + weights / LOADING + busy
        machine = PROCESS + weights + work.held  # a card's weights come through it too
        if cpu:
            machine += HEAP * work.memory
            return Needs(machine, machine, seconds, work.disk)
        card = CARD + (weights + work.memory) / (device.cards if spec.device == "auto" else 1)
        if stage.startswith(("evaluate", "prepare")):
            card += sum(SCORER.get(scorer.kind, 0) for scorer in self.params.scorers.values())
        return Needs(card, machine, seconds, work.disk)

    def in_all(self, device: Device) -> Needs:
        """What the stages need, one after the other."""
        each = (self.needs(stage, work, device) for stage, work in self.works.items())
        devices, machines, durations, disk = zip(*each, strict=True)
        return Needs(max(devices), max(machines), sum(durations), sum(disk))

    def fits(self, device: Device) -> bool:
        return self.in_all(device).device <= device.memory


def plan(params: Params, project: Params | None = None) -> Plan:
    """Of a profile, with the prompts that are prepared for `project` if they are its own."""
    exact = all(
        getattr(params, key) == getattr(project, key, None)
        for key in ("model", "prompt_sets", "test_sets", "prepare")
    ) and all(prompts_path(name).is_file() for name in sets_of(params))
    return Plan(params, cost.shape(configuration(params), params.model.dtype), exact)


def configuration(params: Params) -> PretrainedConfig:
    """config.json of model.path; where that is still to be fetched, the one that profiles/configs
    has for a folder of its name, or the hub's. InputError, with the key: none.
    """
    path, revision, fetch = params.model.path, None, params.fetch
    if not Path(path).is_dir():
        kept = CONFIGS / f"{Path(path).name.partition('@')[0]}.json"
        if kept.is_file():
            path = str(kept)
        elif hub := hub_of(path):
            path, revision = hub
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
            f"params: model.path: no config.json of {path} ({first_line(error)}); put the model's "
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
    model = planned.params.model
    batched = {name: getattr(planned.params, name) for name in BATCHED}
    half = replace(model, dtype="bfloat16" if device.bfloat16 else "float16")
    auto = planned.changed(model=replace(model, device="auto"))

    def smaller(tokens: int) -> Plan:
        return planned.changed(
            **{n: replace(s, batch_tokens=min(tokens, s.batch_tokens)) for n, s in batched.items()}
        )

    powers = (2**n for n in reversed(range(6, batched["attribute"].batch_tokens.bit_length())))
    kinds = [((f"batch_tokens: {n} in {', '.join(BATCHED)}", smaller(n), device) for n in powers)]
    if model.dtype == "float32":
        kinds.append((f"model.dtype: {m.dtype}", planned.changed(model=m), device) for m in [half])
    if device.name != "CPU":
        several = [device._replace(cards=cards) for cards in range(2, MOST_CARDS + 1)]
        others = [card._replace(cards=device.cards) for card in CARDS]
        kinds.append((f"model.device: auto over {each}", auto, each) for each in several)
        kinds.append((f"a larger device: {each}", planned, each) for each in others)
    enough = ((name for name, changed, at in kind if changed.fits(at)) for kind in kinds)
    return [name for names in enough for name in islice(names, 1)]


def describe(planned: Plan, devices: Sequence[Device]) -> list[str]:
    """Lines of text: each stage on the first device, and all of them on each."""
    first, model, spec = devices[0], planned.model, planned.params.model
    whole = planned.in_all(first)
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
        f"\nscores on disk: {whole.disk / 1e9:.2f} GB; memory of the machine for each process: "
        f"{whole.machine / 1e9:.1f} GB\n",
        *_columns(totals),
    ]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) for row in rows]


def _clock(duration: float) -> str:
    minutes = round(duration / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{max(1, minutes)} min"


def _time(needed: Needs, device: Device) -> str:
    return _clock(needed.seconds) if needed.device <= device.memory else "does not fit"


def costs(profiles: Sequence[Path]) -> list[list[str]]:
    """A header, and a row for every device: GB and time that each profile needs on one, on two."""
    devices = [card._replace(cards=cards) for card in CARDS for cards in (1, 2)]
    rows = [["device"], *([str(device)] for device in devices), ["scores on disk"]]
    for profile in profiles:
        planned = plan(checks.load(profile, checks.PARAMS))
        rows[0] += [f"{profile.stem}: GB a card", f"{profile.stem}: time"]
        needed = [planned.in_all(device) for device in devices]
        for row, device, needs in zip(rows[1:-1], devices, needed, strict=True):
            row += [f"{needs.device / 1e9:.0f}", _time(needs, device)]
        rows[-1] += [f"{needed[0].disk / 1e9:.1f}", ""]
    return rows


def named(key: str, name: str, cards: int) -> Device:
    """So many of a device of the table; InputError, with the key that names it, for another."""
    table = {device.name: device for device in (CPU, *CARDS)}
    if name not in table:
        raise InputError(f"{key} {name!r} is not known; choose one of {', '.join(table)}")
    return table[name]._replace(cards=cards)


def here(params: Params) -> Device:
    """The device of this machine that params name. InputError: there is none."""
    if params.model.device == "cpu":
        return CPU
    if not torch.cuda.is_available():
        problem = f"model.device is {params.model.device}, and no card is here"
        raise InputError(f"{problem}; set it to cpu, or run where there is one")
    card = torch.cuda.get_device_properties(0)
    cards = torch.cuda.device_count() if params.model.device == "auto" else 1
    size = card.total_memory / 2**30
    return CARDS[-1]._replace(name=card.name, gibibytes=size, cards=cards)


def of_stage(params: Params, job: str, name: str, cards: int) -> Needs:
    """What the stage `job` (attribute@general, prepare, ...) needs on so many devices of that name;
    InputError: an unknown device, or a stage that does not fit.
    """
    device = named("params: cluster.device", name, cards)
    planned = replace(plan(params, project=params), job=job)
    refuse(planned, device)
    return planned.in_all(device)


def run(project: Params, profile: Path | None, device: str | None, cards: int) -> None:
    """Print the plan of a profile (or of the project's own params) for a device: by default for
    this machine, or every card of the table. InputError: the run cannot fit, with what would.
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
