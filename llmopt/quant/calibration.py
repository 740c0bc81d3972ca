"""Calibration: the tokens, and what they look like at the input of every linear layer."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt.backend.base import Backend, Linear
from llmopt.backend.reference import causal_mask
from llmopt.engine.llm import LLM
from llmopt.engine.params import SamplingParams
from llmopt.errors import InputError
from llmopt.model import rope
from llmopt.model.builtin_text import calibration_text
from llmopt.model.config import ModelConfig
from llmopt.model.decoder import LINEAR_GROUPS, DecoderLayer
from llmopt.model.source import ModelSource, as_dense
from llmopt.progress import Progress
from llmopt.quant.methods.base import InputStatistics

SELF, BUILTIN = "self", "builtin"
SAMPLED_AT_ONCE = 64
TOKENS_AT_ONCE = 4096  # bounds the activations in memory; more gains no speed


def calibration_tokens(
    calibration: str, source: ModelSource, samples: int, seq_len: int, seed: int, device: str, progress: Progress
) -> Tensor:
    """int64 [samples, seq_len] tokens to calibrate on.

    `calibration` is a text file, `builtin` for prose that every Python carries, or `self` for text that the model
    samples from itself (Liu et al. 2023, "LLM-QAT", arXiv:2305.17888). Texts are cut into windows, of which `samples`
    are drawn without repetition. Raises InputError where the text is too short.
    """
    if calibration == SELF:
        return _sample_from_model(source, samples, seq_len, seed, device, progress)
    text = calibration_text() if calibration == BUILTIN else read_text(calibration)
    tokens = source.tokenizer.encode(text, add_special_tokens=False)
    windows = len(tokens) // seq_len
    if windows < samples:
        raise InputError(
            f"the calibration text has {len(tokens)} tokens, too few for {samples} samples of {seq_len}; give a longer "
            f"text, or --samples of at most {windows}"
        )
    chosen = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    return torch.tensor(tokens[: windows * seq_len]).reshape(windows, seq_len)[chosen]


def read_text(path: str) -> str:
    """The content of a text file. Raises InputError where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; give a text file, {SELF!r} or {BUILTIN!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from None


def _sample_from_model(
    source: ModelSource, samples: int, seq_len: int, seed: int, device: str, progress: Progress
) -> Tensor:
    ends = sorted(source.tokenizer.eos_ids)
    opening = [source.tokenizer.bos_id if source.tokenizer.bos_id is not None else ends[0] if ends else 0]
    length = seq_len - len(opening)
    llm = LLM(
        str(source.path),
        max_num_seqs=min(samples, SAMPLED_AT_ONCE),
        max_model_len=seq_len,
        seed=seed,
        device=device,
        dtype="float32",
    )
    params = [SamplingParams(max_tokens=length, ignore_eos=True, seed=seed + i) for i in range(samples)]

    def report(step: int) -> None:
        progress("sampling calibration text", step, length * -(-samples // SAMPLED_AT_ONCE))

    outputs = llm.generate([opening] * samples, params, on_step=report)
    return torch.tensor([opening + output.outputs[0].token_ids for output in outputs])


class CalibrationSweep:
    """Carries all calibration samples through the model, one decoder layer at a time.

    `observe` looks at what a layer is given, `advance` replaces it by what the layer makes of it. Advancing through
    the quantized layer lets later layers see, and make up for, the errors of the earlier ones.
    """

    def __init__(self, source: ModelSource, tokens: Tensor, backend: Backend) -> None:
        self.config: ModelConfig = source.config
        self.length = tokens.shape[1]
        frequencies = rope.frequencies(self.config.rope, self.config.head_dim)
        positions = torch.arange(self.length)
        self.cos, self.sin = (t.to(backend.device) for t in rope.angles(positions, frequencies))
        embedding = backend.embedding(as_dense(source.embedding))
        per_batch = max(1, TOKENS_AT_ONCE // self.length)
        self.batches = [F.embedding(part.to(backend.device), embedding) for part in tokens.split(per_batch)]

    @torch.inference_mode()
    def observe(self, layer: DecoderLayer) -> dict[str, InputStatistics]:
        """What each group of linear layers is given, over all samples."""
        observed = {group: Observed(getattr(layer, group)) for group in LINEAR_GROUPS}
        for group, linear in observed.items():
            setattr(layer, group, linear)
        for hidden in self.batches:
            self._run(layer, hidden)
        for group, linear in observed.items():
            setattr(layer, group, linear.linear)
        return {group: linear.statistics for group, linear in observed.items()}

    @torch.inference_mode()
    def advance(self, layer: DecoderLayer) -> None:
        self.batches = [self._run(layer, hidden) for hidden in self.batches]

    def _run(self, layer: DecoderLayer, hidden: Tensor) -> Tensor:
        samples = hidden.shape[0]
        rotation = self.cos.repeat(samples, 1), self.sin.repeat(samples, 1)
        return layer(hidden.flatten(0, 1), rotation, self._attend).unflatten(0, (samples, self.length))

    def _attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Causal attention within each sample."""
        q, k, v = (t.unflatten(0, (-1, self.length)).transpose(1, 2) for t in (queries, keys, values))
        window = self.config.windows[layer]
        mask = None if window is None else causal_mask(self.length, self.length, window, q.device)
        scale = self.config.head_dim**-0.5
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)


class Observed(Linear):
    """A linear operation that keeps statistics of its inputs."""

    def __init__(self, linear: Linear) -> None:
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.statistics = InputStatistics(linear.in_features)

    def __call__(self, x: Tensor) -> Tensor:
        self.statistics.add(x)
        return self.linear(x)
