"""How long a quantization will take and how much memory, from counts of operations and this machine's rates.

Products of matrices are counted and divided by a measured rate. What choosing codes costs beside them depends on
scheme, method and grid, so that it is timed on a small matrix by the code that will do it, and scaled by the number of
weights. Estimates are meant to be right within a factor of 1.5, on a machine as busy as while it was measured.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import log2, prod

import torch
import torch.nn.functional as F

from llmopt.backend.gram import fast_gram
from llmopt.backend.select import fast_products
from llmopt.model.config import ModelConfig
from llmopt.model.decoder import config_groups
from llmopt.model.source import EMBEDDING, ModelSource, as_dense, layer_name
from llmopt.quant.calibration import TOKENS_AT_ONCE
from llmopt.quant.methods import awq, smoothquant
from llmopt.quant.methods.base import Method
from llmopt.quant.methods.gptq import Hessian, gptq
from llmopt.quant.methods.rtn import round_to_nearest
from llmopt.quant.recipe import GGUF, Recipe
from llmopt.quant.samples import SAMPLED_AT_ONCE, SELF
from llmopt.weights.formats import bits
from llmopt.weights.formats.gguf_blocks import encode_blocks
from llmopt.weights.quantized import ELEMENTS_AT_ONCE, QuantizedTensor
from llmopt.weights.scheme import PER_CHANNEL, Scheme

MEASURED = 0.1  # seconds for each rate
SIDE = 1024  # of the matrices that are multiplied: large enough for the full rate
SAMPLE_HEADS = 8
SAMPLE_INPUTS, SAMPLE_OUTPUTS = 128, 1024  # of the matrix that is rounded, at most: far more than fits into a cache
FLOAT = 4  # bytes of float32
KEPT_BELOW = 32 << 20  # bytes; the largest block that glibc takes from its heap, which it seldom gives back


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second, now.

    Attributes:
        products: operations (two for each multiply and add) of matrix products in the dtype of calibration.
        exact: the same in float32.
        gram: operations of `add_gram`, counted as those of a whole product.
        elements: float32 numbers of a matrix that one elementwise operation passes over.
    """

    products: float
    exact: float
    gram: float
    elements: float


def measure_rates(dtype: torch.dtype) -> Rates:
    """Takes four times `MEASURED` seconds, on the CPU."""
    add_gram, gram = fast_gram("cpu", dtype), torch.zeros(SIDE, SIDE)
    exact = torch.ones(SIDE, SIDE)
    fast = exact.to(dtype)
    large = torch.ones(4 * SIDE, SIDE)  # as large as the activations of a batch, and larger than a cache
    flops = 2 * SIDE**3
    return Rates(
        products=flops / _seconds(lambda: fast @ fast),
        exact=flops / _seconds(lambda: exact @ exact),
        gram=flops / _seconds(lambda: add_gram(gram, exact)),
        elements=large.numel() / _seconds(lambda: large * large),
    )


def _seconds(work: Callable[[], object]) -> float:
    """The mean time of something, over `MEASURED` seconds; the first time does not count."""
    work()
    count, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < MEASURED or not count:
        work()
        count += 1
    return passed / count


@dataclass(frozen=True)
class Shape:
    """A matrix that is quantized as one: the linear layers that share an input and a scheme."""

    scheme: Scheme
    outputs: int
    inputs: int

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs


def stack_shapes(recipe: Recipe, config: ModelConfig) -> Counter[Shape]:
    """How many of each there are in the whole model."""
    found: Counter[Shape] = Counter()
    for layer in range(config.num_layers):
        schemes, shapes = recipe.layer_schemes(layer), config.layer_shapes(layer)
        for members in config_groups(config, layer).values():
            outputs: Counter[Scheme] = Counter()
            for module in members:
                if module in schemes:
                    outputs[schemes[module]] += shapes[f"{module}.weight"][0]
            inputs = shapes[f"{members[0]}.weight"][1]
            found.update(Shape(scheme, rows, inputs) for scheme, rows in outputs.items())
    return found


def layer_weights(config: ModelConfig) -> list[int]:
    """The weights of each decoder layer's matrices."""
    layers = map(config.layer_shapes, range(config.num_layers))
    return [sum(prod(shape) for shape in shapes.values() if len(shape) == 2) for shapes in layers]


def used_weights(config: ModelConfig) -> int:
    """Those of all layers that one token meets: of experts, as many as it is sent to."""
    total = sum(layer_weights(config))
    if config.experts is None:
        return total
    idle = config.experts.count - config.experts.chosen
    of_one = 3 * config.hidden_size * config.experts.intermediate_size
    return total - sum(config.experts.layers) * idle * of_one


def group_widths(config: ModelConfig, layer: int, met: bool = False) -> list[int]:
    """The inputs of each group of a layer's linear layers; with `met`, of those that one token meets."""
    shapes, groups = config.layer_shapes(layer), config_groups(config, layer)
    widths = [shapes[f"{members[0]}.weight"][1] for members in groups.values()]
    # The first two groups are those of attention, and each expert has two.
    return widths[: 2 + 2 * config.experts.chosen] if met and config.experts is not None else widths


def estimate_seconds(recipe: Recipe, source: ModelSource, rates: Rates) -> dict[str, float]:
    """Seconds of each phase, by its name in the manifest; that of reading a calibration text is left out."""
    config, method = source.config, recipe.build_method(source.config)
    layers, weights = config.num_layers, sum(layer_weights(config))
    seconds = {} if recipe.calibration != SELF else {"sample": _seconds_to_sample(recipe, config, rates)}
    seconds["read"] = weights * _seconds_to_read(source)
    if recipe.calibration is not None:
        tokens = recipe.options.samples * recipe.options.seq_len
        run = tokens * (_forward_seconds(config, rates) + layers * _seconds_to_attend(recipe, config))
        pack = 2 * weights / rates.elements  # each weight is read, and written in another dtype
        seconds["observe"] = run + pack + tokens * _observing_seconds(method, config, rates)
        seconds["advance"] = (run + pack) * (layers - 1) / layers
    choosing = _Choosing(recipe, rates)
    shapes = stack_shapes(recipe, config)
    seconds["choose codes"] = sum(count * choosing.seconds(shape) for shape, count in shapes.items())
    if recipe.head is not None:
        head = config.vocab_size * config.hidden_size
        seconds["read"] += head * _seconds_to_read(source)
        seconds["choose codes"] += head * choosing.seconds_to_round(recipe.head) + choosing.seconds_of_error(
            recipe.head, head
        )
    seconds["write"] = sum(_seconds_to_write(str(e.format), recipe, config, choosing) for e in recipe.options.exports)
    return seconds


def _observing_seconds(method: Method, config: ModelConfig, rates: Rates) -> float:
    """Of one token's inputs in all layers: their gram matrix, or x² and its sum; and |x| and its largest."""
    widths = [width for layer in range(config.num_layers) for width in group_widths(config, layer, met=True)]
    passes = (0 if method.needs_gram else 2) + (2 if method.keep_rows else 0)
    products = 2 * sum(width**2 for width in widths) if method.needs_gram else 0
    return passes * sum(widths) / rates.elements + products / rates.gram


def _seconds_to_sample(recipe: Recipe, config: ModelConfig, rates: Rates) -> float:
    """Of the model writing the samples itself: for each token of as many samples as go together, every weight is read
    once and multiplied with all of them, and the vocabulary is sorted for each."""
    samples, vocabulary = recipe.options.samples, config.vocab_size
    at_once = min(samples, SAMPLED_AT_ONCE)
    head = vocabulary * config.hidden_size
    step = (sum(layer_weights(config)) + head) / rates.elements
    step += 2 * (used_weights(config) + head) * at_once / rates.exact
    step += at_once * vocabulary * log2(vocabulary) / rates.elements
    return -(-samples // at_once) * recipe.options.seq_len * step


def _forward_seconds(config: ModelConfig, rates: Rates) -> float:
    """Of one token through all decoder layers but for attention: products, and the passes over its activations: two
    norms of five, conversions before and after each product, the rotation, the gate, two sums."""
    hidden, inner = config.hidden_size, config.intermediate_size
    if config.experts is not None:
        inner = config.experts.chosen * config.experts.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    norms = 10 * hidden
    conversions = (2 * hidden + queries + inner) + (queries + 2 * keys + 2 * hidden + 2 * inner)
    rotation = 4 * (queries + keys)
    around_attention = 2 * queries + 2 * keys
    passes = norms + conversions + rotation + around_attention + 2 * inner + 2 * hidden
    return 2 * used_weights(config) / rates.products + config.num_layers * passes / rates.elements


def _seconds_to_attend(recipe: Recipe, config: ModelConfig) -> float:
    """Of one token in one layer, by the attention of a few heads over one sample; torch's is no mere product."""
    heads, length = min(config.num_heads, SAMPLE_HEADS), recipe.options.seq_len
    sample = torch.ones(1, heads, length, config.head_dim, dtype=fast_products(recipe.device))
    taken = _seconds(lambda: F.scaled_dot_product_attention(sample, sample, sample, is_causal=True))
    return taken / length / heads * config.num_heads


class _Choosing:
    """What it costs to choose the codes of a matrix."""

    def __init__(self, recipe: Recipe, rates: Rates) -> None:
        self.recipe, self.rates = recipe, rates
        self.per_weight: dict[tuple[str, Scheme], float] = {}

    def seconds(self, shape: Shape) -> float:
        scheme, inputs, weights = shape.scheme, shape.inputs, shape.weights
        once = 2 * weights * inputs / self.rates.exact  # of a product with the gram matrix
        return self.seconds_of_error(scheme, weights) + self._method_seconds(scheme, inputs, weights, once)

    def seconds_of_error(self, scheme: Scheme, weights: int) -> float:
        """Of so many weights: their values, the difference from what they were, squares and sums of both."""
        return weights * (self._timed("dequantize", scheme) + 5 / self.rates.elements)

    def _method_seconds(self, scheme: Scheme, inputs: int, weights: int, once: float) -> float:
        match self.recipe.options.method:
            case "gptq":
                factorise = 2 / 3 * inputs**3 / self.rates.exact  # the Cholesky factor, and its inverse
                update = weights * inputs / self.rates.exact  # of the inputs that are still to come
                return weights * self._timed("gptq", scheme) + factorise + update + once
            case "awq":
                ratios, clips = awq.RATIOS + 1, awq.CLIP_STEPS
                own = clips * 2 * weights * _group_size(scheme, inputs) / self.rates.exact
                rounding = (ratios + clips) * weights * self._timed("once", scheme)
                return rounding + own + (ratios + 1) * once
            case "smoothquant":
                tries = len(smoothquant.STRENGTHS) + 1
                products = tries * 2 * 2 * smoothquant.KEEP_ROWS * weights / self.rates.exact
                return weights * (tries * self._timed("once", scheme) + self._timed("search", scheme)) + products
        searched = self.recipe.calibration is not None
        return weights * self._timed("search" if searched else "once", scheme)

    def seconds_to_round(self, scheme: Scheme) -> float:
        """Of one weight, without data."""
        return self._timed("once", scheme)

    def _timed(self, how: str, scheme: Scheme) -> float:
        if (how, scheme) not in self.per_weight:
            self.per_weight[how, scheme] = _seconds_a_weight(how, scheme, self.recipe.options.desc_act)
        return self.per_weight[how, scheme]


def _seconds_a_weight(how: str, scheme: Scheme, desc_act: bool) -> float:
    """Of rounding: `once`; with a `search` for the best range; by the loop of `gptq`; or the way back."""
    inputs = max(SAMPLE_INPUTS, scheme.row_multiple)
    weight = torch.randn(SAMPLE_OUTPUTS, inputs, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(inputs)
    if how == "dequantize":
        taken = _seconds(round_to_nearest(weight, scheme).dequantize)
    elif how == "gptq":
        hessian = Hessian(torch.eye(inputs), damping=0.01)
        taken = _seconds(lambda: gptq(weight, hessian, scheme, desc_act))
    elif how == "search":
        taken = _seconds(lambda: round_to_nearest(weight, scheme, importance=importance).dequantize())
    else:
        taken = _seconds(lambda: round_to_nearest(weight, scheme).dequantize())
    return taken / weight.numel()


def _seconds_to_write(format: str, recipe: Recipe, config: ModelConfig, choosing: _Choosing) -> float:
    """Of one artifact: codes are packed, and what has none passes from one dtype to another. GGUF also rounds the
    embedding, and the head where that is another."""
    embedding_alone = config.tie_word_embeddings or recipe.head is not None
    outer = config.vocab_size * config.hidden_size * (1 if embedding_alone else 2)
    seconds = 2 * outer / choosing.rates.elements
    rounded = recipe.outer.get(EMBEDDING)
    if format == GGUF and rounded is not None and not rounded.is_dense:
        seconds += outer * choosing.seconds_to_round(rounded)
    for scheme, weights in _weights_by_scheme(recipe, config).items():
        sample = _rounded_sample(scheme)
        pack = partial(encode_blocks, sample) if format == GGUF else partial(bits.pack, sample.codes, sample.bits)
        seconds += weights * _seconds(pack) / sample.codes.numel()
    return seconds


def _weights_by_scheme(recipe: Recipe, config: ModelConfig) -> Counter[Scheme]:
    found: Counter[Scheme] = Counter()
    for shape, count in stack_shapes(recipe, config).items():
        found[shape.scheme] += count * shape.weights
    if recipe.head is not None:
        found[recipe.head] += config.vocab_size * config.hidden_size
    return found


def _rounded_sample(scheme: Scheme) -> QuantizedTensor:
    return round_to_nearest(torch.ones(SAMPLE_OUTPUTS, max(SAMPLE_INPUTS, scheme.row_multiple)), scheme)


def _seconds_to_read(source: ModelSource) -> float:
    """Of one weight, by reading the smallest linear layer of the first decoder layer."""
    shapes = source.config.layer_shapes(0)
    linears = (name for name in shapes if name.endswith("_proj.weight"))
    name = min(linears, key=lambda name: prod(shapes[name]))
    return _seconds(lambda: as_dense(source.weight(layer_name(0, name)))) / prod(shapes[name])


def _group_size(scheme: Scheme, inputs: int) -> int:
    return inputs if scheme.group_size in (None, PER_CHANNEL) else scheme.group_size


def estimate_memory(recipe: Recipe, source: ModelSource, products: torch.dtype) -> dict[str, int]:
    """Bytes of what is in memory at the peak, beside Python and its libraries."""
    config = source.config
    moments = [_writing_the_embedding(source)]
    held: dict[str, int] = {}
    if recipe.calibration is not None:
        tokens = recipe.options.samples * recipe.options.seq_len
        held["activations of the samples"] = tokens * config.hidden_size * FLOAT
        moments.append(_observing(recipe, config, products))
    moments.append(_choosing(recipe, config))
    if recipe.head is not None:
        moments.append(_rounding_the_head(source))
    return held | max(moments, key=lambda moment: sum(moment.values()))


def _observing(recipe: Recipe, config: ModelConfig, products: torch.dtype) -> dict[str, int]:
    weights = max(layer_weights(config))
    length = recipe.options.seq_len
    batch = min(recipe.options.samples, max(1, TOKENS_AT_ONCE // length)) * length
    hidden, inner = config.hidden_size, config.intermediate_size
    # What a batch has freed stays with the allocator where the blocks are small: its input and the norms of it; the
    # gate, what it makes, and gate and up in 16 bits.
    blocks = [batch * width * FLOAT for width in (hidden, hidden, hidden, inner, inner, inner)]
    # Widest between the two products of the MLP: x, its norm, gate and up in both dtypes, what they make, and a copy.
    widest = 2 * hidden * FLOAT + 2 * inner * (products.itemsize + FLOAT) + 2 * inner * FLOAT
    return {
        "a layer in float32": weights * FLOAT,
        "the layer as it runs": weights * products.itemsize,
        "gram matrices": _gram_bytes(recipe, config),
        "activations of a batch": batch * widest,
        "freed, but not given back": sum(block for block in blocks if block < KEPT_BELOW),
    }


def _choosing(recipe: Recipe, config: ModelConfig) -> dict[str, int]:
    weights = max(layer_weights(config))
    stacks = stack_shapes(recipe, config)
    largest = max((shape.weights for shape in stacks), default=0)
    # The stack itself; in GPTQ's order, and the numbers chosen; or for the error, its values and two differences.
    copies = 4 if recipe.options.method != "rtn" else 3
    moment = {
        "a layer in float32": weights * FLOAT,
        "its codes": weights,
        "copies of its largest matrix": copies * largest * FLOAT,
    }
    if recipe.calibration is not None:
        moment["gram matrices"] = _gram_bytes(recipe, config)
    if recipe.options.method == "gptq":  # its factor, and a copy while it is put in order
        moment["a Hessian"] = 2 * max(config.linear_widths()) ** 2 * FLOAT
    return moment


def _gram_bytes(recipe: Recipe, config: ModelConfig) -> int:
    if not recipe.build_method(config).needs_gram:
        return 0
    layers = range(config.num_layers)
    return max(sum(width**2 for width in group_widths(config, layer)) for layer in layers) * FLOAT


def _writing_the_embedding(source: ModelSource) -> dict[str, int]:
    """As it is stored, and as it is written, both in 16 bits at most; between them it passes in parts."""
    return {"the embedding, stored and written": 2 * 2 * prod(source.shape(EMBEDDING))}


def _rounding_the_head(source: ModelSource) -> dict[str, int]:
    """As it is stored, in 16 bits at most; its codes, in parts and whole; and of a part the weights, their groups'
    numbers, their values and a square. Packing the codes takes less, as what was stored is gone by then."""
    weights = source.config.vocab_size * source.config.hidden_size
    part = min(weights, ELEMENTS_AT_ONCE)
    return {"the head, stored": 2 * weights, "its codes": 2 * weights, "some of its rows in float32": 4 * part * FLOAT}
