"""Sampled completions: many per prompt, in large batches, from one random stream per completion.

A token is drawn by the Gumbel-max rule: of the candidates, the one with the largest log p + noise.
The noise of (seed, prompt, completion, position, vocabulary entry) is a hash of these five. So
neither batch size nor order decides what is drawn, the model without one circuit and without
another may share a batch, and models that differ little draw mostly the same tokens, which makes a
paired comparison of them sharper.
"""

import hashlib
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from sparc3.base.errors import InputError
from sparc3.circuits.ablate import Edit, pruned_rows
from sparc3.circuits.circuit import INTACT, Circuit
from sparc3.measure.instrument import Progress
from sparc3.measure.likelihood import Tokens
from sparc3.model import families, loading

NUCLEUS = 256  # so many entries are searched for the nucleus first,
WIDER = 4  # and so many times more where it is wider
NOT_FINITE = -1  # instead of a token
IDLE = 0.125  # share of finished completions at which a batch is packed anew


class Sampling(NamedTuple):
    """How completions are drawn."""

    completions: int  # of each prompt
    new_tokens: int  # at most
    temperature: float  # that logits are divided by
    top_p: float  # of the nucleus, 1 for all tokens
    seed: int


def complete(
    model: PreTrainedModel,
    edits: Sequence[Edit],
    prompts: Sequence[Tokens],
    keys: Sequence[str],
    sampling: Sampling,
    batch: int = 200,
    progress: Progress | None = None,
) -> list[list[list[list[int]]]]:
    """Completions of every prompt, as token ids, by the model under each of `edits`: by edit,
    prompt and number.

    Tokens are drawn from the softmax of logits / `temperature`, cut to its nucleus: the most
    probable tokens up to the one with which their probability reaches `top_p` (Holtzman et al.
    2020, arXiv 1904.09751). A completion ends before an end-of-sequence token of the model's
    generation config, so it may be short or empty. `keys` name the prompts and their random
    streams, the same for all edits. `batch` completions run together, of whatever circuits, and of
    one intervention. `progress` is told how many more prompts of edits are finished. InputError: an
    empty prompt, one that leaves no room for `new_tokens` in the model's context, logits that are
    not finite.
    """
    limit = families.context(model.config.to_dict()) - sampling.new_tokens
    for key, prompt in zip(keys, prompts, strict=True):
        if not 1 <= len(prompt) <= limit:
            problem = f"has {len(prompt)} tokens, expected 1 to {limit}: the model's context"
            raise InputError(f"prompt {key} {problem} less new_tokens; cut it, or lower new_tokens")
    rest = prompts, keys, sampling, batch, progress
    circuits = [edit for edit in edits if isinstance(edit, Circuit)]
    without = iter(_side_by_side(model, circuits, *rest) if circuits else [])
    found = []
    for edit in edits:
        if isinstance(edit, Circuit):
            found.append(next(without))
        else:
            with edit.on(model):
                found += _side_by_side(model, [INTACT], *rest)
    return found


def _side_by_side(
    model: PreTrainedModel,
    circuits: Sequence[Circuit],
    prompts: Sequence[Tokens],
    keys: Sequence[str],
    sampling: Sampling,
    batch: int,
    progress: Progress | None,
) -> list[list[list[list[int]]]]:
    ends = model.generation_config.eos_token_id if model.generation_config else None
    stops = set(ends if isinstance(ends, list) else [ends])
    count = sampling.completions
    every = [
        _Completion(place, key, prompt, _stream(sampling.seed, key, number))
        for place in range(len(circuits))
        for prompt, key in zip(prompts, keys, strict=True)
        for number in range(count)
    ]
    done = 0
    with pruned_rows(model, circuits) as tell:
        for group in _batches(every, batch, sampling.new_tokens):
            _extend(model, tell, group, sampling, stops)
            if progress:
                before, done = done, done + len(group)
                progress(done // count - before // count)
    tokens = iter([each.tokens for each in every])
    return [[[next(tokens) for _ in range(count)] for _ in prompts] for _ in circuits]


def repeated(items: Sequence[Hashable], n: int = 4) -> float:
    """Share of the n-grams of some items that were there before, 0 without any (Welleck et al.
    2020, arXiv 1908.04319: seq-rep-n).
    """
    grams = [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def quality(tokens: Tokens) -> dict[str, Any]:
    """Signs of a broken completion. distinct_1, distinct_2: distinct n-grams / n-grams, 0 without
    any (Li et al. 2016, arXiv 1510.03055). repetition: share of the longest stretch that repeats
    one token or one pair of tokens, 0 if it is shorter than two pairs. rep_4: `repeated`
    4-grams. degenerate: empty, or more than half of it is such a stretch.
    """
    length = len(tokens)
    longest = stretch = min(length, 2)
    for index in range(2, length):
        stretch = stretch + 1 if tokens[index] == tokens[index - 2] else 2
        longest = max(longest, stretch)
    repetition = longest / length if longest >= 4 else 0.0
    pairs = set(itertools.pairwise(tokens))
    return {
        "length": length,
        "distinct_1": len(set(tokens)) / length if length else 0.0,
        "distinct_2": len(pairs) / (length - 1) if length > 1 else 0.0,
        "repetition": repetition,
        "rep_4": repeated(tokens),
        "degenerate": length == 0 or repetition > 0.5,
    }


@dataclass
class _Completion:
    circuit: int  # its place
    key: str  # of its prompt
    prompt: Tokens
    stream: int  # 64 bits, signed
    tokens: list[int] = field(default_factory=list)
    finished: bool = False

    def take(self, token: int, new_tokens: int, stops: set[int | None]) -> None:
        if token not in stops:
            self.tokens.append(token)
        self.finished = token in stops or len(self.tokens) == new_tokens


class _Room(DynamicLayer):
    """Keys and values of one layer in memory that is taken once, for the tokens read first and
    `more`: a DynamicLayer copies all that it holds at every token.
    """

    def __init__(self, more: int) -> None:
        super().__init__()
        self.more = more
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.is_initialized = True
            room = key_states.shape[2] + self.more
            self.keys, self.values = (
                states.new_empty(*states.shape[:2], room, states.shape[3])
                for states in (key_states, value_states)
            )
        held = self.length
        self.length += key_states.shape[2]
        self.keys[:, :, held : self.length] = key_states
        self.values[:, :, held : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length


def _batches(
    completions: Sequence[_Completion], batch: int, spread: int
) -> Iterator[list[_Completion]]:
    """Longest prompts first; in one batch, their lengths differ by `spread` at most."""
    group: list[_Completion] = []
    for each in sorted(completions, key=lambda c: -len(c.prompt)):
        if group and (len(group) == batch or len(group[0].prompt) - len(each.prompt) > spread):
            yield group
            group = []
        group.append(each)
    if group:
        yield group


@torch.inference_mode()
def _extend(
    model: PreTrainedModel,
    tell: Callable[[Sequence[int]], None],
    group: list[_Completion],
    sampling: Sampling,
    stops: set[int | None],
) -> None:
    """Draw the tokens of one batch, which comes longest prompt first.

    All rows are at the same position, which spares padding and masks: prompts are read together up
    to the length of the shortest, and the rest of the longer ones token by token, while the shorter
    ones are continued. Until its prompt is read, a row stands for all its completions.
    """
    device, body = loading.input_device(model), families.body(model)
    position, longest = len(group[-1].prompt), len(group[0].prompt)
    more = longest - position + sampling.new_tokens - 1  # the last token drawn is not read
    cache = Cache(layers=[_Room(more) for _ in range(model.config.num_hidden_layers)])

    def read(rows: list[list[_Completion]], tokens: list[list[int]]) -> Tensor:
        tell([row[0].circuit for row in rows])
        ids = torch.tensor(tokens, device=device)
        return body(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]

    by_prompt = itertools.groupby(group, key=lambda each: (each.circuit, each.key))
    rows = [list(row) for _, row in by_prompt]
    states = read(rows, [list(row[0].prompt[:position]) for row in rows])
    while True:
        parted = [
            (place, part)
            for place, row in enumerate(rows)
            for part in ([[each] for each in row] if len(row[0].prompt) == position else [row])
        ]
        if len(parted) > len(rows):
            rows, places = [row for _, row in parted], torch.tensor([place for place, _ in parted])
            states = states[places]
            cache.batch_select_indices(places)
        firsts = [row[0] for row in rows]
        # Of the prompt; where that is read any token, to be drawn.
        tokens = [each.prompt[position] if position < len(each.prompt) else 0 for each in firsts]
        read_up = [place for place, each in enumerate(firsts) if len(each.prompt) <= position]
        due = [place for place in read_up if not firsts[place].finished]
        if due:
            drawn = _next(model, states[due], [firsts[place] for place in due], sampling)
            for place, token in zip(due, drawn, strict=True):
                tokens[place] = token
                firsts[place].take(token, sampling.new_tokens, stops)
        left = [place for place, each in enumerate(firsts) if not each.finished]
        if not left:
            return
        if len(left) <= (1 - IDLE) * len(rows):
            rows, tokens = [rows[place] for place in left], [tokens[place] for place in left]
            cache.batch_select_indices(torch.tensor(left))
        states = read(rows, [[token] for token in tokens])
        position += 1


def _next(
    model: PreTrainedModel, states: Tensor, due: Sequence[_Completion], sampling: Sampling
) -> list[int]:
    """The next token of each completion, whose last hidden states are `states` (row, hidden)."""
    at = torch.tensor([[each.stream, len(each.tokens)] for each in due])
    logits = families.logits(model, states).float()
    streams = _hash(*at.to(logits.device).T)
    tokens = draw(logits, streams, sampling.temperature, sampling.top_p).tolist()
    if NOT_FINITE in tokens:
        key = due[tokens.index(NOT_FINITE)].key
        raise InputError(f"prompt {key}: logits are not finite; {loading.not_finite(model)}")
    return tokens


def draw(logits: Tensor, streams: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token id for each row of `logits` (row, vocabulary), which are overwritten: as `streams`
    (row,) int64 decide, and NOT_FINITE for a row whose logits are not.
    """
    p = logits.div_(temperature).softmax(1)
    bad = ~p[:, 0].isfinite()  # in a softmax, one bad entry spoils its row
    if top_p == 1:
        entries = torch.arange(p.shape[1], device=p.device).expand_as(p)
        tokens = p.log_().add_(_gumbel(streams, entries)).argmax(1)
    else:
        tokens = _draw_nucleus(p, streams, top_p, NUCLEUS)
    return tokens.masked_fill_(bad, NOT_FINITE)


def _draw_nucleus(p: Tensor, streams: Tensor, top_p: float, width: int) -> Tensor:
    width = min(width, p.shape[1])
    largest, entries = p.topk(width, dim=1)
    before = largest.cumsum(1) - largest
    noisy = largest.log_().add_(_gumbel(streams, entries))
    best = noisy.masked_fill_(before >= top_p, -torch.inf).argmax(1, keepdim=True)
    tokens = entries.gather(1, best).squeeze(1)
    wider = before[:, -1] < top_p
    if width < p.shape[1] and wider.any():
        tokens[wider] = _draw_nucleus(p[wider], streams[wider], top_p, WIDER * width)
    return tokens


def _gumbel(streams: Tensor, entries: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, of each stream (row,) at `entries` (row, entry)."""
    bits = (_hash(streams[:, None], entries) >> 11) & (2**53 - 1)
    uniform = ((bits + 0.5) * 2.0**-53).clamp_(max=1 - 2.0**-24)  # float32 would round it to 1
    return -(-torch.log1p(-uniform)).log()


def _hash(streams: Tensor, numbers: Tensor) -> Tensor:
    """64 bits for each stream and number: SplitMix64 (Steele et al. 2014), entered at `number`."""
    bits = streams + (numbers + 1) * -0x61C8864680B583EB
    bits = (bits ^ _shift(bits, 30)) * -0x40A7B892E31B1A47
    bits = (bits ^ _shift(bits, 27)) * -0x6B2FB644ECCEEE15
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, by: int) -> Tensor:
    """Right shift of int64 as if it were unsigned."""
    return (bits >> by) & (2 ** (64 - by) - 1)


def _stream(seed: int, key: str, number: int) -> int:
    digest = hashlib.blake2b(f"{seed} {number} {key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
