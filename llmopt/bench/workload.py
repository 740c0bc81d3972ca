"""What a server is asked for and when: the settings of one load, checked against each other."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmopt.bench.arrivals import arrival_times
from llmopt.bench.datasets import DATASET_NAMES, Prompt, custom_prompts, random_prompts
from llmopt.errors import InputError

INPUT_LEN = 512  # of random prompts, where nothing is said
WARM_UP_WORDS = 16  # of the random warm-ups before custom prompts, which a server for short ones takes too


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The settings of one load; each is a flag of `llmopt bench` with dashes for underscores.

    Attributes:
        dataset_name: random or custom.
        dataset_path: the JSONL file of custom.
        tokenizer: MODEL whose vocabulary random token ids are drawn from; None for random words.
        input_len: tokens, or words, of a random prompt.
        output_len: tokens to ask for.
        random_range_ratio, random_prefix_len: how random lengths vary, and what comes before each random prompt; see
            `random_prompts`.
        num_prompts: requests in all.
        request_rate: requests per second; infinite for all at once.
        burstiness: shape of the gaps' gamma distribution; None for 1, a Poisson process.
        max_concurrency: requests in flight at most. With an infinite rate this is a closed loop.
        num_warmups: requests before the clock starts.
        num_gpus: of the server, for throughput per GPU.
    """

    dataset_name: str = "random"
    dataset_path: Path | None = None
    tokenizer: str | None = None
    input_len: int | None = None
    output_len: int = 128
    random_range_ratio: float = 0.0
    random_prefix_len: int = 0
    num_prompts: int = 100
    request_rate: float = math.inf
    burstiness: float | None = None
    max_concurrency: int | None = None
    num_warmups: int = 1
    num_gpus: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "num_prompts", "max_concurrency", "num_warmups"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.num_gpus < 0 or self.seed < 0:
            raise InputError("--num-gpus and --seed must not be negative")
        if not 0 <= self.random_range_ratio < 1 or self.random_prefix_len < 0:
            raise InputError("--random-range-ratio must be from 0 to below 1, and --random-prefix-len not negative")
        if self.dataset_name not in DATASET_NAMES:
            raise InputError(f"unknown --dataset-name {self.dataset_name!r}; known: {', '.join(DATASET_NAMES)}")
        if self.dataset_name == "custom":
            if self.dataset_path is None:
                raise InputError("--dataset-name custom needs --dataset-path FILE.jsonl")
            if self.input_len is not None or self.tokenizer is not None:
                raise InputError(
                    "--input-len and --tokenizer are for --dataset-name random; custom prompts are sent as is"
                )
            if self.random_range_ratio or self.random_prefix_len:
                raise InputError("--random-range-ratio and --random-prefix-len are for --dataset-name random")
        elif self.dataset_path is not None:
            raise InputError("--dataset-path needs --dataset-name custom")
        if self.burstiness is not None and math.isinf(self.request_rate):
            raise InputError("--burstiness shapes the gaps of a finite --request-rate; give one")

    def prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        """The warm-ups and the prompts to measure; no prompt is in both, so that none is measured out of a cache."""
        if self.dataset_path is not None:
            warmups = random_prompts(self.num_warmups, WARM_UP_WORDS, self.output_len, self.seed, None)
            return warmups, custom_prompts(self.num_prompts, self.dataset_path, self.output_len)
        count = self.num_warmups + self.num_prompts
        lengths = self.input_len or INPUT_LEN, self.output_len
        shape = self.random_range_ratio, self.random_prefix_len
        drawn = random_prompts(count, *lengths, self.seed, self.tokenizer, *shape)
        return drawn[: self.num_warmups], drawn[self.num_warmups :]

    def arrivals(self) -> np.ndarray:
        """Seconds after the start at which each request is due, float64 [num_prompts]."""
        burstiness = 1.0 if self.burstiness is None else self.burstiness
        return arrival_times(self.num_prompts, self.request_rate, burstiness, self.seed)

    def describe(self) -> dict[str, Any]:
        """What the report says about the load; null for an infinite rate."""
        finite = math.isfinite(self.request_rate)
        random = self.dataset_name == "random"
        return {
            "dataset_name": self.dataset_name,
            "dataset_path": None if self.dataset_path is None else str(self.dataset_path),
            "prompts_are": "token ids" if self.tokenizer is not None else "text",
            "input_len": (self.input_len or INPUT_LEN) if random else None,
            "output_len": self.output_len,
            "random_range_ratio": self.random_range_ratio if random else None,
            "random_prefix_len": self.random_prefix_len if random else None,
            "request_rate": self.request_rate if finite else None,
            "burstiness": (self.burstiness or 1.0) if finite else None,
            "max_concurrency": self.max_concurrency,
            "num_warmups": self.num_warmups,
            "seed": self.seed,
        }
