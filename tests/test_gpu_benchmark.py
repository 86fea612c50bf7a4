"""The card's benchmark at toy size: every way runs, and the table says what it should."""

import re

import pytest
import torch

from benchmarks import gpu
from sparc3.commands import cost
from sparc3.model import families


@pytest.fixture(scope="module")
def printed() -> str:
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("builtins.print", lambda *what: said.append(" ".join(map(str, what))))
        gpu.main(["--small"])
    return "\n".join(said)


def test_every_way_has_a_row_of_sane_numbers(printed: str) -> None:
    table = [line.strip("| ").split(" | ") for line in printed.splitlines() if line[:2] == "| "]
    names = [row[0].partition(",")[0] for row in table[1:]]
    assert names == [
        "matrix products",
        *["attribution"] * 2,
        "likelihood",
        "completions",
        "transformers.generate",
        "naive",
    ]
    for row in table[1:-1]:
        assert int(re.sub(r"\D", "", row[1])) > 0
        assert float(row[2]) > 0
        assert float(row[3].rstrip(" %")) > 0
    assert re.search(r"attribution: \d+\.\d times naive", printed)
    assert re.search(r"completions: \d+\.\d times transformers\.generate", printed)
    assert "toy shape" in printed
    assert "aten::mm" in printed  # of the profile


def test_a_part_that_would_begin_too_late_is_left_out() -> None:
    rows, _ = gpu.measure(gpu.SMALL, "cpu", deadline=0)
    assert [row.way for row in rows] == ["matrix products"]


def test_the_model_is_llama_3_8bs() -> None:
    with torch.device("meta"):
        model = gpu.model_of(gpu.LLAMA_3_8B, "meta")
    assert cost.shape(model.config, "bfloat16").parameters == 8_030_261_248
    assert model.dtype == torch.bfloat16


def test_the_naive_way_scores_the_weights_of_so_many_layers() -> None:
    model = gpu.model_of(gpu.SMALL, "cpu")
    (prompt,) = gpu.random_prompts(gpu.SMALL, 1, 9)
    asked: list[int] = []
    own = torch.autograd.grad
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", lambda y, xs: asked.append(len(xs) - 1) or own(y, xs))
        for layers in (0, 1, 3):
            gpu.weights_scored(model, prompt, layers)()
    assert asked == [0, 7, 21]  # q, k, v, o, gate, up, down
    assert not any(p.requires_grad for p in model.parameters())
    assert families.num_layers(model) == 3
