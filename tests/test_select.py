from dataclasses import replace

import numpy as np
import pytest

from sparc3.base.artifacts import circuit_names
from sparc3.base.errors import InputError
from sparc3.base.params import Budget, Method
from sparc3.circuits.choose import choose, choose_per_layer, protected, scales
from sparc3.circuits.methods import noise
from sparc3.stages.checks import load
from sparc3.stages.select import Choice, best_point, choice

RNG = np.random.default_rng(0)


def naive_choice(differential: np.ndarray, k: int, barred: np.ndarray) -> list[int]:
    """The k most negative, one at a time."""
    layers, width = differential.shape
    left = [(differential[i, j], i * width + j) for i in range(layers) for j in range(width)]
    left = [(value, flat) for value, flat in left if not barred.ravel()[flat]]
    chosen = []
    for _ in range(k):
        best = min(left)
        left.remove(best)
        chosen.append(best[1])
    return chosen


def test_choose_takes_the_most_negative_that_are_not_protected() -> None:
    values = RNG.integers(-3, 3, (4, 6)).astype(float)  # with ties
    barred = RNG.random((4, 6)) < 0.3
    for k in (0, 1, 5, 12):
        assert choose(values, k, barred, "k").tolist() == naive_choice(values, k, barred)


def test_choose_refuses_more_neurons_than_there_are() -> None:
    barred = np.array([[True, False], [False, False]])
    with pytest.raises(InputError, match=r"params: KEY: 4 neurons, but only 3 of 4 are not prot"):
        choose(np.zeros((2, 2)), 4, barred, "KEY")
    with pytest.raises(InputError, match=r"params: KEY, layer 0: 2 neurons, but only 1 of 2"):
        choose_per_layer(np.zeros((2, 2)), np.array([2, 0]), barred, "KEY")


def test_protected_is_the_most_important_share() -> None:
    importance = RNG.permutation(20).reshape(4, 5).astype(float)
    mask = protected(importance, 0.25)
    assert mask.sum() == 5
    assert importance[mask].min() > importance[~mask].max()
    assert not protected(importance, 0.0).any()
    assert protected(importance, 1.0).all()


def test_choose_per_layer_keeps_the_counts() -> None:
    values, barred = RNG.standard_normal((4, 10)), RNG.random((4, 10)) < 0.2
    counts = np.array([3, 0, 1, 4])
    ids = choose_per_layer(values, counts, barred, "k")
    assert np.bincount(ids // 10, minlength=4).tolist() == counts.tolist()
    for layer, count in enumerate(counts):
        own = naive_choice(values[layer : layer + 1], count, barred[layer : layer + 1])
        assert {10 * layer + i for i in own} == {i for i in ids if i // 10 == layer}
    assert (np.diff(values.ravel()[ids]) >= 0).all()
    assert choose_per_layer(values, np.zeros(4, int), barred, "k").size == 0


def test_aura_dampens_by_its_own_formula() -> None:
    auroc = np.array([1.0, 0.75, 0.5])
    method = Method(score="max-activation", contrast="auroc", scale="auroc")
    assert scales(method, 0.5 - auroc) == pytest.approx(1 - 2 * (auroc - 0.5))
    assert scales(Method(score="lrp", scale=0.25), auroc).tolist() == [0.25] * 3


ROWS = [
    {
        "method": m,
        "num_neurons": str(k),
        "protect": str(q),
        "ppl_delta": str(p),
        "ppl_error": "0.2",
        "kl": str(k / 1000),
        "kl_error": "0.0015",
        "objective": str(o),
    }
    for m, k, q, p, o in [
        ("a", 10, 0.2, 0.1, 0.1),
        ("a", 50, 0.2, 0.75, 0.4),
        ("a", 70, 0.2, 0.9, 0.7),  # within the budget by less than its standard error
        ("a", 50, 0.5, 0.5, 0.3),
        ("a", 99, 0.2, 1.5, 0.9),
        ("b", 10, 0.2, 4.0, 0.5),
        ("b", 20, 0.2, 9.0, 0.9),
    ]
]


def test_best_point_maximises_within_the_budget() -> None:
    one, two = Budget(perplexity=1.0), Budget(perplexity=2.0)
    assert best_point(ROWS, "a", None, None, one) == (50, 0.2)
    assert best_point(ROWS, "a", None, None, two) == (99, 0.2)
    assert best_point(ROWS, "a", None, 0.5, one) == (50, 0.5)
    assert best_point(ROWS, "a", 10, None, one) == (10, 0.2)
    # A budget of KL as well: 50 neurons, with the standard error, break it.
    assert best_point(ROWS, "a", None, None, Budget(perplexity=2.0, kl=0.052)) == (50, 0.2)
    assert best_point(ROWS, "a", None, None, Budget(perplexity=2.0, kl=0.051)) == (10, 0.2)
    # Nothing within the budget: the cheapest.
    assert best_point(ROWS, "b", None, None, one) == (10, 0.2)
    with pytest.raises(InputError, match="no point for method a with num_neurons=7"):
        best_point(ROWS, "a", 7, None, one)


def test_noise_depends_on_seed_and_name_only() -> None:
    assert np.array_equal(noise(0, "x", (2, 3)), noise(0, "x", (2, 3)))
    assert not np.array_equal(noise(0, "x", (2, 3)), noise(1, "x", (2, 3)))
    assert not np.array_equal(noise(0, "x", (2, 3)), noise(0, "y", (2, 3)))


def test_a_method_has_a_circuit_per_draw() -> None:
    assert circuit_names("lrp", Method(score="lrp")) == ["lrp"]
    assert circuit_names("r", Method(score="random", draws=2)) == ["r-0", "r-1"]


@pytest.mark.parametrize(
    ("fixed", "method", "key"),
    [
        (None, "lrp", "sweep.num_neurons"),
        (7, "lrp", "select.num_neurons"),
        (7, "gradient-t", "methods.gradient-t"),
    ],
)
def test_a_choice_knows_the_key_that_asked(fixed: int | None, method: str, key: str) -> None:
    params = load()
    params = replace(
        params,
        sweep=replace(params.sweep, num_neurons=(3,), protect=(0.2,)),
        select=replace(params.select, num_neurons=fixed, protect=None),
    )
    followed = Choice(7, 0.1, "select.num_neurons") if method == "gradient-t" else None
    found = choice(params, method, followed, [], np.zeros((2, 9)))
    assert found == (fixed or 3, 0.1 if followed else 0.2, key)
