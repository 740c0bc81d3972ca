"""Thousands of requests of mixed lengths and samplings, some aborted, in random order through a cache that is too small
for them; each that ended and whose choices are repeatable must say what it says alone, nothing may be left
behind, and memory must not grow. Run by `make soak`; exit status 1 where one of these does not hold.

Settings of the engine to run it with: --engine '{"speculative_config": {"method": "ngram"}}'.
"""

import argparse
import gc
import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import psutil

from llmopt import quiet_barriers
from llmopt.engine.config import EngineConfig
from llmopt.engine.engine import Engine
from llmopt.engine.params import SamplingParams
from llmopt.engine.speculation.config import SpeculativeConfig

LONGEST = 384
CROWD = 24  # requests that are in the engine at once, about
CACHE_BLOCKS = 120  # of 16 tokens; CROWD requests want about twice as many
PREFIXES = 6
MOST_GROWTH = 64 << 20  # bytes of resident memory, from the first quarter of the run to its end


@dataclass
class Ask:
    """A request, when it is to be aborted (after so many of its tokens; None for never), and what it said."""

    name: str
    prompt: list[int]
    params: SamplingParams
    abort_after: int | None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    ended: bool = False

    @property
    def repeatable(self) -> bool:
        return self.params.greedy or self.params.seed is not None


def draw(dice: random.Random, number: int, prefixes: list[list[int]], vocabulary: int) -> Ask:
    prompt = [dice.randrange(3, vocabulary) for _ in range(dice.choice((1, 5, 17, 40, 120, 200)))]
    if dice.random() < 0.5:
        prompt = dice.choice(prefixes) + prompt
    kind: dict[str, Any] = dice.choice(
        (
            {"temperature": 0},
            {"temperature": 0, "repetition_penalty": 1.2},
            {"temperature": 0, "logprobs": 2},
            {"temperature": 0, "stop": (" the", "\n\n")},
            {"temperature": 0.8, "seed": number},
            {"temperature": 1.0, "top_p": 0.9, "seed": number},
            {"temperature": 1.0, "top_k": 20, "presence_penalty": 0.5},
        )
    )
    params = SamplingParams(max_tokens=dice.choice((1, 2, 8, 24, 64)), ignore_eos=dice.random() < 0.5, **kind)
    return Ask(str(number), prompt, params, dice.randrange(0, 10) if dice.random() < 0.1 else None)


def run(engine: Engine, asks: list[Ask], crowd: int, dice: random.Random) -> list[int]:
    """Run all of them, about `crowd` at once; the resident bytes after each tenth."""
    live: dict[str, Ask] = {}
    sizes, added = [], 0
    while added < len(asks) or live:
        while added < len(asks) and len(live) < crowd and (not live or dice.random() < 0.7):
            ask = asks[added]
            live[ask.name] = ask
            engine.add(ask.name, ask.prompt, ask.params)
            added += 1
            if len(asks) >= 10 and added % (len(asks) // 10) == 0:
                gc.collect()
                sizes.append(psutil.Process().memory_info().rss)
                print(f"{added:6} of {len(asks)} added, {engine.stats().preemptions} preemptions", file=sys.stderr)
        for delta in engine.step():
            ask = live[delta.request_id]
            ask.tokens += delta.token_ids
            ask.text += delta.text
            if delta.finish_reason is not None:
                ask.ended = True
                del live[ask.name]
        for ask in [ask for ask in live.values() if ask.abort_after is not None and len(ask.tokens) >= ask.abort_after]:
            engine.abort(ask.name)
            del live[ask.name]
        engine.check()
    return sizes


def says_the_same_alone(engine: Engine, ask: Ask) -> bool:
    again = Ask(ask.name, ask.prompt, ask.params, None)
    run(engine, [again], 1, random.Random(0))
    return (again.tokens, again.text) == (ask.tokens, ask.text)


def settings(text: str) -> dict[str, Any]:
    """Settings of EngineConfig from JSON."""
    given: dict[str, Any] = json.loads(text)
    if "speculative_config" in given:
        given["speculative_config"] = SpeculativeConfig.of(given["speculative_config"])
    return given


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--engine", type=settings, default={}, help="settings of EngineConfig, as JSON")
    arguments = parser.parse_args()
    seed = random.randrange(1 << 32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}")
    dice = random.Random(seed)
    roomy = EngineConfig(model=arguments.model, max_model_len=LONGEST, enable_prefix_caching=False)
    quiet = Engine(roomy)
    memory = CACHE_BLOCKS * quiet.runner.plan.block_bytes
    crowded = Engine(
        EngineConfig(
            model=arguments.model,
            max_model_len=LONGEST,
            max_num_seqs=CROWD,
            kv_cache_memory_bytes=memory,
            **arguments.engine,
        )
    )
    vocabulary = crowded.tokenizer.vocab_size
    prefixes = [[dice.randrange(3, vocabulary) for _ in range(dice.choice((16, 50, 100)))] for _ in range(PREFIXES)]
    asks = [draw(dice, number, prefixes, vocabulary) for number in range(arguments.requests)]
    start = time.monotonic()
    sizes = run(crowded, asks, CROWD, dice)
    seconds, stats = time.monotonic() - start, crowded.stats()
    compared = [ask for ask in asks if ask.ended and ask.repeatable]
    print(f"{sum(ask.ended for ask in asks)} of {len(asks)} ended, {stats.preemptions} preemptions, {seconds:.0f} s")
    wrong = [ask.name for ask in compared if not says_the_same_alone(quiet, ask)]
    growth = sizes[-1] - sizes[len(sizes) // 4]
    pool = crowded.pool
    checks = {
        f"all {len(compared)} repeatable ones say what they say alone (others: {wrong[:10] or 'none'})": not wrong,
        "some were preempted": stats.preemptions > 0,
        "the rest were aborted": all(ask.ended or ask.abort_after is not None for ask in asks),
        "no request is left": not crowded.has_work and stats.running == stats.waiting == 0,
        "free + used + cached = total, and none is used": pool.used == 0 and pool.free + pool.cached == pool.total,
        f"memory grew by {growth / 1e6:.1f} MB, at most {MOST_GROWTH / 1e6:.0f}": growth <= MOST_GROWTH,
    }
    for what, holds in checks.items():
        print(f"{'ok' if holds else 'NOT SO'}: {what}")
    sys.exit(not all(checks.values()))


if __name__ == "__main__":
    quiet_barriers()
    main()
