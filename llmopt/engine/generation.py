"""What one request has generated, and the rule by which it ends."""

from collections.abc import Sequence

from llmopt.engine.detokenizer import Detokenizer
from llmopt.engine.outputs import Delta, FinishReason, TokenLogprobs
from llmopt.engine.request import Request
from llmopt.model.tokenizer import Tokenizer


class Generation:
    """Takes a request's sampled tokens and gives out deltas, the last of them with a finish reason."""

    def __init__(self, request: Request, tokenizer: Tokenizer, max_model_len: int) -> None:
        self.request = request
        params = request.params
        room = max_model_len - request.prompt_length
        self.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        self.end_ids: frozenset[int] = frozenset() if params.ignore_eos else tokenizer.eos_ids
        self.detokenizer = Detokenizer(tokenizer, params)

    @property
    def left(self) -> int:
        """How many tokens may still come."""
        return self.max_tokens - self.request.output_length

    def advance(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> Delta:
        """Append the tokens of a step, up to the one that ends the text; those behind it are dropped."""
        request, before = self.request, self.request.output_length
        text = ""
        reason: FinishReason | None = None
        stop_reason: str | int | None = None
        for token_id in token_ids:
            added, reason, stop_reason = self._append(token_id)
            text += added
            if reason is not None:
                break
        count = request.output_length - before
        reports = [report for report in logprobs[:count] if report is not None]
        return Delta(
            request_id=request.id,
            text=text,
            token_ids=list(token_ids[:count]),
            logprobs=reports if request.params.logprobs is not None else None,
            finish_reason=reason,
            stop_reason=stop_reason,
            prompt_tokens=request.prompt_length,
            output_tokens=request.output_length,
            prompt_logprobs=request.prompt_logprobs if before == 0 else None,
            cached_tokens=request.cached_tokens,
        )

    def _append(self, token_id: int) -> tuple[str, FinishReason | None, str | int | None]:
        """Append a token: the text that is certain by it, and the finish and stop reason that it brings."""
        request = self.request
        request.tokens.append(token_id)
        stop_reason: str | int | None
        reason, stop_reason = self._end_by_token(token_id)
        if reason == "stop" and not request.params.include_stop_str_in_output:
            text = ""  # the token that ends a text is not part of it
        else:
            text = self.detokenizer.add(token_id, request.output_length > request.params.min_tokens)
        if self.detokenizer.stopped_by is not None:
            return text, "stop", self.detokenizer.stopped_by
        if reason is not None:
            text += self.detokenizer.finish()
        return text, reason, stop_reason

    def _end_by_token(self, token_id: int) -> tuple[FinishReason | None, int | None]:
        """The finish reason that a token brings, and the token itself where it was a stop token of the request."""
        params, length = self.request.params, self.request.output_length
        if length >= params.min_tokens:
            if token_id in params.stop_token_ids:
                return "stop", token_id
            if token_id in self.end_ids:
                return "stop", None
        return ("length", None) if length >= self.max_tokens else (None, None)
