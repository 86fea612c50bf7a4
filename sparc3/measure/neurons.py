"""What single neurons do: the tokens that one promotes, and the texts that drive it most.

Both are aids to reading, no evidence: a neuron also acts through the layers above it. The first
token of a text, at which many neurons are extreme whatever follows, is not looked at.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from sparc3.base.files import Array
from sparc3.circuits.circuit import Circuit

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS, TEXTS = 8, 3  # that are kept of every neuron
BATCH_TOKENS = 1024  # that are read together


def push(model: "PreTrainedModel", layer: int, neuron: int) -> "Tensor":
    """What a positive activation adds to the logits, (vocabulary,): the neuron's column of the
    output projection, through the final norm, without its bias, and the unembedding.

    Of a hidden state that is this direction alone: the order of the tokens counts, not the size.
    """
    import torch

    from sparc3.model import families

    head = families.head(model).get_parameter("weight").detach()
    direction = families.outgoing(families.mlps(model)[layer].down)[:, neuron].detach()
    norm = families.final_norm(model)
    if norm is not None:
        with torch.no_grad():
            direction = norm(direction) - norm(torch.zeros_like(direction))
    return head.float() @ direction.to(head.device).float()


@contextmanager
def _listening(model: "PreTrainedModel", circuit: Circuit) -> "Iterator[dict[int, Tensor]]":
    """Within the block, what entered the output projections of the circuit's layers last."""
    from sparc3.model import families

    heard: dict[int, Tensor] = {}
    downs = [mlp.down for mlp in families.mlps(model)]
    with ExitStack() as stack:
        for layer in set(circuit.layers.tolist()):

            def hear(module: Any, args: Any, layer: int = layer) -> None:
                heard[layer] = args[0].reshape(-1, args[0].shape[-1])

            stack.callback(downs[layer].register_forward_pre_hook(hear).remove)
        yield heard


def peaks(
    model: "PreTrainedModel", circuit: Circuit, tokens: Sequence[Sequence[int]]
) -> tuple[Array, Array]:
    """Every neuron's activation of largest size, with its sign, and its position: (text, neuron).

    `tokens`: of each text at least two, the first of which is not looked at.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from sparc3.measure.likelihood import batches
    from sparc3.model import families, loading

    body, device = families.body(model), loading.input_device(model)
    values = np.zeros((len(tokens), len(circuit)))
    places = np.zeros_like(values, dtype=np.int64)
    with _listening(model, circuit) as heard, torch.no_grad():
        for batch in batches([len(ids) for ids in tokens], BATCH_TOKENS):
            rows = [torch.tensor(tokens[at]) for at in batch]
            ids = pad_sequence(rows, batch_first=True).to(device)
            with loading.attention(ids):
                body(input_ids=ids, use_cache=False)
            columns = [
                heard[layer][:, neuron].float().cpu() for layer, neuron, *_ in circuit.rows()
            ]
            h = torch.stack(columns, 1).view(len(batch), -1, len(circuit)).numpy()
            for at, row, text in zip(batch, h, rows, strict=True):
                places[at] = 1 + np.abs(row[1 : len(text)]).argmax(0)
                values[at] = row[places[at], np.arange(len(circuit))]
    return values, places


def describe(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    circuit: Circuit,
    texts: Mapping[str, Sequence[str]],
) -> list[dict[str, Any]]:
    """Of every neuron the tokens that it promotes and demotes most, and the texts, each of a prompt
    set, in which its activation is largest, with the token at which it is.
    """
    from sparc3.model import loading

    every = list(dict.fromkeys((name, text) for name, there in texts.items() for text in there))
    tokens = loading.encode(tokenizer, [text for _, text in every]) if every else []
    kept = [at for at, ids in enumerate(tokens) if len(ids) > 1]
    values, places = peaks(model, circuit, [tokens[at] for at in kept])
    found = []
    for column, (layer, neuron, score, _) in enumerate(circuit.rows()):
        order = push(model, layer, neuron).argsort(descending=True, stable=True)
        ends = {"promotes": order[:TOKENS], "demotes": order.flip(0)[:TOKENS]}
        top = np.argsort(-np.abs(values[:, column]), kind="stable")[:TEXTS].tolist()
        driven = []
        for row in top:
            name, ids, place = every[kept[row]][0], tokens[kept[row]], int(places[row, column])
            said = {
                "before": tokenizer.decode(ids[:place], skip_special_tokens=True),
                "token": tokenizer.decode([ids[place]]),
                "after": tokenizer.decode(ids[place + 1 :]),
            }
            driven.append({"set": name, **said, "activation": float(f"{values[row, column]:.4g}")})
        words = {key: [tokenizer.decode([i]) for i in ids.tolist()] for key, ids in ends.items()}
        found.append({"layer": layer, "neuron": neuron, "score": score, **words, "texts": driven})
    return found
