"""How one request wants its tokens chosen."""

from dataclasses import dataclass, fields

from llmopt.errors import InputError

MAX_LOGPROBS = 20
LEAST_TEMPERATURE = 1e-5  # as in vLLM


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The sampling parameters of a request, with vLLM's names and meanings.

    Penalties are applied to the logits first (repetition: Keskar et al. 2019, arXiv:1909.05858; presence and frequency
    as in OpenAI's API), then temperature, then top-k, top-p (Holtzman et al. 2019, arXiv:1904.09751) and min-p
    (Nguyen et al. 2024, arXiv:2407.01082). A temperature of 0 is greedy, and so
    is one so near to it that dividing by it overflows.

    Attributes:
        n: completions for each prompt.
        max_tokens: tokens to generate at most; None up to what the model's length leaves.
        stop: strings that end the text; they are not part of it unless `include_stop_str_in_output`.
        stop_token_ids: tokens that end the text besides the model's own end tokens.
        ignore_eos: go on after the model's end tokens.
        min_tokens: tokens before which no end token may be chosen.
        seed: makes this request's choices repeatable; None draws a fresh one.
        logprobs: how many of the likeliest tokens to report at each step beside the chosen one; None for no report.
        skip_special_tokens: leave special tokens out of the text.

    Raises InputError for a value outside its range, naming the range.
    """

    n: int = 1
    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        if self.top_k == -1:  # vLLM's other spelling of "all"
            object.__setattr__(self, "top_k", 0)
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # also refuses NaN
                raise InputError(f"{name} must be between {low} and {high}, not {value}")
        if self.top_p == 0.0:
            raise InputError("top_p must be above 0; for greedy decoding give temperature 0")
        if self.repetition_penalty == 0.0:
            raise InputError("repetition_penalty must be above 0; 1 means none")
        if "" in self.stop:
            raise InputError("a stop string must not be empty")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InputError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})")

    @property
    def greedy(self) -> bool:
        return self.temperature < LEAST_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


_RANGES = (
    ("n", 1, 128),
    ("max_tokens", 1, 2**31),
    ("temperature", 0, 100),
    ("top_p", 0, 1),
    ("top_k", 0, 2**31),
    ("min_p", 0, 1),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("repetition_penalty", 0, 100),
    ("seed", -(2**63), 2**64 - 1),
    ("min_tokens", 0, 2**31),
    ("logprobs", 0, MAX_LOGPROBS),
)

PARAMETER_NAMES = frozenset(field.name for field in fields(SamplingParams))
