"""The trunk: what lies below a layer is computed once, and kept for all that begin there."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def keeping(blocks: "Sequence[nn.Module]", places: Iterable[int]) -> Iterator[dict[int, Any]]:
    """Within the block, what left the blocks at `places` when the model last ran, by place."""
    kept: dict[int, Any] = {}
    with ExitStack() as stack:
        for place in places:

            def keep(module: "nn.Module", args: Any, output: Any, place: int = place) -> None:
                kept[place] = output

            stack.callback(blocks[place].register_forward_hook(keep).remove)
        yield kept


@contextmanager
def skipping(blocks: "Sequence[nn.Module]", output: Any) -> Iterator[None]:
    """Within the block `blocks` compute nothing: whatever enters them, `output` leaves them."""
    replaced = [vars(block).get("forward") for block in blocks]  # accelerate puts one there
    try:
        for block in blocks:
            vars(block)["forward"] = lambda *args, **kwargs: output
        yield
    finally:
        for block, forward in zip(blocks, replaced, strict=True):
            if forward is None:
                vars(block).pop("forward", None)
            else:
                vars(block)["forward"] = forward


def repeated(output: Any, times: int) -> Any:
    """A block's output for `times` batches like the one that it was kept of, one after another."""
    if isinstance(output, tuple):  # of which only hidden states go on
        return (repeated(output[0], times), *output[1:])
    return output.repeat(times, 1, 1)
