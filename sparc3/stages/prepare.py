"""Prepare: every prompt set of params, as outputs/prompts/SET.jsonl."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sparc3.base.artifacts import OUTPUTS, metrics_path, prompts_path
from sparc3.base.errors import InputError
from sparc3.base.files import digest, write_json, write_jsonl
from sparc3.base.params import Keep, Model, Params, PromptSet, scores_of, sets_of
from sparc3.model.checkpoint import front, here, language_model, reading, require_vocabulary
from sparc3.model.families import context
from sparc3.prompts.sampling import Prompt, as_row, prompt_set
from sparc3.prompts.sources import CHOICES
from sparc3.stages.fetch import check_data

log = logging.getLogger(__name__)
WANTED, TESTED = OUTPUTS / "wanted", OUTPUTS / "test-sets.json"


def load_tokenizer(spec: Model) -> tuple[Tokenizer, float]:
    """The model's tokenizer and the tokens of a text that it reads whole, which are fewer than its
    context by those that stand in front; without torch if they are at hand.
    """
    folder = Path(here(spec.path))
    config = language_model("model.path", spec.path)
    if (folder / "tokenizer.json").is_file():
        with reading("model.path", spec.path):
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        require_vocabulary("model.path", spec.path, tokenizer, config)
    else:  # in an older format that transformers converts
        from sparc3.model import loading

        tokenizer = getattr(loading.tokenizer(spec), "backend_tokenizer", None)
        if not isinstance(tokenizer, Tokenizer):
            raise InputError(
                f"params: model.path: {folder} has no tokenizer.json and no tokenizer that "
                "converts to one; choose another model"
            )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, context(config) - len(front(tokenizer))


def check_context(key: str, spec: PromptSet, prompts: Sequence[Prompt], longest: float) -> None:
    """InputError for a prompt that the model cannot read whole, or can score nothing of."""
    for prompt in prompts:
        shown = "" if spec.private else f" ({prompt.text[:40]!r})"
        named = prompt.row.place or f"params: {key}: prompt {prompt.id}{shown}"
        about = f"{named} has {prompt.tokens} token"
        if prompt.tokens > longest:
            raise InputError(
                f"{about}s, the model's context {longest} after what it puts in front; set "
                "max_tokens"
            )
        if prompt.tokens < 2 and spec.target == "likelihood":
            raise InputError(f"{about}, and the target likelihood needs 2; set min_tokens")


def describe(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Prompts, groups and mean tokens of each split that has prompts."""
    described = {}
    for split in sorted({row["split"] for row in rows}):
        there = [row for row in rows if row["split"] == split]
        described[split] = {
            "prompts": len(there),
            "groups": len({row["group"] for row in there}),
            "mean_tokens": sum(row["tokens"] for row in there) / len(there),
        }
    return described


def elicited(
    params: Params, name: str, keep: Keep, rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The second pass of a set, for which the model and a scorer are loaded."""
    from sparc3.measure.scorers import scorer  # here: a set without a second pass needs no torch
    from sparc3.model import loading
    from sparc3.prompts.second_pass import keep_highest

    model, tokenizer = loading.load(params.model), loading.tokenizer(params.model)
    score = scorer(params.scorers[keep.scorer], params.model.device)
    return keep_highest(model, tokenizer, rows, keep, score, name)


def run(params: Params) -> dict[str, float]:
    """Write outputs/prompts/SET.jsonl for every prompt set, and no other file there; all of a set
    that is only tested on is of the split `test`. InputError: data/ is not what is pinned (`dvc
    repro` does not see that, but pins it anew).

    Beside them, for DVC to compare: the scores that are wanted of each set, which params.methods,
    params.gate, params.differential and params.attribute decide, and the digests of the test sets.
    """
    check_data()
    tokenizer, longest = load_tokenizer(params.model)
    made: dict[str, list[Prompt]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    specs = sets_of(params)
    for name in sorted(specs, key=lambda name: specs[name][1].match_length is not None):
        key, spec = specs[name]
        like = made[spec.match_length] if spec.match_length else None
        made[name] = prompt_set(key, spec, params.prepare.splits, tokenizer, like)
        whole = spec.target == "pair" or spec.source in CHOICES
        if name in params.prompt_sets or whole:  # other texts go through windows
            check_context(key, spec, made[name], longest)
        split = "test" if name in params.test_sets else None
        rows[name] = [as_row(prompt, split) for prompt in made[name]]
    for name, (_, spec) in specs.items():
        if spec.keep is not None:
            rows[name] = elicited(params, name, spec.keep, rows[name])
    for path in (*prompts_path("any").parent.glob("*.jsonl"), *WANTED.glob("*.json")):
        if path.stem not in made:
            path.unlink()
    for name, lines in rows.items():
        write_jsonl(prompts_path(name), lines)
    for name in params.prompt_sets:
        write_json(WANTED / f"{name}.json", scores_of(params, name))
    write_json(TESTED, {name: digest(prompts_path(name)) for name in params.test_sets})
    counts = ", ".join(f"{len(lines)} {name}" for name, lines in rows.items())
    log.info("prepare: %d prompts: %s", sum(map(len, rows.values())), counts)
    metrics = {name: describe(lines) for name, lines in rows.items()}
    write_json(metrics_path("prepare"), metrics)
    return {
        f"{name}.{split}.{key}": float(value)
        for name, splits in metrics.items()
        for split, values in splits.items()
        for key, value in values.items()
    }
