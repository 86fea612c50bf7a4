"""Prompt sets: rows of the sources, narrowed, split by group, sampled, cut, written as JSONL.

Leak-free by construction: a group (an article, a target term, four occupations, a text) lies in one
split only, the same one in every prompt set, because its split depends on the source's groups and
the shares alone. Everything is ordered by hashes, so that the same params give the same files.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from sparc3.base.errors import InputError
from sparc3.base.files import digest_text
from sparc3.base.params import PromptSet, shares_of
from sparc3.prompts import sources
from sparc3.prompts.row import Row


class Prompt(NamedTuple):
    """A chosen row, with the text as it will be used and the tokens of its longest sequence."""

    row: Row
    text: str
    tokens: int
    split: str
    seed: int

    @property
    def id(self) -> str:
        return identity(self.row, self.text)


class Limits(NamedTuple):
    """The tokens that a text must have at least, and those it is cut to (None: it is not cut)."""

    least: int
    most: int | None


def identity(row: Row, text: str) -> str:
    """16 hexadecimal characters of the sha256 of the text, a pair's two lines, or a question's and
    its answers'.
    """
    return digest_text("\n".join(row.pair or (text, *row.choices)))[:16]


def largest_remainder(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers of this sum, less than 1 away from their shares; ties go to the earlier key."""
    whole = sum(weights.values())
    exact = {key: total * weight / whole for key, weight in weights.items()}
    counts = {key: int(value) for key, value in exact.items()}
    by_remainder = sorted(exact, key=lambda key: counts[key] - exact[key])
    for key in by_remainder[: total - sum(counts.values())]:
        counts[key] += 1
    return counts


def split_of_groups(groups: Iterable[str], shares: Mapping[str, float]) -> dict[str, str]:
    """Group -> split: the groups in the order of their hashes, cut by the shares, at least one for
    each split of a positive share. ValueError: there are fewer groups than such splits.
    """
    ordered = sorted(set(groups), key=digest_text)
    wanted = [split for split, share in shares.items() if share > 0]
    if len(ordered) < len(wanted):
        raise ValueError(f"{len(ordered)} groups, at least {len(wanted)} needed")
    counts = largest_remainder(len(ordered), shares)
    for split in wanted:
        if counts[split] == 0:
            counts[max(counts, key=lambda key: counts[key])] -= 1
            counts[split] = 1
    splits = [split for split, count in counts.items() for _ in range(count)]
    return dict(zip(ordered, splits, strict=True))


def split_of_one(group: str, shares: Mapping[str, float]) -> str:
    """The split of a group of a stream, whose other groups are not known: its hash as a number."""
    wanted = [split for split, share in shares.items() if share > 0]
    position = int(digest_text(group), 16) / 16**64
    edges = np.cumsum([shares[split] for split in wanted])[:-1]
    return wanted[int(np.searchsorted(edges, position, side="right"))]


def fit(tokenizer: Tokenizer, row: Row, limits: Limits, split: str, seed: int) -> Prompt | None:
    """The row as a prompt, its text cut at a token; tokens are counted without special ones.

    None if it is too short, or if the beginning of its text, alone, would be tokenised otherwise
    than within the text. A pair is never cut, and as long as its longest sentence; nor a question,
    as long as with its longest answer.
    """
    if row.pair or row.choices:
        sentences = [row.text, *(row.pair or ()), *([row.unrelated] if row.unrelated else [])]
        sentences += [f"{row.text} {choice}" for choice in row.choices]
        encoded = tokenizer.encode_batch(sentences, add_special_tokens=False)
        tokens = max(len(encoding.ids) for encoding in encoded)
        return Prompt(row, row.text, tokens, split, seed) if tokens >= limits.least else None
    encoding = tokenizer.encode(row.text, add_special_tokens=False)
    tokens = len(encoding.ids)
    if tokens < limits.least:
        return None
    if limits.most is None or tokens <= limits.most:
        return Prompt(row, row.text, tokens, split, seed)
    text = row.text[: encoding.offsets[limits.most - 1][1]]
    again = tokenizer.encode(text, add_special_tokens=False).ids
    same = again == encoding.ids[: limits.most]
    return Prompt(row, text, limits.most, split, seed) if same else None


def interleave(counts: Mapping[str, int]) -> list[str]:
    """Each key as often as counted; the n-th of a key's N stands at (n + 1/2) / N of the way."""
    places = [((n + 0.5) / count, key) for key, count in counts.items() for n in range(count)]
    return [key for _, key in sorted(places, key=lambda place: place[0])]


def order(key: str, seed: int, identifier: str) -> str:
    """Sorting key: the order in which a seed of a set draws, whichever section the set is in."""
    return digest_text(f"{key.partition('.')[2]}/{seed}/{identifier}")


def limits_like(
    key: str, seed: int, prompts: Sequence[Prompt], split: str, number: int
) -> list[Limits]:
    """Limits that match the lengths of a split's prompts, all in turn, in an order of the seed's.

    A text must be as long as the longest prompt before it is cut, so that which texts are chosen
    does not depend on that. InputError if the split has no prompt.
    """
    lengths = [
        prompt.tokens
        for prompt in sorted(prompts, key=lambda prompt: order(key, seed, prompt.id))
        if prompt.split == split
    ]
    if number and not lengths:
        problem = f"names a set without prompts in the {split} split"
        raise InputError(f"params: {key}.match_length {problem}; raise its count")
    longest = max(prompt.tokens for prompt in prompts)
    return [Limits(longest, lengths[n % len(lengths)]) for n in range(number)]


def draw(
    key: str,
    spec: PromptSet,
    rows: Sequence[Row],
    split_of: Mapping[str, str],
    tokenizer: Tokenizer,
    like: Sequence[Prompt] | None = None,
) -> list[Prompt]:
    """`count` prompts for each seed, in the proportions that the splits have, no text twice.

    A seed's prompts are the first that fit, in the order of `order`, of those that earlier seeds
    have left; none has the text of a prompt in another split. Texts are cut to the lengths of the
    prompts `like` if those are given, split by split. InputError, naming the set: too few of them.
    """
    assert spec.count is not None  # else the caller takes every row
    asked = spec.count * len(spec.seeds)
    if len(rows) < asked:
        raise InputError(
            f"params: {key} asks for {len(spec.seeds)} x {spec.count} = {asked} prompts, there are "
            f"{len(rows)}; lower count or ask less of where"
        )
    by_split: dict[str, list[Row]] = {split: [] for split in split_of.values()}
    for row in rows:
        by_split[split_of[row.group]].append(row)
    slots = interleave(largest_remainder(asked, {k: len(v) for k, v in by_split.items()}))
    prompts: list[Prompt] = []
    used: set[str] = set()
    home: dict[str, str] = {}
    for number, seed in enumerate(spec.seeds):
        quotas = Counter(slots[number * spec.count : (number + 1) * spec.count])
        for split, pool in by_split.items():
            limits = [Limits(spec.min_tokens or 1, spec.max_tokens)] * quotas[split]
            if like is not None:
                limits = limits_like(key, seed, like, split, quotas[split])
            chosen = 0
            for row in sorted(pool, key=lambda row: order(key, seed, identity(row, row.text))):
                if chosen == len(limits):
                    break
                if home.get(row.text, split) != split:
                    continue  # two groups share the text that a pair begins with
                prompt = fit(tokenizer, row, limits[chosen], split, seed)
                if prompt is not None and prompt.id not in used:
                    used.add(prompt.id)
                    home[row.text] = split
                    prompts.append(prompt)
                    chosen += 1
            if chosen < len(limits):
                raise InputError(
                    f"params: {key} asks for {len(limits)} prompts in the {split} split of seed "
                    f"{seed}, {chosen} that are long enough are left; lower count or min_tokens"
                )
    return prompts


def draw_stream(
    key: str, spec: PromptSet, shares: Mapping[str, float], tokenizer: Tokenizer
) -> list[Prompt]:
    """As `draw`, out of a source that is read row by row until each split has enough prompts."""
    assert spec.count is not None  # stages.checks refuses to take all of a stream
    quotas = largest_remainder(spec.count, shares)
    limits = Limits(spec.min_tokens or 1, spec.max_tokens)
    prompts: list[Prompt] = []
    used: set[str] = set()
    for seed in spec.seeds:
        missing = dict(quotas)
        with tqdm(total=spec.count, desc=f"prepare {key}, seed {seed}", unit="prompt") as bar:
            for row in sources.SOURCES[spec.source].rows(spec.where, seed):
                split = split_of_one(row.group, shares)
                prompt = fit(tokenizer, row, limits, split, seed) if missing[split] else None
                if prompt is not None and prompt.id not in used:
                    used.add(prompt.id)
                    prompts.append(prompt)
                    missing[split] -= 1
                    bar.update()
                if not any(missing.values()):
                    break
        if any(missing.values()):
            raise InputError(
                f"params: {key} asks for {spec.count} prompts for seed {seed}, "
                f"{spec.count - sum(missing.values())} fit; lower count or min_tokens"
            )
    return prompts


def splits(
    key: str, rows: Sequence[Row], shares: Mapping[str, float], kept: Sequence[Row]
) -> dict[str, str]:
    """Group -> split for the strata of the rows that are kept, where the rows do not say. What
    `where` leaves out counts too, so that two sets of one source agree on every group.
    """
    split_of = {row.group: row.split for row in kept if row.split is not None}
    for source, stratum in sorted({(row.source, row.stratum) for row in kept if row.split is None}):
        groups = {row.group for row in rows if (row.source, row.stratum) == (source, stratum)}
        try:
            split_of |= split_of_groups(groups, shares)
        except ValueError as error:
            raise InputError(
                f"params: {key}: {source} {stratum} cannot be split by prepare.splits: {error}; "
                "choose another where, or give fewer splits a share"
            ) from None
    return split_of


def prompt_set(
    key: str,
    spec: PromptSet,
    shares: Mapping[str, float],
    tokenizer: Tokenizer,
    like: Sequence[Prompt] | None = None,
) -> list[Prompt]:
    """The prompts of one set, seed by seed and split by split; without a count every row that fits,
    in the order of the source. `shares`: of a set without blocks. InputError: too few of them.
    """
    source = sources.source_of(spec)
    if source.stream:
        return draw_stream(key, spec, shares, tokenizer)
    rows = distinct(source.rows(spec.where))
    kept = sources.narrow(key, rows, spec.where)
    if not kept:
        raise InputError(f"params: {key}.where leaves none of {len(rows)} rows; ask less of it")
    split_of = splits(key, rows, shares_of(spec, shares), kept)
    if spec.count is not None:
        return draw(key, spec, kept, split_of, tokenizer, like)
    limits = Limits(spec.min_tokens or 1, spec.max_tokens)
    fitted = (fit(tokenizer, row, limits, split_of[row.group], spec.seeds[0]) for row in kept)
    prompts = [prompt for prompt in fitted if prompt is not None]
    if not prompts:
        raise InputError(f"params: {key}: none of {len(kept)} texts is long enough for min_tokens")
    return prompts


def distinct(rows: Iterable[Row]) -> list[Row]:
    """The rows in their order, each text or pair once, none empty."""
    first: dict[str, Row] = {}
    for row in rows:
        if row.text or row.pair:
            first.setdefault(identity(row, row.text), row)
    return list(first.values())


def as_row(prompt: Prompt, split: str | None = None) -> dict[str, Any]:
    """A prompt's line in its file, in `split` if given, whatever its group was drawn for."""
    row = {
        "id": prompt.id,
        "text": prompt.text,
        "group": prompt.row.group,
        "split": split or prompt.split,
        "seed": prompt.seed,
        "tokens": prompt.tokens,
        "source": prompt.row.source,
        "pair": prompt.row.pair and list(prompt.row.pair),
        "unrelated": prompt.row.unrelated,
        "choices": list(prompt.row.choices),
    }
    kinds = ("pair", "unrelated", "choices")
    return {key: value for key, value in row.items() if value or key not in kinds}
