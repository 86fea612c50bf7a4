"""How likely a model finds given tokens, without each of some circuits: negative log-likelihood
(NLL) in nats; and how far its predictions are from the whole model's.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from sparc3.base.errors import InputError
from sparc3.base.files import Array
from sparc3.circuits.ablate import Edit, edited, without_each
from sparc3.circuits.circuit import INTACT, Circuit
from sparc3.circuits.intervention import Intervention
from sparc3.measure.instrument import Progress
from sparc3.model import families, loading
from sparc3.model.families import context

Tokens = Sequence[int]
PADDING = 0.1  # largest share of padding in a batch
CHUNK = 256  # positions whose logits exist at the same time


class Window(NamedTuple):
    """How long texts are read: `length` tokens at a time, each begun `stride` after the last."""

    length: int
    stride: int


def token_nll(
    model: PreTrainedModel,
    edits: Sequence[Edit],
    sequences: Sequence[Tokens],
    names: Sequence[str],
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> list[list[Array]]:
    """-log p(token | the tokens before it) in nats: float32 `(length - 1,)` for each sequence, by
    the model without each of `edits`.

    The first token is not scored. `names` are the ids of the sequences, which are batched by
    length, at most `batch_tokens` tokens or one sequence at a time. `progress` counts sequences,
    for each circuit anew. Raises InputError for an empty sequence, one longer than the model's
    context, and logits that are not finite.
    """
    _check_lengths(sequences, names, 1, context(model.config.to_dict()))
    rows = [_plain(*given, 1) for given in zip(names, sequences, strict=True)]
    return _score(model, edits, rows, batch_tokens, progress)


def continuation_nll(
    model: PreTrainedModel,
    edits: Sequence[Edit],
    groups: Sequence[Sequence[Tokens]],
    names: Sequence[str],
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> list[list[list[Array]]]:
    """As `token_nll`, for groups of sequences that begin alike: the sentences of a paired item.

    The common prefix of a group is computed once: its sequences share a row of the batch, and the
    attention mask keeps them apart. `names` and `progress` are of groups. InputError also for a
    sequence longer than the model's sliding window, which would reach across the row.
    """
    window = getattr(model.config, "sliding_window", None) or math.inf
    limit = min(context(model.config.to_dict()), window)
    for name, group in zip(names, groups, strict=True):
        _check_lengths(group, [name] * len(group), 1, limit)
    shared = [
        sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*group, strict=False)))
        for group in groups
    ]
    rows = [_packed(*given) for given in zip(names, groups, shared, strict=True)]
    return [
        [_unpacked(*item) for item in zip(scored, groups, shared, strict=True)]
        for scored in _score(model, edits, rows, batch_tokens, progress)
    ]


def sentence_scores(nlls: Sequence[Array], name: str) -> Array:
    """Mean log p per scored token, in nats: float64 `(sequences,)`; InputError without one."""
    if not all(len(nll) for nll in nlls):
        raise InputError(f"prompt {name} has a sequence of 1 token; at least 2 are needed")
    return np.array([-nll.mean(dtype=np.float64) for nll in nlls])


def window_scores(
    model: PreTrainedModel,
    edits: Sequence[Edit],
    texts: Sequence[Tokens],
    names: Sequence[str],
    window: Window,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> list[list[Array]]:
    """Of every token of texts of any length, float32 `(2, length)`, NaN if not scored: its NLL in
    nats, and KL(whole model || model without a circuit) of the distribution it was drawn from, at
    least 0 up to rounding.

    Every token but a text's first is scored once, by the first window that reaches it: with all
    tokens before it in the first window, and at least `length - stride` in later ones. With
    `stride == length` each window leaves its first token unscored. `progress` counts windows, for
    each circuit anew, and for the whole model, if INTACT is none of them. Memory: a batch's last
    hidden states for every circuit, and the logits of one chunk. Source: Hugging Face, "Perplexity
    of fixed-length models". InputError: a text of fewer than 2 tokens, a window beyond the context.
    """
    length, stride = window
    longest = context(model.config.to_dict())
    _check_lengths(texts, names, 2, math.inf)
    if not 2 <= length <= longest:
        raise InputError(f"window {length}: expected 2 to {longest}, the model's context")
    windows = [
        (index, begin, end, first)
        for index, tokens in enumerate(texts)
        for begin, end, first in window_spans(len(tokens), length, stride)
    ]
    rows = [_plain(names[i], texts[i][begin:end], first) for i, begin, end, first in windows]
    compare = partial(_compare, model, edits, progress)
    every = []
    for scored in _by_edit(compare, edits, rows, batch_tokens):
        scores = [np.full((2, len(tokens)), np.nan, np.float32) for tokens in texts]
        for (index, begin, end, first), found in zip(windows, scored, strict=True):
            scores[index][:, begin + first : end] = found
        every.append(scores)
    return every


def _check_lengths(
    sequences: Sequence[Tokens], names: Sequence[str], shortest: int, longest: float
) -> None:
    for name, tokens in zip(names, sequences, strict=True):
        if not shortest <= len(tokens) <= longest:
            limits = f"at least {shortest}" if longest == math.inf else f"{shortest} to {longest}"
            problem = f"has {len(tokens)} tokens, expected {limits}"
            raise InputError(f"prompt {name} {problem}; drop it or cut it")


class _Row(NamedTuple):
    """A row of a batch, in which `targets[i]` is predicted from the state at `predictors[i]`.

    `branches` numbers the sequences packed into the row, and 0 is their common prefix: a token sees
    what came before it there and in its own branch. None: a single sequence.
    """

    name: str  # for messages
    tokens: Tokens
    predictors: Tokens
    targets: Tokens
    positions: Tokens | None = None
    branches: Tokens | None = None


def _plain(name: str, tokens: Tokens, first: int) -> _Row:
    return _Row(name, tokens, range(first - 1, len(tokens) - 1), tokens[first:])


def _packed(name: str, group: Sequence[Tokens], prefix: int) -> _Row:
    tokens = list(group[0][:prefix])
    predictors, targets = list(range(prefix - 1)), tokens[1:]
    positions, branches = list(range(prefix)), [0] * prefix
    for branch, sequence in enumerate(group, start=1):
        tail = sequence[prefix:]
        before = [prefix - 1] if prefix else []  # without a prefix, the tail's first is unscored
        ends = [*before, *range(len(tokens), len(tokens) + len(tail))]
        predictors += ends[:-1]
        targets += tail[1 - len(before) :]
        tokens += tail
        positions += range(prefix, len(sequence))
        branches += [branch] * len(tail)
    return _Row(name, tokens, predictors, targets, positions, branches)


def _unpacked(nll: Array, group: Sequence[Tokens], prefix: int) -> list[Array]:
    head = nll[: max(prefix - 1, 0)]
    lengths = [len(head), *(len(sequence) - 1 - len(head) for sequence in group)]
    return [np.concatenate([head, tail]) for tail in np.split(nll, np.cumsum(lengths))[1:-1]]


def window_spans(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Begin and end of each window in the text, and the first token in it that is scored."""
    reached = 1
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        first = max(reached - begin, 1)
        if begin + first < end:
            yield begin, end, first
        if end == length:
            return
        reached = end


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of each batch, longest sequence first. With its padding it has at most `batch_tokens`
    tokens, or is a single sequence.
    """
    batch: list[int] = []
    used = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        size = (len(batch) + 1) * lengths[(batch or [index])[0]]
        padded = used + lengths[index] < (1 - PADDING) * size
        if batch and (padded or size > batch_tokens):
            yield batch
            batch, used = [], 0
        batch.append(index)
        used += lengths[index]
    if batch:
        yield batch


def _score(
    model: PreTrainedModel,
    edits: Sequence[Edit],
    rows: Sequence[_Row],
    batch_tokens: int,
    progress: Progress | None,
) -> list[list[Array]]:
    """NLL of each row's targets, in nats: float32 `(targets,)` for each row, by circuit."""

    def measure(batch: Sequence[_Row]) -> list[list[Array]]:
        return without_each(model, edits, partial(_score_batch, model, batch, progress))

    return _by_edit(measure, edits, rows, batch_tokens)


@torch.inference_mode()
def _by_edit(
    measure: Callable[[Sequence[_Row]], list[list[Array]]],
    edits: Sequence[Edit],
    rows: Sequence[_Row],
    batch_tokens: int,
) -> list[list[Array]]:
    """What `measure` gives for batches of rows, put together: for each row, by circuit."""
    found: list[dict[int, Array]] = [{} for _ in edits]
    for batch in batches([len(row.tokens) for row in rows], batch_tokens):
        for by_row, values in zip(found, measure([rows[i] for i in batch]), strict=True):
            by_row.update(zip(batch, values, strict=True))
    return [[by_row[index] for index in range(len(rows))] for by_row in found]


def _score_batch(
    model: PreTrainedModel, rows: Sequence[_Row], progress: Progress | None
) -> list[Array]:
    states = _predicting(model, rows, progress)
    targets = torch.tensor([t for row in rows for t in row.targets], dtype=torch.long)
    pieces = [
        _target_nll(families.logits(model, part).float(), wanted)[0]
        for part, wanted in zip(states.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return _by_row(model, rows, torch.cat(pieces))


def _compare(
    model: PreTrainedModel,
    edits: Sequence[Edit],
    progress: Progress | None,
    rows: Sequence[_Row],
) -> list[list[Array]]:
    """NLL and KL of each row's targets: float32 `(2, targets)` for each row, by edit.

    Chunk by chunk through all edits, so that the whole model's distribution is made once.
    """
    others = [edit for edit in edits if edit is not INTACT]
    run = partial(_predicting, model, rows, progress)
    whole, *rest = without_each(model, [INTACT, *others], run)
    without = iter(rest)
    states = [whole if edit is INTACT else next(without) for edit in edits]
    targets = torch.tensor([t for row in rows for t in row.targets], dtype=torch.long)
    pieces: list[list[torch.Tensor]] = [[] for _ in edits]
    for wanted, part, *parts in zip(
        *(each.split(CHUNK) for each in (targets, whole, *states)), strict=True
    ):
        left = families.head(model)(part)  # the head, which is dear, once for all edits of it
        before = families.capped(model, left).float()
        _, log_z = _target_nll(before.clone(), wanted)
        p = (before - log_z[:, None]).exp_()
        for found, edit, state in zip(pieces, edits, parts, strict=True):
            if edit is INTACT:
                after = before.clone()
            elif isinstance(edit, Intervention) and edit.at_head:
                after = families.capped(model, edit.change(left.clone())).float()
            else:
                after = _logits(model, edit, state)
            gap = torch.einsum("nv,nv->n", p, before - after)
            nll, log_z_after = _target_nll(after, wanted)
            found.append(torch.stack([nll, gap + log_z_after - log_z]))
    return [_by_row(model, rows, torch.cat(found, dim=1)) for found in pieces]


def _logits(model: PreTrainedModel, edit: Edit, state: torch.Tensor) -> torch.Tensor:
    """In float32; a circuit lies below them, and need not be removed once more."""
    with nullcontext() if isinstance(edit, Circuit) else edited(model, edit):
        return families.logits(model, state).float()


def _predicting(
    model: PreTrainedModel, rows: Sequence[_Row], progress: Progress | None
) -> torch.Tensor:
    """Last hidden states `(predictors of all rows, width)`."""
    counts = torch.tensor([len(row.predictors) for row in rows])
    predictors = torch.tensor([p for row in rows for p in row.predictors], dtype=torch.long)
    hidden = _forward(model, rows)
    if progress:
        progress(len(rows))
    at = torch.repeat_interleave(counts), predictors
    return hidden[tuple(index.to(hidden.device) for index in at)]


def _by_row(model: PreTrainedModel, rows: Sequence[_Row], values: torch.Tensor) -> list[Array]:
    """Values `(..., targets of all rows)` for each row; InputError where one is not finite."""
    ends = np.cumsum([len(row.targets) for row in rows])[:-1]
    found = np.split(values.cpu().numpy(), ends, axis=-1)
    for row, each in zip(rows, found, strict=True):
        if not np.isfinite(each).all():
            problem = f"logits are not finite; {loading.not_finite(model)}"
            raise InputError(f"prompt {row.name}: {problem}")
    return found


def _target_nll(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL of each row's target, and the logarithm of the row's sum of exp.

    Overwrites `logits`: on a CPU, another array of their size costs as much as the exp.
    """
    target = logits.gather(1, targets.to(logits.device)[:, None]).squeeze(1)
    largest = logits.amax(1, keepdim=True)
    log_z = logits.sub_(largest).exp_().sum(1).log_() + largest.squeeze(1)
    return log_z - target, log_z


def _forward(model: PreTrainedModel, rows: Sequence[_Row]) -> torch.Tensor:
    """Last hidden states `(row, length, width)`."""
    # Padding stands on the right: causal attention keeps it from what comes before, so a batch of
    # plain rows needs no mask and takes the attention kernel's fast path.
    device = loading.input_device(model)
    inputs = {"input_ids": _padded([row.tokens for row in rows], 0).to(device)}
    if rows[0].branches is not None:
        branches = _padded([row.branches or [] for row in rows], -1).to(device)
        common, same = branches[:, None, :] == 0, branches[:, None, :] == branches[:, :, None]
        unseen = ~(common | same).tril()[:, None]
        mask = torch.zeros(unseen.shape, dtype=model.dtype, device=device)
        inputs["attention_mask"] = mask.masked_fill_(unseen, torch.finfo(model.dtype).min)
        inputs["position_ids"] = _padded([row.positions or [] for row in rows], 0).to(device)
    with loading.attention(inputs["input_ids"]):
        return families.body(model)(**inputs, use_cache=False).last_hidden_state


def _padded(rows: Sequence[Tokens], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], True, value)
