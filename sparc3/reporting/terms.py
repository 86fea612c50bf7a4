"""Whose a model is: its name, and what its licence asks of whoever passes an edited one on."""

from pathlib import Path
from typing import NamedTuple

import yaml

from sparc3.base.files import read_json
from sparc3.base.params import Params
from sparc3.model.checkpoint import ORIGIN, TERMS

KNOWN = {  # embedded models: what they are conversions of
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "gemma3-270m": "google/gemma-3-270m",
}
LICENCES = {  # words of its text -> the hub's identifier
    "Gemma Terms of Use": "gemma",
    "META LLAMA 3 COMMUNITY LICENSE": "llama3",
    "Apache License": "apache-2.0",
    "MIT License": "mit",
}
NOTICES = {  # prescribed by the licence
    "gemma": (
        "Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms"
    ),
    "llama3": (
        "Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta "
        "Platforms, Inc. All Rights Reserved."
    ),
}
DUTIES = {
    "gemma": (
        "The base model's terms bind whoever passes this on: the Gemma Terms of Use "
        "(https://ai.google.dev/gemma/terms), their use restrictions "
        "(https://ai.google.dev/gemma/prohibited_use_policy), which must be part of any agreement "
        "about it, a copy of the terms, the file NOTICE, and a statement that files were changed, "
        "which this card is."
    ),
    "llama3": (
        "Built with Meta Llama 3. Its licence binds whoever passes this on: a name that begins "
        'with "Llama 3", a copy of the licence, the file NOTICE, and the acceptable use policy '
        "(https://llama.meta.com/llama3/use-policy)."
    ),
}


class Base(NamedTuple):
    """The model that was edited. name: on the hub, or of its folder; repository, revision: on the
    hub, where the weights are those very ones; licence: the hub's identifier, `other` if unknown.
    """

    name: str
    repository: str | None
    revision: str | None
    licence: str


def base_of(params: Params) -> Base:
    """By its folder: what fetch noted down there, its card's metadata and its licence's text."""
    folder = Path(params.model.path)
    note = read_json(folder / ORIGIN) if (folder / ORIGIN).is_file() else {}
    repository, revision = note.get("repository"), note.get("revision")
    name = repository or KNOWN.get(folder.name, folder.name)
    return Base(name, repository, revision, _on_its_card(folder) or _in_its_text(folder))


def _on_its_card(folder: Path) -> str | None:
    card = folder / "README.md"
    text = card.read_text(errors="replace") if card.is_file() else ""
    if not text.startswith("---\n"):
        return None
    try:
        about = yaml.safe_load(text.split("---\n")[1])
    except yaml.YAMLError:
        return None
    return about.get("license") if isinstance(about, dict) else None


def _in_its_text(folder: Path) -> str:
    files = sorted({file for name in TERMS for file in folder.glob(name)})
    text = "\n".join(file.read_text(errors="replace") for file in files)
    return next((name for words, name in LICENCES.items() if words in text), "other")


def notice(base: Base) -> str:
    """The text of a file NOTICE, where the licence prescribes one."""
    words = NOTICES.get(base.licence)
    return f"{words}\n\nThe weights were changed by sparc3: see README.md.\n" if words else ""
