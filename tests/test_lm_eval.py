"""The shipped tasks, in the real lm-evaluation-harness, against likelihoods computed here."""

from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import yaml
from lm_eval.tasks import TaskManager

from sparc3.base.files import read_jsonl
from sparc3.base.params import Model
from sparc3.circuits.circuit import INTACT, Circuit
from sparc3.measure.instrument import How
from sparc3.measure.instruments import accuracy
from sparc3.measure.likelihood import token_nll
from sparc3.model import loading
from sparc3.prompts.sources import SOURCES
from sparc3.stages.checks import load

TASKS = Path(__file__).parent.parent / "examples/lm_eval"
LIMIT = 5
PARAMS = load(Path(__file__).parent.parent / "params.yaml")
QUESTIONS = [f"sparc3_{name}" for name in ("siqa", "piqa", "openbookqa", "commonsenseqa")]
EVALUATE: Any = lm_eval.simple_evaluate  # whose decorator hides its arguments
# Every tenth neuron of two late layers: enough to move a likelihood.
CIRCUIT = Circuit(
    np.repeat([20, 25], 154), np.tile(np.arange(0, 1536, 10), 2), np.zeros(308), np.zeros(308)
)


def test_every_task_names_its_file_and_has_a_version() -> None:
    for path in TASKS.glob("[!_]*.yaml"):
        text = path.read_text()
        assert f"task: sparc3_{path.stem}\n" in text
        assert "data_files: data/" in text
        assert "include: _" in text
    for path in TASKS.glob("_*.yaml"):
        loaded = yaml.safe_load(path.read_text().replace("!function ", ""))
        assert loaded["metadata"]["version"] == 1


def test_the_harness_finds_the_likelihoods_of_base_and_edited_model(
    fetched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(fetched)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    spec = Model(path="models/smollm2-135m")
    model, tokenizer = loading.load(spec), loading.tokenizer(spec)
    CIRCUIT.save_adapter(tmp_path / "adapter", model)
    begin = loading.between(tokenizer)
    pairs = {
        "sparc3_stereoset": [
            [row["stereotype"], row["anti-stereotype"]]
            for row in read_jsonl(Path("data/stereoset.jsonl"))
            if row["type"] == "intrasentence"
        ][:LIMIT],
        "sparc3_crows_pairs": [row.pair for row in SOURCES["crows-pairs"].rows({})][:LIMIT],
    }
    for circuit, peft in ((INTACT, {}), (CIRCUIT, {"peft": str(tmp_path / "adapter")})):
        found = EVALUATE(
            model="hf",
            model_args={
                "pretrained": spec.path,
                "dtype": "float32",
                "prefix_token_id": begin,
                **peft,
            },
            tasks=[*pairs, *QUESTIONS],
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
            device="cpu",
            limit=LIMIT,
            bootstrap_iters=0,
        )
        for task, items in pairs.items():
            sequences = [[begin, *tokenizer(t).input_ids] for item in items for t in item or ()]
            names = list(map(str, range(len(sequences))))
            (nlls,) = token_nll(model, [circuit], sequences, names)
            ours = -np.array([nll.sum(dtype=np.float64) for nll in nlls]).reshape(-1, 2)
            theirs = np.array(
                [[ll for ll, _ in sample["filtered_resps"]] for sample in found["samples"][task]]
            )
            np.testing.assert_allclose(theirs, ours, rtol=1e-4)
            assert found["results"][task]["acc,none"] == np.mean(ours[:, 0] > ours[:, 1])
        for task in QUESTIONS:
            for sample in found["samples"][task]:
                doc = sample["doc"]
                options = doc["options"].strip().split("\n")
                assert options[int(sample["target"])].strip() == doc["answer"].strip()
            asked = {sample["arguments"][0][0] for sample in found["samples"][task]}
            every = list(SOURCES[task.removeprefix("sparc3_")].rows({}))
            first = {row.text: row for row in reversed(every) if row.text in asked}
            rows = [
                {"id": "q", "group": row.group, "text": row.text, "choices": row.choices}
                for row in first.values()
            ]
            assert len(rows) == LIMIT
            how = How(PARAMS.evaluate, 2048, tokenizer)
            (reading,) = accuracy.read(model, [circuit], accuracy.encode(rows, tokenizer), how)
            for key, theirs in (("accuracy", "acc"), ("accuracy_norm", "acc_norm")):
                expected = 100 * found["results"][task][f"{theirs},none"]
                assert reading.columns[key].mean() == pytest.approx(expected)
