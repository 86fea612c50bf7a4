"""sparc3 as a library, on models and tokenizers that transformers loaded: `import sparc3`.

Score texts, choose a circuit, remove it, see what that did; docs/library.md goes through it. Of
MLflow, DVC and params.yaml nothing is needed, and of lxt only for the scores `lrp` and `lrp-abs`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparc3.base.errors import InputError
from sparc3.base.files import Array
from sparc3.circuits.circuit import INTACT, Circuit
from sparc3.measure import generate, inference
from sparc3.measure.instrument import How, Measured, Sample
from sparc3.measure.instruments import nll, pairs, perplexity
from sparc3.model import loading
from sparc3.relevance import attribution
from sparc3.relevance.contrasts import CONTRASTS
from sparc3.relevance.scores import SCORES, TARGETS, Target

__all__ = ["INTACT", "Circuit", "InputError", "complete", "differential", "evaluate", "score"]

Pair = tuple[str, str]
AT_ONCE = 2048  # tokens of a batch


@contextmanager
def _inspected(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model is in eval mode and its weights take no gradient."""
    training, wanted = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for weight in wanted:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for weight in wanted:
            weight.requires_grad_(True)


def _known(what: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise InputError(f"{what} {name!r} is not known; choose one of: {', '.join(names)}")


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] | Sequence[Pair],
    method: str = "gradient",
    target: Target | None = None,
    batch_tokens: int = AT_ONCE,
) -> Array:
    """A number for every neuron and text: float32 (text, layer, neuron).

    method: a row of the table in `sparc3.relevance.scores`, such as gradient, lrp (SparC3, Eq. 8),
    activation. target: what it explains, the likelihood of the text unless given, or max-logit; of
    pairs always by how much the first text is the likelier. InputError: an unknown name, a text
    that the model cannot take, a package that is not installed.
    """
    paired = bool(texts) and not isinstance(texts[0], str)
    target = "pair" if paired else target or "likelihood"
    _known("method", method, list(SCORES))
    _known("target", target, TARGETS)
    if paired:
        encoded = [loading.encode_sentences(tokenizer, pair) for pair in texts]
    else:
        encoded = [[ids] for ids in loading.encode(tokenizer, cast("Sequence[str]", texts))]
    prompts = [attribution.Prompt(f"text {i}", tuple(each)) for i, each in enumerate(encoded)]
    with _inspected(model):
        (found,) = attribution.score(
            model, [prompts], [method], target=target, batch_tokens=batch_tokens
        )
    return found[method]


def differential(reference: Array, behaviour: Array, contrast: str = "mean-difference") -> Array:
    """One number for every neuron, float32 (layer, neuron), from the scores of two sets of texts;
    the most negative neurons are the most specific to the behaviour (SparC3, Eq. 7).

    contrast: mean-difference, auroc, t ... of `sparc3.relevance.contrasts`. InputError: an unknown
    one, scores of different models, too few texts for it.
    """
    _known("contrast", contrast, list(CONTRASTS))
    return CONTRASTS[contrast](reference, behaviour)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    circuit: Circuit,
    general: Sequence[str],
    behaviour: Sequence[str] | Sequence[Pair] = (),
    groups: Sequence[str] | None = None,
    resamples: int = inference.RESAMPLES,
) -> dict[str, dict[str, float]]:
    """What the circuit's removal changes, by name: value, low and high of its 95 % interval, p.

    ppl_delta: perplexity of general texts, in percent. Of the behaviour's texts nll_shift: the rise
    of their NLL beyond that of general text, nats a token, without p. Of its pairs margin: how much
    likelier the first text is, nats a token; and ss: how often, in percentage points. Texts that
    the circuit was chosen on show nothing: keep some apart. groups: what each of `behaviour` is
    about, where several are about the same. InputError: fewer than 6 texts or groups.
    """
    how = How(cast(Any, None), AT_ONCE, tokenizer)  # nothing read here asks for params

    def sample(texts: Sequence[Any], among: Sequence[str] | None, kind: str) -> Sample:
        names = [f"text {i}" for i in range(len(texts))]
        rows = [
            {"id": name, "group": group, kind: text}
            for name, group, text in zip(names, among or names, texts, strict=True)
        ]
        return (pairs if kind == "pair" else perplexity).encode(rows, tokenizer)

    with _inspected(model):
        text = nll.read(model, [INTACT, circuit], sample(general, None, "text"), how)
        found: dict[str, Any] = {"ppl_delta": perplexity.change(text[0], text[1], resamples)}
        if behaviour:
            kind, instrument = ("text", nll) if isinstance(behaviour[0], str) else ("pair", pairs)
            own = instrument.read(model, [INTACT, circuit], sample(behaviour, groups, kind), how)
            before, after = (Measured(*each) for each in zip(own, text, strict=True))
            if kind == "text":
                found["nll_shift"] = nll.shift_interval(before, after, resamples)
            else:
                values = [value for value in pairs.VALUES if value.name in ("margin", "ss")]
                found |= {value.name: value.change(before, after, resamples) for value in values}
    return {name: change._asdict() for name, change in found.items()}


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    circuit: Circuit = INTACT,
    new_tokens: int = 20,
    seed: int = 0,
) -> list[str]:
    """A completion of every prompt without the circuit, drawn from the nucleus of 0.9. The same
    seed draws with the same random numbers, so that before and after can be compared. InputError: a
    prompt that leaves no room in the model's context.
    """
    sampling = generate.Sampling(1, new_tokens, temperature=1.0, top_p=0.9, seed=seed)
    encoded = loading.encode(tokenizer, prompts)
    with _inspected(model):
        (drawn,) = generate.complete(model, [circuit], encoded, list(prompts), sampling)
    return tokenizer.batch_decode([tokens for (tokens,) in drawn])
