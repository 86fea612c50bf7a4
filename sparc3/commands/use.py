"""Use: another profile becomes params.yaml."""

from pathlib import Path


def run(profile: Path) -> None:
    raise NotImplementedError(profile)
