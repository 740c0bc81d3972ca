"""Logits of given tokens, by the same runner that serves them: what quality is measured on."""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from llmopt.engine.batch import build_batch
from llmopt.engine.config import EngineConfig
from llmopt.engine.params import SamplingParams
from llmopt.engine.request import Request
from llmopt.engine.runner import Runner
from llmopt.engine.scheduler import Chunk
from llmopt.errors import InputError
from llmopt.model.source import ModelSource, open_source

CHUNK = 512  # tokens whose logits are in memory at once


class Scorer:
    """Computes what a model thinks of every token of a text, one text at a time."""

    def __init__(self, config: EngineConfig, source: ModelSource | None = None) -> None:
        """`source` is the model where it is open already; else `config.model` is opened."""
        self.config = replace(config, max_num_seqs=1)
        self.source = open_source(config.model) if source is None else source
        self.tokenizer = self.source.tokenizer
        self.runner = Runner(self.source, self.config)

    def logits(self, tokens: list[int]) -> Iterator[Tensor]:
        """Blocks of float32 logits [up to CHUNK, vocabulary] that together cover every position of `tokens`.

        Row i predicts token i + 1. Raises InputError where the tokens are more than the model takes.
        """
        longest = self.runner.plan.max_model_len
        if len(tokens) > longest:
            raise InputError(f"{len(tokens)} tokens are more than the {longest} that the model takes at once")
        request = Request("score", tokens, SamplingParams(), seed=0)
        request.blocks = list(range(self.runner.plan.blocks))
        for start in range(0, len(tokens), CHUNK):
            chunk = Chunk(request, start, min(CHUNK, len(tokens) - start))
            batch = build_batch([chunk], self.config.block_size)
            yield self.runner.logits(self.runner.hidden(batch))
