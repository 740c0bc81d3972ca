"""Log-probabilities of tokens, as they are reported."""

from collections.abc import Sequence

from torch import Tensor

from llmopt.engine.outputs import TokenLogprobs


def report(logprobs: Tensor, tokens: Tensor, alternatives: Sequence[int]) -> list[TokenLogprobs]:
    """One report for each row of log-probabilities, float32 [R, vocabulary], on the row's token, int64 [R].

    `alternatives` [R] is how many of the likeliest tokens each row reports beside it. A token has the same float
    wherever it stands in a report.
    """
    own = logprobs.gather(1, tokens[:, None])
    ranks = (logprobs >= own).sum(-1).tolist()
    values, ids = logprobs.topk(min(max(alternatives), logprobs.shape[1]), dim=-1)
    rows = zip(tokens.tolist(), own[:, 0].tolist(), ranks, ids.tolist(), values.tolist(), alternatives, strict=True)
    return [
        TokenLogprobs(token, logprob, rank, list(zip(top_ids, top_values, strict=True))[:count])
        for token, logprob, rank, top_ids, top_values, count in rows
    ]
