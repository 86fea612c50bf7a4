"""Tokens and passwords: where they are given, and how they are kept out of what is written."""

import hashlib
import os
import re
from pathlib import Path

from sparc3.base.errors import InputError
from sparc3.base.files import read_text

SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_KEY|ACCESS_KEY")


def secrets() -> list[str]:
    """Values of the environment that must not be seen; short ones are switches (`..._TOKEN=1`)."""
    return [v for k, v in os.environ.items() if SECRET.search(k.upper()) and len(v) >= 8]


LINE = 5000  # letters of one line of an error


def masked(value: object, limit: int) -> str:
    """As logged: without secrets, and cut so that different long values stay different."""
    text = str(value)
    for secret in secrets():
        text = text.replace(secret, "***")
    if len(text) <= limit:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    mark = f"... [{len(text)} characters, sha256 {digest}]"
    return text[: limit - len(mark)] + mark


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return masked(lines[0] if lines else type(error).__name__, LINE)


def hub_token() -> str | None:
    """HF_TOKEN of the environment, else of .env; None if neither has it.

    InputError, which does not show it, if it cannot be a token: sent to the hub it would come back
    in an error message.
    """
    token = os.environ.get("HF_TOKEN") or _from_env_file(Path(".env"))
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise InputError(
            "HF_TOKEN: not a token (it has spaces or unprintable letters); copy it again"
        )
    return token


def _from_env_file(path: Path) -> str | None:
    lines = read_text(path).splitlines() if path.is_file() else []
    for line in lines:
        name, _, value = line.strip().removeprefix("export ").partition("=")
        if name.strip() == "HF_TOKEN":
            return value.strip().strip("'\"") or None
    return None
