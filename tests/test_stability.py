import numpy as np

from sparc3.circuits.correlation import Scores
from sparc3.circuits.stability import overlaps, resampled_circuits, selection_frequency
from sparc3.relevance.contrasts import mean_difference, t


def apart(scores: np.ndarray) -> Scores:
    """Every prompt a group of its own."""
    return Scores(scores, np.array([f"g{i}" for i in range(len(scores))]))


def test_a_clear_signal_is_found_again_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    reference, behaviour = rng.standard_normal((60, 40)), rng.standard_normal((60, 40))
    behaviour[:, :5] += 10
    (clear,) = resampled_circuits(
        apart(reference), apart(behaviour), mean_difference, 5, [60], 50, 0
    )
    assert selection_frequency(clear, 40)[:5].tolist() == [1.0] * 5
    assert overlaps(clear, 5).tolist() == [1.0] * 50
    noise = rng.standard_normal((60, 40))
    (vague,) = resampled_circuits(apart(reference), apart(noise), mean_difference, 5, [10], 300, 0)
    # Five of forty by chance: an eighth of the circuit, up to the noise of 300 resamples.
    assert overlaps(vague, 5).mean() < 0.5
    assert np.isclose(selection_frequency(vague, 40).sum(), 5)


def test_more_prompts_agree_more() -> None:
    rng = np.random.default_rng(1)
    signal = np.linspace(1, 0, 60)
    reference = rng.standard_normal((200, 60))
    behaviour = rng.standard_normal((200, 60)) + signal
    few, many = resampled_circuits(apart(reference), apart(behaviour), t, 10, [10, 200], 60, 0)
    assert overlaps(many, 10).mean() > overlaps(few, 10).mean()


def test_copies_of_a_prompt_make_nothing_more_stable() -> None:
    rng = np.random.default_rng(2)
    reference, behaviour = rng.standard_normal((2, 12, 30))
    one, other = (
        Scores(np.repeat(scores, 8, axis=0), np.array([f"g{i // 8}" for i in range(96)]))
        for scores in (reference, behaviour)
    )
    (once,) = resampled_circuits(
        apart(reference), apart(behaviour), mean_difference, 5, [12], 300, 0
    )
    (often,) = resampled_circuits(one, other, mean_difference, 5, [96], 300, 0)
    assert abs(overlaps(once, 5).mean() - overlaps(often, 5).mean()) < 0.05


def test_an_empty_circuit_is_stable() -> None:
    assert overlaps(np.empty((7, 0), dtype=int), 0).tolist() == [1.0] * 7
