"""Measures what speculation gains: SmolLM2 in bfloat16, one stream, with drafts and without in turns, in one process.

    make bench-speculation ARGS="--rounds 5 --case draft-q4_0"

writes build/bench-speculation.json. The cases:

- draft-q4_0, draft-q4_1: plain prose, greedy, with the model's own 4-bit artifact as the draft. The built-in model's
  weights lie on the grid of q4_1 already, so that this draft differs from it by the rounding of activations and of the
  head alone; q4_0 loses as much as 4 bits usually do;
- ngram-edit: the prompt holds a text twice and begins it a third time with a word replaced; greedy, with n-grams;
- draft-drawn: the same prose with temperature 0.7 and top-p 0.9;
- ngram-noise, draft-noise: tokens drawn at the highest temperature, which nothing predicts.

A ratio is the median of its rounds; each round is a run with drafts next to one without, of the same requests, and
both must give the same tokens.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from bench_artifacts import WORK, bfloat16_folder, our_artifact

from llmopt import quiet_barriers
from llmopt.engine.llm import LLM
from llmopt.engine.params import SamplingParams
from llmopt.errors import LlmoptError

OUTPUT = WORK.parent / "bench-speculation.json"
TEXT = (
    "Mrs Hall went down to the harbour early, before the boats came in. The water was grey and quite still, and the "
    "gulls stood along the wall as if they had been told to wait. She bought two loaves and a pound of butter, asked "
    "after the baker's wife, and walked home by the long road past the mill. At the gate she met the postman, who had "
    "a letter for Mr Brown and none for her. She put the bread on the table, opened the window, and began to write to "
    "her sister about the garden, the new roof, and the price of coal. It rained in the afternoon, and the road to "
    "the station was closed until the men had cleared it."
)
PROSE = (
    "The history of the lighthouse begins with",
    "To bake a good loaf of bread, you first need to",
    "The main difference between a river and a canal is that",
)


class Case(NamedTuple):
    """Requests, and whose drafts they are measured with."""

    speculation: dict[str, Any]
    prompts: Sequence[str]
    params: SamplingParams


def cases(tokens: int) -> dict[str, Case]:
    ngram = {"method": "ngram"}
    coarse, fine = (
        {"method": "draft_model", "model": str(our_artifact(name))} for name in ("llmopt-q4_0", "llmopt-q4_1")
    )
    edit = f"{TEXT}\n\n{TEXT}\n\n{TEXT.replace('Mrs Hall', 'Miss Grey')[:120]}"
    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    drawn = SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=tokens, ignore_eos=True)
    noise = SamplingParams(temperature=2, seed=1, max_tokens=tokens, ignore_eos=True)
    return {
        "draft-q4_0": Case(coarse, PROSE, greedy),
        "draft-q4_1": Case(fine, PROSE, greedy),
        "draft-drawn": Case(coarse, PROSE, drawn),
        "ngram-edit": Case(ngram, [edit], greedy),
        "ngram-noise": Case(ngram, PROSE[:2], noise),
        "draft-noise": Case(coarse, PROSE[:2], noise),
    }


def run(llm: LLM, case: Case) -> tuple[float, list[list[int]]]:
    """Output tokens a second after the first, one request after the other, and the tokens."""
    seconds, tokens = 0.0, []
    for prompt in case.prompts:
        starts: list[float] = []
        result = llm.generate(prompt, case.params, on_step=lambda _: starts.append(time.perf_counter()))  # noqa: B023
        seconds += starts[-1] - starts[0]
        tokens.append(result[0].outputs[0].token_ids)
    return sum(len(each) - 1 for each in tokens) / seconds, tokens


def measure(name: str, case: Case, plain: LLM, model: str, rounds: int) -> dict[str, Any]:
    """A case with drafts and without, in turns, after a warm-up. Raises LlmoptError where the tokens differ."""
    drafting = LLM(model, max_num_seqs=1, max_model_len=1024, speculative_config=case.speculation)
    run(plain, case._replace(prompts=case.prompts[:1]))
    run(drafting, case._replace(prompts=case.prompts[:1]))
    speeds: list[tuple[float, float]] = []
    for turn in range(rounds):
        order = (plain, drafting) if turn % 2 == 0 else (drafting, plain)
        found = {id(llm): run(llm, case) for llm in order}
        (slow, expected), (fast, tokens) = found[id(plain)], found[id(drafting)]
        if tokens != expected:
            raise LlmoptError(f"{name}: the tokens with drafts are not those without")
        speeds.append((slow, fast))
    stats = drafting.engine.stats().speculation
    assert stats is not None
    row = {
        "case": name,
        "tokens_per_s": {"plain": median(slow for slow, _ in speeds), "drafted": median(fast for _, fast in speeds)},
        "ratio": median(fast / slow for slow, fast in speeds),
        "ratios": [fast / slow for slow, fast in speeds],
        "drafted": stats.draft_tokens,
        "accepted": stats.accepted_tokens,
        "accepted_by_position": stats.accepted_by_position,
    }
    print(
        f"{name}: {row['ratio']:.2f} times, from {row['ratios']}, {row['tokens_per_s']}, {stats}",
        file=sys.stderr,
        flush=True,
    )
    return row


def main() -> None:
    quiet_barriers()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96, help="of output for each request")
    parser.add_argument("--case", action="append", help="one of them; may be repeated; all by default")
    options = parser.parse_args()
    model = str(bfloat16_folder())
    known = cases(options.tokens)
    plain = LLM(model, max_num_seqs=1, max_model_len=1024)
    rows = [measure(name, known[name], plain, model, options.rounds) for name in options.case or known]
    OUTPUT.write_text(json.dumps({"version": 1, "rows": rows}, indent=2), "utf-8")


if __name__ == "__main__":
    main()
