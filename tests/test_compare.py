"""One prompt with and without a circuit: what a model pruned for good draws from the same noise."""

from pathlib import Path

import pytest
import whole

from sparc3.__main__ import main
from sparc3.base.artifacts import circuit_path
from sparc3.base.files import digest_text
from sparc3.circuits.ablate import prune_weights
from sparc3.circuits.circuit import INTACT, read_circuit
from sparc3.measure.generate import Sampling, complete
from sparc3.measure.scorers import scorer
from sparc3.model import loading
from sparc3.stages.checks import load

PROMPT = "the old king is very"


def columns(text: str) -> list[list[str]]:
    return [[part.strip() for part in line.split(" | ")] for line in text.splitlines()]


def drawn(behaviour: str, method: str | None, count: int) -> list[str]:
    """Completions by a model of which the circuit's neurons are cut out for good."""
    params = load()
    model, tokenizer, e = (
        loading.load(params.model),
        loading.tokenizer(params.model),
        params.evaluate,
    )
    if method:
        prune_weights(model, read_circuit(circuit_path(behaviour, method)))
    sampling = Sampling(count, e.new_tokens, e.temperature, e.top_p, e.seed)
    prompts, key = loading.encode(tokenizer, [PROMPT]), digest_text(PROMPT)[:16]
    ((tokens,),) = complete(model, [INTACT], prompts, [key], sampling)
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("method", [None, "aura", f"random-layer-matched-{whole.DRAWS - 1}"])
def test_both_columns_are_what_the_two_models_draw(
    finished: Path,
    method: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(finished)
    monkeypatch.setenv("COLUMNS", "400")  # no line is broken
    flags = [] if method is None else ["--method", method]
    command = ["compare", "--behaviour", "rude", "--prompt", PROMPT, "--completions", "4", *flags]
    assert main(command) == 0
    (left, right), *shown, means = columns(capsys.readouterr().out)
    assert left == "the model"
    assert right.endswith(f"neurons of {method or 'lrp'}")
    score = scorer(load().scorers["profanity"])
    for at, name in enumerate((None, method or "lrp")):
        texts = drawn("rude", name, 4)
        scores = score(texts)
        expected = [
            f"{value:.2f} {text}".strip() for value, text in zip(scores, texts, strict=True)
        ]
        assert [" ".join(row[at].split()) for row in shown] == [
            " ".join(e.split()) for e in expected
        ]
        assert means[at] == f"{scores.mean():.2f} mean profanity"
    assert [row[0] for row in shown] != [row[1] for row in shown] or method


def test_without_a_scorer_there_are_completions_alone_and_lines_fit_the_screen(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished)
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["compare", "--behaviour", "bias", "--prompt", PROMPT]) == 0
    said = capsys.readouterr().out
    assert "mean" not in said
    assert max(map(len, said.splitlines())) <= 60
    words = " ".join(row[0] for row in columns(said)[1:]).replace("- ", "").split()
    assert words == " ".join(drawn("bias", None, 3)).split()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--behaviour", "rage", "--prompt", "a"],
            "--behaviour 'rage' is not in params.behaviours",
        ),
        (["--behaviour", "rude", "--prompt", "a", "--method", "x"], "--method 'x' is no circuit; "),
        (["--behaviour", "rude", "--prompt", "a", "--method", ""], "--method '' is no circuit; "),
        (["--behaviour", "rude", "--prompt", "a", "--method", "act"], "'act' is no circuit; known"),
        (["--behaviour", "rude", "--prompt", "a", "--completions", "0"], "expected 1 to 1000"),
        (["--behaviour", "rude", "--prompt", "a", "--completions", "1001"], "expected 1 to 1000"),
        (["--behaviour", "rude", "--prompt", "\udcff a"], "--prompt is no UTF-8 text"),
        (["--behaviour", "rude", "--prompt", "a " * 99], "expected 1 to"),
    ],
)
def test_bad_input_is_one_line(
    finished: Path,
    flags: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(finished)
    assert main(["compare", *flags]) == 2
    assert said in capsys.readouterr().err
