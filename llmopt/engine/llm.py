"""The engine from Python: `LLM("smollm2").generate(["Once upon a time"])`."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from llmopt.engine.config import EngineConfig
from llmopt.engine.engine import Engine
from llmopt.engine.outputs import CompletionOutput, Delta, RequestOutput
from llmopt.engine.params import SamplingParams
from llmopt.engine.speculation.config import SpeculativeConfig
from llmopt.errors import InputError

Prompt = str | list[int]


class LLM:
    """A model in this process. Options are the fields of `EngineConfig`, which are the flags of `llmopt serve`;
    `speculative_config` may be a dict of its keys.

    One default differs: chunked_prefill_size is 0, because all prompts are there from the beginning and nobody watches
    a stream.

    Example:
        >>> llm = LLM("smollm2", max_num_seqs=8)
        >>> llm.generate(["The capital of France is"], SamplingParams(temperature=0))[0].outputs[0].text
    """

    def __init__(self, model: str, **options: Any) -> None:
        speculation = options.get("speculative_config")
        if isinstance(speculation, Mapping):
            options["speculative_config"] = SpeculativeConfig.of(speculation)
        self.engine = Engine(EngineConfig(model=model, **{"chunked_prefill_size": 0} | options))
        self._requests = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_step: Callable[[int], None] | None = None,
        priority: Sequence[int] | None = None,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, given as text or as tokens; the results come in the order of the prompts.

        `params` are for all prompts or one for each; `on_step` is told the number of steps so far; `priority` is one
        for each and `cache_salt` for all, see `Engine.add`.
        Raises InputError for a prompt that the model cannot take; then nothing has been generated.
        """
        one = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        several = cast("list[Prompt]", [prompts] if one else list(prompts))
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(several)
        if len(each) != len(several):
            raise InputError(
                f"there are {len(several)} prompts and {len(each)} params; give one for each, or one for all"
            )
        priorities = [0] * len(several) if priority is None else list(priority)
        if len(priorities) != len(several):
            raise InputError(f"there are {len(several)} prompts and {len(priorities)} priorities; give one for each")
        tokenizer = self.engine.tokenizer
        results = []
        for prompt in several:
            text, tokens = (prompt, tokenizer.encode(prompt)) if isinstance(prompt, str) else (None, prompt)
            self.engine.check_prompt(tokens)
            self._requests += 1
            results.append(RequestOutput(str(self._requests), text, tokens, []))
        self._run(zip(results, each, priorities, strict=True), cache_salt, on_step)
        return results

    def chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, **variables: Any
    ) -> RequestOutput:
        """The model's answer to a conversation of {"role", "content"} messages."""
        return self.generate(self.engine.tokenizer.encode_chat(messages, **variables), params)[0]

    def _run(
        self,
        work: Iterable[tuple[RequestOutput, SamplingParams, int]],
        cache_salt: str | None,
        on_step: Callable[[int], None] | None,
    ) -> None:
        completions: dict[str, tuple[RequestOutput, CompletionOutput]] = {}
        steps = 0
        try:
            for result, params, priority in work:
                self._add(result, params, priority, cache_salt, completions)
            while self.engine.has_work:
                time.sleep(self.engine.pause)
                steps += 1
                for delta in self.engine.step():
                    _extend(*completions[delta.request_id], delta)
                if on_step is not None:
                    on_step(steps)
        finally:
            for request_id in completions:  # after Ctrl-C or an error nothing may be left behind
                self.engine.abort(request_id)

    def _add(
        self,
        result: RequestOutput,
        params: SamplingParams,
        priority: int,
        cache_salt: str | None,
        completions: dict[str, tuple[RequestOutput, CompletionOutput]],
    ) -> None:
        """One engine request for each of the `n` completions of a prompt; the first tells of the prompt."""
        for index in range(params.n):
            completion = CompletionOutput(index, logprobs=None if params.logprobs is None else [])
            request_id = f"{result.request_id}-{index}"
            completions[request_id] = result, completion
            result.outputs.append(completion)
            choice = params.of_choice(index)
            if index > 0:
                choice = replace(choice, prompt_logprobs=None)
            self.engine.add(request_id, result.prompt_token_ids, choice, priority, cache_salt)


def _extend(result: RequestOutput, completion: CompletionOutput, delta: Delta) -> None:
    if delta.prompt_logprobs is not None:
        result.prompt_logprobs = delta.prompt_logprobs
    if completion.index == 0:
        result.num_cached_tokens = delta.cached_tokens
    completion.text += delta.text
    completion.token_ids += delta.token_ids
    completion.finish_reason = delta.finish_reason
    completion.stop_reason = delta.stop_reason
    if completion.logprobs is not None and delta.logprobs is not None:
        completion.logprobs += delta.logprobs
