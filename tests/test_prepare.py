"""Prepare: splits, sampling and cutting against naive versions, and whole runs on small data."""

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import raw
from raw import sentence
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2TokenizerFast

from sparc3.base.artifacts import prompts_path, read_prompts
from sparc3.base.errors import InputError
from sparc3.base.files import digest, digest_text, read_json, read_jsonl
from sparc3.base.params import Params, PromptSet, scores_of
from sparc3.prompts import sampling
from sparc3.prompts.row import Row
from sparc3.prompts.sampling import Limits, Prompt
from sparc3.stages import checks, prepare
from sparc3.stages.checks import load

ROOT = Path(__file__).parent.parent
SHARES = {"attribute": 0.5, "tune": 0.2, "test": 0.3}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level BPE, trained on the words above: words are tokens, digits and é are bytes."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([sentence(seed, 30) for seed in range(50)], trainer)
    return made


def text_rows(number: int, words: int = 20, per_group: int = 1, start: int = 0) -> list[Row]:
    return [
        Row("made", f"made/{(start + n) // per_group}", "", sentence(start + n, words))
        for n in range(number)
    ]


# Splits


def test_largest_remainder_by_hand():
    assert sampling.largest_remainder(10, SHARES) == {"attribute": 5, "tune": 2, "test": 3}
    assert sampling.largest_remainder(3, SHARES) == {"attribute": 1, "tune": 1, "test": 1}
    assert sampling.largest_remainder(4, {"a": 1, "b": 1, "c": 1}) == {"a": 2, "b": 1, "c": 1}
    assert sampling.largest_remainder(5, {"a": 1.0, "b": 0.0}) == {"a": 5, "b": 0}
    assert sampling.largest_remainder(0, SHARES) == {"attribute": 0, "tune": 0, "test": 0}


def test_largest_remainder_sums_and_stays_within_one_of_the_shares():
    numbers = random.Random(0)
    for _ in range(500):
        weights = {key: numbers.random() for key in "abcd"}
        total = numbers.randint(0, 200)
        counts = sampling.largest_remainder(total, weights)
        assert sum(counts.values()) == total
        for key, weight in weights.items():
            assert abs(counts[key] - total * weight / sum(weights.values())) < 1


def test_splits_hold_their_share_of_the_groups_whatever_the_order():
    groups = [f"group {n}" for n in range(1000)]
    splits = sampling.split_of_groups(groups, SHARES)
    assert Counter(splits.values()) == {"attribute": 500, "tune": 200, "test": 300}
    assert sampling.split_of_groups([*reversed(groups), *groups], SHARES) == splits
    assert [splits[g] for g in groups] != sorted(splits.values())  # by hash, not by order


def test_every_split_with_a_share_has_a_group():
    for number in range(3, 12):
        splits = sampling.split_of_groups(map(str, range(number)), SHARES)
        assert set(splits.values()) == set(SHARES)
        assert len(splits) == number
    alone = sampling.split_of_groups(["a", "b"], {"attribute": 1.0, "tune": 0.0, "test": 0.0})
    assert set(alone.values()) == {"attribute"}
    with pytest.raises(ValueError, match="2 groups, at least 3 needed"):
        sampling.split_of_groups(["a", "b"], SHARES)


def test_a_stream_splits_its_groups_by_the_shares():
    splits = [sampling.split_of_one(f"group {n}", SHARES) for n in range(4000)]
    for split, share in SHARES.items():
        assert abs(splits.count(split) / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    alone = {"attribute": 0.0, "tune": 0.0, "test": 1.0}
    assert {sampling.split_of_one(str(n), alone) for n in range(50)} == {"test"}


def test_interleaving_keeps_the_proportions_in_every_beginning():
    numbers = random.Random(1)
    for _ in range(100):
        counts = {key: numbers.randint(0, 40) for key in "abc"}
        total = sum(counts.values())
        keys = sampling.interleave(counts)
        assert Counter(keys) == Counter(counts)
        for length in range(1, total + 1):
            found = Counter(keys[:length])
            assert all(abs(found[k] - length * c / total) <= 1.5 for k, c in counts.items())


def test_what_where_leaves_out_does_not_move_a_group():
    rows = text_rows(200)
    everything = sampling.splits("prompt_sets.a", rows, SHARES, rows)
    few = sampling.splits("prompt_sets.b", rows, SHARES, rows[:20])
    assert few == everything


def test_every_stratum_has_its_own_shares():
    rows = [
        replace(r, stratum="even" if n % 2 == 0 else "odd") for n, r in enumerate(text_rows(40))
    ]
    splits = sampling.splits("prompt_sets.a", rows, SHARES, rows)
    for stratum in ("even", "odd"):
        found = Counter(splits[row.group] for row in rows if row.stratum == stratum)
        assert found == {"attribute": 10, "tune": 4, "test": 6}
    with pytest.raises(InputError, match=r"prompt_sets\.a: made even .* 2 groups, at least 3"):
        sampling.splits("prompt_sets.a", rows[:4], SHARES, rows[:4])


# Cutting


def test_a_cut_text_is_the_beginning_of_the_text_and_as_long_as_asked(tokenizer):
    for n in range(40):
        row = text_rows(1, 15, start=n)[0]
        ids = tokenizer.encode(row.text).ids
        for length in (1, 3, len(ids) - 1):
            prompt = sampling.fit(tokenizer, row, Limits(1, length), "tune", 7)
            assert prompt is not None
            assert row.text.startswith(prompt.text)
            assert tokenizer.encode(prompt.text).ids == ids[:length]
            assert (prompt.tokens, prompt.split, prompt.seed) == (length, "tune", 7)


def test_texts_that_fit_stay_whole_and_short_ones_are_left_out(tokenizer):
    row = text_rows(1)[0]
    tokens = len(tokenizer.encode(row.text).ids)
    for most in (None, tokens, tokens + 5):
        prompt = sampling.fit(tokenizer, row, Limits(tokens, most), "test", 0)
        assert prompt is not None
        assert (prompt.text, prompt.tokens) == (row.text, tokens)
    assert sampling.fit(tokenizer, row, Limits(tokens + 1, None), "test", 0) is None
    assert sampling.fit(tokenizer, replace(row, text=""), Limits(1, None), "test", 0) is None


def test_no_text_is_cut_inside_a_letter(tokenizer):
    row = Row("made", "made/é", "", "the é")  # é is two bytes, two tokens
    ids = tokenizer.encode(row.text).ids
    assert sampling.fit(tokenizer, row, Limits(1, len(ids) - 1), "test", 0) is None
    whole = sampling.fit(tokenizer, row, Limits(1, len(ids)), "test", 0)
    assert whole is not None


def test_a_pair_is_as_long_as_its_longest_sentence(tokenizer):
    pair = (sentence(1, 5), sentence(2, 9))
    row = Row("made", "made/pair", "", "the", pair, sentence(3, 12))
    lengths = [len(tokenizer.encode(text).ids) for text in (*pair, row.unrelated)]
    prompt = sampling.fit(tokenizer, row, Limits(1, None), "test", 0)
    assert prompt is not None
    assert prompt.tokens == max(lengths)
    assert prompt.id == digest_text("\n".join(pair))[:16]


# Sampling


def drawn(tokenizer: Tokenizer, spec: PromptSet, rows: list[Row], **more) -> list[Prompt]:
    splits = sampling.splits("prompt_sets.made", rows, SHARES, rows)
    return sampling.draw("prompt_sets.made", spec, rows, splits, tokenizer, **more)


def test_seeds_draw_different_texts_in_the_splits_proportions(tokenizer):
    rows = text_rows(400)
    prompts = drawn(tokenizer, PromptSet("made", 50, seeds=(0, 1, 2)), rows)
    assert len({prompt.id for prompt in prompts}) == 150
    for seed in (0, 1, 2):
        found = Counter(prompt.split for prompt in prompts if prompt.seed == seed)
        assert found == {"attribute": 25, "tune": 10, "test": 15}
    backwards = drawn(tokenizer, PromptSet("made", 50, seeds=(0, 1, 2)), rows[::-1])
    assert backwards == prompts  # nothing depends on the order of the source
    first = drawn(tokenizer, PromptSet("made", 50, seeds=(0,)), rows)
    assert {p.id for p in first if p.split == "test"} == {
        p.id for p in prompts if p.split == "test" and p.seed == 0
    }
    other = drawn(tokenizer, PromptSet("made", 50, seeds=(5,)), rows)
    assert len({p.id for p in other} & {p.id for p in first}) < 25  # 6 expected


def test_without_a_count_every_row_that_fits_is_taken_in_the_order_of_the_source(
    project, tokenizer
):
    prepare.run(params({"all": PromptSet("news", None, min_tokens=25)}))
    articles = [row["document"] for row in read_jsonl(Path("data/xsum.jsonl"))]
    long = [t for t in articles if len(tokenizer.encode(t, add_special_tokens=False)) >= 25]
    assert [row["text"] for row in read("all")] == list(dict.fromkeys(long))
    assert 2 < len(long) < len(articles)


def test_all_rows_can_be_drawn_although_the_groups_differ_in_size(tokenizer):
    rows = [replace(row, group=f"made/{n % 7 % 5}") for n, row in enumerate(text_rows(99))]
    prompts = drawn(tokenizer, PromptSet("made", 33, seeds=(0, 1, 2)), rows)
    assert {prompt.row for prompt in prompts} == set(rows)
    assert Counter(prompt.seed for prompt in prompts) == {0: 33, 1: 33, 2: 33}


def test_sampling_is_uniform(tokenizer):
    rows = text_rows(30)
    splits = dict.fromkeys((row.group for row in rows), "test")
    spec = PromptSet("made", 10, seeds=(0,))
    counts = Counter(
        prompt.row.group
        for n in range(300)
        for prompt in sampling.draw(f"prompt_sets.{n}", spec, rows, splits, tokenizer)
    )
    # Each row is drawn 300 times with probability 1/3: chi-squared with 29 degrees of freedom.
    chi = sum((counts[row.group] - 100) ** 2 / (300 / 3 * 2 / 3) for row in rows) * 29 / 30
    assert chi < 58  # p = 0.001


def test_matched_texts_have_the_lengths_of_the_other_set_split_by_split(tokenizer):
    rows = text_rows(600, words=40)
    other = [
        Prompt(row, row.text, 3 + n % 17, ("attribute", "tune", "test")[n % 3], 0)
        for n, row in enumerate(text_rows(90, start=1000))
    ]
    spec = PromptSet("made", 60, seeds=(0, 1), match_length="other")
    prompts = drawn(tokenizer, spec, rows, like=other)
    for seed in (0, 1):
        for split, number in {"attribute": 30, "tune": 12, "test": 18}.items():
            found = [p.tokens for p in prompts if (p.seed, p.split) == (seed, split)]
            there = [p.tokens for p in other if p.split == split]
            assert len(found) == number
            assert Counter(found) <= Counter(there)  # drawn without repetition
            if number == len(there):
                assert sorted(found) == sorted(there)
    for prompt in prompts:
        assert len(tokenizer.encode(prompt.text).ids) == prompt.tokens
        assert len(tokenizer.encode(prompt.row.text).ids) >= 19  # the longest of all, not its own


def test_lengths_come_again_only_when_all_were_used():
    other = [Prompt(row, row.text, n, "tune", 0) for n, row in enumerate(text_rows(5), start=4)]
    limits = sampling.limits_like("prompt_sets.made", 0, other, "tune", 12)
    lengths = [limit.most for limit in limits]
    assert {limit.least for limit in limits} == {8}
    assert lengths[:5] == lengths[5:10]
    assert sorted(n for n in lengths[:5] if n) == [4, 5, 6, 7, 8]
    assert lengths[10:] == lengths[:2]
    orders = [
        [limit.most for limit in sampling.limits_like("prompt_sets.made", seed, other, "tune", 5)]
        for seed in range(6)
    ]
    assert any(a != b for a, b in pairwise(orders))


def test_equal_texts_are_kept_once():
    rows = [*text_rows(5), replace(text_rows(1)[0], group="made/again"), Row("made", "e", "", "")]
    assert sampling.distinct(rows) == text_rows(5)


def test_texts_that_become_equal_by_cutting_are_used_once(tokenizer):
    rows = [Row("made", f"made/{n}", "", f"the river {n}") for n in range(30)]
    with pytest.raises(InputError, match=r"prompt_sets\.made asks for 15 prompts .* 1 that"):
        drawn(tokenizer, PromptSet("made", 30, max_tokens=2), rows)


# The stage

SETS = {
    "general": PromptSet("wikipedia", 10, seeds=(0, 1), min_tokens=30, max_tokens=30),
    "general-like": PromptSet("wikipedia", 20, match_length="toxicity"),
    "toxicity": PromptSet("real-toxicity-prompts", 30, where={"min_toxicity": 0.95}),
    "mild": PromptSet("real-toxicity-prompts", 60),
    "race": PromptSet("stereoset", 40, target="pair", where={"bias_type": "race"}),
    "neutral": PromptSet("neutral-pairs", 40, target="pair", where={"bias_type": "race"}),
    "gender": PromptSet("gender-pairs", 40, target="pair"),
    "occupations": PromptSet("winobias", 24, target="pair"),
}
ONLY_TESTED = {
    "news": PromptSet("news", 10),
    "crows": PromptSet("crows-pairs", 9, target="pair", where={"bias_type": "gender"}),
}


@pytest.fixture
def project(tmp_path, monkeypatch, tokenizer) -> Path:
    """A folder with data/ and a model's tokenizer and configuration."""
    monkeypatch.chdir(tmp_path)
    raw.write_data(tmp_path / "data")
    (tmp_path / "model").mkdir()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "config.json").write_text(
        '{"model_type": "llama", "max_position_embeddings": 64}'
    )
    return tmp_path


def params(sets: dict[str, PromptSet], tests: dict[str, PromptSet] | None = None) -> Params:
    found = load(ROOT / "params.yaml")
    return replace(
        found,
        model=replace(found.model, path="model"),
        prompt_sets=sets,
        test_sets=tests or {},
        behaviours={},
        prepare=replace(found.prepare, splits=SHARES),
    )


def run(params: Params) -> None:
    """As on the command line, where the checks of the sets come first."""
    checks.refuse(checks.check_sets(params))
    prepare.run(params)


def read(name: str) -> list[dict]:
    return read_jsonl(prompts_path(name))


def test_every_set_is_written_as_promised(project, tokenizer):
    scalars = prepare.run(params(SETS, ONLY_TESTED))
    assert {path.stem for path in Path("outputs/prompts").iterdir()} == {*SETS, *ONLY_TESTED}
    for name, spec in {**SETS, **ONLY_TESTED}.items():
        rows = read(name)
        assert Counter(row["seed"] for row in rows) == dict.fromkeys(spec.seeds, spec.count)
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            assert row["split"] in (SHARES if name in SETS else ("test",))
            pair = row.get("pair")
            identified = "\n".join(pair) if pair else row["text"]
            assert row["id"] == digest_text(identified)[:16]
            texts = [row["text"], *(pair or []), row.get("unrelated", "")]
            assert row["tokens"] == max(len(tokenizer.encode(text).ids) for text in texts)
            assert (pair is not None) == (spec.target == "pair")
        for split in SHARES if name in SETS else ("test",):
            there = [row for row in rows if row["split"] == split]
            assert scalars[f"{name}.{split}.prompts"] == len(there)
            assert scalars[f"{name}.{split}.groups"] == len({row["group"] for row in there})
    assert {row["tokens"] for row in read("general")} == {30}
    assert "unrelated" in read("race")[0]
    texts = {
        row["text"]: row["toxicity"] for row in read_jsonl(Path("data/real-toxicity-prompts.jsonl"))
    }
    assert all(texts[row["text"]] >= 0.95 for row in read("toxicity"))


def test_no_group_is_in_two_splits_over_all_sets(project):
    prepare.run(params(SETS, ONLY_TESTED))
    splits: dict[str, set[str]] = {}
    sets: dict[str, set[str]] = {}
    for name in {**SETS, **ONLY_TESTED}:
        for row in read(name):
            splits.setdefault(row["group"], set()).add(row["split"])
            sets.setdefault(row["group"], set()).add(name)
    assert all(len(found) == 1 for found in splits.values())
    shared = {frozenset(found) for found in sets.values() if len(found) > 1}
    for names in ("general", "general-like"), ("toxicity", "mild"), ("race", "neutral"):
        assert any(set(names) <= found for found in shared)  # so that they could have disagreed


def test_a_set_does_not_depend_on_the_others_and_runs_repeat(project):
    prepare.run(params(SETS, ONLY_TESTED))
    first = {path.stem: path.read_bytes() for path in Path("outputs/prompts").iterdir()}
    prepare.run(params({"race": SETS["race"]}, {"crows": ONLY_TESTED["crows"]}))
    again = {path.stem: path.read_bytes() for path in Path("outputs/prompts").iterdir()}
    assert again == {name: first[name] for name in ("race", "crows")}


@pytest.mark.parametrize("name", ["toxicity", "race", "all"])
def test_a_set_that_is_only_tested_on_is_tested_on_whole(project, name):
    """The same texts in the same order as if it were attributed; only their split is another."""
    spec = {**SETS, "all": PromptSet("news", None)}[name]
    for shares in (SHARES, {"attribute": 1.0, "tune": 0.0, "test": 0.0}):
        made = []
        for sets in ({name: spec}, {}), ({}, {name: spec}):
            chosen = params(*sets)
            prepare.run(replace(chosen, prepare=replace(chosen.prepare, splits=shares)))
            made.append(read(name))
        attributed, tested = made
        assert {row["split"] for row in attributed} == {k for k, share in shares.items() if share}
        assert tested == [{**row, "split": "test"} for row in attributed]
    assert len(read_prompts(name, "test")) == len(read_prompts(name, None)) == len(tested)


def test_all_of_the_shares_can_go_to_one_split(project):
    alone = params({"race": SETS["race"]})
    alone = replace(
        alone,
        prepare=replace(alone.prepare, splits={"attribute": 1.0, "tune": 0.0, "test": 0.0}),
    )
    prepare.run(alone)
    assert {row["split"] for row in read("race")} == {"attribute"}


def test_a_stream_gives_each_seed_its_own_full_length_texts(project, tokenizer):
    raw.write_c4(project / "c4")
    spec = PromptSet("hub/c4", 20, seeds=(0, 1), min_tokens=40, max_tokens=40, where={"path": "c4"})
    prepare.run(params({"general": spec}))
    rows = read("general")
    assert len({row["id"] for row in rows}) == 40
    for seed in (0, 1):
        found = Counter(row["split"] for row in rows if row["seed"] == seed)
        assert found == {"attribute": 10, "tune": 4, "test": 6}
    for row in rows:
        assert row["split"] == sampling.split_of_one(row["group"], SHARES)
        assert len(tokenizer.encode(row["text"]).ids) == 40
    with pytest.raises(InputError, match=r"prompt_sets\.general asks for 90 .* fit; lower count"):
        prepare.run(params({"general": replace(spec, count=90)}))


def test_a_model_without_tokenizer_json_is_read_by_transformers(project, tokenizer):
    prepare.run(params({"race": SETS["race"]}))
    first = prompts_path("race").read_bytes()
    wrapped = GPT2TokenizerFast(tokenizer_object=tokenizer)
    wrapped.save_pretrained("old")
    Path("old/tokenizer.json").unlink()  # vocab.json and merges.txt stay, as OPT has them
    GPT2Config(n_positions=64).save_pretrained("old")
    changed = params({"race": SETS["race"]})
    prepare.run(replace(changed, model=replace(changed.model, path="old")))
    assert prompts_path("race").read_bytes() == first


RACE = SETS["race"]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            {"a": PromptSet("books", 1)},
            r"prompt_sets\.a\.source 'books' .* hub/c4, or a file",
        ),
        (
            {"a": replace(RACE, where={"biastype": "race"})},
            r"prompt_sets\.a\.where\.biastype is not known; source 'stereoset' has bias_type",
        ),
        (
            {"a": replace(RACE, where={"bias_type": "age"})},
            r"prompt_sets\.a\.where\.bias_type 'age' .* gender, race, religion$",
        ),
        (
            {"a": replace(RACE, where={"bias_type": 3})},
            r"prompt_sets\.a\.where\.bias_type is 3; expected text",
        ),
        (
            {"a": PromptSet("real-toxicity-prompts", 5, where={"min_toxicity": "0.9"})},
            r"prompt_sets\.a\.where\.min_toxicity is '0\.9'; expected a number from 0 to 1",
        ),
        (
            {"a": PromptSet("real-toxicity-prompts", 5, where={"min_toxicity": 1.0})},
            r"prompt_sets\.a\.where leaves none of 80 rows",
        ),
        (
            {"a": replace(RACE, where={"bias_type": "religion"}, count=12)},
            r"prompt_sets\.a: stereoset religion .* 2 groups, at least 3 needed",
        ),
        (
            {"a": replace(RACE, count=20, seeds=(0, 1, 2))},
            r"prompt_sets\.a asks for 3 x 20 = 60 prompts, there are 48",
        ),
        (
            {"a": PromptSet("wikipedia", 10, min_tokens=300)},
            r"prompt_sets\.a asks for 5 prompts in the attribute split of seed 0, 0 that are long",
        ),
        ({"a": replace(RACE, max_tokens=3)}, r"prompt_sets\.a: the rows .* are never cut"),
        (
            {"a": PromptSet("wikipedia", 10, target="pair")},
            r"prompt_sets\.a\.target is 'pair', but the source 'wikipedia' of .* has no pairs",
        ),
        ({"a": PromptSet("news", 10)}, r"prompt_sets\.a: prompt .* the model's context 40"),
        (
            {"a": PromptSet("news", None, seeds=(0, 1))},
            r"prompt_sets\.a\.count is null, .*; give a number with .* several seeds",
        ),
        (
            {"a": PromptSet("news", None, min_tokens=90)},
            r"prompt_sets\.a: none of \d+ texts is long enough for min_tokens",
        ),
        (
            {"a": PromptSet("news", 1, match_length="b")},
            r"prompt_sets\.a\.match_length is 'b'; expected a prompt set that matches none",
        ),
        (
            {"race": RACE, "a": PromptSet("news", 1, match_length="race", max_tokens=5)},
            r"prompt_sets\.a\.match_length replaces min_tokens and max_tokens",
        ),
        (
            {"a": PromptSet("hub/c4", 1, where={"path": "allenai/c4"})},
            r"prompt_sets\.a\.where\.revision is missing",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_its_key_and_writes_nothing(project, sets, message):
    (project / "model" / "config.json").write_text(
        '{"model_type": "llama", "max_position_embeddings": 40}'
    )
    with pytest.raises(InputError, match=message) as raised:
        run(params({"fine": SETS["mild"], **sets}))
    assert str(raised.value).startswith("params: ")
    assert "\n" not in str(raised.value)
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"attribute": 0.5, "tune": 0.5}, r"prepare\.splits is .*attribute, tune, test"),
        ({"attribute": 0.5, "tune": 0.2, "test": 0.4}, r"prepare\.splits sums to 1\.1"),
    ],
)
def test_shares_that_are_no_shares_are_refused(project, splits, message):
    changed = params(SETS)
    with pytest.raises(InputError, match=message):
        checks.refuse(
            checks.check_splits(replace(changed, prepare=replace(changed.prepare, splits=splits)))
        )


def test_data_that_are_not_those_pinned_are_refused_and_nothing_is_written(project):
    path = Path("data/boolq.jsonl")
    text = path.read_text()
    for damage in (path.unlink, lambda: path.write_text(text.replace("a", "b", 1))):
        damage()
        with pytest.raises(InputError, match=r"^data/ is not what fetch --update pinned; .* git"):
            prepare.run(params(SETS))
    path.write_text(text)
    Path("data.dvc").unlink()
    with pytest.raises(InputError, match=r"^data/LICENSE is missing; .* fetch again"):
        prepare.run(params(SETS))
    assert not Path("outputs").exists()


# The default parameters, on the real data


def test_the_default_sets_are_leak_free_and_as_asked(fetched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data", "models"):
        (tmp_path / name).symlink_to(fetched / name)
    found = load(ROOT / "params.yaml")
    prepare.run(found)
    tokenizer = AutoTokenizer.from_pretrained(found.model.path)
    splits: dict[str, set[str]] = {}
    for name, spec in {**found.prompt_sets, **found.test_sets}.items():
        rows = read(name)
        assert len(rows) == (spec.count or 0) * len(spec.seeds)
        expected = {"test"} if name in found.test_sets else {*SHARES}
        if spec.blocks:
            expected = {f"block-{n}" for n in range(spec.blocks + 1)}
        assert {row["split"] for row in rows} == expected
        for row in rows:
            splits.setdefault(row["group"], set()).add(row["split"])
            if spec.max_tokens and spec.min_tokens:
                ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
                assert spec.min_tokens <= len(ids) == row["tokens"] <= spec.max_tokens
    assert all(len(groups) == 1 for groups in splits.values())


def test_dvc_can_compare_what_is_wanted_of_each_set_and_what_test_sets_are(project):
    found = params({name: SETS[name] for name in ("general", "toxicity")}, ONLY_TESTED)
    prepare.run(found)
    wanted = {path.stem: read_json(path) for path in Path("outputs/wanted").iterdir()}
    assert wanted == {name: list(scores_of(found, name)) for name in found.prompt_sets}
    sums = {name: digest(prompts_path(name)) for name in ONLY_TESTED}
    assert read_json(Path("outputs/test-sets.json")) == sums
    prepare.run(replace(found, prompt_sets={"toxicity": SETS["toxicity"]}))
    assert [path.name for path in Path("outputs/wanted").iterdir()] == ["toxicity.json"]


def test_a_row_of_a_file_that_is_too_long_is_named_by_file_and_row(project):
    Path("prompts").mkdir()
    lines = [f'{{"text": "{n} {sentence(n, 9)}"}}\n' for n in range(12)]
    Path("prompts/mine.jsonl").write_text("".join([*lines, f'{{"text": "{"a " * 99}"}}\n']))
    mine = PromptSet("prompts/mine.jsonl", None, private=True)
    with pytest.raises(InputError, match=r"^prompts/mine\.jsonl: row 13 has \d+ tokens, the"):
        run(params({"mine": mine}))
