"""What the calibration samples look like at the input of every linear layer."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt.backend.base import Linear
from llmopt.backend.gram import GramSum, fast_gram
from llmopt.backend.reference import ReferenceBackend, Scores, attention, causal_mask
from llmopt.model import rope
from llmopt.model.config import ModelConfig, Rope
from llmopt.model.decoder import DecoderLayer, scale_embedding
from llmopt.model.source import ModelSource
from llmopt.quant.activations import hold
from llmopt.quant.methods.base import InputStatistics
from llmopt.weights.quantized import QuantizedTensor, Weight

TOKENS_AT_ONCE = 2048  # their widest activations stay in a large cache; more, or fewer, take longer


class CalibrationSweep:
    """Carries all calibration samples through the model, one decoder layer at a time.

    `observe` looks at what a layer is given, `advance` replaces it by what the layer makes of it. Advancing through
    the quantized layer lets later layers see, and make up for, the errors of the earlier ones.
    """

    def __init__(
        self,
        source: ModelSource,
        tokens: Tensor,
        backend: ReferenceBackend,
        with_gram: bool = True,
        keep_rows: int = 0,
        spill_to: Path | None = None,
    ) -> None:
        """`with_gram` and `keep_rows` say what to keep of the inputs, see `InputStatistics`; `spill_to` is a file for
        the activations where they are not to be in memory."""
        self.config: ModelConfig = source.config
        self.backend = backend
        self.with_gram, self.keep_rows = with_gram, keep_rows
        self.add_gram = fast_gram(backend.device.type, backend.products)
        self.length = tokens.shape[1]
        self.rotations = {each: self._rotation(each) for each in self.config.ropes()}
        per_batch = max(1, TOKENS_AT_ONCE // self.length)
        table = source.embedding
        embedded = (rows(table, part).to(backend.device, backend.dtype) for part in tokens.split(per_batch))
        scaled = (scale_embedding(part, self.config) for part in embedded)
        self._batches = hold(scaled, spill_to, backend.device)

    def _rotation(self, kind: Rope) -> tuple[Tensor, Tensor]:
        """Cosines and sines of one sample's positions."""
        frequencies = rope.frequencies(kind, self.config.head_dim, self.length)
        cos, sin = rope.angles(torch.arange(self.length), frequencies, kind.attention_factor)
        return cos.to(self.backend.device), sin.to(self.backend.device)

    @property
    def batches(self) -> list[Tensor]:
        """Where all samples stand, float32 [samples, length, hidden] each, in memory."""
        return list(self._batches)

    @torch.inference_mode()
    def observe(self, layer: DecoderLayer) -> dict[str, InputStatistics]:
        """What each group of linear layers is given, over all samples."""
        observed = {}
        for group, linear in layer.linears.items():
            statistics = InputStatistics(linear.in_features, self.with_gram, self.keep_rows)
            # Nothing that is observed comes after the projection down.
            observed[group] = Observed(linear, statistics, self.add_gram, output_matters=not group.endswith("down"))
        layer.linears.update(observed)
        for hidden in self._batches:
            self.run(layer, hidden)
        layer.linears.update({group: wrapped.linear for group, wrapped in observed.items()})
        return {group: wrapped.statistics for group, wrapped in observed.items()}

    @torch.inference_mode()
    def advance(self, layer: DecoderLayer) -> None:
        for index, hidden in enumerate(self._batches):
            self._batches[index] = self.run(layer, hidden)

    def run(self, layer: DecoderLayer, hidden: Tensor) -> Tensor:
        """A layer over whole samples, [samples, length, hidden] to the same shape."""
        samples = hidden.shape[0]
        cos, sin = self.rotations[self.config.layer_rope(layer.index)]
        rotation = cos.repeat(samples, 1), sin.repeat(samples, 1)
        return layer(hidden.flatten(0, 1), rotation, self._attend).unflatten(0, (samples, self.length))

    def _attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Causal attention within each sample."""
        fast = self.backend.products
        q, k, v = (t.to(fast).unflatten(0, (-1, self.length)).transpose(1, 2) for t in (queries, keys, values))
        window = self.config.windows[layer]
        mask = None if window is None else causal_mask(self.length, self.length, window, q.device)
        out = attention(q, k, v, mask, Scores(self.config.softmax_scale, window, self.config.attention_soft_cap))
        return out.transpose(1, 2).flatten(0, 1).to(queries.dtype)


def rows(table: Weight, tokens: Tensor) -> Tensor:
    """float32 [..., width]: the rows of an embedding, without a copy of all of it in floating point."""
    if isinstance(table, QuantizedTensor):
        return table.select_rows(tokens.flatten()).dequantize().unflatten(0, tokens.shape)
    return F.embedding(tokens, table).float()


class Observed(Linear):
    """A linear operation that keeps statistics of its inputs, and gives zeros where its output does not matter."""

    def __init__(self, linear: Linear, statistics: InputStatistics, add_gram: GramSum, output_matters: bool) -> None:
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.statistics = statistics
        self.add_gram = add_gram
        self.output_matters = output_matters

    def __call__(self, x: Tensor) -> Tensor:
        self.statistics.add(x, self.add_gram)
        return self.linear(x) if self.output_matters else x.new_zeros(x.shape[0], self.out_features)
