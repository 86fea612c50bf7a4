"""Products: what a stage wrote, and what it read for it, by the sha256 of every file.

A stage leaves a manifest. While a ledger listens, whoever reads a product gets what its stage
wrote, made from what lies there now, or an InputError: rotten, swapped, missing and foreign files,
and products of stages that ran in another order, are refused before a number is made from them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparc3.base.artifacts import METRICS, OUTPUTS
from sparc3.base.errors import InputError
from sparc3.base.files import digest, read_json, write_json

VERSION = 1  # of the manifests
MANIFESTS = OUTPUTS / "manifests"
MODEL = "model"  # among what was read: the digest of the model's folder
AGAIN = "run: dvc repro; python -m sparc3 verify names all that is wrong"


class Manifest(NamedTuple):
    """Digests by path: of what a stage wrote, and of what it read."""

    name: str  # stage, or stage@value
    wrote: Mapping[str, str]
    read: Mapping[str, str]


def manifest_path(word: str, value: str | None) -> Path:
    return MANIFESTS / word / f"{value}.json" if value else MANIFESTS / f"{word}.json"


def write_manifest(
    word: str, value: str | None, made: Sequence[Path], read: Mapping[str, str]
) -> None:
    """Of the files `made`, and all in the folders among them."""
    every = [file for path in made for file in (path.rglob("*") if path.is_dir() else [path])]
    wrote = {path.as_posix(): digest(path) for path in every if path.is_file()}
    about = {"version": VERSION, "wrote": wrote, "read": dict(read)}
    write_json(manifest_path(word, value), about)


class Ledger:
    """All manifests; and what was read since it was opened."""

    def __init__(self, model: str | None = None) -> None:
        """`model`: the digest of the model's folder, where what is made depends on it."""
        self.read: dict[str, str] = {} if model is None else {MODEL: model}
        self.manifests: list[Manifest] = []
        self.owners: dict[str, Manifest] = {}
        self._sound: set[str] = set()
        for path in sorted(MANIFESTS.rglob("*.json")):
            place = path.relative_to(MANIFESTS).with_suffix("")
            manifest = _parsed("@".join(place.parts), path, read_json(path))
            self.manifests.append(manifest)
            self.owners |= dict.fromkeys(manifest.wrote, manifest)

    def check(self, path: Path) -> None:
        """InputError: a product that is not what its stage wrote, or a file missing beside it, or
        what it was made from was made anew since.

        Metrics that no stage left a manifest of are committed ones, and taken as they are.
        """
        name = path.as_posix()
        if path.parts[:1] not in ((OUTPUTS.name,), (METRICS.name,)) or name in self.read:
            return
        owner = self.owners.get(name)
        if owner is None:
            if path.parts[0] == METRICS.name or not path.exists():
                return  # whoever reads it says that it is not there
            raise InputError(f"{path}: no stage wrote it; remove it, then run: dvc repro")
        beside = [p for p in owner.wrote if Path(p).parent == path.parent and not Path(p).exists()]
        for missing in beside:
            raise InputError(f"{missing}: file not found, though {owner.name} wrote it; {AGAIN}")
        self.read[name] = digest(path)
        if self.read[name] != owner.wrote[name]:
            raise InputError(f"{path}: is not what {owner.name} wrote; remove it, and {AGAIN}")
        self.check_origin(owner)

    def check_origin(self, manifest: Manifest) -> None:
        """InputError: a stage whose products would be others now, for what it read was replaced."""
        if manifest.name in self._sound:
            return
        for path, sha256 in manifest.read.items():
            owner = self.owners.get(path)
            now = owner.wrote[path] if owner else self.read.get(path, sha256)
            if now != sha256:
                what = "the model" if path == MODEL else path
                problem = f"{manifest.name} ran before {what} was what it is now"
                raise InputError(f"{problem}; run {manifest.name} again (dvc repro)")
            if owner:
                self.check_origin(owner)
        self._sound.add(manifest.name)


def _parsed(name: str, path: Path, tree: Any) -> Manifest:
    if not isinstance(tree, dict) or tree.get("version") != VERSION:
        raise InputError(f"{path}: of another version of sparc3; run: dvc repro --force")
    return Manifest(name, tree["wrote"], tree["read"])
