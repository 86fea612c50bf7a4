"""Init: a profile for one's own model and prompts, with choices that the model decides."""

import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import yaml

from sparc3.base.errors import InputError
from sparc3.base.files import write_text
from sparc3.base.params import Columns, Params, PromptSet, Tree, parse, read
from sparc3.base.profiles import FOLDER, merged
from sparc3.commands import plan, use
from sparc3.measure.inference import MIN_CLUSTERS
from sparc3.model.checkpoint import language_model, require_whole
from sparc3.model.families import context, neurons
from sparc3.model.loading import DTYPES
from sparc3.prompts import own
from sparc3.prompts.sampling import prompt_set
from sparc3.stages import checks
from sparc3.stages.fetch import commit_of
from sparc3.stages.prepare import check_context, load_tokenizer

NEURONS = 46_080  # of the model that the default's sizes of circuits are for
BATCHES = [2**n for n in range(12, 6, -1)]  # tokens at once
Sections = dict[str, tuple[str, Tree]]  # of a profile: what is said of it, and its changes


def run(
    name: str,
    model: str,
    prompts: Path,
    reference: Path,
    text: str,
    group: str | None,
    private: bool,
) -> None:
    """Write profiles/NAME.yaml, copy the files below prompts/, make the profile params.yaml, and
    print what it costs. InputError: what does not fit together; then there is no profile.
    """
    profile, base = FOLDER / f"{name}.yaml", read(checks.PARAMS)
    if not checks.NAME.fullmatch(name) or profile.exists():
        problem = "is there already; remove it, or" if profile.exists() else "is no plain name;"
        raise InputError(f"{profile} {problem} choose another NAME of letters, digits, - and _")
    if base.get("profile") is not None:
        problem = f"{checks.PARAMS} holds profile {base['profile']}"
        raise InputError(f"{problem}; get the default back first: git checkout {checks.PARAMS}")
    files = {"prompts": prompts, "reference": reference}
    columns = {"text": text, **({"group": group} if group else {})}
    sets = {role: prompts_of(name, role, file, columns, private) for role, file in files.items()}
    sections = choices(base, name, found_model(model), sets)
    copied = [target for role, file in files.items() for target in copy(file, sets[role]["source"])]
    given = ["--model", model, "--prompts", str(prompts), "--reference", str(reference)]
    given += [part for key, value in columns.items() for part in (f"--{key}", value)]
    command = shlex.join(["init", name, *given, *(["--private"] if private else [])])
    write_text(profile, written(command, sections))
    try:
        check_files(checks.load(profile, checks.PARAMS), name)
        use.run(profile)
    except InputError:
        profile.unlink()
        for target in copied:
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        raise
    plan.run(checks.load(), None, None, 1)
    print(
        f"\n{profile} is the current profile; its comments say why. Run it: make repro\n"
        f"Back to the default: git checkout {checks.PARAMS}"
    )


def found_model(model: str) -> str:
    """model.path for a folder, or for owner/name@revision of the hub, whose commit is looked up."""
    if Path(model).is_dir():
        language_model("--model", model)
        require_whole("--model", model)
        path, here = Path(model).resolve(), Path.cwd()
        return path.relative_to(here).as_posix() if path.is_relative_to(here) else str(path)
    repository, _, revision = model.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise InputError(f"--model {model}: no folder; name one, or owner/name@revision of the hub")
    return f"models/{repository}@{commit_of(repository, revision or None)}"


def prompts_of(
    name: str, role: str, file: Path, columns: dict[str, str], private: bool
) -> dict[str, Any]:
    """The row of a prompt set, whose file is checked and will lie below prompts/."""
    named = Columns(text=columns["text"], group=columns.get("group"))
    rows = own.rows(PromptSet(str(file), None, columns=named))
    inside = any(file.resolve().is_relative_to(place.resolve()) for place in own.PLACES)
    place = file if inside else own.HOME / name / f"{role}{file.suffix}"
    found = {"source": str(place), "columns": {**columns}, "count": len(rows)}
    return {**found, "target": "likelihood", **({"private": True} if private else {})}


def copy(file: Path, source: str) -> list[Path]:
    """Put a file where its set looks for it; what is new there."""
    target = Path(source)
    if file.resolve() == target.resolve():
        return []
    new = [] if target.exists() else [target]
    target.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir():
        shutil.copytree(file, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(file, target)
    return new


def choices(base: Tree, name: str, path: str, sets: Mapping[str, Tree]) -> Sections:
    """What the profile changes, section by section."""
    device = "auto" if torch.cuda.is_available() else "cpu"
    shape = {"path": path, "dtype": "float32", "device": device}
    params = parse({**base, "model": shape, "fetch": {"model": None}})
    config = plan.configuration(params).to_dict()
    longest, total = int(min(context(config), 10**9)), prod(neurons(config))
    kept = {base["differential"]["general"], *base["evaluate"]["general"]}
    kept |= {*base["transfer"]["texts"]}
    sizes, together = (
        [
            max(place, round(size * total / NEURONS))
            for place, size in enumerate(base[section]["num_neurons"], start=1)
        ]
        for section in ("sweep", "faithfulness")
    )
    overlap = max(1, round(base["overlap"]["num_neurons"] * total / NEURONS))
    behaviour = {
        "prompts": name,
        "reference": f"{name}-reference",
        "method": "gradient",
        "instruments": ["nll", "completions"],
        "scorers": ["profanity"],
        "on_fail": "warn",
    }
    changes: Tree = {
        "model": shape,
        "fetch": {"model": None},
        "prompt_sets": {
            **_others(base["prompt_sets"], kept, longest),
            name: sets["prompts"],
            f"{name}-reference": sets["reference"],
        },
        "test_sets": _others(base["test_sets"], kept, longest),
        "sealed_sets": dict.fromkeys(base["sealed_sets"]),
        "behaviours": {**dict.fromkeys(base["behaviours"]), name: behaviour},
        "gate": {"score": "gradient"},
        "sweep": {"num_neurons": sizes},
        "overlap": {"method": "gradient", "num_neurons": overlap},
        "faithfulness": {"num_neurons": together},
        "report": {"method": "gradient"},
        "evaluate": {
            "window": None,
            "new_tokens": min(base["evaluate"]["new_tokens"], longest // 4),
            "completed": None,
            "in_sample": ["gradient"],
        },
    }
    dtype, batches = fitting(parse(merged(base, changes)), config)
    shape["dtype"] = dtype
    for section, tokens in batches.items():
        changes.setdefault(section, {})["batch_tokens"] = tokens
    return {section: (said(section, total, device), each) for section, each in changes.items()}


def _others(rows: Tree, kept: set[str], longest: int) -> Tree:
    """The default's sets: null for one that is not read; shorter texts for a short context."""
    changes: Tree = {}
    for name, row in rows.items():
        if name not in kept:
            changes[name] = None
        elif row.get("max_tokens") and row["max_tokens"] > longest // 2:
            least = min(row.get("min_tokens", 1), longest // 2)
            changes[name] = {**row, "min_tokens": least, "max_tokens": longest // 2}
    return changes


def fitting(params: Params, config: Mapping[str, Any]) -> tuple[str, dict[str, int]]:
    """dtype, and tokens at once by section: the widest and most that the plan fits on the device,
    at most the default's. On a card the dtype is the model's own, elsewhere float32 if it fits.
    """
    device, planned = plan.here(params), plan.plan(params)
    given = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    first = "float32" if device.name == "CPU" or given not in DTYPES else given
    sections = {name: getattr(params, name) for name in plan.BATCHED}
    batches: dict[str, int] = {}
    for dtype in dict.fromkeys((first, "bfloat16")):
        for most in BATCHES:
            batches = {name: min(most, each.batch_tokens) for name, each in sections.items()}
            rows = {n: replace(each, batch_tokens=batches[n]) for n, each in sections.items()}
            if planned.changed(model=replace(params.model, dtype=dtype), **rows).fits(device):
                return dtype, batches
    return "bfloat16", batches


def said(section: str, total: int, device: str) -> str:
    """Why a section of the profile is as it is."""
    return {
        "model": f"Its device here is {device}; float32 where that fits, else bfloat16.",
        "fetch": "Nothing embedded is fetched; models/OWNER/NAME@COMMIT comes from the hub.",
        "prompt_sets": "Your two files; null takes away a set of the default that is not read.",
        "behaviours": (
            "gradient needs no LRP, whose licence is narrow (docs/lxt.md). profanity is a\n"
            "# stand-in: name a scorer that knows your behaviour."
        ),
        "sweep": f"Sizes of circuits: the default's shares of the model's {total:,} neurons.",
        "overlap": "The same share.",
        "faithfulness": "Likewise, where a behaviour asks for it.",
        "evaluate": "window null: the model's context. completed null: every method but controls.",
        "attribute": "Tokens at once: as many as fit, at most the default's.",
    }.get(section, "")


def written(command: str, sections: Sections) -> str:
    """The profile's text."""
    parts = [f"# Your own model and prompts, by: python -m sparc3 {command}\n"]
    for section, (why, changes) in sections.items():
        if changes:
            body = yaml.safe_dump({section: changes}, sort_keys=False, default_flow_style=None)
            parts.append("\n" + (f"# {why}\n" if why else "") + body)
    return "".join(parts)


def check_files(params: Params, name: str) -> None:
    """InputError: too few groups for an interval, or, of a model that is there, a row that is too
    long.
    """
    if not Path(params.model.path).is_dir():
        return  # of the hub, and fetched later
    tokenizer, longest = load_tokenizer(params.model)
    for key in (name, f"{name}-reference"):
        spec = params.prompt_sets[key]
        prompts = prompt_set(f"prompt_sets.{key}", spec, params.prepare.splits, tokenizer)
        check_context(f"prompt_sets.{key}", spec, prompts, longest)
        for split in ("attribute", "test"):
            groups = len({prompt.row.group for prompt in prompts if prompt.split == split})
            if groups < MIN_CLUSTERS:
                raise InputError(
                    f"{spec.source} has {groups} groups for the {split} split, at least "
                    f"{MIN_CLUSTERS} are needed for an interval; add prompts"
                )
