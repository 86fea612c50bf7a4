"""Verify: is everything that is stored what it was when it was written?"""

from collections.abc import Callable, Iterator
from pathlib import Path

from sparc3.base.artifacts import OUTPUTS
from sparc3.base.errors import InputError
from sparc3.base.files import digest
from sparc3.base.params import Params
from sparc3.base.products import MANIFESTS, Ledger
from sparc3.commands.stage import checked_model
from sparc3.stages.fetch import DATA, check_data, folder_md5, is_there, pinned_md5

CACHE = Path(".dvc/cache/files/md5")  # where dvc.yaml's outputs are kept
UNLISTED = ("manifests", "partial", "confirm")  # below outputs/, of no stage of the pipeline


def run(params: Params) -> None:
    """Check the raw data, the model, every product by its stage's manifest, and DVC's cache.

    Prints a line for everything that is wrong, and raises InputError if anything is.
    """
    every = (data(), model(Path(params.model.path)), products(), cache())
    problems = list(dict.fromkeys(problem for part in every for problem in part))
    for problem in problems:
        print(problem)
    if problems:
        raise InputError(f"verify: {len(problems)} things are not what they were; each says more")
    print("verify: data, model, products and DVC's cache are what they were")


def data() -> Iterator[str]:
    """The raw data, by the built-in sums or their pin."""
    if is_there(DATA):
        yield from _problem(check_data)


def model(folder: Path) -> Iterator[str]:
    """The model's files, by the built-in sums or its .dvc file."""
    if is_there(folder):
        yield from _problem(lambda: checked_model(folder))
        pin = folder.with_name(f"{folder.name}.dvc")
        if pin.is_file() and folder_md5(folder) != pinned_md5(pin)[0]:
            yield f"{folder}/: is not what {pin} pins; dvc checkout {pin}, or fetch again"


def products() -> Iterator[str]:
    """Every file of every manifest, what it was made from, and files that no stage wrote."""
    ledger = Ledger()
    for manifest in ledger.manifests:
        for name in manifest.wrote:
            if not Path(name).exists():
                yield f"{name}: file not found, though {manifest.name} wrote it; run: dvc repro"
            else:
                yield from _problem(lambda name=name: ledger.check(Path(name)))
        yield from _problem(lambda manifest=manifest: ledger.check_origin(manifest))
    there = [path for path in sorted(OUTPUTS.rglob("[!.]*")) if path.is_file()]
    for path in there if MANIFESTS.is_dir() else ():
        listed = path.relative_to(OUTPUTS).parts[0] not in UNLISTED
        if listed and path.as_posix() not in ledger.owners:
            yield f"{path}: no stage wrote it; remove it"


def cache() -> Iterator[str]:
    """Objects of DVC's cache that are not what their names say."""
    for path in sorted(CACHE.glob("??/*")):
        if digest(path, "md5") != (path.parent.name + path.name).removesuffix(".dir"):
            yield f"{path}: DVC's cache has another file under this name; remove it, and dvc repro"


def _problem(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except InputError as error:
        return [str(error)]
    return []
