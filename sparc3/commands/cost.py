"""What a model costs to run, from its shape alone: floating-point operations and memory.

Counted are matrix products (2 operations per multiplication and addition), which is nearly all of
the work. The shape is exact: the model is built without its weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from sparc3.measure.likelihood import CHUNK
from sparc3.model import families
from sparc3.relevance.attribution import POSITIONS_AT_ONCE
from sparc3.relevance.scores import PRODUCTS_AT_ONCE, SCORES

COMPLETIONS_AT_ONCE = 200  # of generate.complete
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


# Lengths in tokens: of a text, of the two sequences of a pair, ...
Lengths = Sequence[int]


@dataclass(frozen=True)
class Shape:
    """A model. `products`: weights of matrix products, of which each token takes part in 2
    operations; in all layers, in the first one, in its MLP's output projection, and in the
    language-modelling head.
    """

    parameters: int
    layers: int
    width: int  # neurons per layer
    hidden: int
    attention: int  # heads x their dimension
    keys: int  # key-value heads x their dimension
    vocabulary: int
    products: int
    first_layer: int
    output_projection: int
    head: int
    factors: int  # of a neuron's value: 2 in a gated MLP, 1 in a plain one
    normalised: int  # width of all that one layer's norms read

    @property
    def neurons(self) -> int:
        return self.layers * self.width


def shape(config: PretrainedConfig) -> Shape:
    """InputError for a family that is not known."""
    family = families.family(config.model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    layers = list(model.get_submodule(family.layers).children())
    mlp = families.mlps(model)[0]
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = (getattr(config, "num_key_value_heads", None) or heads) * size
    read = {"q_norm": heads * size, "k_norm": keys}  # all others read the hidden state
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=len(layers),
        width=families.width(model),
        hidden=config.hidden_size,
        attention=heads * size,
        keys=keys,
        vocabulary=config.vocab_size,
        products=_products(families.body(model)),
        first_layer=_products(layers[0]),
        output_projection=mlp.down.get_parameter("weight").numel(),
        head=config.vocab_size * config.hidden_size,
        factors=1 if mlp.gate is None else 2,
        normalised=sum(
            read.get(name.rpartition(".")[2], config.hidden_size)
            for name, module in layers[0].named_modules()
            if "Norm" in type(module).__name__
        ),
    )


def _products(module: torch.nn.Module) -> int:
    return sum(
        m.get_parameter("weight").numel()
        for m in module.modules()
        if isinstance(m, torch.nn.Linear | Conv1D)
    )


# --- operations ------------------------------------------------------------------------------


def forward(model: Shape, lengths: Lengths) -> float:
    """Operations of the body, without the head, on sequences of these lengths.

    A token attends to its whole sequence: what causality spares, the kernels mostly compute.
    """
    tokens, squares = sum(lengths), sum(n * n for n in lengths)
    return 2 * model.products * tokens + _attention(model, model.layers) * squares


def _attention(model: Shape, layers: int) -> int:
    """Operations per token and token attended to: query x key, and weight x value."""
    return 4 * model.attention * layers


def likelihood(model: Shape, lengths: Lengths, scored: int | None = None) -> float:
    """Operations of log p of `scored` tokens; of all but each sequence's first, if not given."""
    if scored is None:
        scored = sum(lengths) - len(lengths)
    return forward(model, lengths) + 2 * model.head * scored


def attribution(
    model: Shape, prompts: Sequence[Lengths], names: Sequence[str], target: str
) -> float:
    """Operations of the scores `names`, which share passes as in `attribution.score`.

    Backward goes through activations only, never to a weight's gradient, and ends at the neurons
    of the first layer.
    """
    lengths = [length for prompt in prompts for length in prompt]
    tokens, squares = sum(lengths), sum(n * n for n in lengths)
    passes = len({SCORES[name].gradient for name in names} - {None})
    if not passes:
        return forward(model, lengths)
    through = model.products - model.first_layer + model.output_projection
    backward = 2 * through * tokens + 2 * _attention(model, model.layers - 1) * squares
    explained = len(prompts) if target == "max-logit" else tokens - len(lengths)
    weights = sum(SCORES[name].at == "weights" for name in names)
    return (
        passes * (forward(model, lengths) + backward)
        + 4 * model.head * explained
        + weights * 2 * model.neurons * model.hidden * tokens
    )


def generation(model: Shape, lengths: Lengths, completions: int, new_tokens: int) -> float:
    """Operations of `completions` completions of each prompt, of all their `new_tokens` tokens."""
    read = new_tokens - 1  # the last token drawn is not read
    attended = sum(read * n + read * (read + 1) / 2 for n in lengths)
    each = 2 * model.products * read + 2 * model.head * new_tokens
    return forward(model, lengths) + completions * (
        each * len(lengths) + _attention(model, model.layers) * attended
    )


# --- memory ----------------------------------------------------------------------------------


def weights(model: Shape, dtype: str) -> int:
    """Bytes of all parameters."""
    return model.parameters * BYTES[dtype]


def attribution_memory(
    model: Shape, prompts: Sequence[Lengths], names: Sequence[str], batch_tokens: int, dtype: str
) -> float:
    """Bytes beyond the weights at the peak of one batch of `attribution.score`."""
    longest = max(map(sum, prompts))
    tokens = max(batch_tokens, longest)
    together = min(len(prompts), max(1, tokens * len(prompts) // sum(map(sum, prompts))))
    found = 4 * len(names) * together * model.neurons
    at = {SCORES[name].at for name in names if SCORES[name].gradient is not None}
    if not at:
        return found + passing(model, tokens, dtype)
    logits = 4 * 4 * POSITIONS_AT_ONCE * model.vocabulary
    matrix = (4 * PRODUCTS_AT_ONCE + BYTES[dtype] * model.width * model.hidden) * ("weights" in at)
    return found + logits + matrix + saved(model, tokens, longest, at, dtype)


def saved(model: Shape, tokens: int, length: int, at: set[str], dtype: str) -> float:
    """Bytes kept between forward and backward for `tokens` in sequences of `length` tokens.

    Per token and layer (but the first) autograd keeps what the norms read, in float32; query, key,
    value and output of attention and the row of its mask; and the two factors of a gated MLP or
    the input of a plain one. Scores `at` "neurons" keep h, those at "weights" the input of `up`.
    """
    graph = 4 * model.attention + length + model.factors * model.width
    scored = model.width * ("neurons" in at) + model.hidden * ("weights" in at)
    per_token = (model.layers - 1) * (4 * model.normalised + BYTES[dtype] * graph)
    return tokens * (per_token + model.layers * BYTES[dtype] * scored)


def passing(model: Shape, tokens: int, dtype: str) -> float:
    """Bytes of a layer's values while a batch passes through it, when nothing is kept."""
    return tokens * (4 * model.hidden + 4 * model.attention + 4 * model.width) * BYTES[dtype]


def likelihood_memory(model: Shape, circuits: int, batch_tokens: int, dtype: str) -> float:
    """Bytes beyond the weights at the peak of one batch of `likelihood.token_nll`, with what
    enters the first layers of the circuits.
    """
    entering = min(circuits, model.layers - 1) * batch_tokens * model.hidden * BYTES[dtype]
    return passing(model, batch_tokens, dtype) + entering + 2 * 4 * CHUNK * model.vocabulary


def generation_memory(
    model: Shape, circuits: int, lengths: Lengths, completions: int, new_tokens: int, dtype: str
) -> float:
    """Bytes beyond the weights of one batch of `generate.complete`: keys and values, and logits."""
    together = min(COMPLETIONS_AT_ONCE, circuits * completions * len(lengths))
    cache = 2 * model.layers * model.keys * (max(lengths) + new_tokens) * BYTES[dtype]
    return together * (cache + 3 * 4 * model.vocabulary)


def scores_size(model: Shape, prompts: int, names: int) -> int:
    """Bytes of attribution scores, in memory and on disk."""
    return 4 * prompts * names * model.neurons
