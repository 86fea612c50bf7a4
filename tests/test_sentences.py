"""What stands in front of a sentence, so that its first word is scored, for several tokenizers."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sparc3.base.errors import InputError
from sparc3.model.loading import encode, encode_sentences

WORDS = {"[unk]": 0, "a": 1, "b": 2, "<|endoftext|>": 3, "<s>": 4, "</s>": 5, "<chat>": 6}


def made(front: str | None = None, without: tuple[str, ...] = (), **special: str) -> Any:
    """A tokenizer of words which puts `front`, if anything, before every text."""
    words = {word: n for word, n in WORDS.items() if word not in without}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if front:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{front} $A", special_tokens=[(front, WORDS[front])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.mark.parametrize(
    ("tokenizer", "front"),
    [
        (made("<s>", bos_token="<s>", eos_token="</s>"), "<s>"),  # LLaMA: there already, once
        (made(bos_token="<|endoftext|>", eos_token="<|endoftext|>"), "<|endoftext|>"),  # GPT-2
        (made(bos_token="<chat>", eos_token="</s>"), "<|endoftext|>"),  # chat models of SmolLM2
        (made(without=("<|endoftext|>",), bos_token="<s>", eos_token="</s>"), "<s>"),
        (made(without=("<|endoftext|>",), eos_token="</s>"), "</s>"),
    ],
)
def test_one_token_stands_in_front_of_a_sentence(tokenizer: Any, front: str) -> None:
    first = WORDS[front]
    assert encode_sentences(tokenizer, ["a b", "b"]) == [[first, 1, 2], [first, 2]]
    plain = encode(tokenizer, ["a b"])  # other texts keep what their tokenizer gives them
    assert plain in ([[1, 2]], [[first, 1, 2]])


def test_a_tokenizer_without_any_is_refused() -> None:
    with pytest.raises(InputError, match="give it a bos_token or an eos_token"):
        encode_sentences(made(without=("<|endoftext|>",)), ["a"])
