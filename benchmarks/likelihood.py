"""Likelihoods against the model's plain forward pass, in tokens scored per second.

    python -m benchmarks.likelihood [MODEL]

The plain forward passes read the very batches that `sparc3.measure.likelihood` makes: "decoder"
stops at the last hidden state, "forward" goes on to the logits of every position, all at once.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.generation import MODEL, REPEATS, alternating, machine, table
from sparc3.base.files import read_jsonl
from sparc3.base.params import Model
from sparc3.circuits.circuit import INTACT
from sparc3.measure.likelihood import Window, continuation_nll, token_nll, window_scores
from sparc3.model import families, loading

TEXTS = Path("data/boolq.jsonl")
ITEMS = Path("data/stereoset.jsonl")
KINDS = ("stereotype", "anti-stereotype", "unrelated")
BATCH_TOKENS = 2048

Way = Callable[[], int]


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[dict[str, Any]]]:
    """The inputs of every forward pass of the model's body within the block."""
    inputs: list[dict[str, Any]] = []
    hook = families.body(model).register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs), with_kwargs=True
    )
    yield inputs
    hook.remove()


def against_forward(
    model: PreTrainedModel, tokens: int, **scorers: Callable[[], Any]
) -> dict[str, Way]:
    """Ways that score `tokens` tokens; the plain passes replay the batches of the first scorer."""
    with recorded(model) as batches:
        next(iter(scorers.values()))()

    @torch.inference_mode()
    def replay(module: Callable[..., Any]) -> int:
        for batch in batches:
            module(**batch)
        return tokens

    def scored(score: Callable[[], Any]) -> int:
        score()
        return tokens

    ways: dict[str, Way] = {
        "decoder": lambda: replay(families.body(model)),
        "forward": lambda: replay(model),
    }
    return ways | {name: lambda score=score: scored(score) for name, score in scorers.items()}


def named(texts: Sequence[object]) -> list[str]:
    return [str(place) for place in range(len(texts))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=MODEL)
    spec = Model(path=parser.parse_args().model)
    model, tokenizer = loading.load(spec), loading.tokenizer(spec)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    passages = [encode(row["passage"]) for row in read_jsonl(TEXTS)[:400]]
    items = [row for row in read_jsonl(ITEMS) if row["type"] == "intrasentence"][:100]
    groups = [[encode(row[kind]) for kind in KINDS] for row in items]
    sentences = [tokens for group in groups for tokens in group]
    texts = [tokens[:128] for tokens in passages if len(tokens) >= 128][:24]
    long = [token for tokens in passages for token in tokens][:3072]
    workloads = {
        "24 texts of 128 tokens": against_forward(
            model,
            sum(map(len, texts)),
            token_nll=lambda: token_nll(model, [INTACT], texts, named(texts), BATCH_TOKENS),
        ),
        "100 StereoSet items of 3 sentences": against_forward(
            model,
            sum(map(len, sentences)),
            token_nll=lambda: token_nll(model, [INTACT], sentences, named(sentences), BATCH_TOKENS),
            continuation_nll=lambda: continuation_nll(
                model, [INTACT], groups, named(groups), BATCH_TOKENS
            ),
        ),
        "a text of 3072 tokens, window 1024, stride 512": against_forward(
            model,
            len(long),
            window_scores=lambda: window_scores(
                model, [INTACT], [long], ["long"], Window(1024, 512), BATCH_TOKENS
            ),
        ),
    }
    print(f"{machine()}, {REPEATS} repeats")
    for name, ways in workloads.items():
        print(f"\n{name}")
        print(table(alternating(ways), "tokens/s", "decoder"))


if __name__ == "__main__":
    main()
