"""Neuron scores per prompt: relevance, gradient and activation.

h is the vector that enters the MLP output projection (one coordinate per neuron) and y the target.

| score          | per prompt and neuron i; sums over the tokens t of the prompt           |
|----------------|-------------------------------------------------------------------------|
| lrp            | sum_t h_ti dy/dh_ti under AttnLRP: signed (SparC3, Eq. 8)               |
| lrp-abs        | sum_j |w_ij dy/dw_ij| under AttnLRP, w the incoming weights of `up`     |
| gradient       | as lrp, with the plain gradient                                         |
| activation     | mean_t |h_ti|                                                           |
| max-activation | max_t h_ti (what AurA ranks by)                                         |
| wanda          | ||W_:i||_2 sqrt(sum_t h_ti^2), W the output projection                  |

A new score is one function and one row of SCORES. No weight gradient is ever asked of autograd:
what is kept per prompt is one number per neuron.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sparc3.base.errors import InputError
from sparc3.model import families, loading
from sparc3.model.families import MLP
from sparc3.relevance.lrp import attnlrp

log = logging.getLogger(__name__)


Target = Literal["max-logit", "likelihood", "pair"]
POSITIONS_AT_ONCE = 128  # of the language-modelling head, whose logits are vocabulary-wide
PRODUCTS_AT_ONCE = 2**19  # of a weight and its gradient: they stay in the processor's cache


class Prompt(NamedTuple):
    """An id, and token ids: one sequence, or (preferred, other) for the target `pair`."""

    id: str
    sequences: tuple[Sequence[int], ...]


class Score(NamedTuple):
    """One row of SCORES.

    `of(mlp, values, last)` reduces the tokens of P prompts to (P, neuron). `values` is h, or at
    "weights" the input x of `up`. `last` is dy/dh, or at "weights" the gradient at the output of
    `up`: zero on padding. With gradient None `last` is instead the mask of real tokens, and P
    counts sequences. All are (P, token, coordinate), the mask (P, token, 1); with a gradient the
    tokens of both sequences of a pair are one axis.
    """

    of: Callable[[MLP, Tensor, Tensor], Tensor]
    gradient: Literal["attnlrp", "plain"] | None
    at: Literal["neurons", "weights"] = "neurons"


def _input_times_gradient(mlp: MLP, h: Tensor, gradient: Tensor) -> Tensor:
    return (h.float() * gradient.float()).sum(1)


def _weight_times_gradient(mlp: MLP, x: Tensor, gradient: Tensor) -> Tensor:
    size = families.incoming(mlp.up).abs()
    deltas = gradient.transpose(1, 2)
    some = max(1, PRODUCTS_AT_ONCE // (len(x) * x.shape[2]))
    parts = []
    for start in range(0, len(size), some):
        part = slice(start, start + some)
        products = torch.bmm(deltas[:, part], x).abs_().mul_(size[part])  # |w * dy/dw|
        parts.append(products.sum(2, dtype=torch.float32))
    return torch.cat(parts, dim=1)


def _mean_absolute(mlp: MLP, h: Tensor, real: Tensor) -> Tensor:
    return (h.float().abs() * real).sum(1) / real.sum(1)


def _maximum(mlp: MLP, h: Tensor, real: Tensor) -> Tensor:
    return h.float().masked_fill(~real, -torch.inf).amax(1)


def _wanda(mlp: MLP, h: Tensor, real: Tensor) -> Tensor:
    columns = torch.linalg.vector_norm(families.outgoing(mlp.down).float(), dim=0)
    return columns * torch.linalg.vector_norm(h.float() * real, dim=1)


SCORES: dict[str, Score] = {
    "lrp": Score(_input_times_gradient, gradient="attnlrp"),
    "lrp-abs": Score(_weight_times_gradient, gradient="attnlrp", at="weights"),
    "gradient": Score(_input_times_gradient, gradient="plain"),
    "activation": Score(_mean_absolute, gradient=None),
    "max-activation": Score(_maximum, gradient=None),
    "wanda": Score(_wanda, gradient=None),
}


def score(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    names: Sequence[str],
    *,
    target: Target = "max-logit",
    batch_tokens: int = 1024,
    shard: int = 256,
    skip: Collection[int] = (),
    progress: Callable[[int], object] | None = None,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yield (shard number, {score name: float32 (prompt, layer, neuron)}), prompts in given order.

    A shard is `shard` consecutive prompts (the last may be shorter). Within it prompts are batched
    by length, at most `batch_tokens` tokens at once with less than 10 % of padding, so a shard does
    not depend on any other: numbers in `skip` are passed over and the rest is the same, bit for
    bit. Scores that need the same pass share it. `progress` is told how many prompts are finished.

    Target y, explained by the scores with a gradient:
    - max-logit: the largest logit at the last position;
    - likelihood: mean log p of the prompt's own tokens, from the second one on;
    - pair: mean log p(preferred) - mean log p(other), over the tokens from the second one on. A
      score with a gradient takes the tokens of both sequences together; one without is that of
      the preferred sequence minus that of the other, so that swapping the two turns its sign.

    Sequences are padded on the right: a causal model cannot see the padding, and no gradient comes
    from there. Out of memory halves the batch from then on, with a warning; the scores stay the
    same up to rounding.

    InputError: unknown score, a prompt that the target or the model cannot take, a score that is
    not finite (it names the prompt), out of memory with a single prompt.
    """
    _check(model, prompts, names, target)
    passes = _passes(names)
    for number, start in enumerate(range(0, len(prompts), shard)):
        if number in skip:
            continue
        members = prompts[start : start + shard]
        shape = (len(members), families.num_layers(model), families.width(model))
        scores = {name: np.full(shape, np.nan, np.float32) for name in names}
        waiting = batches([[len(s) for s in p.sequences] for p in members], batch_tokens)
        while waiting:
            batch = waiting.pop(0)
            try:
                values = _score_batch(model, [members[i] for i in batch], passes, target)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise InputError(
                        f"prompt {members[batch[0]].id}: out of memory with this prompt alone; "
                        "shorten it, or use a smaller model.dtype or a larger device"
                    ) from None
                half = len(batch) // 2
                waiting[:0] = [batch[:half], batch[half:]]
                batch_tokens //= 2
                log.warning("out of memory: going on with batches of %d tokens", batch_tokens)
                continue
            for name, value in values.items():
                scores[name][batch] = value
            if progress is not None:
                progress(len(batch))
        yield number, scores


def batches(
    lengths: Sequence[Sequence[int]], batch_tokens: int, padding: float = 0.1
) -> list[list[int]]:
    """Group prompts, given the lengths of each one's sequences, into batches of similar length.

    Returns lists of positions in `lengths`, each prompt once. A batch, padded to its longest
    sequence, has at most `batch_tokens` tokens (or is a single prompt), and less than `padding` of
    them are padding (or it is a single prompt). Deterministic.
    """
    order = sorted(range(len(lengths)), key=lambda i: (max(lengths[i]), sum(lengths[i]), i))
    found: list[list[int]] = []
    real = 0
    for i in order:
        real += sum(lengths[i])
        padded = (len(found[-1]) + 1 if found else 1) * len(lengths[i]) * max(lengths[i])
        if found and padded <= batch_tokens and padded - real < padding * padded:
            found[-1].append(i)
        else:
            found.append([i])
            real = sum(lengths[i])
    return found


def _check(
    model: PreTrainedModel, prompts: Sequence[Prompt], names: Sequence[str], target: Target
) -> None:
    for name in names:
        if name not in SCORES:
            raise InputError(f"score: {name!r} is not known; choose one of {', '.join(SCORES)}")
    if target not in TARGETS:
        raise InputError(f"target: {target!r} is not known; choose one of {', '.join(TARGETS)}")
    expected = 2 if target == "pair" else 1
    shortest = 1 if target == "max-logit" else 2
    longest = model.config.max_position_embeddings
    for prompt in prompts:
        if len(prompt.sequences) != expected:
            raise InputError(
                f"prompt {prompt.id}: target {target} takes {expected} sequence(s), "
                f"not {len(prompt.sequences)}"
            )
        for sequence in prompt.sequences:
            if not shortest <= len(sequence) <= longest:
                raise InputError(
                    f"prompt {prompt.id}: {len(sequence)} tokens; target {target} and this model "
                    f"take {shortest} to {longest}"
                )


def _passes(names: Sequence[str]) -> dict[str, list[str]]:
    """Scores by the pass that yields them; those of a forward pass join another if there is one."""
    passes: dict[str, list[str]] = {}
    for name in names:
        if SCORES[name].gradient is not None:
            passes.setdefault(str(SCORES[name].gradient), []).append(name)
    forward = [name for name in names if SCORES[name].gradient is None]
    if forward:
        passes.setdefault(next(iter(passes), "forward"), []).extend(forward)
    return passes


def _score_batch(
    model: PreTrainedModel, prompts: Sequence[Prompt], passes: dict[str, list[str]], target: Target
) -> dict[str, np.ndarray]:
    """{name: (prompt, layer, neuron)} of prompts that are run as one batch."""
    sequences = [torch.tensor(s) for prompt in prompts for s in prompt.sequences]
    device = loading.input_device(model)
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(device)
    lengths = torch.tensor([len(s) for s in sequences], device=device)
    real = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    shape = (families.num_layers(model), len(prompts), families.width(model))

    scores: dict[str, np.ndarray] = {}
    explained: Tensor | None = None  # dy/dhidden: the passes differ in gradients, not in values
    for kind, names in passes.items():
        found = {name: torch.empty(shape, device=device) for name in names}
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(kind != "forward"))
            stack.enter_context(attnlrp(model) if kind == "attnlrp" else nullcontext())
            stack.enter_context(loading.attention(ids))
            stack.enter_context(_watching(model, len(prompts), real[:, :, None], found))
            # Padding is not masked, for it is never seen. Without any mask transformers would write
            # out the causal one; with ones it leaves causality to sdpa, which is faster.
            states = families.body(model)(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            )
            hidden = states.last_hidden_state
            if kind != "forward":
                if explained is None:
                    explained = TARGETS[target](model, hidden.detach(), ids, lengths)
                hidden.backward(explained)
        for name, value in found.items():
            scores[name] = value.transpose(0, 1).cpu().numpy()
            _check_finite(name, scores[name], prompts)
    return scores


@contextmanager
def _watching(
    model: PreTrainedModel, prompts: int, real: Tensor, found: dict[str, Tensor]
) -> Iterator[None]:
    """Fill found[name] (layer, prompt, neuron) while the model runs, and then runs backward.

    `real` (sequence, token, 1) is True where a token is no padding; the sequences of a prompt are
    next to each other.
    """

    def observe(names: list[str], layer: int, mlp: MLP, values: Tensor, at: Tensor) -> None:
        # Gradients go no further than the first tensor asked for: that of the first layer.
        if not at.requires_grad:
            at.requires_grad_()
        values = values.detach().view(prompts, -1, values.shape[-1])

        def reduce(gradient: Tensor) -> None:
            gradient = gradient.view(prompts, -1, gradient.shape[-1])
            for name in names:
                found[name][layer] = SCORES[name].of(mlp, values, gradient)

        at.register_hook(reduce)

    handles: list[RemovableHandle] = []
    forward = [n for n in found if SCORES[n].gradient is None]
    neurons = [n for n in found if SCORES[n].gradient and SCORES[n].at == "neurons"]
    weights = [n for n in found if SCORES[n].gradient and SCORES[n].at == "weights"]

    def hook(layer: int, mlp: MLP) -> None:
        def before_down(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            h = args[0]
            for name in forward:
                values = h.detach().view(*real.shape[:2], -1)  # OPT runs all tokens as one axis
                per_sequence = SCORES[name].of(mlp, values, real.to(h.device))
                preferred, *other = per_sequence.view(prompts, -1, h.shape[-1]).unbind(1)
                found[name][layer] = preferred - other[0] if other else preferred
            if neurons:
                observe(neurons, layer, mlp, h, h)

        def after_up(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            observe(weights, layer, mlp, args[0], output)

        handles.append(mlp.down.register_forward_pre_hook(before_down))
        if weights:
            handles.append(mlp.up.register_forward_hook(after_up))

    try:
        for layer, mlp in enumerate(families.mlps(model)):
            hook(layer, mlp)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _max_logit(model: PreTrainedModel, hidden: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """d/d hidden of the largest logit at each sequence's last position."""
    rows, last = torch.arange(len(ids), device=hidden.device), lengths.to(hidden.device) - 1
    leaf = hidden[rows, last].requires_grad_()
    y = families.logits(model, leaf).amax(-1).sum()
    gradient = torch.zeros_like(hidden)
    gradient[rows, last] = torch.autograd.grad(y, leaf)[0]
    return gradient


def _likelihood(model: PreTrainedModel, hidden: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """d/d hidden of the sum of the sequences' mean log p."""
    return _log_p(model, hidden, ids, torch.ones_like(lengths) / (lengths - 1), lengths)


def _pair(model: PreTrainedModel, hidden: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """d/d hidden of sum of mean log p of even rows (preferred) - that of odd rows (other)."""
    sign = 1 - 2 * (torch.arange(len(ids), device=lengths.device) % 2)
    return _log_p(model, hidden, ids, sign / (lengths - 1), lengths)


def _log_p(
    model: PreTrainedModel, hidden: Tensor, ids: Tensor, share: Tensor, lengths: Tensor
) -> Tensor:
    """d/d hidden of the sum over sequences of `share` (sequence,) times their summed log p."""
    ids, lengths, share = (t.to(hidden.device) for t in (ids, lengths, share))
    rows, positions = torch.nonzero(
        torch.arange(ids.shape[1] - 1, device=hidden.device) < lengths[:, None] - 1, as_tuple=True
    )
    gradient = torch.zeros_like(hidden)
    for part in torch.arange(len(rows), device=hidden.device).split(POSITIONS_AT_ONCE):
        row, position = rows[part], positions[part]
        leaf = hidden[row, position].requires_grad_()
        log_p = torch.log_softmax(families.logits(model, leaf).float(), -1)
        y = (log_p[torch.arange(len(part)), ids[row, position + 1]] * share[row]).sum()
        gradient[row, position] = torch.autograd.grad(y, leaf)[0]
    return gradient


TARGETS = {"max-logit": _max_logit, "likelihood": _likelihood, "pair": _pair}


def _check_finite(name: str, scores: np.ndarray, prompts: Sequence[Prompt]) -> None:
    bad = ~np.isfinite(scores).all(axis=(1, 2))
    if bad.any():
        prompt = prompts[int(bad.argmax())]
        layer = int((~np.isfinite(scores[bad.argmax()])).any(axis=1).argmax())
        raise InputError(
            f"prompt {prompt.id}: score {name} is not finite in layer {layer}; "
            "use model.dtype float32 or bfloat16, or leave the prompt out"
        )
