"""What prompts and the model's config.json decide beyond params, checked before the first stage
that costs anything: each problem is one that a later stage would stop at, hours after.
"""

from tokenizers import Tokenizer

from sparc3.base.artifacts import read_prompts
from sparc3.base.params import Params, sets_of
from sparc3.measure import inference, scorers
from sparc3.measure.instruments import instruments_of
from sparc3.model.checkpoint import front, language_model
from sparc3.model.families import context, neurons
from sparc3.prompts.sources import SOURCES
from sparc3.stages import transfer
from sparc3.stages.checks import Problems, refuse
from sparc3.stages.evaluate import (
    Rows,
    check_groups,
    choices_rows,
    flat,
    general_rows,
    rows_of,
)
from sparc3.stages.faithfulness import held_out
from sparc3.stages.prepare import load_tokenizer

FEWEST = inference.MIN_CLUSTERS


def check(params: Params) -> None:
    """InputError for the first thing that could not be measured."""
    config = language_model("model.path", params.model.path)
    tokenizer, longest = load_tokenizer(params.model)
    refuse(check_context(params, longest))
    refuse(check_neurons(params, neurons(config)))
    refuse(check_faithfulness(params, *neurons(config)))
    for behaviour in params.behaviours:
        check_groups(params, behaviour, rows_of(params, behaviour))
    refuse(check_intervals(params))
    refuse(check_ahead(params, tokenizer, context(config)))
    refuse(check_lengths(params, tokenizer, context(config)))
    refuse(check_common(params))
    refuse(check_chosen(params))
    used = {name for spec in params.behaviours.values() for name in spec.scorers}
    for name in sorted(used):
        scorers.describe(params.scorers[name])


def check_context(params: Params, longest: float) -> Problems:
    """Windows and completions against the model's context, less what stands in front of a text."""
    window, new = params.evaluate.window, params.evaluate.new_tokens
    if window is not None and window > longest:
        yield (
            f"evaluate.window is {window}; expected at most {longest}, the model's context, or "
            "null, which takes that"
        )
    if new >= longest:
        yield f"evaluate.new_tokens is {new}; expected less than {longest}, the model's context"


def check_neurons(params: Params, shape: tuple[int, int]) -> Problems:
    """Sizes of circuits against the neurons that protection leaves; `shape`: layers, width."""
    total, select, sweep = shape[0] * shape[1], params.select, params.sweep
    shares = sweep.protect if select.protect is None else (select.protect,)
    sizes, key = (select.num_neurons,), "select.num_neurons"
    if select.num_neurons is None:
        sizes, key = sweep.num_neurons, "sweep.num_neurons"
    asked = {
        key: (max(n for n in sizes if n is not None), max(shares)),
        "overlap.num_neurons": (params.overlap.num_neurons, params.overlap.protect),
    }
    for name, (most, share) in asked.items():
        left = total - round(share * total)
        if most > left:
            yield (
                f"{name} asks for {most}; expected at most {left}, what protection leaves of the "
                f"model's {total:,} neurons"
            )


def check_faithfulness(params: Params, layers: int, width: int) -> Problems:
    """Its sizes against the model's neurons, and what intervals need: neurons of each third of
    depth, of which a sample has as many of every layer, and prompts.
    """
    given = params.faithfulness
    asked = {name: row.prompts for name, row in params.behaviours.items() if row.faithfulness}
    if not asked:
        return
    key, most = "faithfulness.num_neurons", max(given.num_neurons)
    if most > layers * width:
        yield f"{key} asks for {most}; expected at most {layers * width:,}, the model's neurons"
    least = layers * -(-FEWEST // max(1, layers // 3))
    if given.neurons < least:
        yield (
            f"faithfulness.neurons is {given.neurons}; expected at least {least}: {FEWEST} of each "
            f"third of the model's {layers} layers are needed for an interval"
        )
    for prompts in asked.values():
        remedy = f"raise faithfulness.prompts, or prompt_sets.{prompts}.count"
        if rows := held_out(params, prompts):
            few = "for faithfulness", remedy, "prompts", len(rows)
            yield from _few(f"prompt_sets.{prompts}", rows, *few)


def check_intervals(params: Params) -> Problems:
    """Groups of prompts, and texts, against what an interval needs, stage by stage."""
    behaviours, texts = params.behaviours, general_rows(params)
    for name in dict.fromkeys(n for b in behaviours.values() for n in (b.prompts, b.reference)):
        spec = params.prompt_sets[name]
        rows = read_prompts(name, "attribute")[: spec.attributed][: params.gate.prompts]
        remedy = f"raise gate.prompts, prompt_sets.{name}.count or the share of attribute"
        yield from _few(f"prompt_sets.{name}", rows, "to attribute", remedy)
        if spec.blocks is None and any(b.prompts == name for b in behaviours.values()):
            read_prompts(name, "tune" if params.prepare.splits["tune"] else "attribute")
    for name, there in texts.items():
        key = sets_of(params)[name][0]
        remedy = f"raise evaluate.texts, or {key}.count"
        yield from _few(key, there, "to read", remedy, "texts", len(there))
    for key in ("evaluate", "sweep"):
        for name in getattr(params, key).choices:
            remedy = f"raise test_sets.{name}.count"
            yield from _few(f"test_sets.{name}", read_prompts(name, None), "to ask", remedy)
    if params.prepare.splits["tune"]:
        tuned = read_prompts(params.differential.general, "tune")[: params.sweep.texts]
        if len({row["group"] for row in tuned}) < 2:
            yield f"prompt_sets.{params.differential.general}: the sweep needs 2 texts; raise count"
    if params.prepare.splits["test"]:
        tested, general = transfer.read_rows(params)
        remedy = "raise transfer.items, or its count"
        for name, by_block in tested.items():
            key = f"behaviours.{name}.prompts"
            yield from _few(key, flat(by_block), "for transfer", remedy)
        for name, there in general.items():
            key = sets_of(params)[name][0]
            yield from _few(key, there, "for transfer", remedy, "texts", len(there))


def _few(
    key: str, rows: Rows, why: str, remedy: str, what: str = "groups", count: int | None = None
) -> Problems:
    there = len({row["group"] for row in rows}) if count is None else count
    if there < FEWEST:
        needed = f"at least {FEWEST} are needed for an interval"
        yield f"{key} has {there} {what} {why}, {needed}; {remedy}"


def most_ahead(params: Params, tokenizer: Tokenizer) -> int:
    """Tokens of the longest text that an intervention puts in front of every other."""
    texts = [row.text for row in params.steer.interventions.values() if row.text is not None]
    return max((len(tokenizer.encode(t, add_special_tokens=False).ids) for t in texts), default=0)


def check_ahead(params: Params, tokenizer: Tokenizer, longest: float) -> Problems:
    """Texts that interventions put in front, and the windows of general text behind them."""
    for name, row in params.steer.interventions.items():
        if row.text is not None and not tokenizer.encode(row.text, add_special_tokens=False).ids:
            yield f"steer.interventions.{name}.text has no token; write words that are put in front"
    ahead, window = most_ahead(params, tokenizer), params.evaluate.window
    if ahead and window is None:
        texts = (row["tokens"] for there in general_rows(params).values() for row in there)
        window = min(longest, max(texts) + len(front(tokenizer)))
    if ahead and window is not None and window > longest - ahead:
        yield (
            f"evaluate.window: general text is read {window:.0f} tokens at a time, and steer puts "
            f"{ahead} in front; expected at most {longest:.0f} together, the model's context"
        )


def check_lengths(params: Params, tokenizer: Tokenizer, longest: float) -> Problems:
    """Prompts that leave no room for completions, or of which nothing can be scored. A pair's
    sentences have a token in front in any case.
    """
    ahead = most_ahead(params, tokenizer)
    longest, said = longest - ahead, f", less the prompt of steer, {ahead}" if ahead else ""
    before, evaluate = len(front(tokenizer)), params.evaluate
    for behaviour, spec in params.behaviours.items():
        kinds = instruments_of(spec).values()
        key, rows = f"prompt_sets.{spec.prompts}", rows_of(params, behaviour)
        for row in (row for by_block in rows.values() for row in flat(by_block)):
            ids = tokenizer.encode(row["text"], add_special_tokens=False).ids
            about = f"{key}: prompt {row['id']} has {len(ids) + before} tokens, expected at"
            limit = longest - evaluate.new_tokens
            if any(each.writes for each in kinds) and len(ids) + before > limit:
                yield (
                    f"{about} most {limit}: the model's context less evaluate.new_tokens{said}; "
                    "set max_tokens, or lower new_tokens"
                )
            scored = any(each.reads == "text" and not each.writes for each in kinds)
            if scored and len(ids) + before < 2:
                yield f"{about} least 2; set min_tokens"
    for name, (key, _) in sets_of(params).items():
        for row in read_prompts(name, None):
            whole = "pair" in row or "choices" in row
            if whole and row["tokens"] + max(1, before) > longest:
                yield (
                    f"{key}: prompt {row['id']} has a sentence of {row['tokens']} tokens, expected "
                    f"at most {longest - max(1, before)}{said}; leave it out"
                )
    for name, there in general_rows(params).items():
        for row in there:
            if row["tokens"] + before < 2:
                yield f"{sets_of(params)[name][0]}: text {row['id']} has 1 token; set min_tokens"


def check_common(params: Params) -> Problems:
    """Groups, or texts, that own files share and that lie in different splits: what a circuit is
    chosen on would be what it is tested on.
    """
    homes: dict[str, tuple[str, str]] = {}
    for name, (key, spec) in sets_of(params).items():
        for row in read_prompts(name, None) if spec.source not in SOURCES else ():
            other, split = homes.setdefault(row["group"], (key, row["split"]))
            if split != row["split"]:
                yield (
                    f"{other} and {key} have a group, or a text, in common that is of {split} in "
                    f"one and of {row['split']} in the other; give both files the same groups, or "
                    "both a column for split"
                )


def check_chosen(params: Params) -> Problems:
    """What circuits are chosen on against what they are tested on, beyond what splits keep apart;
    and a behaviour's prompts against its reference.
    """
    tested = {**general_rows(params), **choices_rows(params)}
    for name in params.sweep.choices:
        groups = {row["group"] for row in read_prompts(name, None)}
        for other, there in tested.items():
            if groups & {row["group"] for row in there}:
                yield (
                    f"sweep.choices {name!r} and {other!r}, which evaluate reads, have texts in "
                    "common: circuits would be chosen on what they are tested on; take others"
                )
    for name, row in params.behaviours.items():
        one, other = (
            {each["text"] for each in read_prompts(prompts, "attribute")}
            for prompts in (row.prompts, row.reference)
        )
        if one == other:
            yield (
                f"behaviours.{name}: prompts and reference are the same texts, between which "
                "nothing differs; give another reference"
            )
