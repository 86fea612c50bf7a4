"""Perplexity, likelihood and completions against the slow way; what all instruments share."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from naive import FEW, how, likelihood, log_p, measured, pair_difference
from test_elicit import WORDS

from sparc3.base.errors import InputError
from sparc3.base.params import Model
from sparc3.circuits.ablate import pruned
from sparc3.circuits.circuit import INTACT, Circuit
from sparc3.measure.generate import quality, repeated
from sparc3.measure.instrument import (
    Differences,
    Measured,
    Reading,
    Sample,
    differences,
    effect,
    mean_reading,
    objective_error,
)
from sparc3.measure.instruments import INSTRUMENTS, completions, nll, pairs, perplexity, repetition
from sparc3.model import loading
from sparc3.stages.checks import load


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expected Maximum Toxicity of two completions; otherwise it takes 25."""
    monkeypatch.setattr(completions, "MOST", 2)


RNG = np.random.default_rng(0)
TOXICITY = replace(load().behaviours["toxicity"], scorers=("profanity",))


def sample(lengths: list[int]) -> Sample:
    tokens = [RNG.integers(0, 50, n).tolist() for n in lengths]
    return Sample(
        [str(i) for i in range(len(lengths))], [str(i) for i in range(len(lengths))], tokens
    )


def scored(scores: np.ndarray, groups: list[str] | None = None, floor: float = 0.0) -> Measured:
    """The reading of completions from scores (prompt, completion), by the instrument itself."""
    flat = iter(scores)

    def write(*_: Any) -> list[list[dict[str, Any]]]:
        about = {"text": "", "length": 0, "repetition": 0.0}
        return [[{**about, "value": value} for row in flat for value in row]]

    ids = [str(i) for i in range(len(scores))]
    texts = Sample(ids, groups or ids, [[1]] * len(ids))
    values = scores.ravel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(completions, "write", write)
        settings = how(scorers={"profanity": lambda texts: values}, completions=scores.shape[1])
        settings = settings._replace(floors={"profanity": floor})
        (reading,) = completions.read(Any, [INTACT], texts, settings)  # type: ignore[arg-type]
    return measured(reading)


def completion_difference(before: Measured, after: Measured) -> Differences:
    return differences(completions.instrument(TOXICITY).values, before, after, FEW)


# --- likelihood and perplexity -----------------------------------------------------------------


def test_likelihood_is_the_sum_over_tokens() -> None:
    model = tiny.model("llama")
    texts = sample([7, 3, 12, 2])
    (found,) = nll.read(model, [INTACT], texts, how())
    expected = [-log_p(model, tokens) for tokens in texts.tokens]
    assert found.columns["nll"] == pytest.approx(expected, rel=1e-4)
    assert found.columns["tokens"].tolist() == [6, 2, 11, 1]
    assert nll.instrument(TOXICITY).levels(found)["nll"] == pytest.approx(
        sum(expected) / 20, rel=1e-4
    )
    assert perplexity.perplexity(found) == pytest.approx(math.exp(sum(expected) / 20), rel=1e-4)


def test_the_shift_is_the_rise_beyond_general_text() -> None:
    def of(behaviour: tuple[float, float], general: tuple[float, float]) -> Measured:
        return Measured(likelihood(behaviour, [10, 30]), likelihood(general, [10, 30]))

    before, after = of((20, 60), (10, 30)), of((30, 70), (14, 34))
    assert nll.shift(before, after) == pytest.approx((100 - 80) / 40 - (48 - 40) / 40)
    assert nll.shift(before, before) == 0


def test_the_interval_of_the_shift_is_around_it() -> None:
    tokens = RNG.integers(3, 20, (2, 12))
    groups = [f"g{i // 2}" for i in range(12)]
    old, new = (
        Measured(
            likelihood(RNG.random(12) * 40, tokens[0], groups),
            likelihood(RNG.random(12) * 40, tokens[1]),
        )
        for _ in range(2)
    )
    found = nll.shift_interval(old, new, FEW)
    assert found.value == pytest.approx(nll.shift(old, new))
    assert found.low <= found.value <= found.high
    assert found.n == 6


def test_the_error_of_an_objective_is_that_of_its_means() -> None:
    """Two independent means: their variances, over groups, add; and equal groups are one unit."""
    nlls = RNG.normal(3, 1, (4, 60))
    models = [
        Measured(*(Reading({"nll": nll, "tokens": np.ones(60)}) for nll in pair))
        for pair in (nlls[:2], nlls[2:])
    ]
    rises = nlls[2] - nlls[0], nlls[3] - nlls[1]
    expected = math.sqrt(sum(rise.var(ddof=1) / 60 for rise in rises))
    found = objective_error(nll.shift, *models)
    assert found == pytest.approx(expected, rel=0.15)  # 200 resamples: four standard errors, nearly

    def often(reading: Reading) -> Reading:
        columns = {name: np.repeat(column, 3) for name, column in reading.columns.items()}
        return Reading(columns, [str(unit) for unit in range(60) for _ in range(3)])

    grouped = [Measured(*map(often, each)) for each in models]
    assert objective_error(nll.shift, *grouped) == pytest.approx(expected, rel=0.15)
    assert objective_error(nll.shift, models[0], models[0]) == 0.0


def test_a_text_that_fits_the_window_is_read_whole() -> None:
    model = tiny.model("llama")
    texts, windows = sample([9, 4]), how(window=16, stride=8)
    (whole,) = nll.read(model, [INTACT], texts, how())
    (windowed,) = perplexity.read(model, [INTACT], texts, windows)
    assert windowed.columns["nll"] == pytest.approx(whole.columns["nll"], rel=1e-4)
    (long,) = perplexity.read(model, [INTACT], sample([40, 9]), windows)
    assert long.columns["tokens"].tolist() == [39, 8]


@pytest.mark.parametrize("stride", [8, 16])
def test_the_pieces_of_a_joined_text_share_out_its_likelihood(stride: int) -> None:
    model = tiny.model("llama")
    pieces = sample([9, 1, 30, 17])._replace(joined=True)
    whole = Sample(["a"], ["a"], [[token for piece in pieces.tokens for token in piece]])
    windows = how(window=16, stride=stride)
    (found,) = perplexity.read(model, [INTACT], pieces, windows)
    (expected,) = perplexity.read(model, [INTACT], whole, windows)
    assert found.columns["nll"].sum() == pytest.approx(expected.columns["nll"].sum())
    assert found.columns["tokens"].sum() == expected.columns["tokens"].sum()
    if stride == 8:
        assert found.columns["tokens"].tolist() == [8, 1, 30, 17]
        first = -log_p(model, pieces.tokens[0])
        assert found.columns["nll"][0] == pytest.approx(first, rel=1e-4)


def test_texts_are_joined_by_two_newlines_and_tokenised_as_one(fetched: Path) -> None:
    tokenizer: Any = loading.tokenizer(Model(path=str(fetched / "models/smollm2-135m")))
    articles = [" = One = \n\n It is cold .\n", " = Two = \n\n Gr\u00fc\u00dfe \u2603 .\n", "end"]
    rows = [{"id": n, "group": n, "text": t} for n, t in zip("abc", articles, strict=True)]
    found = perplexity.encode_joined(rows, tokenizer)
    whole = tokenizer("\n\n".join(articles), add_special_tokens=False).input_ids
    assert [token for piece in found.tokens for token in piece] == whole
    pieces = tokenizer.batch_decode(found.tokens, clean_up_tokenization_spaces=False)
    assert pieces == [f"{articles[0]}\n\n", f"{articles[1]}\n\n", "end"]
    assert found.ids == list("abc")
    assert found.joined


def test_perplexity_is_of_all_tokens_together() -> None:
    before = likelihood(RNG.random(9) * 50, RNG.integers(5, 30, 9))
    after = likelihood(before.columns["nll"] * 1.1, before.columns["tokens"])
    ratio = perplexity.perplexity(after) / perplexity.perplexity(before)
    assert perplexity.percent(before, after) == pytest.approx(100 * (ratio - 1))
    assert perplexity.change(before, after, FEW).value == pytest.approx(100 * (ratio - 1))


def test_texts_are_read_under_each_circuit_until_its_error_is_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A circuit that does nothing is read once; where it counts, before and after are of the same
    texts, whatever was read under others.
    """
    monkeypatch.setattr(perplexity, "AT_ONCE", 4)
    tokens = {f"t{i}": RNG.integers(0, 50, 12).tolist() for i in range(14)}

    def encode(rows: list[dict[str, str]], tokenizer: object) -> Sample:
        ids = [row["id"] for row in rows]
        return Sample(ids, [f"g{name[-1]}" for name in ids], [tokens[name] for name in ids])

    monkeypatch.setattr(perplexity, "encode", encode)
    model, edits = tiny.model("llama"), [INTACT, tiny.circuit(1, scale=0.999), tiny.circuit(0, 1)]
    rows = [{"id": name} for name in tokens]
    none, slight, strong = perplexity.read_until(model, edits, rows, how(), 0.3)
    assert [len(each.groups) for each in (none, slight, strong)] == [14, 4, 14]
    for edit, found in zip(edits, (none, slight, strong), strict=True):
        texts = encode(rows[: len(found.groups)], None)
        whole, alone = perplexity.read(model, [INTACT, edit], texts, how())
        assert found.groups == texts.groups
        for expected, shown in ((whole, found.before), (alone, found.after)):
            np.testing.assert_allclose(shown.columns["nll"], expected.columns["nll"], rtol=1e-5)
    assert perplexity.percent_error(*slight) <= 0.3 < perplexity.percent_error(*strong)


def test_the_error_of_perplexity_is_the_spread_over_samples_of_texts() -> None:
    """200 samples of 40 articles of 1 to 3 texts that rise and fall together."""
    estimates, errors = [], []
    for _ in range(200):
        groups = np.repeat(np.arange(40), RNG.integers(1, 4, 40))
        tokens = RNG.integers(20, 200, len(groups))
        rise = (0.01 + 0.05 * RNG.standard_normal(40)[groups]) * tokens
        before, after = likelihood(3.0 * tokens, tokens), likelihood(3.0 * tokens + rise, tokens)
        estimates.append(perplexity.percent(before, after))
        errors.append(perplexity.percent_error(before, after, [str(g) for g in groups]))
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.15)


def test_the_error_of_perplexity_in_closed_form() -> None:
    """Equal texts: the standard error of a mean, times the slope of exp."""
    tokens, rise = np.full(5, 10), np.array([0.1, 0.3, -0.2, 0.4, 0.0])
    before, after = likelihood(np.full(5, 30.0), tokens), likelihood(30.0 + rise, tokens)
    expected = 100 * math.exp(0.012) * np.std(rise / 10, ddof=1) / math.sqrt(5)
    assert perplexity.percent_error(before, after, list("abcde")) == pytest.approx(expected)
    assert perplexity.percent_error(before, before, list("abcde")) == 0
    with pytest.raises(InputError, match=r"needs 2 groups of texts, not 1; raise sweep\.texts"):
        perplexity.percent_error(before, after, ["a"] * 5)


# --- completions -------------------------------------------------------------------------------


def test_completion_differences_are_those_of_gehman() -> None:
    before, after = RNG.random((20, 5)), RNG.random((20, 5)) * 0.7
    found = completion_difference(scored(before), scored(after))
    total = [sum(sum(row) / len(row) for row in scores) / 20 for scores in (before, after)]
    assert found["reduction"]["value"] == pytest.approx(100 * (total[0] - total[1]) / total[0])
    emt = [sum(max(row) for row in scores) / 20 for scores in (before, after)]
    assert found["emt"]["value"] == pytest.approx(emt[1] - emt[0])
    toxic = [
        100 * sum(any(s >= 0.5 for s in row) for row in scores) / 20 for scores in (before, after)
    ]
    assert found["toxic_probability"]["value"] == pytest.approx(toxic[1] - toxic[0])
    levels = completions.levels(scored(before).reading)
    assert levels["profanity"] == pytest.approx(total[0])
    assert levels["profanity_emt"] == pytest.approx(emt[0])
    assert levels["profanity_toxic_probability"] == pytest.approx(toxic[0])


def test_a_reduction_is_above_the_floor_of_its_scorer() -> None:
    before, after = 0.4 + 0.3 * RNG.random((20, 2)), 0.35 + 0.2 * RNG.random((20, 2))
    old, new = scored(before, floor=0.3), scored(after, floor=0.3)
    found = completion_difference(old, new)
    fall = before.mean() - after.mean()
    assert found["reduction"]["value"] == pytest.approx(100 * fall / (before.mean() - 0.3))
    assert found["reduction"]["low"] < found["reduction"]["value"] < found["reduction"]["high"]
    plain = completion_difference(scored(before), scored(after))
    assert found["reduction"]["p"] == plain["reduction"]["p"]  # of the difference, as before
    assert found["improved"] == plain["improved"]
    assert completions.levels(old.reading) == completions.levels(scored(before).reading)
    shown = {"profanity_mean", "profanity_max", *completions.WRITING}
    assert shown == {*old.reading.prompts}
    everything = completion_difference(old, scored(np.full((20, 2), 0.3), floor=0.3))
    assert everything["reduction"]["value"] == pytest.approx(100)


def test_nothing_is_reduced_that_was_not_above_the_floor() -> None:
    low = 0.2 + 0.1 * RNG.random((10, 2))
    found = completion_difference(scored(low, floor=0.4), scored(low / 2, floor=0.4))
    assert "reduction" not in found
    assert "improved" in found


def test_expected_maximum_toxicity_takes_enough_completions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(completions, "MOST", 3)
    scores = RNG.random((8, 2))
    found = completion_difference(scored(scores), scored(0.5 * scores))
    assert {"reduction", "improved", *completions.WRITING} == {*found}
    assert completions.levels(scored(scores).reading).keys() == {"profanity"}
    assert "emt" in completion_difference(scored(RNG.random((8, 3))), scored(RNG.random((8, 3))))


def test_prompts_of_one_group_count_as_one() -> None:
    before, after = RNG.random((24, 2)), RNG.random((24, 2)) * 0.8
    groups = [f"g{i // 3}" for i in range(24)]
    apart = completion_difference(scored(before), scored(after))["reduction"]
    grouped = completion_difference(scored(before, groups), scored(after, groups))["reduction"]
    assert (grouped["n"], apart["n"]) == (8, 24)
    assert grouped["value"] == pytest.approx(apart["value"])


def test_improved_counts_prompts_and_halves_of_ties() -> None:
    before = scored(np.array([[0.5, 0.7], [0.2, 0.2], [0.1, 0.3], [0.9, 0.1]] * 2))
    after = scored(np.array([[0.4, 0.7], [0.1, 0.4], [0.3, 0.1], [0.2, 0.2]] * 2))
    found = completion_difference(before, after)["improved"]
    assert found["value"] == pytest.approx(100 * (2 + 0.5) / 4)  # falls, rises, ties, falls
    assert 0 <= found["low"] < found["value"] < found["high"] <= 100
    nothing = completion_difference(before, before)["improved"]
    assert nothing["value"] == nothing["low"] == nothing["high"] == 50


def test_writing_counts_degenerate_completions() -> None:
    found = completions.writing(
        [dict(quality(tokens)) for tokens in ([1, 2, 3, 4], [], [5, 5, 5, 5, 5, 5])]
    )
    assert found["degenerate_percent"] == pytest.approx(200 / 3)
    assert found["length"] == pytest.approx(10 / 3)


def test_repetition_reads_greedy_completions() -> None:
    model, texts = tiny.model("llama"), sample([7, 3, 12, 2])
    settings = how(WORDS, new_tokens=9)
    circuit = Circuit(np.array([0, 1]), np.array([3, 5]), np.zeros(2), np.zeros(2))
    readings = repetition.read(model, [INTACT, circuit], texts, settings)
    for reading, each in zip(readings, (INTACT, circuit), strict=True):
        expected = []
        for tokens in texts.tokens:
            ids = torch.tensor([tokens])
            with pruned(model, each), torch.no_grad():
                for _ in range(9):
                    ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            expected.append(repeated(ids[0, len(tokens) :].tolist()))
        assert reading.columns["rep_4"].tolist() == expected
    assert readings[0].columns["rep_4"].max() > 0
    value = repetition.instrument(TOXICITY).values[0]
    assert (value.name, value.column) == ("reduction", "rep_4")


def test_the_repetition_of_texts_is_that_of_their_words() -> None:
    texts = ["a b c d " * 3, "", "all of these words differ from one another"]
    assert repetition.of_texts(texts) == pytest.approx([5 / 9, 0, 0])


# --- what all share ----------------------------------------------------------------------------


def test_identical_models_differ_by_nothing() -> None:
    both = scored(RNG.random((10, 3)))
    likely = likelihood(RNG.random(10) * 30, np.full(10, 12), [f"g{i}" for i in range(10)])
    items = RNG.standard_normal((60, 3))
    changes = completion_difference(both, both)
    assert changes.pop("improved")["value"] == 50
    changes |= pair_difference(items, items, [f"t{i % 8}" for i in range(60)])
    changes["ppl_delta"] = perplexity.change(likely, likely, FEW)._asdict()
    for difference in changes.values():
        assert difference["value"] == difference["low"] == difference["high"] == 0
        assert difference["p"] == 1
    same = Measured(likely, likely)
    shift = nll.shift_interval(same, same, FEW)
    assert shift.value == shift.low == shift.high == 0


def test_draws_are_reduced_before_they_are_averaged() -> None:
    """Three draws with one bad completion each, in different places: EMT 0.9, not 0.3."""
    draws = [np.zeros((8, 3)) for _ in range(3)]
    for place, scores in enumerate(draws):
        scores[:, place] = 0.9
    mean = mean_reading([scored(scores).reading for scores in draws])
    found = completion_difference(measured(mean), scored(np.zeros((8, 3))))
    assert found["emt"]["value"] == pytest.approx(-0.9)
    assert found["toxic_probability"]["value"] == pytest.approx(-100)
    assert found["reduction"]["value"] == pytest.approx(100)

    terms = [f"t{i}" for i in range(8)]

    def margin(value: float) -> Reading:
        return pairs.reading(np.array([[value, 0, np.nan]] * 8), terms)

    mean = mean_reading([margin(value) for value in (1, 1, -4)])
    even = measured(margin(0))
    found = differences(pairs.VALUES, measured(mean), even, FEW)
    assert found["ss"]["value"] == pytest.approx(50 - 100 * 2 / 3)  # not that of the mean margin


def test_effects_are_larger_where_there_is_less_of_the_behaviour() -> None:
    def text(behaviour: float, general: float) -> Measured:
        own, other = (likelihood(np.full(8, n), np.full(8, 10)) for n in (behaviour, general))
        return Measured(own, other)

    def effect_of(instrument: str, name: str, before: Measured, after: Measured) -> float | None:
        values = {value.name: value for value in INSTRUMENTS[instrument](TOXICITY).values}
        return effect(values[name], before, after)

    # Beyond that of general text: 0.6 - 0.2.
    assert effect_of("nll", "nll_shift", text(30, 20), text(36, 22)) == pytest.approx(0.4)

    high, low = scored(np.full((8, 2), 0.5)), scored(np.full((8, 2), 0.2))
    assert effect_of("completions", "reduction", high, low) == pytest.approx(60)
    assert effect_of("completions", "emt", high, low) == pytest.approx(0.3)

    def pair(margin: float) -> Measured:
        items = np.array([[margin, 0, np.nan]] * 8)
        return measured(pairs.reading(items, [f"t{i}" for i in range(8)]))

    # Toward the even level from either side.
    assert effect_of("pairs", "margin", pair(0.2), pair(0.05)) == pytest.approx(0.15)
    assert effect_of("pairs", "margin", pair(-0.2), pair(-0.05)) == pytest.approx(0.15)
    assert effect_of("pairs", "margin", pair(0.2), pair(0.3)) == pytest.approx(-0.1)
    assert effect_of("pairs", "lms", pair(0.2), pair(0.1)) is None  # no unrelated texts


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_an_instrument_is_whole(name: str) -> None:
    instrument = INSTRUMENTS[name](TOXICITY)
    names = [value.name for value in instrument.values]
    assert len(names) == len(set(names))
    if instrument.swept:
        assert instrument.axis
        assert instrument.cell in names
