"""Attribution: runs the model on prompts and gives every neuron its scores for each of them.

No weight gradient is ever asked of autograd: what is kept per prompt is one number per neuron.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparc3.base.errors import InputError
from sparc3.base.files import Array
from sparc3.model import families, loading, trunk
from sparc3.model.families import MLP
from sparc3.relevance.scores import SCORES, Score, Target

log = logging.getLogger(__name__)

Progress = Callable[[int], object]  # called with the number of prompts just finished
POSITIONS_AT_ONCE = 128  # of the language-modelling head, whose logits are vocabulary-wide


class Prompt(NamedTuple):
    """An id, and token ids: one sequence, or (preferred, other) for the target `pair`."""

    id: str
    sequences: tuple[Sequence[int], ...]


@dataclass
class FirstToken:
    """What becomes of relevance at the first position of every text, which attention may flood.

    Unless it is `kept`, scores with a gradient are made without it. `sizes` counts, for those that
    sum over tokens, sum |h dy/dh| over neurons and prompts: at that position, and at all.
    """

    kept: bool = True
    sizes: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, name: str, there: float, everywhere: float) -> None:
        before = self.sizes.get(name, (0.0, 0.0))
        self.sizes[name] = before[0] + there, before[1] + everywhere


def score(
    model: PreTrainedModel,
    shards: Sequence[Sequence[Prompt]],
    names: Sequence[str],
    *,
    target: Target = "max-logit",
    batch_tokens: int = 1024,
    progress: Progress | None = None,
    first: FirstToken | None = None,
) -> Iterator[dict[str, Array]]:
    """Yield {score name: float32 (prompt, layer, neuron)} of each shard, prompts in given order.

    Within a shard prompts are batched by length, as `batches` says; so its scores depend on no
    other shard, bit for bit. Scores that need the same pass share it.

    Target y, explained by the scores with a gradient:
    - max-logit: the largest logit at the last position;
    - contrast-logit: that minus the mean of all (Gu et al. 2018; lxt's advice for GPT-2);
    - likelihood: mean log p of the prompt's own tokens, from the second one on;
    - pair: mean log p(preferred) - mean log p(other), likewise. A score with a gradient takes the
      tokens of both sequences together; one without is that of the preferred sequence minus that of
      the other, so that swapping the two turns its sign.

    `first` says whether relevance at the first position counts, and is told how much there is.

    Padding stands on the right, where a causal model does not see it. Out of memory batches the
    rest of the shard anew, with half of the tokens that were too many: the same up to rounding.

    InputError, which names the prompt: one that the target or the model cannot take (before
    anything runs), a score that is not finite, out of memory with a single prompt.
    """
    first = first or FirstToken()
    _check(model, [prompt for shard in shards for prompt in shard], target)
    passes = _passes(names)
    smallest = batch_tokens

    def of_batch(batch: Sequence[Prompt]) -> dict[str, Array]:
        return _score_batch(model, batch, passes, target, first)

    for prompts in shards:
        shape = (len(prompts), families.num_layers(model), families.width(model))
        scores = {name: np.full(shape, np.nan, np.float32) for name in names}
        fitted = _score_shard(of_batch, prompts, scores, batch_tokens, progress)
        if fitted < smallest:
            smallest = fitted
            log.warning("out of memory: of %d tokens in a batch, %d fit", batch_tokens, fitted)
        yield scores


def _score_shard(
    of_batch: Callable[[Sequence[Prompt]], dict[str, Array]],
    prompts: Sequence[Prompt],
    scores: dict[str, Array],
    batch_tokens: int,
    progress: Progress | None,
) -> int:
    """Fill {name: (prompt, layer, neuron)}, batch by batch; returns the tokens of a batch that the
    memory was enough for.
    """
    lengths = [[len(s) for s in prompt.sequences] for prompt in prompts]
    waiting = batches(lengths, batch_tokens)
    while waiting:
        batch = waiting[0]
        try:
            values = of_batch([prompts[i] for i in batch])
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise InputError(
                    f"prompt {prompts[batch[0]].id}: out of memory with this prompt alone; "
                    "shorten it, or use a smaller model.dtype or a larger device"
                ) from None
            batch_tokens = len(batch) * len(lengths[0]) * max(max(lengths[i]) for i in batch) // 2
            rest = sorted(i for batch in waiting for i in batch)
            anew = batches([lengths[i] for i in rest], batch_tokens)
            waiting = [[rest[i] for i in batch] for batch in anew]
            continue
        waiting.pop(0)
        for name, value in values.items():
            scores[name][batch] = value
        if progress is not None:
            progress(len(batch))
    return batch_tokens


def batches(
    lengths: Sequence[Sequence[int]], batch_tokens: int, padding: float = 0.1
) -> list[list[int]]:
    """Positions of the prompts, given the lengths of each one's sequences, of each batch.

    A batch, padded to its longest sequence, has at most `batch_tokens` tokens, less than `padding`
    of which are padding, or is a single prompt.
    """
    order = sorted(range(len(lengths)), key=lambda i: (max(lengths[i]), sum(lengths[i]), i))
    grouped: list[list[int]] = []
    real = 0
    for i in order:
        real += sum(lengths[i])
        padded = (len(grouped[-1]) + 1 if grouped else 1) * len(lengths[i]) * max(lengths[i])
        if grouped and padded <= batch_tokens and padded - real < padding * padded:
            grouped[-1].append(i)
        else:
            grouped.append([i])
            real = sum(lengths[i])
    return grouped


def _check(model: PreTrainedModel, prompts: Sequence[Prompt], target: Target) -> None:
    expected = 2 if target == "pair" else 1
    shortest = 1 if target in AT_THE_END else 2
    longest = families.context(model.config.to_dict())
    for prompt in prompts:
        if (given := len(prompt.sequences)) != expected:
            problem = f"target {target} takes {expected} sequence(s), not {given}"
            raise InputError(f"prompt {prompt.id}: {problem}")
        for sequence in prompt.sequences:
            if not shortest <= len(sequence) <= longest:
                raise InputError(
                    f"prompt {prompt.id}: {len(sequence)} tokens; target {target} and this model "
                    f"take {shortest} to {longest}"
                )


def _passes(names: Sequence[str]) -> dict[str, list[str]]:
    """Scores by the pass that yields them; those of a forward pass join another if there is one."""
    passes: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: SCORES[name].gradient is None):
        joined = (kind for kind in passes if kind != "path")
        kind = SCORES[name].gradient or next(joined, "forward")
        passes.setdefault(kind, []).append(name)
    return passes


def _score_batch(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    passes: dict[str, list[str]],
    target: Target,
    first: FirstToken,
) -> dict[str, Array]:
    """{name: (prompt, layer, neuron)} of prompts that are run as one batch."""
    sequences = [torch.tensor(s) for prompt in prompts for s in prompt.sequences]
    device = loading.input_device(model)
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(device)
    lengths = torch.tensor([len(s) for s in sequences], device=device)
    real = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    shape = (families.num_layers(model), len(prompts), families.width(model))

    scores: dict[str, Array] = {}
    sizes: dict[str, list[Tensor]] = {}
    gradient: Tensor | None = None  # dy/dhidden: the passes differ in gradients, not in values
    for kind, names in passes.items():
        if kind == "path":
            for name in names:
                path = _along_path(model, ids, lengths, target, SCORES[name])
                scores[name] = path.transpose(0, 1).cpu().numpy()
                _check_finite(model, name, scores[name], prompts)
            continue
        filled = {name: torch.empty(shape, device=device) for name in names}
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(kind != "forward"))
            stack.enter_context(rules(model, kind))
            watching = _watching(model, len(prompts), real[:, :, None], filled, first.kept, sizes)
            stack.enter_context(watching)
            hidden = run(model, ids)
            if kind != "forward":
                if gradient is None:
                    gradient = _gradient(model, target, hidden.detach(), ids, lengths)
                hidden.backward(gradient)
        for name, value in filled.items():
            scores[name] = value.transpose(0, 1).cpu().numpy()
            _check_finite(model, name, scores[name], prompts)
    for name, layers in sizes.items():
        first.add(name, *torch.stack([each.cpu() for each in layers]).sum(0).tolist())
    return scores


def rules(model: PreTrainedModel, kind: str) -> AbstractContextManager[None]:
    """The rules of relevance of a pass. Only now is lxt imported: other scores do without.
    InputError: it is not there.
    """
    if kind in ("plain", "forward"):
        return nullcontext()
    try:
        from sparc3.relevance.lrp import RULE_SETS, attnlrp
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        problem = f"lrp and its variants need the package {package}, which is not installed"
        remedy = f"install it by: python -m pip install {package}, or take gradient"
        raise InputError(f"params: scores: {problem}; {remedy}") from None
    return attnlrp(model, RULE_SETS[kind])


@contextmanager
def _watching(
    model: PreTrainedModel,
    prompts: int,
    real: Tensor,
    into: dict[str, Tensor],
    first_kept: bool,
    sizes: dict[str, list[Tensor]],
) -> Iterator[None]:
    """Fill into[name] (layer, prompt, neuron) while the model runs, and then runs backward; `sizes`
    by layer. `real` (sequence, token, 1): no padding; sequences of a prompt stand together.
    """
    firsts = slice(None, None, real.shape[1])

    def observe(
        names: list[str], layer: int, mlp: MLP, values: Tensor, at: Tensor, of: slice
    ) -> None:
        # Gradients go no further than the first tensor asked for: that of the first layer.
        if not at.requires_grad:
            at.requires_grad_()
        values = values.detach().view(prompts, -1, values.shape[-1])

        def reduce(gradient: Tensor) -> None:
            gradient = gradient.view(prompts, -1, gradient.shape[-1])[..., of]
            for name in names if SCORES[names[0]].at == "neurons" else []:
                size = (values.float() * gradient.float()).abs().sum((0, 2), dtype=torch.float64)
                sizes.setdefault(name, []).append(torch.stack([size[firsts].sum(), size.sum()]))
            if not first_kept:
                gradient = gradient.clone()  # autograd goes on with its own
                gradient[:, firsts] = 0
            for name in names:
                into[name][layer] = SCORES[name].of(mlp, values, gradient)

        at.register_hook(reduce)

    forward = [n for n in into if SCORES[n].gradient is None]
    neurons = [n for n in into if SCORES[n].gradient and SCORES[n].at == "neurons"]
    weights = [n for n in into if SCORES[n].gradient and SCORES[n].at == "weights"]

    def hook(layer: int, mlp: MLP) -> None:
        def before_down(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            h = args[0]
            for name in forward:
                values = h.detach().view(*real.shape[:2], -1)  # OPT runs all tokens as one axis
                per_sequence = SCORES[name].of(mlp, values, real.to(h.device))
                preferred, *other = per_sequence.view(prompts, -1, h.shape[-1]).unbind(1)
                into[name][layer] = preferred - other[0] if other else preferred
            if neurons:
                observe(neurons, layer, mlp, h, h, slice(None))

        def after_up(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            observe(weights, layer, mlp, args[0], output, mlp.up.of)

        stack.callback(mlp.down.register_forward_pre_hook(before_down).remove)
        if weights:
            stack.callback(mlp.up.module.register_forward_hook(after_up).remove)

    with ExitStack() as stack:
        for layer, mlp in enumerate(families.mlps(model)):
            hook(layer, mlp)
        yield


def _along_path(
    model: PreTrainedModel, ids: Tensor, lengths: Tensor, target: Target, row: Score
) -> Tensor:
    """Integrated gradients (layer, prompt, neuron): of a layer they sum up to y minus what y is
    without all its neurons, but for the error of the quadrature (Sundararajan et al. 2017).
    """
    nodes, weights = np.polynomial.legendre.leggauss(row.steps)
    place = torch.tensor(np.repeat((nodes + 1) / 2, len(ids)), device=ids.device)
    share = torch.tensor(np.repeat(weights / 2, len(ids)), device=ids.device)
    many, lengths = ids.repeat(row.steps, 1), lengths.repeat(row.steps)
    blocks, found = families.layers(model), []
    prompts = len(ids) // (2 if target == "pair" else 1)
    with torch.no_grad(), trunk.keeping(blocks, range(len(blocks) - 1)) as kept:
        run(model, ids)
    for layer, mlp in enumerate(families.mlps(model)):
        ends: list[Tensor] = []

        def scale(module: Any, args: tuple[Tensor, ...], ends: list[Tensor] = ends) -> Any:
            h = args[0].detach()
            each = h.view(len(many), -1, h.shape[-1])  # OPT runs all tokens as one axis
            scaled = (each * place.to(each)[:, None, None]).view(h.shape)
            ends.extend((each, scaled.requires_grad_()))
            return (scaled,)

        with ExitStack() as stack:
            stack.callback(mlp.down.register_forward_pre_hook(scale).remove)
            if layer:
                below = trunk.repeated(kept[layer - 1], row.steps)
                stack.enter_context(trunk.skipping(blocks[:layer], below))
            hidden = run(model, many)
            hidden.backward(_gradient(model, target, hidden.detach(), many, lengths))
        h, scaled = ends
        assert scaled.grad is not None
        of_steps = row.of(mlp, h, scaled.grad.view(h.shape))
        weighted = of_steps * share.to(of_steps)[:, None]
        found.append(weighted.view(row.steps, prompts, -1, h.shape[-1]).sum((0, 2)))
    return torch.stack(found)


def run(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Last hidden states. Padding is not masked, for it is never seen. Without any mask
    transformers would write out the causal one; with ones it leaves causality to sdpa, which is
    faster.
    """
    with loading.attention(ids):
        states = families.body(model)(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        )
    return states.last_hidden_state


AT_THE_END = ("max-logit", "contrast-logit")  # targets of which one position is read


def _predicting(target: Target, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence and position of all hidden states that a target is read from."""
    if target in AT_THE_END:
        return torch.arange(len(ids), device=ids.device), lengths - 1
    before_last = torch.arange(ids.shape[1] - 1, device=ids.device) < lengths[:, None] - 1
    rows, positions = torch.nonzero(before_last, as_tuple=True)
    return rows, positions


def _parts(
    model: PreTrainedModel, target: Target, hidden: Tensor, ids: Tensor, lengths: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Some at a time, sequence and position (n,) of the hidden states that a target is read from,
    those states (n, width), a leaf if gradients are on, and what each adds to y, (n,).
    """
    ids, lengths = ids.to(hidden.device), lengths.to(hidden.device)
    sign = torch.ones_like(lengths)
    sign[1::2] = -1 if target == "pair" else 1  # of (preferred, other), row by row
    rows, positions = _predicting(target, ids, lengths)
    for row, position in zip(
        rows.split(POSITIONS_AT_ONCE), positions.split(POSITIONS_AT_ONCE), strict=True
    ):
        leaf = hidden[row, position].requires_grad_(torch.is_grad_enabled())
        logits = families.logits(model, leaf)
        if target in AT_THE_END:
            y = logits.amax(-1)
            if target == "contrast-logit":
                y = y - logits.mean(-1)
        else:
            log_p = torch.log_softmax(logits.float(), -1)
            share = (sign / (lengths - 1))[row]
            y = log_p[torch.arange(len(row)), ids[row, position + 1]] * share
        yield row, position, leaf, y


def _gradient(
    model: PreTrainedModel, target: Target, hidden: Tensor, ids: Tensor, lengths: Tensor
) -> Tensor:
    """dy/dhidden, y summed over all prompts."""
    gradient = torch.zeros_like(hidden)
    for row, position, leaf, y in _parts(model, target, hidden, ids, lengths):
        gradient[row, position] = torch.autograd.grad(y.sum(), leaf)[0]
    return gradient


def explained(
    model: PreTrainedModel, target: Target, hidden: Tensor, ids: Tensor, lengths: Tensor
) -> Tensor:
    """y of every prompt, float64 (prompt,): what scores with a gradient explain. `hidden`: last
    hidden states (sequence, token, width) of `ids`, padded to the right to one length.
    """
    values = torch.zeros(len(ids), dtype=torch.float64, device=hidden.device)
    with torch.no_grad():
        for row, _, _, y in _parts(model, target, hidden, ids, lengths):
            values.index_add_(0, row, y.double())
    return values.view(-1, 2).sum(1) if target == "pair" else values


def _check_finite(
    model: PreTrainedModel, name: str, scores: Array, prompts: Sequence[Prompt]
) -> None:
    bad = ~np.isfinite(scores).all(axis=(1, 2))
    if bad.any():
        first = int(bad.argmax())
        layer = int((~np.isfinite(scores[first])).any(axis=1).argmax())
        raise InputError(
            f"prompt {prompts[first].id}: score {name} is not finite in layer {layer}; "
            f"{loading.not_finite(model)}"
        )
