"""How much of long prompts a step takes in while streams decode in it.

On a CPU a step takes as long as it has work to do, so the gap that a reader sees grows with every token of a prompt
that shares the step, and a bound on the one is a bound on the other. Work is counted in tokens at the beginning of a
prompt: one further down costs more, because it attends to all before it.
"""

import math
from dataclasses import dataclass

from llmopt.model.config import ModelConfig

LONG = 512
"""The longest prompt that is not held back. It makes a single step longer, and would itself have to wait for many."""
LEAST = 32
"""Tokens that a step takes in however few streams there are: with fewer, the products of matrices are inefficient."""
PER_STREAM = 2.0
"""Tokens for each stream. A stream's token costs about as much as two of a prompt's, whose logits nobody needs; so this
makes a step about twice as long, and leaves the rest of a factor of three to chance."""
ATTENTION_SPEED = 0.25
"""Of attention against products of matrices, in operations per second, on CPUs and in chunks of this size, each of
which reads all keys and values before it again."""


@dataclass(frozen=True)
class PrefillPace:
    """A limit on the prompts of a step.

    Attributes:
        least, per_stream: of this work, per_stream for each stream but no less than `least`.
        depth: the tokens before it that make one cost twice as much as the first; infinite where only their number
            counts.
        longer_than: only requests of more tokens are held back; the others are taken in as the budget allows.
    """

    least: int
    per_stream: float = 0.0
    depth: float = math.inf
    longer_than: int = 0

    def holds_back(self, tokens: int) -> bool:
        """Whether a request of so many tokens is held back."""
        return tokens > self.longer_than

    def work(self, streams: int) -> float:
        """What a step beside so many streams may spend."""
        return max(self.least, self.per_stream * streams)

    def cost(self, start: int) -> float:
        """The work of a token at position `start`."""
        return 1 + start / self.depth


def pace_of(chunked_prefill_size: int | None, device: str, model: ModelConfig) -> PrefillPace | None:
    """The pace for this setting of `EngineConfig` on a type of device; None for no limit."""
    if chunked_prefill_size is not None:
        return PrefillPace(chunked_prefill_size) if chunked_prefill_size else None
    if device != "cpu":
        return None
    width = model.num_heads * model.head_dim
    projections = 2 * width + 2 * model.num_kv_heads * model.head_dim
    products = model.hidden_size * (projections + 3 * model.intermediate_size)  # of a token in a layer
    return PrefillPace(LEAST, PER_STREAM, ATTENTION_SPEED * products / (2 * width), LONG)
