"""Log-probabilities of the tokens of prompts, reported as steps compute them."""

from typing import NamedTuple

import torch
from torch import Tensor

from llmopt.engine.logprobs import report
from llmopt.engine.request import Request
from llmopt.engine.runner import Runner
from llmopt.engine.scheduler import Chunk

LOGITS_AT_ONCE = 1 << 22
"""The most logits in memory at once, however long prompts are: 16 MiB of them, and as much of log-probabilities."""


class DueToken(NamedTuple):
    """A token of a prompt that a step predicts: in which row of its hidden states, and for which request."""

    row: int
    token: int
    request: Request


def due_tokens(chunks: list[Chunk]) -> list[DueToken]:
    """The tokens of a step's chunks that are to be reported and have not been: a preempted prompt is computed again."""
    due = []
    first_row = 0
    for chunk in chunks:
        request = chunk.request
        if request.prompt_logprobs is not None:
            # The token at a position is predicted by the row of the position before.
            start = max(chunk.start + 1, len(request.prompt_logprobs))
            end = min(chunk.start + chunk.count + 1, request.prompt_length)
            for position in range(start, end):
                row = first_row + position - 1 - chunk.start
                due.append(DueToken(row, request.tokens[position], request))
        first_row += chunk.count
    return due


@torch.inference_mode()
def report_prompts(due: list[DueToken], hidden: Tensor, runner: Runner) -> None:
    """Add reports on due tokens to their requests, from a step's hidden states [T, hidden]."""
    at_once = max(1, LOGITS_AT_ONCE // runner.config.vocab_size)
    for start in range(0, len(due), at_once):
        rows, tokens, requests = zip(*due[start : start + at_once], strict=True)
        logprobs = runner.logits(hidden[list(rows)]).log_softmax(-1)
        alternatives = [request.params.prompt_logprobs for request in requests]
        reports = report(logprobs, torch.tensor(tokens, device=hidden.device), alternatives)
        for request, found in zip(requests, reports, strict=True):
            request.prompt_logprobs.append(found)
