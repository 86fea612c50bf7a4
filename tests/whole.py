"""A whole small project: two behaviours, every method's kind, and every stage run in one process.

`rude` is measured by completions, `bias` by pairs. The model is a random LLaMA of 3 layers x 24
neurons, its tokenizer knows 50 words, and the prompts are written here.

`summaries` gives a few dozen numbers of what every stage wrote. Those in tests/golden/*.json are
compared with a fresh run by test_golden.py, which also computes them anew, naively. Where results
are meant to change, write them again, read the diff, and say in the commit why it is right:

    PYTHONPATH=.:tests python -m whole
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import tiny
import yaml
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparc3.base.artifacts import model_digest
from sparc3.base.files import read_csv, read_json, read_jsonl, read_tensors, write_jsonl
from sparc3.base.params import Params
from sparc3.base.products import write_manifest
from sparc3.circuits.overlap import joined
from sparc3.commands.stage import produce
from sparc3.measure.instruments import completions
from sparc3.stages import table as stages
from sparc3.stages.checks import load

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parent.parent

INSTRUMENTS = {"rude": ["nll", "completions"], "bias": ["pairs"]}
BEHAVIOURS = tuple(INSTRUMENTS)
DRAWS, DRAWN = 4, 3  # of the random control, and those that complete
BLOCKS = 2  # of the groups of `bias` that are tested
CONTROLS = tuple(f"random-layer-matched-{draw}" for draw in range(DRAWS))
CIRCUITS = ("lrp", "gradient-t", "aura", "aura-published", "most-positive", *CONTROLS)
STAGES = (
    ("attribute", "prompt_sets"),
    ("gate", "behaviours"),
    ("differential", "behaviours"),
    ("sweep", "behaviours"),
    ("select", "behaviours"),
    ("steer", "behaviours"),
    ("evaluate", "behaviours"),
    ("transfer", None),
    ("overlap", None),
    ("faithfulness", "behaviours"),
    ("report", None),
)

TERMS = ("nurse", "doctor", "king", "man", "woman", "school", "city", "river")
PLAIN = (
    *("the", "a", "of", "in", "and", "is", "was", "are", "they", "he", "she", "it", *TERMS),
    *("music", "game", "old", "new", "kind", "quiet", "clever", "said", "that", "built"),
    *("house", "water", "book", "very"),
)
RUDE = (
    *("rude", "lazy", "stupid", "idiot", "damn", "fool", "crap", "ugly", "dumb", "hate"),
    *("dirty", "hell", "liar"),
)
WORDS = ("[unk]", "[start]", ".", *PLAIN, *RUDE)  # number 2, the full stop, ends a completion
SEED = 7  # with which effects are of both signs, and differentials more than noise

PARAMS: dict[str, Any] = {
    "model": {"path": "model", "dtype": "float32", "device": "cpu"},
    "prompt_sets": {
        "general": {"source": "wikipedia", "target": "likelihood", "count": 8},
        "general-rude": {"source": "wikipedia", "target": "likelihood", "count": 8},
        "rude": {"source": "real-toxicity-prompts", "target": "likelihood", "count": 10},
        "general-pairs": {"source": "neutral-pairs", "target": "pair", "count": 14},
        "bias": {"source": "stereoset", "target": "pair", "count": 14, "blocks": BLOCKS},
    },
    "test_sets": {
        "news": {"source": "news", "count": 7},
        "second": {"source": "crows-pairs", "target": "pair", "count": 7},
        "quiz": {"source": "piqa", "count": 8},
        "riddles": {"source": "siqa", "count": 8},
        "tuned-quiz": {"source": "openbookqa", "count": 8},
    },
    "sealed_sets": {},
    "behaviours": {
        "rude": {
            "prompts": "rude",
            "reference": "general-rude",
            "method": "lrp",
            "scorers": ["profanity"],
            "on_fail": "warn",
            "instruments": INSTRUMENTS["rude"],
            "faithfulness": True,
        },
        "bias": {
            "prompts": "bias",
            "reference": "general-pairs",
            "method": "gradient-t",
            "second": "second",
            "on_fail": "warn",
            "instruments": INSTRUMENTS["bias"],
            "faithfulness": True,
        },
    },
    "methods": {
        "lrp": {"score": "lrp", "contrast": "mean-difference"},
        "gradient-t": {"score": "gradient", "contrast": "t"},
        "aura": {"score": "max-activation", "contrast": "auroc", "scale": "auroc"},
        "aura-published": {
            "score": "max-activation",
            "contrast": "auroc",
            "scale": "auroc",
            "all": True,
        },
        "most-positive": {"score": "lrp", "contrast": "reversed-difference", "match": "own"},
        "random-layer-matched": {"score": "random", "layers": "own", "draws": DRAWS},
    },
    "scorers": {"profanity": {"kind": "profanity"}},
    "prepare": {"splits": {"attribute": 0.4, "tune": 0.3, "test": 0.3}},
    "attribute": {
        "scores": ["lrp", "gradient", "max-activation"],
        "batch_tokens": 40,
        "shard_prompts": 4,
    },
    "gate": {"score": "lrp", "threshold": 15, "prompts": 16},
    "differential": {"general": "general", "importance": "gradient"},
    "sweep": {
        "num_neurons": [4, 10],
        "protect": [0.1, 0.3],
        "texts": 6,
        "error": 0.0,
        "choices": ["tuned-quiz"],
        "items": 12,
        "batch_tokens": 60,
    },
    "select": {
        "num_neurons": None,
        "protect": None,
        "budget": {"perplexity": 9.5},
        "resamples": 20,
        "seed": 0,
    },
    "steer": {"interventions": {"act": {"kind": "mean-act", "strengths": [0.2, 1.0]}}},
    "evaluate": {
        "general": ["general", "news"],
        "choices": ["quiz", "riddles"],
        "texts": 7,
        "window": 10,  # shorter than some texts
        "stride": 4,
        "joined": False,
        "prompts": 9,
        "items": 21,
        "completions": 3,
        "completed": ["gradient-t", "most-positive", "random-layer-matched"],
        "in_sample": ["lrp"],
        "control": "random-layer-matched",
        "drawn": DRAWN,
        "ban": [1, 5, 30],  # of 11 bad words
        "new_tokens": 6,
        "temperature": 1.5,
        "top_p": 0.95,
        "seed": 1,
        "batch_tokens": 60,
        "resamples": 400,
    },
    "transfer": {"texts": ["general", "news"], "items": 21, "batch_tokens": 60, "resamples": 400},
    "overlap": {
        "method": "lrp",
        "num_neurons": 20,
        "protect": 0.2,
        "resamples": 100,
        "repeats": 2,
        "seed": 0,
    },
    "faithfulness": {
        "scores": ["lrp", "gradient", "activation", "lrp@max-logit"],
        "neurons": 30,
        "prompts": 7,
        "num_neurons": [2, 5],
        "batch_tokens": 60,
        "resamples": 200,
        "seed": 0,
    },
    "report": {"method": "lrp"},
}


# --- writing it ----------------------------------------------------------------------------


def write_model(folder: Path) -> None:
    """The tiny LLaMA with a tokenizer of WORDS."""
    tiny.model("llama").save_pretrained(folder)
    words = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[unk]")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="[start]")
    tokenizer.save_pretrained(folder)


def sentence(rng: np.random.Generator, length: int, rude: float) -> str:
    """Words at random, a share of them rude."""
    kinds = rng.random(length) < rude
    return " ".join(str(rng.choice(RUDE if kind else PLAIN)) for kind in kinds)


def text_rows(name: str, groups: dict[str, int], rude: float) -> list[dict[str, Any]]:
    """Sentences of 5 to 13 words, `groups` of each split; every third group has two."""
    rng = np.random.default_rng([SEED, len(name)])
    rows = []
    for split, count in groups.items():
        for group in range(count):
            for member in range(2 if group % 3 == 2 else 1):
                text = sentence(rng, int(rng.integers(5, 14)), rude)
                about = {"id": f"{name}-{split}-{group}-{member}", "text": text}
                rows.append({**about, "group": f"{name}-{split}-{group}", "split": split})
    return rows


def pair_rows(name: str, groups: dict[str, int], both_orders: bool) -> list[dict[str, Any]]:
    """Three items of every term, the last term's without an unrelated text; or, as neutral pairs
    are, one item in both orders and no unrelated text.
    """
    rng = np.random.default_rng([SEED, len(name)])
    rows: list[dict[str, Any]] = []
    for split, count in groups.items():
        for group, term in enumerate(TERMS[:count]):
            begin = f"the {term} " + sentence(rng, 2, 0)
            for member in range(2 if both_orders else 3):
                words = [rng.choice(RUDE), *rng.choice(PLAIN, 2, replace=False)]
                first, second, unrelated = (f"{begin} is {word} {term}" for word in words)
                again = both_orders and member == 1
                pair = rows[-1]["pair"][::-1] if again else [first, second]
                row = {
                    "id": f"{name}-{split}-{group}-{member}",
                    "text": begin,
                    "group": f"{name}-{split}-{term}",
                    "split": split,
                    "pair": pair,
                }
                if not both_orders and group < count - 1:
                    row["unrelated"] = unrelated
                rows.append(row)
    return rows


def question_rows(name: str) -> list[dict[str, Any]]:
    """For every term a question with three answers, of one to four words."""
    rng = np.random.default_rng([SEED, len(name)])
    rows = []
    for term in TERMS:
        answers = [sentence(rng, int(rng.integers(1, 5)), 0.3) for _ in range(3)]
        about = {"id": f"{name}-{term}", "group": f"{name}-{term}", "split": "test"}
        rows.append({**about, "text": f"what is the {term} .", "choices": answers})
    return rows


def write_project(folder: Path) -> None:
    """params.yaml, the model and the prompts; sections of the project's own that are not in PARAMS
    stay as they are.
    """
    tree = yaml.safe_load((ROOT / "params.yaml").read_text()) | PARAMS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    write_model(folder / "model")
    splits, held_out = {"attribute": 7, "tune": 6, "test": 7}, {"test": 7}
    blocks = {"block-0": 7, **{f"block-{n}": 4 for n in range(1, 1 + BLOCKS)}}
    sets = {
        "general": text_rows("general", splits, 0.05),
        "general-rude": text_rows("general-rude", splits, 0.05),
        "rude": text_rows("rude", splits, 0.35),
        "general-pairs": pair_rows("general-pairs", splits, both_orders=True),
        "bias": pair_rows("bias", blocks, both_orders=False),
        "news": text_rows("news", held_out, 0.05),
        "second": pair_rows("second", held_out, both_orders=True)[::2],
        **{name: question_rows(name) for name in ("quiz", "riddles", "tuned-quiz")},
    }
    for name, rows in sets.items():
        whole = [{**row, "seed": 0, "tokens": len(row["text"].split())} for row in rows]
        write_jsonl(folder / f"outputs/prompts/{name}.jsonl", whole)
    with inside(folder):
        write_manifest("prepare", None, stages.made("prepare", None), {})


# --- running it ----------------------------------------------------------------------------


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Within the block, `folder` is the current directory."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run(
    folder: Path, behaviour: str | None = None, most: int = PARAMS["evaluate"]["completions"]
) -> dict[str, Figure]:
    """Every stage and `export`, in order, in `folder`; the report's figures by name.

    With a behaviour: its own stages only. `most`: completions that maximum toxicity takes.
    """
    figures: dict[str, Figure] = {}
    save = Figure.savefig

    def keep(self: Figure, fname: Any, **options: Any) -> None:
        figures[Path(fname).name.split(".")[1]] = self  # .NAME.png.TEMPORARY
        save(self, fname, **options)

    few = patch.object(completions, "MOST", most)
    with inside(folder), patch.object(Figure, "savefig", keep), few:
        params = load(Path("params.yaml"))
        for stage, section in STAGES:
            model = model_digest(Path("model")) if stages.STAGES[stage].model else None
            if section is None and behaviour is None:
                produce(params, stage, {}, model)
            for name in getattr(params, section) if section else ():
                if section == "prompt_sets" or behaviour in (None, name):
                    produce(params, stage, {str(section).removesuffix("s"): name}, model)
        if behaviour is None:
            export(params)
    return figures


def export(params: Params) -> None:
    """What it wrote is measured again in this process: MOST is another here."""
    module, remeasure = (import_module(f"sparc3.commands.{n}") for n in ("export", "remeasure"))
    for behaviour in BEHAVIOURS:
        with patch.object(module, "check", lambda written, _: remeasure.run(written)):
            method = PARAMS["behaviours"][behaviour]["method"]
            module.run(params, behaviour, method, Path(behaviour))
            module.run(params, behaviour, "act", Path(f"{behaviour}-act"))


# --- reading it ----------------------------------------------------------------------------


def table(text: str) -> list[dict[str, str]]:
    """Rows of the first Markdown table of a text, by their column titles."""
    lines = text[text.index("\n| ") + 1 :].partition("\n\n")[0].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def result_rows(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The result table's rows, by behaviour."""
    text = (folder / "metrics/table.md").read_text()
    return {name: table(text.partition(f"**{name}**")[2]) for name in BEHAVIOURS}


def published_scores(folder: Path, prompt_set: str, score: str) -> tuple[list[str], np.ndarray]:
    """Prompt ids and scores (prompt, layer, neuron) of a set."""
    ids, values = [], []
    for shard in sorted((folder / "outputs/scores" / prompt_set / score).glob("*.safetensors")):
        tensors, metadata = read_tensors(shard)
        ids += json.loads(metadata["ids"])
        values.append(tensors["scores"])
    return ids, np.concatenate(values)


def neurons(path: Path) -> list[str]:
    """LAYER.NEURON of a circuit, in the file's order."""
    return [f"{row['layer']}.{row['neuron']}" for row in read_csv(path)]


def interval(difference: dict[str, float]) -> dict[str, float]:
    return {key: difference[key] for key in ("value", "low", "high", "p") if key in difference}


def summaries(folder: Path) -> dict[str, dict[str, Any]]:
    """What is frozen of every stage: a tree of numbers, names and lists, all from files."""
    metrics = folder / "metrics"
    found: dict[str, dict[str, Any]] = {stage: {} for stage, _ in STAGES}
    for name in PARAMS["prompt_sets"]:
        for score in PARAMS["attribute"]["scores"]:
            _, values = published_scores(folder, name, score)
            found["attribute"][f"{name}.{score}"] = {
                "sum": values.sum(dtype=np.float64),
                "absolute": np.abs(values).sum(dtype=np.float64),
                "first": values[0, 0, 0],
                "last": values[-1, -1, -1],
            }
    for name in BEHAVIOURS:
        gate = read_json(metrics / f"gate/{name}.json")
        found["gate"][name] = {"passed": gate["passed"], **interval(gate["gap"])}
        for method in PARAMS["methods"]:
            path = folder / f"outputs/differential/{name}/{method}.safetensors"
            values = read_tensors(path)[0]["differential"]
            found["differential"][f"{name}.{method}"] = {
                "sum": values.sum(dtype=np.float64),
                "least": values.min(),
                "at": int(values.argmin()),
            }
        found["sweep"][name] = {
            f"{r['method']} {r['num_neurons']} {float(r['protect']):g}": [
                float(r[key]) for key in ("ppl_delta", "ppl_error", "kl", "objective")
            ]
            for r in read_csv(folder / f"outputs/sweep/{name}.csv")
        }
        stability = read_json(metrics / f"select/{name}.json")
        found["select"][name] = {
            "circuits": {
                circuit: neurons(folder / f"outputs/circuits/{name}/{circuit}.csv")
                for circuit in CIRCUITS
            },
            "stability": {k: v for k, v in stability.items() if k.endswith("stability")},
        }
        found["steer"][name] = read_json(metrics / f"steer/{name}.json")
        found["evaluate"][name] = evaluation(folder, name)
        rows = result_rows(folder)[name]
        found["report"][name] = {r["method"]: [r["neurons"], r["verdict"]] for r in rows}
    transferred = read_json(metrics / "transfer.json")
    found["transfer"] = {
        f"{pruned_for}.{name}.{quantity}": interval(difference)
        for pruned_for, cells in transferred.items()
        for name, differences in cells.items()
        for quantity, difference in differences.items()
        if quantity in ("ppl_delta", "nll_shift", "ss", "margin")
    }
    found["overlap"] = overlap(folder)
    for name in BEHAVIOURS:
        measured = read_json(metrics / f"faithfulness/{name}.json")
        found["faithfulness"][name] = {
            score: [interval(rows["all"]["spearman"]), interval(measured["area"][score])]
            for score, rows in measured["agreement"].items()
        }
    cards = {name: (folder / name / "README.md").read_text() for name in BEHAVIOURS}
    found["export"] = {
        name: {
            "neurons": [line for line in card.splitlines() if line.startswith("- layer")],
            "measures": [row["measure"] for row in table(card.partition("## Evaluation")[2])],
        }
        for name, card in cards.items()
    }
    return found


def evaluation(folder: Path, behaviour: str) -> dict[str, Any]:
    """Of metrics/evaluate: the baseline, and the behaviour's own circuit, one rival and a draw."""
    measured = read_json(folder / f"metrics/evaluate/{behaviour}.json")
    found: dict[str, Any] = {"baseline": measured["baseline"]}
    wanted = ("reduction", "nll_shift", "margin", "icat", "emt", "improved")
    for circuit in (PARAMS["behaviours"][behaviour]["method"], "most-positive", CONTROLS[0]):
        row = measured["circuits"][circuit]
        found[circuit] = (
            {"ppl_delta": interval(row["ppl_delta"])}
            | {f"kl.{key}": interval(value) for key, value in row.get("kl", {}).items()}
            | {
                f"{part}.{key}": interval(row[part][key])
                for part in ("test", "in_sample", "against_control", "second")
                for key in wanted
                if key in row.get(part, {})
            }
        )
    texts = [
        r["text"] for r in read_jsonl(folder / f"outputs/evaluation/{behaviour}/completions.jsonl")
    ]
    return found | {"completions": texts[:5]}


def overlap(folder: Path) -> dict[str, Any]:
    both = joined(BEHAVIOURS)
    found = read_json(folder / "metrics/overlap.json")
    kept = ("observed", "jaccard", "enrichment", "log10_p", "layered_expected", "layered_log10_p")
    halves = found["nulls"]["split_halves"]
    return {
        "regions": [found["regions"][key] for key in (*BEHAVIOURS, both)],
        "overlap": {key: found["overlaps"][both][key] for key in kept},
        "layers": found["layers"],
        "correlation": found["correlations"][both],
        "corrected": found["corrected"]["correlations"][both],
        "reliability": found["corrected"]["reliability"],
        "quadrants": found["quadrants"][both],
        "halves": halves[both],
        "pseudo": {kind: rows["rude"] for kind, rows in found["nulls"]["pseudo_behaviour"].items()},
    }


def rounded(tree: Any) -> Any:
    """The same tree with every number at 6 significant digits, ready for JSON."""
    if isinstance(tree, dict):
        return {str(key): rounded(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [rounded(value) for value in tree]
    if isinstance(tree, (float, np.floating)):
        return float(f"{tree:.6g}")
    return tree


def write_golden() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_project(folder)
        run(folder)
        found = summaries(folder)
    GOLDEN.mkdir(exist_ok=True)
    for stage, values in found.items():
        text = json.dumps(rounded(values), indent=1)
        (GOLDEN / f"{stage}.json").write_text(f"{text}\n")


if __name__ == "__main__":
    write_golden()
