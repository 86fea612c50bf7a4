"""Tokens and passwords: where they are given, and how they are kept out of what is written.

They are what the environment, and .env in the current folder, hold under a name such as HF_TOKEN,
or within an address such as https://user:password@host/?token=...
"""

import io
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dotenv import dotenv_values

from sparc3.base.errors import InputError
from sparc3.base.files import digest_text, read_text

SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_KEY|ACCESS_KEY", re.IGNORECASE)
SHORT = 8  # letters; what has fewer is a switch (`..._TOKEN=1`), or would be masked in every word
LINE = 5000  # letters of one line of an error


def secrets() -> list[str]:
    """Values that must not be seen, the longest first: one may hold another."""
    values: set[str] = set()
    for name, value in [*os.environ.items(), *_env_file().items()]:
        if "://" in value:
            values |= _in_address(value)
        if SECRET.search(name) and len(value) >= SHORT:
            values.add(value)
    return sorted(values, key=lambda secret: (-len(secret), secret))


def masked(value: object, limit: int | None = None) -> str:
    """Text without secrets, cut to `limit` letters so that different long values stay different."""
    text = str(value)
    for secret in secrets():
        text = text.replace(secret, "***")
    if limit is None or len(text) <= limit:
        return text
    mark = f"... [{len(text)} characters, sha256 {digest_text(text)[:16]}]"
    return text[: limit - len(mark)] + mark


def first_line(error: BaseException) -> str:
    """What an error says first, without secrets; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return masked(lines[0] if lines else type(error).__name__, LINE)


def hub_reason(error: BaseException) -> str:
    """Why the hub gave nothing, as in: (GatedRepoError: 401 ...); no HF_TOKEN was given"""
    given = "HF_TOKEN was given" if hub_token() else "no HF_TOKEN was given"
    return f"({type(error).__name__}: {first_line(error)}); {given}"


def hub_token() -> str | None:
    """HF_TOKEN of the environment, else of .env; None if neither has it.

    InputError, which does not show it, if it cannot be a token: sent to the hub it would come back
    in an error message.
    """
    token = os.environ.get("HF_TOKEN") or _env_file().get("HF_TOKEN") or None
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise InputError("HF_TOKEN: not a token (spaces or unprintable letters); copy it again")
    return token


def _env_file() -> dict[str, str]:
    """The variables of .env that have a value; none without the file."""
    path = Path(".env")
    text = read_text(path) if path.is_file() else ""
    return {k: v for k, v in dotenv_values(stream=io.StringIO(text)).items() if v}


def _in_address(address: str) -> set[str]:
    """user:password@ and name=token of an address and, where they are long, their values alone.

    As they are written and with %-escapes resolved, for messages show either.
    """
    try:
        parts = urlsplit(address)
    except ValueError:  # not an address after all: a text with :// in it
        return set()
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    pairs = {f"{user}:{password}@"} if password else set()
    values = {password}
    if not password and parts.scheme in ("http", "https"):
        values.add(user)  # without a password it is a token, as in https://TOKEN@host
    for part in parts.query.split("&"):
        name, _, value = part.partition("=")
        if value and SECRET.search(name):
            pairs.add(part)
            values.add(value)
    written = pairs | {value for value in values if len(value) >= SHORT}
    return written | {unquote(secret) for secret in written}
