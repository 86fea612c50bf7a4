"""Small raw files, of the schemas that the real ones in data/ and on the hub have."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

from sparc3.base.files import write_csv, write_jsonl
from sparc3.stages.fetch import pin_text

WORDS = [
    "the",
    "of",
    "a",
    "river",
    "town",
    "people",
    "was",
    "built",
    "north",
    "war",
    "old",
    "new",
    "music",
    "film",
    "game",
    "law",
]


def sentence(seed: int, words: int) -> str:
    """Random words, and the seed, so that no two are equal."""
    letters = random.Random(seed)
    return " ".join(letters.choices(WORDS, k=words)) + f" {seed}"


def write_boolq(folder: Path, articles: int = 60, passages: int = 2) -> None:
    rows = [
        {
            "question": "is it so",
            "passage": f"Article {a} -- {sentence(a * passages + p, 40)}",
            "idx": a,
            "label": False,
        }
        for a in range(articles)
        for p in range(passages)
    ]
    write_jsonl(folder / "boolq.jsonl", rows)


def write_toxicity(folder: Path, number: int = 80) -> None:
    """`number` that are not sealed, of toxicity 0.9 to 0.99, the 260 that are, and 20 mild ones."""
    scores = [(90 + n % 10) / 100 for n in range(number + 260)] + [0.5 + n / 50 for n in range(20)]
    rows = [
        {"text": sentence(1000 + n, 4 + n % 9), "profanity": 0.1, "toxicity": toxicity}
        for n, toxicity in enumerate(scores)
    ]
    write_jsonl(folder / "real-toxicity-prompts.jsonl", rows)


def stereoset_item(bias_type: str, target: str, number: int) -> dict[str, str]:
    """As in the wheel: the sentences in lower case but for their first letter."""
    context = f"My friend {number} from {target} is BLANK."
    words = {"stereotype": "sly", "anti-stereotype": "kind", "unrelated": "oven"}
    filled = {kind: context.replace("BLANK", word).capitalize() for kind, word in words.items()}
    return {
        "type": "intrasentence",
        "target": target,
        "bias_type": bias_type,
        "context": context,
        **filled,
    }


def write_stereoset(folder: Path, per_target: int = 6) -> None:
    targets = {"race": 8, "gender": 4, "religion": 2}
    rows = [
        stereoset_item(bias_type, f"{bias_type.title()}land {t}", n)
        for bias_type, number in targets.items()
        for t in range(number)
        for n in range(per_target)
    ]
    between = {**rows[0], "type": "intersentence", "context": "A friend came."}
    write_jsonl(folder / "stereoset.jsonl", [between, *rows])


def write_crows(folder: Path) -> None:
    fillers = [("She", "He"), ("He", "She"), ("Tom", "Jane"), ("women.", "men."), ("Girls", "Boys")]
    rows = [
        {
            "": str(n),
            "bias_type": "gender" if n < 10 else "age",
            "sentence": f"[MASK] came to town {n}, it was late",
            "mask1": fillers[n % 5][0],
            "mask2": fillers[n % 5][1],
        }
        for n in range(15)
    ]
    write_csv(folder / "crows-pairs.csv", rows, list(rows[0]))


def winobias_row(text: str, pronoun: str, options: tuple[str, str]) -> dict[str, str]:
    lines = [f"A. {options[0]}", f"B. {options[1]}", "C. Both A and B"]
    return {"text": text, "pro_stereotyped": pronoun, "options": "\n".join(lines)}


def write_winobias(folder: Path, of_each: int = 6) -> None:
    """Every pair of a man's and a woman's occupation, either of them referred to."""
    rows = []
    for m in range(of_each):
        for w in range(of_each):
            for one, other, pronoun in ((f"he{m}", f"she{w}", "he"), (f"she{w}", f"he{m}", "she")):
                text = f" [The {one}] met the {other} because [MASK] was early."
                rows.append(winobias_row(text, pronoun, ("she", "he")))
    write_jsonl(folder / "winobias.jsonl", rows)


def question(seed: int, answers: int) -> dict[str, str]:
    """With lettered options, one of which is the answer."""
    options = [f"{chr(ord('A') + n)}. {sentence(seed + n, 3)}" for n in range(answers)]
    return {
        "question": f"{sentence(seed, 6)}?",
        "options": "\n".join(options),
        "answer": options[seed % answers],
    }


def write_questions(folder: Path) -> None:
    """Those of Social IQa after a situation."""
    for place, (name, answers) in enumerate(
        {"piqa": 2, "openbookqa": 4, "commonsenseqa": 5, "siqa": 3}.items()
    ):
        rows = [question(3000 + 1000 * place + 10 * n, answers) for n in range(20)]
        if name == "siqa":
            rows = [{"passage": sentence(3000 + n, 20), **row} for n, row in enumerate(rows)]
        write_jsonl(folder / f"{name}.jsonl", rows)


def write_data(folder: Path) -> None:
    """data/ with every file that a source reads, pinned as the user's own."""
    write_boolq(folder)
    write_toxicity(folder)
    write_stereoset(folder)
    write_crows(folder)
    write_winobias(folder)
    articles = [{"id": str(n), "document": sentence(n, 50), "summary": "so"} for n in range(20)]
    write_jsonl(folder / "xsum.jsonl", [*articles, {"id": "x", "document": "", "summary": ""}])
    reviews = [{"text": sentence(2000 + n, 70), "label": n % 2} for n in range(20)]
    write_csv(folder / "imdb.csv", reviews, ["text", "label"])
    write_questions(folder)
    (folder.parent / "data.dvc").write_text(pin_text(folder, own=True))


def card(configs: dict[str, tuple[str, str]]) -> str:
    """A data set card that names each config's split and files, as on the hub."""
    lines = ["---", "configs:"]
    for name, (split, files) in configs.items():
        lines += [f"- config_name: {name}", "  data_files:", f"  - split: {split}"]
        lines += [f"    path: {files}"]
    return "\n".join([*lines, "---", ""])


def write_c4(folder: Path, number: int = 200) -> None:
    """Texts of 3 to 59 words in two compressed files."""
    (folder / "en").mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {
            "text": sentence(n, 3 + n % 57),
            "timestamp": "2019-04-25T12:57:54Z",
            "url": f"https://example.org/{n}",
        }
        for n in range(number)
    ]
    for part in (0, 1):
        lines = "".join(f"{json.dumps(row)}\n" for row in rows[part::2])
        path = folder / "en" / f"c4-train.0000{part}-of-00002.json.gz"
        path.write_bytes(gzip.compress(lines.encode()))
    (folder / "README.md").write_text(card({"en": ("train", "en/c4-train.*.json.gz")}))
