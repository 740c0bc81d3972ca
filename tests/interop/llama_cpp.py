"""Runs llama-perplexity and reads the file of probabilities that it writes."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from environments import llama_tool


@dataclass(frozen=True)
class Perplexity:
    """What llama-perplexity says of a text, for the second half of each chunk.

    Attributes:
        value: exp of the mean negative log-likelihood, as it prints it.
        tokens: int32 [chunks, ctx], its own tokenization of the text. Where the model opens texts with a token of its
            own, the computation had that in place of each chunk's first.
        logprobs: float32 [chunks, ctx - 1 - ctx // 2, vocabulary]; row i is what follows position ctx // 2 + i.
    """

    value: float
    tokens: np.ndarray
    logprobs: np.ndarray


def run_perplexity(model: Path, text: Path, ctx: int, chunks: int, scratch: Path) -> Perplexity:
    """Raises subprocess.CalledProcessError where llama.cpp fails, for example because it cannot load the model."""
    command = [llama_tool("perplexity"), "-m", model, "-f", text, "-c", ctx, "-b", ctx, "--chunks", chunks, "-t", 2]
    done = subprocess.run(
        [*map(str, command), "--kl-divergence-base", str(scratch)], check=True, capture_output=True, text=True
    )
    value = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
    if value is None:
        raise subprocess.CalledProcessError(0, "llama-perplexity", done.stdout, done.stderr)
    return Perplexity(float(value[1]), *_read_logprobs(scratch))


def _read_logprobs(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A file of --kl-divergence-base: a header, the tokens, then rows of 16-bit steps between two ends of each row."""
    with path.open("rb") as file:
        if file.read(8) != b"_logits_":
            raise ValueError(f"{path} is no file of llama-perplexity's probabilities")
        ctx, vocabulary, chunks = np.fromfile(file, np.int32, 3).tolist()
        tokens = np.fromfile(file, np.int32, chunks * ctx).reshape(chunks, ctx)
        rows = np.fromfile(file, np.uint16).reshape(chunks, ctx - 1 - ctx // 2, -1)
    step, least = np.moveaxis(rows[..., :4].copy().view(np.float32), -1, 0)
    codes = rows[..., 4 : 4 + vocabulary].astype(np.float32)
    return tokens, codes * step[..., None] + least[..., None]
