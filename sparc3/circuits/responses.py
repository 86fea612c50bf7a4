"""What modules of a model give on prompts: one pass, one vector for every prompt and module."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from sparc3.base.files import Array
from sparc3.circuits.intervention import Arrays, replace_output, transported

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

DEPTHS = (0.25, 0.5, 0.75)  # of the layers that a single direction is taken from


class Prompts(NamedTuple):
    """What an intervention is learnt from, as token ids.

    instruction: what a prompt says, without the `front` tokens that every text begins with.
    """

    behaviour: Sequence[Sequence[int]]
    reference: Sequence[Sequence[int]]
    instruction: Sequence[int] = ()
    front: int = 0


Fit = Callable[[Array, Array], Arrays]  # (prompt, coordinate) of behaviour, of reference


def _mean(values: "Tensor", real: "Tensor") -> "Tensor":
    return (values * real).sum(1) / real.sum(1)


def _maximum(values: "Tensor", real: "Tensor") -> "Tensor":
    return values.masked_fill(~real, float("-inf")).amax(1)


def _last(values: "Tensor", real: "Tensor") -> "Tensor":
    import torch

    return values[torch.arange(len(values)), real.sum((1, 2)) - 1]


POOLS = {"mean": _mean, "max": _maximum, "last": _last}


def fitted(
    model: "PreTrainedModel",
    prompts: Prompts,
    sites: Sequence[str],
    pool: str,
    fit: Fit,
    at_once: bool = True,
) -> dict[str, Array]:
    """What `fit` makes of every module's outputs, pooled over a prompt's tokens: arrays by
    MODULE/ARRAY. One pass of all prompts; unless `at_once`, a module is transported as soon as it
    is fitted, and what comes after it is fitted to that (ml-act's incremental mode).
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from sparc3.model import families, loading

    device, count = loading.input_device(model), len(prompts.behaviour)
    texts = [torch.tensor(text) for text in (*prompts.behaviour, *prompts.reference)]
    lengths = torch.tensor([len(text) for text in texts])
    ids = pad_sequence(texts, batch_first=True).to(device)
    real = (torch.arange(ids.shape[1]) < lengths[:, None])[..., None]
    found: dict[str, Array] = {}

    def hook(site: str, module: "nn.Module", args: Any, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        values = y.float().view(len(texts), -1, y.shape[-1])  # OPT runs all tokens as one axis
        pooled = POOLS[pool](values, real.to(y.device)).cpu().numpy()
        arrays = fit(pooled[:count], pooled[count:])
        found.update({f"{site}/{name}": array for name, array in arrays.items()})
        return None if at_once else replace_output(output, lambda y: transported(arrays, y, 1.0))

    with ExitStack() as stack, torch.inference_mode():
        for site in sites:
            hooked = model.get_submodule(site).register_forward_hook(partial(hook, site))
            stack.callback(hooked.remove)
        families.body(model)(input_ids=ids, use_cache=False)
    return found


def projections(model: "PreTrainedModel") -> list[str]:
    """Names of the modules up, gate and down of every layer's MLP."""
    from sparc3.model import families

    names = families.family(model.config.model_type)
    own = dict.fromkeys(name for name in (names.up, names.gate, names.down) if name is not None)
    return [f"{block}.{name}" for block in blocks(model) for name in own]


def blocks(model: "PreTrainedModel") -> list[str]:
    """Names of the layers."""
    from sparc3.model import families

    path = families.family(model.config.model_type).layers
    return [f"{path}.{layer}" for layer in range(families.num_layers(model))]


def at_depths(model: "PreTrainedModel") -> list[str]:
    """Names of the layers at DEPTHS."""
    names = blocks(model)
    return list(dict.fromkeys(names[int(depth * len(names))] for depth in DEPTHS))
