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
from sparc3.model.loading import DTYPES
from sparc3.relevance.attribution import AT_THE_END, POSITIONS_AT_ONCE
from sparc3.relevance.scores import PRODUCTS_AT_ONCE, SCORES

COMPLETIONS_AT_ONCE = 200  # of generate.complete

Lengths = Sequence[int]  # in tokens: of texts, of the two sequences of a pair, ...


@dataclass(frozen=True)
class Shape:
    """A model. `products`: weights of matrix products in all layers, of which each token takes part
    in 2 operations; `passed_back`: those that a backward pass to the first layer's neurons crosses.
    """

    size: int  # bytes of a number
    parameters: int
    layers: int
    width: int  # neurons per layer
    hidden: int
    attention: int  # heads x their dimension
    keys: int  # key-value heads x their dimension
    vocabulary: int
    products: int
    passed_back: int
    head: int  # weights of the language-modelling head
    factors: int  # of a neuron's value: 2 in a gated MLP, 1 in a plain one
    normalised: int  # width of all that one layer's norms read
    context: float  # tokens of the longest text
    written: int = 0  # heads whose attention scores are written out: by eager attention

    @property
    def weights(self) -> int:
        """Bytes of all parameters."""
        return self.parameters * self.size

    def scores(self, prompts: int, names: int = 1) -> int:
        """Bytes of attribution scores, in memory and on disk."""
        return 4 * prompts * names * self.layers * self.width


def shape(config: PretrainedConfig, dtype: str = "float32") -> Shape:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    first, mlp = families.layers(model)[0], families.mlps(model)[0]
    heads = config.num_attention_heads
    dimension = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = (getattr(config, "num_key_value_heads", None) or heads) * dimension
    read = {"q_norm": heads * dimension, "k_norm": keys}  # all others read the hidden state
    products = _products(families.body(model))
    return Shape(
        size=DTYPES[dtype].itemsize,
        parameters=sum(p.numel() for p in model.parameters()),
        layers=families.num_layers(model),
        width=families.width(model),
        hidden=config.hidden_size,
        attention=heads * dimension,
        keys=keys,
        vocabulary=config.vocab_size,
        head=config.vocab_size * config.hidden_size,
        products=products,
        passed_back=products - _products(first) + _products(mlp.down),
        factors=1 if mlp.gate is None else 2,
        context=families.context(config.to_dict()),
        normalised=sum(
            read.get(name.rpartition(".")[2], config.hidden_size)
            for name, module in first.named_modules()
            if "Norm" in type(module).__name__
        ),
        written=heads if families.attention_kind(config.to_dict()) == "eager" else 0,
    )


def _products(module: torch.nn.Module) -> int:
    products = (m for m in module.modules() if isinstance(m, torch.nn.Linear | Conv1D))
    return sum(m.get_parameter("weight").numel() for m in products)


@dataclass(frozen=True)
class Work:
    """Of one stage, or a part of one. `passes`: operations on whole sequences; `drawn`: on
    completions, token by token; `steps`: times that all weights are read for those; `memory`: bytes
    beyond the weights on the device; `held`: bytes of scores in the process; `disk`: bytes written.
    """

    tokens: int = 0
    passes: float = 0
    drawn: float = 0
    steps: int = 0
    memory: float = 0
    held: float = 0
    disk: float = 0

    @property
    def operations(self) -> float:
        return self.passes + self.drawn


def together(parts: Sequence[Work]) -> Work:
    """Parts of a stage that run one after the other."""
    return Work(
        tokens=sum(part.tokens for part in parts),
        passes=sum(part.passes for part in parts),
        drawn=sum(part.drawn for part in parts),
        steps=sum(part.steps for part in parts),
        memory=max((part.memory for part in parts), default=0),
    )


def forward(model: Shape, lengths: Lengths) -> float:
    """Operations of the body, without the head."""
    # Of the whole sequence: what causality spares, the kernels mostly compute.
    attended = 4 * model.attention * model.layers * sum(n * n for n in lengths)
    return 2 * model.products * sum(lengths) + attended


def backward(model: Shape, lengths: Lengths) -> float:
    """Operations of a backward pass through activations, down to the first layer's neurons."""
    attended = 8 * model.attention * (model.layers - 1) * sum(n * n for n in lengths)
    return 2 * model.passed_back * sum(lengths) + attended


def attribution(
    model: Shape, prompts: Sequence[Lengths], names: Sequence[str], target: str, batch_tokens: int
) -> Work:
    """The scores `names`, which share passes as `attribution.score` says; memory of its batch."""
    lengths = [length for prompt in prompts for length in prompt]
    tokens, longest = sum(lengths), max(map(sum, prompts))
    batch = max(batch_tokens, longest)
    at_once = min(len(prompts), max(1, batch * len(prompts) // tokens))
    rows = [SCORES[name] for name in names if SCORES[name].gradient]
    at = [row.at for row in rows]
    # A path is walked for every layer, from there on: half of the layers on average.
    walks = sum(row.steps for row in rows) * (model.layers + 1) // 2
    passes = len({row.gradient for row in rows} - {"path"}) + walks
    operations = max(1, passes) * forward(model, lengths)
    memory: float = model.scores(at_once, len(names))
    if rows:
        explained = len(prompts) if target in AT_THE_END else tokens - len(lengths)
        heads = 1 + 2 * walks  # all layers' paths need their own
        operations += passes * backward(model, lengths) + 4 * model.head * explained * heads
        memory += saved(model, batch, longest, set(at))
        memory += 4 * 4 * POSITIONS_AT_ONCE * model.vocabulary
    else:
        memory += passing(model, batch)
    if "weights" in at:
        per_token = 2 * model.layers * model.width * model.hidden
        operations += at.count("weights") * per_token * tokens
        memory += 4 * PRODUCTS_AT_ONCE + model.size * model.width * model.hidden
    return Work(tokens, passes=operations, memory=memory)


def saved(model: Shape, tokens: int, length: int, at: set[str]) -> float:
    """Bytes kept between forward and backward for `tokens` in sequences of `length` tokens.

    Per token and layer (but the first) autograd keeps what the norms read, in float32; query, key,
    value and output of attention and the row of its mask, with eager attention its scores; and the
    two factors of a gated MLP or the input of a plain one. Scores `at` "neurons" keep h, those at
    "weights" the input of `up`.
    """
    graph = 4 * model.attention + length + model.factors * model.width
    per_score = 4 + (2 if model.size < 4 else 1) * model.size  # softmax, cap, and in 16 bits again
    attended = model.written * length * per_score
    scored = model.width * ("neurons" in at) + model.hidden * ("weights" in at)
    per_token = (model.layers - 1) * (4 * model.normalised + model.size * graph + attended)
    return tokens * (per_token + model.layers * model.size * scored)


def passing(model: Shape, tokens: int) -> float:
    """Bytes of a layer's values while a batch passes through it, when nothing is kept."""
    return tokens * 4 * (model.hidden + model.attention + model.width) * model.size


def likelihood(
    model: Shape, times: int, lengths: Lengths, batch_tokens: int, scored: int | None = None
) -> Work:
    """log p of `scored` tokens (of all but each text's first, if not given) by the model and
    without each of `times` - 1 circuits; memory with what enters their first layers.
    """
    if scored is None:
        scored = sum(lengths) - len(lengths)
    batch = max([batch_tokens, *lengths])
    entering = min(times - 1, model.layers - 1) * batch * model.hidden * model.size
    return Work(
        tokens=times * sum(lengths),
        passes=times * (forward(model, lengths) + 2 * model.head * scored),
        memory=passing(model, batch) + entering + 2 * 4 * CHUNK * model.vocabulary,
    )


def generation(
    model: Shape, times: int, lengths: Lengths, completions: int, new_tokens: int
) -> Work:
    """`completions` completions of each prompt, of all their `new_tokens` tokens, by the model and
    without each of `times` - 1 circuits; memory of keys and values, and logits.
    """
    read = new_tokens - 1  # the last token drawn is not read
    attended = sum(read * n + read * (read + 1) / 2 for n in lengths)
    each = 2 * model.products * read + 2 * model.head * new_tokens
    drawn = each * len(lengths) + 4 * model.attention * model.layers * attended
    count = times * completions * len(lengths)
    cache = 2 * model.layers * model.keys * (max(lengths) + new_tokens) * model.size
    return Work(
        tokens=times * sum(lengths) + count * new_tokens,
        drawn=times * (forward(model, lengths) + completions * drawn),
        steps=-(-count // COMPLETIONS_AT_ONCE) * new_tokens,
        memory=min(COMPLETIONS_AT_ONCE, count) * (cache + 3 * 4 * model.vocabulary),
    )
