import numpy as np
import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparc3.base.params import Keep
from sparc3.circuits.circuit import INTACT
from sparc3.measure.generate import Sampling, complete
from sparc3.prompts.second_pass import highest, keep_highest


def whole_numbers() -> PreTrainedTokenizerFast:
    """A tokenizer of whole numbers: text "3 7" is the tokens 3 and 7."""
    vocabulary = {str(number): number for number in range(tiny.VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


WORDS = whole_numbers()
ROWS = [{"id": str(i), "text": f"{i} {i + 1}"} for i in range(12)]


def lengths(texts: list[str]) -> np.ndarray:
    return np.array([sum(int(word) for word in text.split()) / 500 for text in texts])


def test_highest_keeps_order_and_breaks_ties_by_it() -> None:
    assert highest([0.1, 0.9, 0.5, 0.9, 0.5], 3) == [1, 2, 3]
    assert highest([0.1], 0) == []


def test_the_rows_with_the_highest_completion_are_kept_with_their_score() -> None:
    model, keep = tiny.model("llama"), Keep(scorer="s", top=4, new_tokens=5)
    kept = keep_highest(model, WORDS, ROWS, keep, lengths, "set")
    everything = keep_highest(
        model, WORDS, ROWS, Keep(scorer="s", top=12, new_tokens=5), lengths, "set"
    )
    scores = sorted((row["elicited"] for row in everything), reverse=True)
    assert sorted((row["elicited"] for row in kept), reverse=True) == scores[:4]
    assert [row["id"] for row in kept] == sorted((r["id"] for r in kept), key=int)
    assert keep_highest(model, WORDS, ROWS, keep, lengths, "set") == kept


def test_chance_flatters_the_chosen() -> None:
    """The winner's curse: drawn again, the prompts that scored highest score lower."""
    model = tiny.model("llama")
    rows = [{"id": str(i), "text": "3 4"} for i in range(60)]  # alike: all difference is chance
    first = keep_highest(model, WORDS, rows, Keep("s", 15, 5, 1.0, 1.0, 0), lengths, "set")
    again = keep_highest(model, WORDS, first, Keep("s", 15, 5, 1.0, 1.0, 1), lengths, "set")
    gap = np.mean([r["elicited"] for r in first]) - np.mean([r["elicited"] for r in again])
    assert gap > 0.02


def test_evaluation_with_the_same_seed_draws_other_completions() -> None:
    model, rows = tiny.model("llama"), [{"id": str(i), "text": "3 4"} for i in range(12)]
    kept = keep_highest(model, WORDS, rows, Keep("s", 12, 5, 1.0, 1.0, 0), lengths, "set")
    ids = [row["id"] for row in rows]
    (drawn,) = complete(model, [INTACT], [[3, 4]] * 12, ids, Sampling(1, 5, 1.0, 1.0, 0))
    again = lengths(WORDS.batch_decode([tokens for (tokens,) in drawn], skip_special_tokens=True))
    assert not np.array_equal([row["elicited"] for row in kept], again)


def test_extended_texts_end_in_what_was_scored() -> None:
    model, rows = tiny.model("llama"), [{**row, "tokens": 2} for row in ROWS]
    plain = keep_highest(model, WORDS, rows, Keep("s", 4, 5), lengths, "set")
    longer = keep_highest(model, WORDS, rows, Keep("s", 4, 5, extend=True), lengths, "set")
    assert [row["id"] for row in longer] == [row["id"] for row in plain]
    for before, after in zip(plain, longer, strict=True):
        completion = after["text"].removeprefix(before["text"])
        assert lengths([completion]).item() == after["elicited"] == before["elicited"]
        assert after["tokens"] == 2 + 5
    assert [row["text"] for row in rows] == [row["text"] for row in ROWS]
