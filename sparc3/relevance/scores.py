"""Neuron scores per prompt: relevance, gradient and activation.

h is the vector that enters the MLP output projection (one coordinate per neuron) and y the target.

| score          | per prompt and neuron i; sums over the tokens t of the prompt           |
|----------------|-------------------------------------------------------------------------|
| lrp            | sum_t h_ti dy/dh_ti under AttnLRP: signed (SparC3, Eq. 8)               |
| cp-lrp, relp   | as lrp, under other rules (`lrp.RULE_SETS`)                             |
| lrp-abs        | sum_j |w_ij dy/dw_ij| under AttnLRP, w the incoming weights of `up`     |
| gradient       | as lrp, with the plain gradient                                         |
| integrated-    | as gradient, whose mean is taken while all neurons of a layer go        |
| gradients      | together from 0 to h (Sundararajan et al. 2017); costs layers x steps / 2|
|                | times as much, and says little where a norm follows the MLP (Gemma 3)   |
| activation     | mean_t |h_ti|                                                           |
| max-activation | max_t h_ti (what AurA ranks by)                                         |
| wanda          | ||W_:i||_2 sqrt(sum_t h_ti^2), W the output projection                  |

A new score is one function and one row of SCORES. Importing this takes no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from sparc3.model import families

if TYPE_CHECKING:
    from torch import Tensor

    from sparc3.model.families import MLP

Target = Literal["max-logit", "contrast-logit", "likelihood", "pair"]
TARGETS: tuple[Target, ...] = get_args(Target)
PRODUCTS_AT_ONCE = 2**19  # of a weight and its gradient: they stay in the processor's cache


class Score(NamedTuple):
    """One row of SCORES.

    `of(mlp, values, last)` reduces the tokens of P prompts to (P, neuron). `values` is h, or at
    "weights" the input x of `up`. `last` is dy/dh, or at "weights" the gradient at the output of
    `up`: zero on padding. With gradient None `last` is instead the mask of real tokens, and P
    counts sequences. All are (P, token, coordinate), the mask (P, token, 1); with a gradient the
    tokens of both sequences of a pair are one axis. `gradient`: plain, along a path, or by a set of
    rules; a path is read at so many `steps` (Gauss-Legendre).
    """

    of: Callable[[MLP, Tensor, Tensor], Tensor]
    gradient: Literal["attnlrp", "cp-lrp", "relp", "plain", "path"] | None
    at: Literal["neurons", "weights"] = "neurons"
    steps: int = 0


def _input_times_gradient(mlp: MLP, h: Tensor, gradient: Tensor) -> Tensor:
    return (h.float() * gradient.float()).sum(1)


def _weight_times_gradient(mlp: MLP, x: Tensor, gradient: Tensor) -> Tensor:
    import torch

    size = families.incoming(mlp.up).abs()
    deltas = gradient.transpose(1, 2)
    some = max(1, PRODUCTS_AT_ONCE // (len(x) * x.shape[2]))
    sums = deltas.new_empty(deltas.shape[:2], dtype=torch.float32)
    for start in range(0, len(size), some):
        part = slice(start, start + some)
        products = torch.bmm(deltas[:, part], x).abs_().mul_(size[part])  # |w * dy/dw|
        sums[:, part] = products.sum(2, dtype=torch.float32)
    return sums


def _mean_absolute(mlp: MLP, h: Tensor, real: Tensor) -> Tensor:
    return (h.float().abs() * real).sum(1) / real.sum(1)


def _maximum(mlp: MLP, h: Tensor, real: Tensor) -> Tensor:
    return h.float().masked_fill(~real, -math.inf).amax(1)


def _wanda(mlp: MLP, h: Tensor, real: Tensor) -> Tensor:
    import torch

    columns = torch.linalg.vector_norm(families.outgoing(mlp.down).float(), dim=0)
    return columns * torch.linalg.vector_norm(h.float() * real, dim=1)


SCORES: dict[str, Score] = {
    "lrp": Score(_input_times_gradient, gradient="attnlrp"),
    "cp-lrp": Score(_input_times_gradient, gradient="cp-lrp"),
    "relp": Score(_input_times_gradient, gradient="relp"),
    "lrp-abs": Score(_weight_times_gradient, gradient="attnlrp", at="weights"),
    "gradient": Score(_input_times_gradient, gradient="plain"),
    "integrated-gradients": Score(_input_times_gradient, gradient="path", steps=3),
    "activation": Score(_mean_absolute, gradient=None),
    "max-activation": Score(_maximum, gradient=None),
    "wanda": Score(_wanda, gradient=None),
}
