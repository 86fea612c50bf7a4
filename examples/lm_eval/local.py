"""What the tasks beside it make of the raw files in data/."""

import re
from typing import Any

from datasets import Dataset

Doc = dict[str, Any]


def intrasentence(docs: Dataset) -> Dataset:
    """Of StereoSet the items that are one sentence."""
    return docs.filter(lambda doc: doc["type"] == "intrasentence")


def stereotype_first(doc: Doc) -> list[str]:
    """Of StereoSet."""
    return [doc["stereotype"], doc["anti-stereotype"]]


def fillers(doc: Doc) -> list[str]:
    """Of CrowS-Pairs: the sentence with each of its fillers, the stereotype first."""
    return [doc["sentence"].replace("[MASK]", doc[name]) for name in ("mask1", "mask2")]


def options(doc: Doc) -> list[str]:
    """Of questions: the options without their letters."""
    return [re.sub(r"^[A-Z]\. ", "", line) for line in doc["options"].strip().split("\n")]


def whole(docs: Dataset) -> Dataset:
    """Of questions those whose answer is the option that its letter names; in the file of
    CommonsenseQA six are cut wrongly.
    """

    def answered(doc: Doc) -> bool:
        lines, place = doc["options"].strip().split("\n"), gold(doc)
        return place < len(lines) and lines[place].strip() == doc["answer"].strip()

    return docs.filter(answered)


def gold(doc: Doc) -> int:
    """Which option the answer, repeated in full, is."""
    return ord(doc["answer"][0]) - ord("A")
