"""Every stage of a whole small project (whole.py), computed anew in the plainest way, with signs.

The model is pruned by hand in a copy, texts are read one by one, and every number is made of
Python's own sums. What is left, random streams and the like, is frozen in tests/golden.
"""

import copy
import csv
import hashlib
import json
import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import whole
from matplotlib.figure import Figure
from scipy import stats
from transformers import AutoModelForCausalLM
from whole import BEHAVIOURS, BLOCKS, CIRCUITS, CONTROLS, DRAWN, PARAMS

from sparc3.base.errors import InputError
from sparc3.base.files import read_json, read_jsonl, read_tensors
from sparc3.circuits.intervention import read_intervention
from sparc3.circuits.overlap import joined
from sparc3.relevance.lrp import attnlrp
from sparc3.stages import transfer

LAYERS, WIDTH = 3, 24
Row = dict[str, Any]
Neurons = tuple[tuple[int, int, float], ...]  # layer, neuron, what is left of it
BUDGET = PARAMS["select"]["budget"]["perplexity"]
EVALUATE, TRANSFER = PARAMS["evaluate"], PARAMS["transfer"]
OWN = {name: spec["method"] for name, spec in PARAMS["behaviours"].items()}
BAN = "word-ban"
# The blocks that have circuits of their own; "" stands for what is chosen on all that may be seen.
TESTED = [f"block-{n}" for n in range(1, 1 + BLOCKS)]
CASES = [("rude", ""), ("bias", ""), *(("bias", block) for block in TESTED)]


def close(value: float) -> Any:
    """What float32 in other batches may differ by."""
    return pytest.approx(value, rel=1e-4, abs=1e-4)


class Project(NamedTuple):
    folder: Path
    figures: dict[str, Figure]

    def metrics(self, name: str) -> Any:
        return read_json(self.folder / "metrics" / f"{name}.json")

    def rows(self, prompt_set: str, split: str, count: int | None = None) -> list[Row]:
        """Of a set with blocks: all are chosen on, all but the first are tested."""
        every = read_jsonl(self.folder / f"outputs/prompts/{prompt_set}.jsonl")
        of_blocks = {"attribute": ["block-0", *TESTED], "test": TESTED}.get(split, [])
        return [row for row in every if row["split"] in (split, *of_blocks)][:count]

    def before(self, prompt_set: str, block: str) -> list[Row]:
        """The prompts that a block's circuits may be chosen on."""
        rows = self.rows(prompt_set, "attribute")
        return [row for row in rows if not block or row["split"] < block]

    def csv(self, name: str) -> list[dict[str, str]]:
        with (self.folder / "outputs" / f"{name}.csv").open(newline="") as stream:
            return list(csv.DictReader(stream))

    def circuit(self, behaviour: str, name: str, block: str = "") -> Neurons:
        rows = self.csv(f"circuits/{behaviour}/{block}/{name}")
        return tuple((int(r["layer"]), int(r["neuron"]), float(r["scale"])) for r in rows)

    def shifts(self, behaviour: str, block: str = "") -> dict[str, torch.Tensor]:
        """What `act` adds to the outputs of modules, by their names."""
        path = self.folder / f"outputs/interventions/{behaviour}/{block}/act.safetensors"
        arrays, about = read_tensors(path)
        return {
            name.partition("/")[0]: float(about["strength"]) * torch.from_numpy(array)
            for name, array in arrays.items()
            if name.endswith("/shift")
        }

    def differential(self, behaviour: str, method: str, block: str = "") -> np.ndarray:
        path = self.folder / f"outputs/differential/{behaviour}/{method}.safetensors"
        return read_tensors(path)[0][block or "differential"]

    def importance(self) -> np.ndarray:
        """Mean absolute gradient score on general text, from the scores themselves."""
        return np.abs(whole.published_scores(self.folder, "general", "gradient")[1]).mean(0)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("whole")
    whole.write_project(folder)
    return Project(folder, whole.run(folder))


# --- the plainest way ----------------------------------------------------------------------


class Naive:
    """The model without some neurons, with some tokens made less likely, or with outputs of modules
    shifted; texts are read one at a time.
    """

    def __init__(
        self,
        folder: Path,
        removed: Neurons = (),
        banned: Sequence[int] = (),
        shifts: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        self.banned = list(banned)
        for layer, neuron, scale in removed:
            with torch.no_grad():
                self.model.model.layers[layer].mlp.down_proj.weight[:, neuron] *= scale
        for site, by in shifts.items():
            module = self.model.get_submodule(site)
            module.register_forward_hook(lambda module, given, y, by=by: y + by)
        self.seen: dict[tuple[int, ...], np.ndarray] = {}

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            found = self.model(torch.tensor([list(ids)])).logits[0].double()
        found[:, self.banned] -= 5.0
        return found

    def log_p(self, ids: Sequence[int]) -> np.ndarray:
        """log p of every token but the first."""
        key = tuple(ids)
        if key not in self.seen:
            log_p = self.logits(ids).log_softmax(-1)
            self.seen[key] = np.array([float(log_p[t - 1, ids[t]]) for t in range(1, len(ids))])
        return self.seen[key]

    def sentence(self, text: str) -> float:
        """Mean log p per token, the first word included."""
        return float(self.log_p([START, *encode(text)]).mean())

    def nll(self, rows: Sequence[Row]) -> float:
        """Nats per token over all texts."""
        scored = [-log_p for row in rows for log_p in self.log_p(encode(row["text"]))]
        return sum(scored) / len(scored)

    def windowed_nll(self, rows: Sequence[Row]) -> float:
        """As `nll`, every token predicted within the first window that reaches it."""
        scored = [nll for row in rows for nll in self.windowed(row)]
        return sum(scored) / len(scored)

    def windowed(self, row: Row) -> list[float]:
        return [-float(self.log_p(ids)[at]) for ids, at in windows(row)]

    def divergences(self, row: Row, other: "Naive") -> list[float]:
        """KL(this || other) of the distribution of every token but the first."""
        found = []
        for ids, at in windows(row):
            p, q = (model.logits(ids)[at].softmax(-1) for model in (self, other))
            found.append(float((p * (p / q).log()).sum()))
        return found


def windows(row: Row) -> list[tuple[list[int], int]]:
    """Of every token but the first the window that it is predicted in, and where."""
    window, stride, ids = EVALUATE["window"], EVALUATE["stride"], encode(row["text"])
    begins = [
        next(b for b in range(0, len(ids), stride) if b + window > t) for t in range(1, len(ids))
    ]
    return [(ids[b : b + window], t - b) for t, b in enumerate(begins)]


START = whole.WORDS.index("[start]")  # stands before every sentence of a pair


def encode(text: str) -> list[int]:
    return [whole.WORDS.index(word) if word in whole.WORDS else 0 for word in text.split()]


def percent(before: float, after: float) -> float:
    """Change of perplexity, from nats per token."""
    return 100 * (math.exp(after) - math.exp(before)) / math.exp(before)


def by_term(rows: Sequence[Row], values: Sequence[float | None]) -> list[float]:
    """Means of a term's items, for terms that have any."""
    found = defaultdict(list)
    for row, value in zip(rows, values, strict=True):
        if value is not None:
            found[row["group"]].append(value)
    return [mean(found[term]) for term in sorted(found)]


Models = dict[tuple[str, str, str], Naive]


def stereotypes(model: Callable[[Row], Naive], rows: Sequence[Row]) -> dict[str, float]:
    """SS, LMS, ICAT and margin, by StereoSet's definitions; a model may be of an item's block."""
    first, second = ([model(row).sentence(row["pair"][side]) for row in rows] for side in (0, 1))
    third = [
        model(row).sentence(row["unrelated"]) if row.get("unrelated") else None for row in rows
    ]
    prefers = [100.0 * (a > b) for a, b in zip(first, second, strict=True)]
    margins = [a - b for a, b in zip(first, second, strict=True)]
    found = {"ss": mean(by_term(rows, prefers)), "margin": mean(by_term(rows, margins))}
    meaningful = [
        None if c is None else 50.0 * ((a > c) + (b > c))
        for a, b, c in zip(first, second, third, strict=True)
    ]
    if sum(value is not None for value in meaningful):
        whole_terms = [p if c is not None else None for p, c in zip(prefers, third, strict=True)]
        ss, lms = mean(by_term(rows, whole_terms)), mean(by_term(rows, meaningful))
        found |= {"lms": lms, "icat": lms * min(ss, 100 - ss) / 50}
    return found


def free_neurons(differential: np.ndarray, importance: np.ndarray, share: float) -> list[int]:
    """Flat ids from the most negative on, without the share that matters most for general text."""
    total = LAYERS * WIDTH
    ranked = sorted(range(total), key=lambda i: -importance.flat[i])
    barred = set(ranked[: round(share * total)])
    ordered = sorted(range(total), key=lambda i: differential.flat[i])
    return [i for i in ordered if i not in barred]


def scale_of(method: str, value: float) -> float:
    return max(0.0, 1 + 2 * value) if method.startswith("aura") else 0.0


def bad_words(project: Project) -> list[int]:
    """Words that the scorer calls bad of those in the prompts, the most frequent first; every word
    is one token.
    """
    from profanity_check import predict_prob

    sets = "rude", "general-rude"
    rows = [row for name in sets for row in project.rows(name, "attribute")]
    counts = Counter(word for row in rows for word in row["text"].split())
    bad = [word for word in counts if predict_prob([word])[0] >= 0.5]
    return sorted(map(whole.WORDS.index, bad), key=lambda i: (-counts[whole.WORDS[i]], i))


def ban(project: Project) -> list[int]:
    """The longest list of bad words whose ban stays within the budget."""
    general = project.rows("general", "tune", PARAMS["sweep"]["texts"])
    before, longest = Naive(project.folder), []
    for count in EVALUATE["ban"]:
        words = bad_words(project)[:count]
        after = Naive(project.folder, banned=words)
        cost = percent(before.windowed_nll(general), after.windowed_nll(general))
        if cost + standard_error(before, after, general) <= BUDGET:
            longest = words
    return longest


@pytest.fixture(scope="module")
def models(project: Project) -> Models:
    """(behaviour, circuit, block) -> the model without it; "none" is the model as it is."""
    intact, banned = Naive(project.folder), Naive(project.folder, banned=ban(project))
    found = {("rude", BAN, ""): banned}
    for behaviour, block in CASES:
        found[behaviour, "none", block] = intact
        shifts = project.shifts(behaviour, block)
        found[behaviour, "act", block] = Naive(project.folder, shifts=shifts)
        for name in CIRCUITS:
            removed = project.circuit(behaviour, name, block)
            found[behaviour, name, block] = Naive(project.folder, removed)
    return found


def each_without(models: Models, circuit: str) -> Callable[[Row], Naive]:
    """The model for an item of `bias`: without what was chosen before the item's block."""
    return lambda row: models["bias", circuit, row["split"]]


def whole_without(models: Models, behaviour: str, circuit: str) -> Callable[[Row], Naive]:
    return lambda row: models[behaviour, circuit, ""]


# --- attribute, gate, differential ---------------------------------------------------------


def relevance(model: Any, row: Row, target: str, rules: Any) -> np.ndarray:
    """sum over tokens of h * dy/dh, (layer, neuron)."""
    texts = row["pair"] if target == "pair" else [row["text"]]
    kept: list[list[torch.Tensor]] = []

    def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        args[0].retain_grad()
        kept[-1].append(args[0])

    handles = [layer.mlp.down_proj.register_forward_pre_hook(keep) for layer in model.model.layers]
    try:
        with rules:
            y = torch.zeros(())
            for sign, text in zip((1, -1), texts, strict=False):
                kept.append([])
                before = [START] if target == "pair" else []
                ids = torch.tensor([*before, *encode(text)])
                log_p = model(ids[None]).logits[0, :-1].log_softmax(-1)
                y = y + sign * log_p[torch.arange(len(ids) - 1), ids[1:]].mean()
            y.backward()
    finally:
        for handle in handles:
            handle.remove()
    return sum(
        np.stack([(h * h.grad)[0].sum(0).detach().numpy() for h in sequence if h.grad is not None])
        for sequence in kept
    )  # pyright: ignore[reportReturnType]


def largest(model: Any, row: Row, target: str) -> np.ndarray:
    """max over tokens of h; of the first text minus that of the second for a pair."""
    found = []
    for text in row["pair"] if target == "pair" else [row["text"]]:
        kept: list[np.ndarray] = []
        handles = [
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda module, args, kept=kept: kept.append(args[0][0].amax(0).numpy())
            )
            for layer in model.model.layers
        ]
        with torch.no_grad():
            model(torch.tensor([[START] * (target == "pair") + encode(text)]))
        for handle in handles:
            handle.remove()
        found.append(np.stack(kept))
    return found[0] - found[1] if len(found) == 2 else found[0]


@pytest.mark.parametrize("name", PARAMS["prompt_sets"])
def test_attribute_is_h_times_the_gradient_of_every_prompt(project: Project, name: str) -> None:
    target, model = PARAMS["prompt_sets"][name]["target"], Naive(project.folder).model
    rows = project.rows(name, "attribute")
    for score, of in {
        "lrp": lambda row: relevance(model, row, target, attnlrp(model)),
        "gradient": lambda row: relevance(model, row, target, nullcontext()),
        "max-activation": lambda row: largest(model, row, target),
    }.items():
        ids, values = whole.published_scores(project.folder, name, score)
        assert ids == [row["id"] for row in rows]
        expected = np.stack([of(row) for row in rows])
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_gate_is_positive_where_the_reference_has_more_relevance(
    project: Project, behaviour: str
) -> None:
    spec = PARAMS["behaviours"][behaviour]
    reference, own = (
        mean(
            float(np.abs(scores).sum())
            for scores in whole.published_scores(project.folder, name, "lrp")[1][
                : PARAMS["gate"]["prompts"]
            ]
        )
        for name in (spec["reference"], spec["prompts"])
    )
    found = project.metrics(f"gate/{behaviour}")
    assert found["gap"]["value"] == close(100 * (reference - own) / reference)
    assert found["passed"] == (found["gap"]["value"] >= PARAMS["gate"]["threshold"])


@pytest.mark.parametrize(("behaviour", "block"), CASES)
def test_differential_is_reference_minus_what_may_be_seen(
    project: Project, behaviour: str, block: str
) -> None:
    spec = PARAMS["behaviours"][behaviour]
    known = {row["id"] for row in project.before(spec["prompts"], block)}
    assert len(known) == len(project.rows(spec["prompts"], "attribute")) or block

    def scores(score: str) -> tuple[np.ndarray, np.ndarray]:
        _, one = whole.published_scores(project.folder, spec["reference"], score)
        ids, two = whole.published_scores(project.folder, spec["prompts"], score)
        return one.astype(float), two[[prompt in known for prompt in ids]].astype(float)

    reference, own = scores("lrp")
    difference = reference.mean(0) - own.mean(0)
    found = project.differential(behaviour, "lrp", block)
    np.testing.assert_allclose(found, difference, rtol=1e-4, atol=1e-6)
    reverse = project.differential(behaviour, "most-positive", block)
    np.testing.assert_allclose(reverse, -difference, rtol=1e-4, atol=1e-6)

    t = np.array(stats.ttest_ind(*scores("gradient"), equal_var=False)[0])
    found = project.differential(behaviour, "gradient-t", block)
    np.testing.assert_allclose(found, t, rtol=1e-4, atol=1e-5)

    reference, own = scores("max-activation")
    wins = (own[:, None] > reference[None]) + 0.5 * (own[:, None] == reference[None])
    for method in ("aura", "aura-published"):
        found = project.differential(behaviour, method, block)
        np.testing.assert_allclose(found, 0.5 - wins.mean((0, 1)), rtol=1e-4, atol=1e-6)

    path = project.folder / f"outputs/differential/{behaviour}/lrp.safetensors"
    tensors, _ = read_tensors(path)
    np.testing.assert_allclose(tensors["importance"], project.importance(), rtol=1e-4)
    blocks = TESTED if behaviour == "bias" else []
    assert tensors.keys() == {"differential", "importance", *blocks}


# --- sweep, select -------------------------------------------------------------------------


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_sweep_prunes_the_most_negative_and_reads_the_tune_split(
    project: Project, behaviour: str
) -> None:
    """Of a set with blocks only general text is read, without what the first block gave."""
    sweep, before = PARAMS["sweep"], Naive(project.folder)
    rows = project.rows(behaviour, "tune", sweep["items"])
    general = project.rows("general", "tune", sweep["texts"])
    first = "block-1" if behaviour == "bias" else ""

    def objective(model: Naive) -> float:
        rise = model.windowed_nll(general) - before.windowed_nll(general)
        return model.nll(rows) - before.nll(rows) - rise

    found = project.csv(f"sweep/{behaviour}")
    assert len(found) == 1 + 3 * len(sweep["protect"]) * len(sweep["num_neurons"])
    for point in found:
        removed: Neurons = ()
        if (method := point["method"]) != "none":
            values = project.differential(behaviour, method, first)
            ids = free_neurons(values, project.importance(), float(point["protect"]))
            removed = tuple(
                (*divmod(i, WIDTH), scale_of(method, float(values.flat[i])))
                for i in ids[: int(point["num_neurons"])]
            )
        model = Naive(project.folder, removed)
        change = percent(before.windowed_nll(general), model.windowed_nll(general))
        assert float(point["ppl_delta"]) == close(change)
        if first:
            assert (rows, float(point["objective"])) == ([], float(point["num_neurons"]))
            assert float(point["objective_error"]) == 0.0
        else:
            assert float(point["objective"]) == close(objective(model))
            assert (float(point["objective_error"]) > 0) == bool(removed)
        assert float(point["ppl_error"]) == close(standard_error(before, model, general))
        every = [kl for row in general for kl in before.divergences(row, model)]
        assert float(point["kl"]) == close(mean(every))
        old, new = (answered(each, project.rows("tuned-quiz", "test")) for each in (before, model))
        lost = [a - b for a, b in zip(old, new, strict=True)]
        assert float(point["accuracy_loss"]) == close(mean(lost))
        error = float(np.std(lost, ddof=1)) / math.sqrt(len(lost))
        assert float(point["accuracy_error"]) == close(error)


def standard_error(before: Naive, after: Naive, rows: Sequence[Row]) -> float:
    """Of the change of perplexity, over groups of texts: the delta method of a ratio of sums."""
    rise, tokens = Counter[str](), Counter[str]()
    for row in rows:
        old, new = before.windowed(row), after.windowed(row)
        rise[row["group"]] += sum(new) - sum(old)  # pyright: ignore[reportArgumentType]
        tokens[row["group"]] += len(old)
    ratio, n = sum(rise.values()) / sum(tokens.values()), len(rise)
    spread = sum((rise[group] - ratio * tokens[group]) ** 2 for group in rise)
    variance = n / (n - 1) * spread / sum(tokens.values()) ** 2
    return 100 * math.exp(ratio) * math.sqrt(variance)


def chosen_sizes(project: Project, behaviour: str, block: str) -> dict[str, tuple[int, float]]:
    """Method -> number of neurons and share that is protected.

    Of the points within the budget the one with the least of the behaviour, the first of equal
    ones; of a set with blocks the one with the most neurons, and it holds for every block.
    """
    points, budget = project.csv(f"sweep/{behaviour}"), BUDGET

    def cost(point: dict[str, str]) -> float:
        return float(point["ppl_delta"]) + float(point["ppl_error"])

    sizes = {}
    for method in ("lrp", "gradient-t", "aura"):
        own = [point for point in points if point["method"] == method]
        within = [point for point in own if cost(point) <= budget]
        wanted = "num_neurons" if behaviour == "bias" else "objective"
        best = max(within, key=lambda point: float(point[wanted])) if within else min(own, key=cost)
        sizes[method] = int(best["num_neurons"]), float(best["protect"])
    negative = project.differential(behaviour, "aura-published", block) < 0
    return {
        **sizes,
        "aura-published": (int(negative.sum()), 0.0),
        "most-positive": sizes[OWN[behaviour]],
    }


@pytest.mark.parametrize(("behaviour", "block"), CASES)
def test_select_takes_the_best_point_within_the_budget(
    project: Project, behaviour: str, block: str
) -> None:
    sizes = chosen_sizes(project, behaviour, block)
    for method, (count, share) in sizes.items():
        values = project.differential(behaviour, method, block)
        ids = free_neurons(values, project.importance(), share)[:count]
        expected = [(*divmod(i, WIDTH), scale_of(method, float(values.flat[i]))) for i in ids]
        assert project.circuit(behaviour, method, block) == tuple(expected)
        assert all(scale < 1 for *_, scale in expected)

    share = sizes[OWN[behaviour]][1]
    allowed = set(free_neurons(project.importance(), project.importance(), share))
    own = project.circuit(behaviour, OWN[behaviour], block)
    own_layers = Counter(layer for layer, *_ in own)
    draws = [project.circuit(behaviour, name, block) for name in CONTROLS]
    assert len(set(draws)) == len(draws)
    for drawn in draws:
        assert Counter(layer for layer, *_ in drawn) == own_layers
        assert allowed.issuperset(layer * WIDTH + neuron for layer, neuron, _ in drawn)

    prompts = PARAMS["behaviours"][behaviour]["prompts"]
    for name in CIRCUITS:
        path = project.folder / f"outputs/circuits/{behaviour}/{block}/{name}.json"
        about = read_json(path)
        assert about["block"] == block
        used = {prompt for ids in about["chosen_on"].values() for prompt in ids}
        for split in ("attribute", "tune"):
            assert used.issuperset(row["id"] for row in project.rows("general", split))
        assert used.issuperset(row["id"] for row in project.rows(prompts, "tune"))
        own_rows = {row["id"] for row in project.before(prompts, block)}
        every = read_jsonl(project.folder / f"outputs/prompts/{prompts}.jsonl")
        not_seen = (
            {row["id"] for row in every}
            - own_rows
            - {row["id"] for row in project.rows(prompts, "tune")}
        )
        assert used.issuperset(own_rows)
        assert used.isdisjoint(not_seen)
        assert used.isdisjoint(row["id"] for row in project.rows("general", "test"))
        groups = {row["group"] for row in every if row["id"] in not_seen}
        assert groups.isdisjoint(about["groups"])


def test_a_methods_circuits_of_blocks_agree_as_much_as_they_have_in_common(
    project: Project,
) -> None:
    found = project.metrics("select/bias")
    for method, spec in PARAMS["methods"].items():
        if spec["score"] == "random":
            continue
        own = {row[:2] for row in project.circuit("bias", method)}
        shares = [
            len(own & {row[:2] for row in project.circuit("bias", method, block)}) / len(own)
            for block in TESTED
        ]
        assert found[f"{method}.agreement"] == close(mean(shares))
        assert f"{method}.agreement" not in project.metrics("select/rude")


# --- evaluate ------------------------------------------------------------------------------


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_evaluate_reads_every_kind_of_general_text_through_windows(
    project: Project, models: Models, behaviour: str
) -> None:
    found = project.metrics(f"evaluate/{behaviour}")
    for place, text in enumerate(EVALUATE["general"]):
        rows = project.rows(text, "test", EVALUATE["texts"])
        assert max(len(encode(row["text"])) for row in rows) > EVALUATE["window"]
        before = models[behaviour, "none", ""].windowed_nll(rows)
        assert found["baseline"][f"perplexity_{text}"] == close(math.exp(before))
        for name in (*CIRCUITS, "act", *([BAN] if behaviour == "rude" else [])):
            row = found["circuits"][name]
            drawn = 1 if place else len(CONTROLS) if behaviour == "rude" else EVALUATE["drawn"]
            if name in CONTROLS[drawn:]:
                assert text not in row["texts"]
                assert place or "ppl_delta" not in row
                continue
            change = percent(before, models[behaviour, name, ""].windowed_nll(rows))
            assert row["texts"][text]["value"] == close(change)
            if not place:
                assert row["ppl_delta"] == row["texts"][text]
                assert found["baseline"]["perplexity"] == close(math.exp(before))
            of_all = project.circuit(behaviour, name) if name in CIRCUITS else ()
            assert row["num_neurons"] == len(of_all)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_kl_is_of_whole_distributions_on_all_kinds_of_general_text(
    project: Project, models: Models, behaviour: str
) -> None:
    found = project.metrics(f"evaluate/{behaviour}")["circuits"]
    rows = [
        r for text in EVALUATE["general"] for r in project.rows(text, "test", EVALUATE["texts"])
    ]
    for name in (OWN[behaviour], "act", CONTROLS[0], *([BAN] if behaviour == "rude" else [])):
        after = models[behaviour, name, ""]
        every = [kl for r in rows for kl in models[behaviour, "none", ""].divergences(r, after)]
        assert found[name]["kl"]["mean"]["value"] == close(mean(every))
        assert found[name]["kl"]["mean"]["n"] == len(rows)
        largest = sorted(every, reverse=True)[math.floor(0.05 * len(every))]
        assert found[name]["kl"]["percentile_95"]["value"] == close(largest)
        for part in found[name]["kl"].values():
            assert part["low"] <= part["value"] <= part["high"]
    assert "kl" not in found[CONTROLS[1]]


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_steer_takes_the_strength_that_does_best_within_the_budget(
    project: Project, behaviour: str
) -> None:
    """And what it learnt on each block's prompts; of a set with blocks the largest strength."""
    points = project.csv(f"interventions/{behaviour}/points")
    named = PARAMS["steer"]["interventions"]["act"]
    assert [float(p["strength"]) for p in points] == [0, *named["strengths"]]
    own = points[1:]
    within = [p for p in own if float(p["ppl_delta"]) + float(p["ppl_error"]) <= BUDGET]
    best = (
        max(within, key=lambda p: float(p["objective"]))
        if within
        else min(own, key=lambda p: float(p["ppl_delta"]) + float(p["ppl_error"]))
    )
    found = project.metrics(f"steer/{behaviour}")
    assert found["act.strength"] == float(best["strength"])
    file = project.folder / f"outputs/interventions/{behaviour}/act.safetensors"
    assert found["act.bytes"] == len(file.read_bytes())
    learnt = {}
    for block in ["", *(TESTED if behaviour == "bias" else [])]:
        path = project.folder / f"outputs/interventions/{behaviour}/{block}/act.safetensors"
        arrays, about = read_tensors(path)
        assert float(about["strength"]) == float(best["strength"])
        learnt[block] = arrays["model.layers.0.mlp.up_proj/shift"]
        used = {
            i for ids in read_json(path.with_suffix(".json"))["chosen_on"].values() for i in ids
        }
        prompts = PARAMS["behaviours"][behaviour]["prompts"]
        assert used.issuperset(row["id"] for row in project.before(prompts, block))
        model, first = Naive(project.folder).model, "model.layers.0.mlp.up_proj"
        if behaviour == "rude":
            texts = project.rows("rude", "attribute"), project.rows("general-rude", "attribute")
            sides = [[encode(row["text"]) for row in rows] for rows in texts]
        else:
            rows = project.before(prompts, block)
            sides = [[[START, *encode(row["pair"][n])] for row in rows] for n in (0, 1)]
        one, other = (
            np.mean([mean_output(model, ids, first) for ids in side], 0) for side in sides
        )
        np.testing.assert_allclose(learnt[block], other - one, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_an_intervention_is_exported_as_its_file_with_what_was_measured(
    project: Project, behaviour: str
) -> None:
    folder = project.folder / f"{behaviour}-act"
    kept = project.folder / f"outputs/interventions/{behaviour}/act.safetensors"
    assert (folder / "intervention.safetensors").read_bytes() == kept.read_bytes()
    row = project.metrics(f"evaluate/{behaviour}")["circuits"]["act"]
    text = (folder / "README.md").read_text()
    assert f"at strength {row['strength']:g}." in text
    shown = {each["measure"]: each["change"] for each in whole.table(text)}
    assert shown["kl.mean"] == f"{row['kl']['mean']['value']:.4g}"
    intact, given = Naive(project.folder), encode(project.rows("general", "test")[0]["text"])
    steered = Naive(project.folder, shifts=project.shifts(behaviour)).logits(given)
    with read_intervention(folder / "intervention.safetensors").on(intact.model):
        torch.testing.assert_close(intact.logits(given), steered, rtol=1e-4, atol=1e-4)


def mean_output(model: Any, ids: list[int], site: str) -> np.ndarray:
    """Of a module, over a text's tokens."""
    kept: list[torch.Tensor] = []
    hook = model.get_submodule(site).register_forward_hook(lambda *given: kept.append(given[2]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    hook.remove()
    return kept[0][0].mean(0).numpy()


def splits_of(name: str, behaviour: str) -> list[tuple[str, str]]:
    """What is measured of a circuit: (name in the metrics, split)."""
    return [("test", "test")] + [("in_sample", "attribute")] * (name in ("none", "lrp"))


def assert_ranked(among: dict[str, float], own: float, drawn: Sequence[float]) -> None:
    """An effect among those of draws: their mean and range, its rank, and where another would be
    with 95 % probability, if they are normal.
    """
    n, middle = len(drawn), mean(drawn)
    spread = math.sqrt(sum((draw - middle) ** 2 for draw in drawn) / (n - 1) * (1 + 1 / n))
    reach = float(stats.t.ppf(0.975, n - 1)) * spread
    expected = {
        "value": own,
        "mean": middle,
        "low": min(drawn),
        "high": max(drawn),
        "p": (1 + sum(draw >= own for draw in drawn)) / (1 + n),
        "n": n,
        "least": middle - reach,
        "most": middle + reach,
    }
    assert among == {key: close(value) for key, value in expected.items()}


def test_evaluate_of_texts_is_positive_where_they_are_rarer(
    project: Project, models: Models
) -> None:
    general = project.rows("general", "test", EVALUATE["texts"])
    found = project.metrics("evaluate/rude")
    before = models["rude", "none", ""]
    shifts = {}
    for name in (*CIRCUITS, BAN):
        after = models["rude", name, ""]
        rise = after.windowed_nll(general) - before.windowed_nll(general)
        for part, split in splits_of(name, "rude"):
            rows = project.rows("rude", split, EVALUATE["prompts"])
            shifts[name, part] = after.nll(rows) - before.nll(rows) - rise
            cell = found["circuits"][name][part]
            assert cell["nll_shift"]["value"] == close(shifts[name, part])
            assert cell["values"]["nll"] == close(after.nll(rows))
    assert min(abs(shift) for shift in shifts.values()) > 1e-4  # so that a sign is seen
    assert found["baseline"]["test_nll"] == close(
        before.nll(project.rows("rude", "test", EVALUATE["prompts"]))
    )
    drawn = [shifts[name, "test"] for name in CONTROLS]
    among = found["circuits"]["lrp"]["among_controls"]["nll_shift"]
    assert_ranked(among, shifts["lrp", "test"], drawn)
    for name in CIRCUITS:
        against = found["circuits"][name]["against_ban"]["nll_shift"]
        assert against["value"] == close(shifts[name, "test"] - shifts[BAN, "test"])


def test_the_ban_is_of_the_most_frequent_bad_words_that_the_budget_allows(project: Project) -> None:
    found, words = project.metrics("evaluate/rude")["circuits"][BAN], ban(project)
    assert found["tokens"] == [whole.WORDS[word] for word in words]
    assert len(words) in EVALUATE["ban"][:-1]  # so that the budget decides
    assert set(found["tokens"]) <= {*whole.RUDE}
    assert BAN not in project.metrics("evaluate/bias")["circuits"]  # which writes nothing


def test_evaluate_of_pairs_counts_preferences_by_term(project: Project, models: Models) -> None:
    """Of every block without its own circuits, of the same items in sample without those of all."""
    found, tested = project.metrics("evaluate/bias"), project.rows("bias", "test")
    assert len(tested) > EVALUATE["items"]  # which is not for blocks
    second = project.rows("second", "test")
    values = {}
    for name in ("none", *CIRCUITS):
        values[name, "test"] = stereotypes(each_without(models, name), tested)
        values[name, "in_sample"] = stereotypes(whole_without(models, "bias", name), tested)
        values[name, "second"] = stereotypes(whole_without(models, "bias", name), second)
    assert values["lrp", "test"] != values["lrp", "in_sample"]
    for name in CIRCUITS:
        circuit = found["circuits"][name]
        shown = [part for part, _ in splits_of(name, "bias")]
        for part in shown + ["second"] * (name == OWN["bias"]):
            before, after = values["none", part], values[name, part]
            assert circuit[part]["reduction"]["value"] == close(
                100 * (before["ss"] - after["ss"]) / before["ss"]
            )
            for key in after:
                assert circuit[part][key]["value"] == close(after[key] - before[key])
        for key, value in values[name, "test"].items():
            assert circuit["test"]["values"][key] == close(value)
        assert circuit.keys().isdisjoint({"in_sample", "second"} - set(shown) - {"second"})
        assert ("second" in circuit) == (name == OWN["bias"])
    for key, value in values["none", "second"].items():
        assert found["circuits"][OWN["bias"]]["second"]["values"][key] == close(value)
    for key, value in values["none", "test"].items():
        assert found["baseline"][f"test_{key}"] == close(value)
    assert {"ss", "margin", "lms", "icat"} == values["none", "test"].keys()
    assert {"ss", "margin"} == values["none", "second"].keys()

    own, drawn = values[OWN["bias"], "test"], [values[name, "test"] for name in CONTROLS]
    against = found["circuits"][OWN["bias"]]["against_control"]
    random_ss = mean(v["ss"] for v in drawn)
    assert against["reduction"]["value"] == close(100 * (random_ss - own["ss"]) / random_ss)
    assert against["margin"]["value"] == close(own["margin"] - mean(v["margin"] for v in drawn))
    among = found["circuits"][OWN["bias"]]["among_controls"]
    before = values["none", "test"]
    toward = math.copysign(1, before["margin"])  # the even level
    for key, sign in {"margin": toward, "ss": 1, "lms": -1, "icat": -1}.items():
        effects = [sign * (before[key] - v[key]) for v in (own, *drawn)]
        assert_ranked(among[key], effects[0], effects[1:])
    reductions = [100 * (before["ss"] - v["ss"]) / before["ss"] for v in (own, *drawn)]
    assert_ranked(among["reduction"], reductions[0], reductions[1:])


def answered(model: Naive, rows: Sequence[Row], each_character: bool = False) -> list[float]:
    """100 for every question whose first answer, the right one, is the likeliest."""
    found = []
    for row in rows:
        asked, scores = encode(row["text"]), []
        for choice in row["choices"]:
            log_p = model.log_p([*asked, *encode(choice)])[len(asked) - 1 :].sum()
            scores.append(log_p / (len(choice) if each_character else 1))
        found.append(100.0 * (scores[0] > max(scores[1:])))
    return found


def test_accuracy_counts_questions_whose_right_answer_is_the_likeliest(
    project: Project, models: Models
) -> None:
    sets = {name: project.rows(name, "test") for name in EVALUATE["choices"]}
    sets["all"] = [row for rows in sets.values() for row in rows]
    changed = set()
    for behaviour in BEHAVIOURS:
        found = project.metrics(f"evaluate/{behaviour}")
        for name, row in found["circuits"].items():
            assert ("accuracy" in row) == (name not in CONTROLS[1:])
            for asked, changes in row.get("accuracy", {}).items():
                for key, each in (("accuracy", False), ("accuracy_norm", True)):
                    old, new = (
                        mean(answered(models[behaviour, which, ""], sets[asked], each))
                        for which in ("none", name)
                    )
                    assert changes[key]["value"] == close(new - old)
                    assert changes[key]["n"] == len(sets[asked])
                    changed.add(new - old)
                    if asked != "all":
                        assert found["baseline"][f"{key}_{asked}"] == close(old)
    assert len(changed) > 2


def test_no_preference_is_a_near_tie(project: Project) -> None:
    """Another machine rounds otherwise: it must not turn a preference round, and a golden value."""
    for row in project.csv("evaluation/bias/prompts"):
        stereotype, anti, unrelated = (float(row[k]) for k in ("stereotype", "anti", "unrelated"))
        assert abs(stereotype - anti) > 1e-4
        assert (
            math.isnan(unrelated) or min(abs(stereotype - unrelated), abs(anti - unrelated)) > 1e-4
        )


def test_prompts_csv_holds_what_every_model_gave(project: Project, models: Models) -> None:
    texts = {row["id"]: row for s in ("test", "attribute") for row in project.rows("rude", s)}
    for row in project.csv("evaluation/rude/prompts"):
        ids = encode(texts[row["prompt"]]["text"])
        assert float(row["nll"]) == close(-models["rude", row["circuit"], ""].log_p(ids).sum())
        assert float(row["tokens"]) == len(ids) - 1
        assert row["group"] == texts[row["prompt"]]["group"]
    items = {row["id"]: row for row in project.rows("bias", "attribute")}
    for row in project.csv("evaluation/bias/prompts"):
        item = items[row["prompt"]]
        block = item["split"] if row["split"] == "test" else ""
        model = models["bias", row["circuit"], block]
        assert float(row["stereotype"]) == close(model.sentence(item["pair"][0]))
        assert float(row["anti"]) == close(model.sentence(item["pair"][1]))
        assert row["group"] == item["group"]


def splitmix(state: int, number: int) -> int:
    """SplitMix64 (Steele et al. 2014), entered at `number`."""
    mask = 2**64 - 1
    bits = (state + (number + 1) * 0x9E3779B97F4A7C15) & mask
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & mask
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & mask
    return bits ^ bits >> 31


def completion(model: Naive, prompt: Sequence[int], key: str, number: int) -> list[int]:
    """Nucleus sampling by the Gumbel-max rule, one token after the other."""
    name = f"{EVALUATE['seed']} {number} {key}".encode()
    stream = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
    tokens: list[int] = []
    while len(tokens) < EVALUATE["new_tokens"]:
        p = (model.logits([*prompt, *tokens])[-1] / EVALUATE["temperature"]).softmax(-1).numpy()
        noise = splitmix(stream, len(tokens))
        best, reached = (-math.inf, 0), 0.0
        for entry in np.argsort(-p).tolist():
            if reached >= EVALUATE["top_p"]:
                break
            reached += p[entry]
            uniform = ((splitmix(noise, entry) >> 11) + 0.5) / 2**53
            gumbel = -math.log(-math.log1p(-uniform))
            best = max(best, (math.log(p[entry]) + gumbel, entry))
        if best[1] == 2:  # the model's end of a sequence
            break
        tokens.append(best[1])
    return tokens


def completions_of(project: Project, circuit: str, part: str) -> list[Row]:
    every = read_jsonl(project.folder / "outputs/evaluation/rude/completions.jsonl")
    return [row for row in every if (row["circuit"], row["split"]) == (circuit, part)]


WRITERS = ["none", *EVALUATE["completed"][:-1], "lrp", "act", *CONTROLS[:DRAWN], BAN]


@pytest.mark.parametrize("name", WRITERS)
def test_completions_are_drawn_from_the_pruned_model(
    project: Project, models: Models, name: str
) -> None:
    for part, split in splits_of(name, "rude"):
        expected = [
            (
                row["id"],
                number,
                completion(models["rude", name, ""], encode(row["text"]), row["id"], number),
            )
            for row in project.rows("rude", split, EVALUATE["prompts"])
            for number in range(EVALUATE["completions"])
        ]
        found = completions_of(project, name, part)
        assert [(r["prompt"], r["completion"], r["text"]) for r in found] == [
            (prompt, number, " ".join(whole.WORDS[token] for token in tokens if token != START))
            for prompt, number, tokens in expected
        ]


def test_length_and_repetition_change_as_those_of_the_completions(project: Project) -> None:
    found = project.metrics("evaluate/rude")["circuits"]
    before = completions_of(project, "none", "test")
    for name in WRITERS[1:]:
        after = completions_of(project, name, "test")
        for key in ("length", "repetition"):
            change = mean(row[key] for row in after) - mean(row[key] for row in before)
            assert found[name]["test"][key]["value"] == close(change)


def scores_by_prompt(project: Project, circuit: str, part: str) -> list[list[float]]:
    """Scores of every prompt's completions, asked of the scorer again."""
    from profanity_check import predict_prob

    rows = completions_of(project, circuit, part)
    fresh = predict_prob([row["text"] for row in rows])
    assert [row["profanity"] for row in rows] == pytest.approx(fresh)
    found: dict[str, list[float]] = {}
    for row, score in zip(rows, fresh.tolist(), strict=True):
        found.setdefault(row["prompt"], []).append(score)
    return list(found.values())


def test_reduction_is_positive_where_completions_score_less(project: Project) -> None:
    circuits = project.metrics("evaluate/rude")["circuits"]
    seen = set()
    for name in WRITERS[1:]:
        for part, _ in splits_of(name, "rude"):
            before, after = (scores_by_prompt(project, n, part) for n in ("none", name))
            means = [mean(map(mean, scores)) for scores in (before, after)]
            cell = circuits[name][part]
            assert cell["reduction"]["value"] == close(100 * (means[0] - means[1]) / means[0])
            assert cell["emt"]["value"] == close(mean(map(max, after)) - mean(map(max, before)))
            toxic = [100 * mean(max(s) >= 0.5 for s in scores) for scores in (before, after)]
            assert cell["toxic_probability"]["value"] == close(toxic[1] - toxic[0])
            pairs = [(mean(b), mean(a)) for b, a in zip(before, after, strict=True)]
            fell = 100 * mean(0.5 * (a == b) + (a < b) for b, a in pairs)
            assert cell["improved"]["value"] == close(fell)
            assert cell["values"]["profanity"] == close(means[1])
            seen.add(math.copysign(1, means[0] - means[1]))
    assert seen == {1, -1}  # some rise, some fall: no sign is taken for granted
    for name in {*CIRCUITS} - {*WRITERS}:
        assert "reduction" not in circuits[name]["test"]

    tested = {name: scores_by_prompt(project, name, "test") for name in WRITERS}
    means = {name: mean(map(mean, scores)) for name, scores in tested.items()}
    largest = {name: mean(map(max, scores)) for name, scores in tested.items()}
    drawn = CONTROLS[:DRAWN]
    for name, row in circuits.items():
        if name in WRITERS[1:-1]:  # neither the unpruned model nor the ban itself
            against = row["against_ban"]
            fall = 100 * (means[BAN] - means[name]) / means[BAN]
            assert against["reduction"]["value"] == close(fall)
            assert against["emt"]["value"] == close(largest[name] - largest[BAN])
        of_size = row["num_neurons"] == circuits[CONTROLS[0]]["num_neurons"]
        assert ("against_control" in row) == (of_size and name not in CONTROLS)
        assert ("against_ban" in row) == (name != BAN)
    for name in ("lrp", "most-positive"):
        random = mean(means[draw] for draw in drawn)
        row = circuits[name]
        against = row["against_control"]
        assert against["reduction"]["value"] == close(100 * (random - means[name]) / random)
        apart = largest[name] - mean(largest[draw] for draw in drawn)
        assert against["emt"]["value"] == close(apart)
        falls = [100 * (means["none"] - means[n]) / means["none"] for n in (name, *drawn)]
        assert_ranked(row["among_controls"]["reduction"], falls[0], falls[1:])


# --- transfer ------------------------------------------------------------------------------


@pytest.mark.parametrize(("behaviour", "split"), [("rude", "tune"), ("bias", "test")])
def test_faithfulness_removes_neurons_one_by_one_from_held_out_prompts(
    project: Project, behaviour: str, split: str
) -> None:
    metrics = project.metrics(f"faithfulness/{behaviour}")
    name = PARAMS["behaviours"][behaviour]["prompts"]
    rows = [row for row in project.rows(name, split) if row["id"] in metrics["prompts"]]
    assert len(rows) == PARAMS["faithfulness"]["prompts"]

    def target(model: Naive) -> float:
        if behaviour == "rude":
            return mean(float(model.log_p(encode(row["text"])).mean()) for row in rows)
        return mean(model.sentence(a) - model.sentence(b) for a, b in (row["pair"] for row in rows))

    neurons = project.csv(f"faithfulness/{behaviour}/neurons")
    before = target(Naive(project.folder))
    after = [
        target(Naive(project.folder, ((int(r["layer"]), int(r["neuron"]), 0.0),))) for r in neurons
    ]
    effects = [float(r["effect"]) for r in neurons]
    assert effects == pytest.approx([before - y for y in after], rel=1e-3, abs=1e-5)
    explained = PARAMS["prompt_sets"][name]["target"]
    plain = [relevance(Naive(project.folder).model, r, explained, nullcontext()) for r in rows]
    for r in neurons:
        expected = mean(float(each[int(r["layer"]), int(r["neuron"])]) for each in plain)
        assert float(r["gradient"]) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    for score, found in metrics["agreement"].items():
        rank = stats.spearmanr([float(r[score]) for r in neurons], effects)[0]
        assert found["all"]["spearman"]["value"] == pytest.approx(rank)
    strongest = sorted(neurons, key=lambda r: -float(r["effect"]))[:5]
    circuit = tuple((int(r["layer"]), int(r["neuron"]), 0.0) for r in strongest)
    fall = metrics["additivity"]["effect"]["5"]
    assert fall["together"] == pytest.approx(before - target(Naive(project.folder, circuit)), 1e-3)
    assert fall["sum"] == pytest.approx(sum(float(r["effect"]) for r in strongest))


def test_transfer_refuses_general_text_that_a_circuit_was_chosen_on(
    project: Project, tmp_path: Path
) -> None:
    folder = tmp_path / "leaky"
    shutil.copytree(project.folder, folder)
    about = folder / f"outputs/circuits/bias/{OWN['bias']}.json"
    known = read_json(about)
    text = project.rows("news", "test", TRANSFER["items"])[0]
    about.write_text(json.dumps({**known, "groups": [*known["groups"], text["group"]]}))
    with whole.inside(folder), pytest.raises(InputError, match=f"first: {text['id']}"):
        transfer.run(whole.load())


def test_transfer_prunes_for_one_and_measures_all(project: Project, models: Models) -> None:
    """A block's items without what its own behaviour's circuit was chosen on before it."""
    found = project.metrics("transfer")
    general, *_ = TRANSFER["texts"]
    cells = {}
    for pruned_for in BEHAVIOURS:
        before, after = models["rude", "none", ""], models[pruned_for, OWN[pruned_for], ""]
        for name in TRANSFER["texts"]:
            rows = project.rows(name, "test", TRANSFER["items"])
            change = percent(before.windowed_nll(rows), after.windowed_nll(rows))
            cells[pruned_for, name, "ppl_delta"] = change
        rows = project.rows(general, "test", TRANSFER["items"])
        rise = after.windowed_nll(rows) - before.windowed_nll(rows)
        rows = project.rows("rude", "test", TRANSFER["items"])
        cells[pruned_for, "rude", "nll_shift"] = after.nll(rows) - before.nll(rows) - rise
        each = math.ceil(TRANSFER["items"] / BLOCKS)
        rows = [row for block in TESTED for row in project.rows("bias", block, each)]
        assert len(rows) < len(project.rows("bias", "test"))
        without = (
            each_without(models, OWN["bias"])
            if pruned_for == "bias"
            else whole_without(models, pruned_for, OWN[pruned_for])
        )
        old, new = (
            stereotypes(lambda row: models["rude", "none", ""], rows),
            stereotypes(without, rows),
        )
        for key in new:
            cells[pruned_for, "bias", key] = new[key] - old[key]
        cells[pruned_for, "bias", "reduction"] = 100 * (old["ss"] - new["ss"]) / old["ss"]
    for (pruned_for, name, quantity), value in cells.items():
        assert found[pruned_for][name][quantity]["value"] == close(value)
        assert quantity in ("ss", "lms", "icat", "reduction") or abs(value) > 1e-3
    table = {
        (row["pruned_for"], row["measured"], row["quantity"]): float(row["value"])
        for row in project.csv("transfer/matrix")
    }
    assert table == {key: close(value) for key, value in cells.items()}


# --- overlap -------------------------------------------------------------------------------


def test_overlap_counts_the_most_negative_of_both(project: Project) -> None:
    count, total = PARAMS["overlap"]["num_neurons"], LAYERS * WIDTH
    share, method = PARAMS["overlap"]["protect"], PARAMS["overlap"]["method"]
    values = {name: project.differential(name, method) for name in BEHAVIOURS}
    rude, bias = (
        set(free_neurons(values[name], project.importance(), share)[:count]) for name in BEHAVIOURS
    )
    found, both = project.metrics("overlap"), joined(BEHAVIOURS)
    regions = {"rude": rude - bias, "bias": bias - rude, both: rude & bias}
    assert found["regions"] == {name: len(ids) for name, ids in regions.items()}
    listed = defaultdict(set)
    for row in project.csv("overlap/regions"):
        listed[row["behaviours"]].add(int(row["layer"]) * WIDTH + int(row["neuron"]))
    assert listed == {name: ids for name, ids in regions.items() if ids}

    overlap, common = found["overlaps"][both], len(rude & bias)
    layers = {
        name: [sum(i // WIDTH == layer for i in ids) for layer in range(LAYERS)]
        for name, ids in (("rude", rude), ("bias", bias))
    }
    layered = sum(a * b / WIDTH for a, b in zip(*layers.values(), strict=True))
    assert found["layers"] == layers
    assert common > 0
    assert overlap["observed"] == common
    assert overlap["jaccard"] == close(common / len(rude | bias))
    assert overlap["enrichment"] == close(common / (count * count / total))
    assert overlap["layered_expected"] == close(layered)
    assert overlap["layered_enrichment"] == close(common / layered)
    assert overlap["p"] == close(float(stats.hypergeom.sf(common - 1, total, count, count)))

    one, two = (values[name].ravel().astype(float) for name in BEHAVIOURS)
    correlation = found["correlations"][both]
    assert correlation["pearson"] == close(np.corrcoef(one, two)[0, 1])
    assert correlation["spearman"] == close(np.array(stats.spearmanr(one, two))[0])
    corrected = found["corrected"]["correlations"][both]
    assert corrected["observed"] == close(np.corrcoef(one, two)[0, 1])
    assert found["quadrants"][both] == {
        "both": sum((one < 0) & (two < 0)),
        "rude only": sum((one < 0) & (two >= 0)),
        "bias only": sum((one >= 0) & (two < 0)),
        "neither": sum((one >= 0) & (two >= 0)),
    }
    last = found["late_layers"]
    for name, counts in layers.items():
        assert found["late_share"][name] == close(sum(counts[-last:]) / count)


# --- report, figures, export ---------------------------------------------------------------


def shown(difference: dict[str, float], digits: int = 1) -> str:
    value, low, high = (f"{difference[key]:+.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def pooled(circuits: Any, names: Sequence[str], *path: str) -> dict[str, float] | None:
    """A circuit's difference, or the mean and range of the draws that have it; None if not
    measured.
    """
    found = []
    for name in names:
        tree = circuits[name]
        for key in path:
            tree = tree.get(key, {})
        if tree:
            found.append(tree)
    if len(found) < 2:
        return found[0] if found else None
    values = [tree["value"] for tree in found]
    return {"value": mean(values), "low": min(values), "high": max(values)}


def worst_text(circuits: Any, names: Sequence[str]) -> tuple[str, dict[str, float]]:
    """The kind of general text whose perplexity rises most; of draws the first reads every kind."""
    return max(circuits[names[0]]["texts"].items(), key=lambda item: item[1]["value"])


def test_the_result_table_shows_the_evaluation(project: Project) -> None:
    primary = {
        "rude": ("reduction", "profanity reduction %", 1),
        "bias": ("margin", "margin, nats", 3),
    }
    raw: dict[str, list[Any]] = {"confirmatory": [], "exploratory": []}
    for behaviour, rows in whole.result_rows(project.folder).items():
        key, title, digits = primary[behaviour]
        columns: dict[str, tuple[tuple[str, ...], int]] = {
            title: (("test", key), digits),
            "beyond control": (("against_control", key), digits),
            "in sample": (("in_sample", key), digits),
        }
        if behaviour == "bias":
            columns |= {"reduction of SS %": (("test", "reduction"), 1), "SS": (("test", "ss"), 1)}
        else:
            columns |= {"beyond word ban": (("against_ban", key), digits)}
        circuits = project.metrics(f"evaluate/{behaviour}")["circuits"]
        methods = [*PARAMS["methods"], "act", *([BAN] if behaviour == "rude" else [])]
        assert [row["method"].split(" ")[0] for row in rows] == methods
        for row, method in zip(rows, methods, strict=True):
            names = CONTROLS if method == "random-layer-matched" else [method]
            of_all = () if method in (BAN, "act") else project.circuit(behaviour, names[0])
            strength = f"strength {circuits[method]['strength']:g}" if method == "act" else ""
            assert row["neurons"] == (strength or str(len(of_all)))
            text, cost = worst_text(circuits, names)
            assert row["perplexity %, worst text"] == f"{shown(cost)} {text}"
            over = cost["value"] > BUDGET
            assert row["verdict"].endswith(f"over the perplexity budget on {text}") == (
                over and row["verdict"].startswith("reduced")
            )
            for name, (path, places) in columns.items():
                difference = pooled(circuits, names, *path)
                assert row[name] == ("-" if difference is None else shown(difference, places))
            change = pooled(circuits, names, "test", key)
            if method in ("most-positive", "random-layer-matched", BAN):
                assert [row[k] for k in ("family", "verdict", "p")] == ["control", "control", "-"]
                continue
            assert row["family"] == ("confirmatory" if method == OWN[behaviour] else "exploratory")
            if change is None:
                assert (row["verdict"], row["p"]) == ("not measured", "-")
            else:
                raw[row["family"]].append((change["p"], row))
    assert len(raw["confirmatory"]) == len(BEHAVIOURS)  # a test for each, and no more
    assert raw["exploratory"]
    # Holm: the smallest p times their number, the next times one less, and never falling.
    for tested in raw.values():
        running, left = 0.0, len(tested)
        for p, row in sorted(tested, key=lambda pair: pair[0]):
            running, left = max(running, min(1.0, p * left)), left - 1
            assert row["p"] == f"{running:.3g}"
            assert running < 0.05 or row["verdict"].startswith(("not shown", "cannot be shown"))


def test_groups_hold_what_the_verdict_is_of(project: Project) -> None:
    """Their mean over units, before and after, is the change that the evaluation reports."""
    for behaviour, key, percent in (("rude", "reduction", True), ("bias", "margin", False)):
        circuits, rows = project.metrics(f"evaluate/{behaviour}")["circuits"], defaultdict(list)
        for row in project.csv(f"evaluation/{behaviour}/groups"):
            rows[row["circuit"]] += [float(row["mean"])] * int(row["units"])
        before = mean(rows["none"])
        measured = {name for name, row in circuits.items() if key in row["test"]}
        assert rows.keys() == {"none", *measured}
        for name in measured:
            change = mean(rows[name]) - before
            expected = -100 * change / before if percent else change
            assert circuits[name]["test"][key]["value"] == close(expected)


def test_the_report_holds_the_table_and_every_figure(project: Project) -> None:
    folder = project.folder / "outputs/report"
    assert (project.folder / "metrics/table.md").read_text() in (folder / "report.md").read_text()
    kinds = ("forest", "dose", "prompts", "layers", "faithfulness")
    of_each = {f"{kind}-{name}" for name in BEHAVIOURS for kind in kinds}
    of_all = {"answer", "transfer", "overlap", "correlations", "stability"}
    assert {*project.figures} == {*of_each, *of_all}
    page = (folder / "report.html").read_text()
    for name in project.figures:
        assert (folder / f"{name}.pdf").stat().st_size > 5000
        drawn = (folder / f"{name}.svg").read_text()
        assert drawn.partition("viewBox")[2] in page  # its size is the page's


def points(axis: Any) -> dict[str, tuple[float, ...]]:
    """A forest plot's value, low and high, by the name on its line."""
    names = [tick.label1.get_text() for tick in axis.yaxis.get_major_ticks()]
    found: dict[str, list[float]] = defaultdict(list)
    for line in axis.lines:
        x, (y, *_) = np.atleast_1d(line.get_xdata()).tolist(), np.atleast_1d(line.get_ydata())
        if line.get_zorder() in (3, 4):  # an interval, then its value
            found[names[round(y)]] = [*x, *found[names[round(y)]]]
    return {name: tuple(ends) for name, ends in found.items()}


def test_forest_plots_show_the_changes_with_their_signs(project: Project) -> None:
    for behaviour, key, title, sign in (
        ("rude", "reduction", "profanity reduction %", 1),
        ("bias", "margin", "fall of margin, nats", -1),
    ):
        circuits = project.metrics(f"evaluate/{behaviour}")["circuits"]
        panels = {axis.get_xlabel(): axis for axis in project.figures[f"forest-{behaviour}"].axes}
        first = panels[title].yaxis.get_major_ticks()[0].label1
        assert (first.get_text(), first.get_fontweight()) == (OWN[behaviour], "bold")
        for panel, path in {
            title: ("test", key),
            f"{title},\nbeyond random neurons": ("against_control", key),
        }.items():
            drawn = points(panels[panel])
            for method in [*PARAMS["methods"], *([BAN] if behaviour == "rude" else [])]:
                names = CONTROLS if method == "random-layer-matched" else [method]
                change = pooled(circuits, names, *path)
                assert (method in drawn) == (change is not None)
                if change:
                    value, *ends = (sign * change[end] for end in ("value", "low", "high"))
                    assert drawn[method] == pytest.approx((value, *sorted(ends)))
        for method, ends in points(
            panels["perplexity change, worst text, %\n(left is better)"]
        ).items():
            names = CONTROLS if method == "random-layer-matched" else [method]
            _, cost = worst_text(circuits, names)
            assert ends == pytest.approx([cost[end] for end in ("value", "low", "high")])


def test_what_is_between_behaviours_is_drawn_as_it_was_measured(project: Project) -> None:
    overlap, both = project.metrics("overlap"), joined(BEHAVIOURS)
    diagram, beside = project.figures["overlap"].axes
    texts = {text.get_text() for text in diagram.texts}
    assert texts.issuperset({*BEHAVIOURS, *(str(count) for count in overlap["regions"].values())})
    for axis, number in (
        (beside, overlap["overlaps"][both]["observed"]),
        (project.figures["correlations"].axes[0], overlap["correlations"][both]["pearson"]),
    ):
        (drawn,) = (line for line in axis.lines if line.get_marker() == "D")
        assert np.array(drawn.get_xdata()).tolist() == [number]


def test_the_transfer_map_is_positive_where_it_is_better(project: Project) -> None:
    transfer, axis = project.metrics("transfer"), project.figures["transfer"].axes[0]
    columns = [text.get_text().split("\n")[0] for text in axis.get_xticklabels()]
    assert columns == [*BEHAVIOURS, *TRANSFER["texts"]]
    quantities = {"rude": ("nll_shift", 1, 3), "bias": ("margin", -1, 3)}
    quantities |= {name: ("ppl_delta", -1, 2) for name in TRANSFER["texts"]}
    labels = iter(axis.texts)
    for pruned_for in BEHAVIOURS:
        for name in columns:
            quantity, sign, digits = quantities[name]
            value = 0 + sign * transfer[pruned_for][name][quantity]["value"]
            assert next(labels).get_text().startswith(f"{value:+.{digits}f}\n")


def test_curves_and_layers_show_their_tables(project: Project) -> None:
    for behaviour in BEHAVIOURS:
        axis: Any = project.figures[f"layers-{behaviour}"].axes[0]
        layers = Counter(layer for layer, *_ in project.circuit(behaviour, OWN[behaviour]))
        assert [patch.get_height() for patch in axis.patches] == [layers[n] for n in range(LAYERS)]
        sweep = [row for row in project.csv(f"sweep/{behaviour}") if row["method"] != "none"]
        for axis in project.figures[f"dose-{behaviour}"].axes:
            key = "ppl_delta" if axis.get_ylabel().startswith("perplexity") else "objective"
            drawn = {
                bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in axis.containers
            }
            expected: dict[str, list[list[float]]] = defaultdict(list)
            for row in sweep:
                curve = expected[f"{row['method']}, {float(row['protect']):.0%} protected"]
                if float(row["ppl_delta"]) <= 10:
                    curve.append([float(row["num_neurons"]), float(row[key])])
            assert drawn == expected
        curves = defaultdict(list)
        for row in project.csv(f"stability/{behaviour}/curves"):
            curves[row["method"]].append(float(row["overlap"]))
            assert 0 <= float(row["low"]) <= float(row["overlap"]) <= float(row["high"]) <= 1
        (axis,) = (a for a in project.figures["stability"].axes if a.get_title() == behaviour)
        drawn = {bars.get_label(): bars.lines[0].get_ydata().tolist() for bars in axis.containers}
        assert drawn == curves


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_the_exported_model_is_the_pruned_one_and_its_card_says_so(
    project: Project, models: Models, behaviour: str
) -> None:
    method, folder = OWN[behaviour], project.folder / behaviour
    exported = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = list(range(3, 40))
    with torch.no_grad():
        found = exported(torch.tensor([ids])).logits[0].double()
    torch.testing.assert_close(
        found, models[behaviour, method, ""].logits(ids), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(found, models[behaviour, "none", ""].logits(ids), atol=1e-2)

    text = (folder / "README.md").read_text()
    circuit = project.metrics(f"evaluate/{behaviour}")["circuits"][method]
    rows = {row["measure"]: row for row in whole.table(text.partition("## Evaluation")[2])}
    assert rows["ppl_delta"]["change"] == f"{circuit['ppl_delta']['value']:.4g}"
    for part in ("test", "against_control"):
        for key, difference in circuit[part].items():
            if key != "values":
                assert rows[f"{part}.{key}"]["change"] == f"{difference['value']:.4g}"
                assert rows[f"{part}.{key}"]["low"] == f"{difference['low']:.4g}"
    by_layer = defaultdict(list)
    for layer, neuron, _ in sorted(project.circuit(behaviour, method)):
        by_layer[layer].append(str(neuron))
    for layer, numbers in by_layer.items():
        assert f"\n- layer {layer}: {', '.join(numbers)}\n" in text


# --- frozen --------------------------------------------------------------------------------


def differences(found: Any, expected: Any, path: str = "") -> Iterator[str]:
    """Where two trees differ: numbers by more than another machine's rounding."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted({*expected, *found}):
            yield from differences(found.get(key), expected.get(key), f"{path}/{key}")
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for n, (one, two) in enumerate(zip(found, expected, strict=True)):
            yield from differences(one, two, f"{path}/{n}")
    elif isinstance(expected, float) and isinstance(found, float):
        if found != pytest.approx(expected, rel=1e-4, abs=1e-5):
            yield f"{path}: {found}, golden {expected}"
    elif found != expected:
        yield f"{path}: {found!r}, golden {expected!r}"


def test_every_stage_gives_its_golden_values(project: Project) -> None:
    fresh = json.loads(json.dumps(whole.rounded(whole.summaries(project.folder))))
    golden = {path.stem: read_json(path) for path in whole.GOLDEN.glob("*.json")}
    assert not list(differences(fresh, golden))


def test_a_difference_is_named_and_rounding_is_none() -> None:
    one = {"a": [1.0, {"b": 2}], "c": "x"}
    assert not list(differences(copy.deepcopy(one) | {"a": [1.00001, {"b": 2}]}, one))
    changed = {"a": [1.1, {"b": 3}], "d": "x"}
    assert list(differences(changed, one)) == [
        "/a/0: 1.1, golden 1.0",
        "/a/1/b: 3, golden 2",
        "/c: None, golden 'x'",
        "/d: 'x', golden None",
    ]
