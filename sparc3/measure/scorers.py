"""Scorers: a text in, a score in [0, 1] out.

Five kinds, and what `path`, `label` and `revision` of a row of `scorers` in params are for each:

profanity   the linear model in the alt-profanity-check wheel, always at hand; takes none of them
hatesonar   the linear model of words that `fetch` takes from the hatesonar wheel: trained on tweets
            that people had called hate speech, offensive or neither (Davidson et al. 2017, arXiv
            1703.04009), it scores the probability of the first two together; takes none of them
detoxify    Detoxify's `original` model (Hanu and Unitary 2020). path: the checkpoint, or a folder
            with one *.ckpt and its encoder's config.json and tokenizer; null for the published
            checkpoint, cached by torch.hub. label: `toxicity` unless given. revision: the
            checkpoint's sha256, or its first characters
python      a function of the project's own. path: module:function, the module a file below the
            project's folder, or of this package. It takes a list of texts and gives a number from
            0 to 1 for each, which may depend on nothing else. label, revision: none
classifier  any text-classification model. path: a folder, or owner/name on the hub. label: whose
            probability is the score. revision: the commit on the hub

Each is pinned, or recorded, by sha256 or the commit on the hub. Of pickles only those two are read
that the wheel of alt-profanity-check has, and Detoxify's checkpoint by torch's reader of plain
tensors.
"""

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from sparc3.base.errors import InputError
from sparc3.base.files import Array, digest
from sparc3.base.params import Scorer as Spec
from sparc3.model.checkpoint import reading, require_whole
from sparc3.model.families import EVERY_WEIGHT, context, require_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Scorer = Callable[[list[str]], Array]
Load = Callable[[Spec, str], Scorer]  # spec, device
Describe = Callable[[Spec], dict[str, str]]

BATCH = 32  # texts
TEXTS = ["", "you are", "a text of some more words, so that they are padded in one batch"]
SAME = 1e-3  # how far the score of a text may be from its score in a batch
LONG = 10**9  # tokens: no limit at all
HUB = "give a folder with config.json, safetensors and tokenizer, or a name on the hub"

# alt-profanity-check 1.9.1 unpickles these on import: they must be those of its wheel.
PROFANITY = {
    "model.joblib": "aeafc04849d4d93db4721cf30a86ebf22085595294b8a07d51918e7fa98f538b",
    "vectorizer.joblib": "19c5200dc6a41f026e0558e2f164f5fe8d8f58e502b46b37e4385037fcfa4831",
}

# hatesonar 0.1.0's model, and the attribute of its graph by which it lowers text itself.
HATESONAR = Path("models/hatesonar/model.onnx")
HATESONAR_SHA256 = "3d881e00b16eb0cf8a6df58a68305f6a1b36e512334aa702a9501eaa0afe51b5"
LOWERS, IGNORED = b"case_change_action", b"__se_change_action"

# Detoxify 0.5.4, model `original`: its checkpoint, and the encoder whose configuration and
# vocabulary the checkpoint leaves out.
CHECKPOINT = "https://github.com/unitaryai/detoxify/releases/download/v0.1-alpha/toxic_original-c1212f89.ckpt"
ENCODER = "google-bert/bert-base-uncased"
ENCODER_REVISION = "86b5e0934494bd15c9632b12f734a8a67f723594"

# Detoxify renames the labels of the Jigsaw challenge so.
LABELS = {
    "toxic": "toxicity",
    "severe_toxic": "severe_toxicity",
    "identity_hate": "identity_attack",
}


def scorer(spec: Spec, device: str = "cpu") -> Scorer:
    """Load a scorer: texts to scores of shape (text,), float64, in [0, 1], in their order.

    A text longer than the model's context is cut to it; an empty one is scored like any other. The
    scores do not depend on the batch. `device` is a torch device, or "auto" for a GPU if there is
    one; `profanity` runs on the CPU. Kind and fields are checked with the params. Raises
    InputError: an unknown label, a model on the hub without its commit, nothing to load.
    """
    load, _ = SCORERS[spec.kind]
    score = load(spec, device)

    def checked(texts: list[str]) -> Array:
        scores = score(texts) if texts else np.empty(0)
        if not np.isfinite(scores).all():
            place = 1 + int(np.isfinite(scores).argmin())  # a text may be private
            remedy = "name another scorer, or leave the text out"
            problem = f"{spec.kind} gives a non-finite score to text {place} of {len(texts)}"
            raise InputError(f"scorer: {problem}; {remedy}")
        return scores

    checked(TEXTS)
    return checked


def describe(spec: Spec) -> dict[str, str]:
    """What exactly scores, to be logged: kind, label, versions, and the digest or commit.

    Loads no model. Raises InputError as `scorer` does, but for an unknown label.
    """
    _, about = SCORERS[spec.kind]
    return {"kind": spec.kind} | about(spec)


def _versions(*packages: str) -> dict[str, str]:
    return {package: version(package) for package in packages}


def _profanity(spec: Spec, device: str) -> Scorer:
    _profanity_files()
    from profanity_check import predict_prob  # loads its model on import

    return predict_prob


def _profanity_files() -> dict[str, str]:
    """What the package unpickles, found without importing it, and its sha256, which is checked."""
    package = getattr(find_spec("profanity_check"), "origin", "nowhere")
    for name, sha256 in PROFANITY.items():
        file = Path(package).parent / "data" / name
        if (found := digest(file)) != sha256:
            raise InputError(
                f"scorer: {file} has sha256 {found}, expected {sha256}, and is not unpickled; "
                "install the pinned alt-profanity-check again"
            )
    return {f"sha256 {name}": sha256 for name, sha256 in PROFANITY.items()}


def _describe_profanity(spec: Spec) -> dict[str, str]:
    return _versions("alt-profanity-check", "scikit-learn") | _profanity_files()


def _hatesonar(spec: Spec, device: str) -> Scorer:
    runtime: Any = import_module("onnxruntime")  # its stubs lack half of it
    _describe_hatesonar(spec)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1  # no sum is split
    # To lower text, ONNX Runtime asks for the locale en_US.UTF-8, which few containers have. An
    # attribute that begins with __ is ignored, and Python lowers the text.
    model = HATESONAR.read_bytes().replace(LOWERS, IGNORED)
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def score(texts: list[str]) -> Array:
        chances = (
            session.run(["output_probability"], {"text": np.array([text.lower()], dtype=object)})
            for text in texts  # one by one: no score depends on the batch
        )
        return np.array([row[0] + row[1] for ((row,),) in chances])

    return score


def _describe_hatesonar(spec: Spec) -> dict[str, str]:
    if not HATESONAR.is_file():
        raise InputError(f"scorer: {HATESONAR}: file not found; run: python -m sparc3 fetch")
    if (found := digest(HATESONAR)) != HATESONAR_SHA256:
        problem = f"{HATESONAR} has sha256 {found}, expected {HATESONAR_SHA256}"
        raise InputError(f"scorer: {problem}; move it away and run: python -m sparc3 fetch")
    return {f"sha256 {HATESONAR.name}": HATESONAR_SHA256} | _versions("onnxruntime")


def _python(spec: Spec, device: str) -> Scorer:
    module, name = _entry_point(spec)
    function = getattr(import_module(module), name, None)
    if not callable(function):
        raise InputError(f"scorer: {spec.path}: {module} has no function {name}; add it")

    def score(texts: list[str]) -> Array:
        scores = np.asarray(function(list(texts)), dtype=float)
        if scores.shape != (len(texts),) or ((scores < 0) | (scores > 1)).any():
            raise InputError(
                f"scorer: {spec.path} gives {str(scores)[:60]} for {len(texts)} texts; expected a "
                "number from 0 to 1 for each"
            )
        return scores

    if not np.allclose(np.concatenate([score([t]) for t in TEXTS]), score(TEXTS), equal_nan=True):
        raise InputError(
            f"scorer: {spec.path} scores a text otherwise beside other texts; score each by itself"
        )
    return score


def _entry_point(spec: Spec) -> tuple[str, str]:
    """Module and function; InputError unless the module is the project's own, or this package's."""
    module, _, name = str(spec.path).partition(":")
    try:
        file = getattr(find_spec(module), "origin", None)
    except (ImportError, ValueError):
        file = None
    own = Path.cwd(), Path(__file__).parents[1]
    if file is None or not any(Path(file).resolve().is_relative_to(f.resolve()) for f in own):
        problem = f"{module} is {file or 'not found'}; expected a module below {own[0]}"
        raise InputError(f"scorer: {spec.path}: {problem}, in which to run python -m sparc3")
    return module, name


def _describe_python(spec: Spec) -> dict[str, str]:
    module, _ = _entry_point(spec)
    file = Path(str(getattr(find_spec(module), "origin", "")))
    return {"path": str(spec.path), f"sha256 {file.name}": digest(file)}


def _classifier(spec: Spec, device: str) -> Scorer:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path, revision = _pinned(spec), spec.revision
    if Path(path).is_dir():
        require_whole("scorer", path)
    with reading("scorer", path, HUB):
        model, found = AutoModelForSequenceClassification.from_pretrained(
            path, revision=revision, **EVERY_WEIGHT
        )
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    require_weights(f"scorer: {path} as a text-classification model", found)
    names = [str(name) for name in model.config.id2label.values()]
    # The rule of transformers' own pipeline.
    independent = model.config.problem_type == "multi_label_classification" or len(names) == 1
    return _run(model, tokenizer, _index(spec.label, names, path), independent, device)


def _pinned(spec: Spec) -> str:
    """A folder, or the name of a model on the hub whose commit is given."""
    path = str(spec.path)
    if not Path(path).is_dir() and not re.fullmatch("[0-9a-f]{40}", spec.revision or ""):
        raise InputError(
            f"scorer: {path} is not a folder, and revision is {spec.revision!r}; a model on "
            "the hub needs its commit (40 hexadecimal digits) as revision"
        )
    return path


def _describe_classifier(spec: Spec) -> dict[str, str]:
    path = _pinned(spec)
    pin = {"revision": spec.revision} if spec.revision else {}
    if Path(path).is_dir():
        weights = sorted(Path(path).glob("*.safetensors"))
        pin = {f"sha256 {w.name}": digest(w) for w in weights}
    return {"path": path, "label": str(spec.label)} | pin | _versions("torch", "transformers")


def _detoxify(spec: Spec, device: str) -> Scorer:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    file, encoder, revision = _detoxify_files(spec)
    remedy = "not a Detoxify checkpoint, which has state_dict and config; get it again"
    with reading("scorer", str(file), remedy):
        saved = torch.load(file, map_location="cpu", weights_only=True)
        size = saved["config"]["arch"]["args"]["num_classes"]
        classes = map(str, saved["config"]["dataset"]["args"]["classes"])
        labels = [LABELS.get(name, name) for name in classes]
        # Older versions of transformers saved these indices with the weights.
        state = {k: w for k, w in saved["state_dict"].items() if not k.endswith(".position_ids")}
    code: dict[str, Any] = {"trust_remote_code": False}
    with reading("scorer", encoder, HUB):
        config = AutoConfig.from_pretrained(encoder, num_labels=size, revision=revision, **code)
        tokenizer = AutoTokenizer.from_pretrained(encoder, revision=revision, **code)
        model = AutoModelForSequenceClassification.from_config(config, **code)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{file}: its weights do not fit the encoder {encoder}") from error
    column = _index(spec.label or "toxicity", labels, str(file))
    return _run(model, tokenizer, column, True, device)


def _detoxify_files(spec: Spec) -> tuple[Path, str, str | None]:
    """Checkpoint, and the encoder's folder or hub name and commit; the checkpoint is verified."""
    encoder, revision = ENCODER, ENCODER_REVISION
    pins = [spec.revision] if spec.revision else []
    if spec.path is None:
        checkpoint = _published_checkpoint()
        pins.append(checkpoint.stem.rpartition("-")[2])  # its name ends in its sha256
    elif Path(spec.path).is_dir():
        there = sorted(Path(spec.path).glob("*.ckpt"))
        if len(there) != 1:
            raise InputError(f"scorer: {spec.path} has {len(there)} files *.ckpt; expected one")
        checkpoint, encoder, revision = there[0], spec.path, None
    else:
        checkpoint = Path(spec.path)
    sha256 = digest(checkpoint)
    for pin in pins:
        if not sha256.startswith(pin):
            problem = f"sha256 is {sha256}, expected {pin}..."
            raise InputError(f"{checkpoint}: {problem}; get the file again, or correct revision")
    return checkpoint, encoder, revision


def _published_checkpoint() -> Path:
    """The checkpoint in torch.hub's cache, downloaded if it is not there."""
    from torch import hub

    path = Path(hub.get_dir()) / "checkpoints" / Path(CHECKPOINT).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            hub.download_url_to_file(CHECKPOINT, str(path))
        except OSError as error:  # URLError is one
            problem = f"cannot download {CHECKPOINT} ({error})"
            raise InputError(
                f"scorer: {problem}; put it into {path.parent}, or give its place as path"
            ) from None
    return path


def _describe_detoxify(spec: Spec) -> dict[str, str]:
    file, encoder, revision = _detoxify_files(spec)
    about = {
        "checkpoint": str(file),
        "sha256": digest(file),
        "encoder": encoder,
        "label": spec.label or "toxicity",
    }
    pin = {"encoder revision": revision} if revision else {}
    return about | pin | _versions("torch", "transformers")


SCORERS: dict[str, tuple[Load, Describe]] = {
    "profanity": (_profanity, _describe_profanity),
    "hatesonar": (_hatesonar, _describe_hatesonar),
    "python": (_python, _describe_python),
    "detoxify": (_detoxify, _describe_detoxify),
    "classifier": (_classifier, _describe_classifier),
}


def _index(label: str | None, labels: Sequence[str], where: str) -> int:
    if label not in labels:
        known = ", ".join(sorted(labels))
        raise InputError(f"scorer: {where} has no label {label!r}; choose one of: {known}")
    return labels.index(label)


def _run(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    column: int,
    independent: bool,
    device: str,
) -> Scorer:
    """Probability of one label: by itself if labels are `independent`, else among all of them."""
    import torch

    if device == "auto":  # for a model in parts; a scorer is small
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.nn.Module.to(model.eval(), device)  # transformers' own `to` has no usable type
    limit = min(tokenizer.model_max_length, _positions(model))
    fit: Any = {"truncation": True, "max_length": int(limit)} if limit < LONG else {}

    @torch.inference_mode()
    def batch(texts: list[str], padding: bool) -> Array:
        inputs = tokenizer(texts, return_tensors="pt", padding=padding, **fit)
        logits = model(**inputs.to(model.device)).logits.float()
        chances = logits.sigmoid() if independent else logits.softmax(-1)
        return chances[:, column].cpu().numpy()

    with reading("scorer", str(model.name_or_path), "no text can be scored; name another model"):
        alone = np.concatenate([batch([text], False) for text in TEXTS])
        pad = tokenizer.pad_token_id  # without one, or another than the model's, texts go alone
        together = pad is not None and pad == model.config.pad_token_id
        together = together and np.allclose(batch(TEXTS, True), alone, atol=SAME, equal_nan=True)

    def score(texts: list[str]) -> Array:
        scores, size = np.empty(len(texts)), BATCH if together else 1
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
        starts = range(0, len(texts), size)
        for start in tqdm(starts, "score texts", unit="batch", disable=None, leave=False):
            places = order[start : start + size]
            scores[places] = batch([texts[i] for i in places], together)
        return scores

    return score


def _positions(model: "PreTrainedModel") -> float:
    """Tokens that a classifier reads at most. RoBERTa and its like number them from after the
    padding's own number, and so have fewer than their table has rows.
    """
    from torch.nn import Embedding

    tables = (each for name, each in model.named_modules() if name.endswith("position_embeddings"))
    padded = (t.padding_idx + 1 for t in tables if isinstance(t, Embedding) and t.padding_idx)
    return context(model.config.to_dict()) - next(padded, 0)
