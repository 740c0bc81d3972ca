"""`make demo`: quantizes SmolLM2 four ways, measures each against the original, and prints one table.

Everything in the table was measured a moment before. Each row is what the commands printed above it give.
"""

import time
from pathlib import Path
from typing import Any

from rich.table import Table

from llmopt import quiet_barriers
from llmopt.cli import console

MODEL = "smollm2"
OUTPUT = Path("out")
CALIBRATION = {"calibration": "builtin", "samples": 8, "seq_len": 512}
ARTIFACTS: dict[str, dict[str, Any]] = {
    "GPTQ 4-bit": {"output": "demo-gptq", "method": "gptq", "scheme": "w4a16", "group_size": 64, **CALIBRATION},
    "AWQ 4-bit": {"output": "demo-awq", "method": "awq", "scheme": "w4a16-asym", "group_size": 64, **CALIBRATION},
    "INT8": {"output": "demo-int8", "method": "rtn", "scheme": "w8a8", "format": "compressed-tensors"},
    "GGUF Q8_0": {"output": "demo-q8_0.gguf", "method": "rtn", "scheme": "q8_0"},
}
WINDOWS, CTX = 4, 512
PROMPT, OUTPUT_TOKENS = 128, 32


def main() -> None:
    quiet_barriers()
    started = time.monotonic()
    rows = [_measure(MODEL, "original, Q4_1", None)]
    for label, options in ARTIFACTS.items():
        rows.append(_measure(_quantize(options), label, MODEL))
    _show(rows)
    console.output(None).print(
        f"\nmeasured in {time.monotonic() - started:.0f} s; serve one with:\n"
        f"  .venv/bin/llmopt serve {OUTPUT / 'demo-gptq'}",
        highlight=False,
    )


def _quantize(options: dict[str, Any]) -> str:
    from llmopt.quant.pipeline import quantize

    output = str(OUTPUT / options["output"])
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in (options | {"output": output}).items())
    console.errors.print(f"llmopt quantize {MODEL} {flags} --overwrite", highlight=False)
    with console.progress_bar() as progress:
        quantize(MODEL, **options | {"output": output}, overwrite=True, progress=progress)
    return output


def _measure(model: str, label: str, reference: str | None) -> dict[str, Any]:
    """Quality and speed of one model, by the functions behind `llmopt eval` and `llmopt bench`."""
    from llmopt.bench.in_process import bench_model, grid
    from llmopt.evaluate.evaluate import evaluate

    against = "" if reference is None else f" --reference {reference}"
    console.errors.print(f"llmopt eval {model}{against} --windows {WINDOWS} --ctx {CTX}", highlight=False)
    with console.progress_bar() as progress:
        quality = evaluate(model, reference=reference, windows=WINDOWS, ctx=CTX, progress=progress)
    console.errors.print(f"llmopt bench {model} -p {PROMPT} -n {OUTPUT_TOKENS}", highlight=False)
    with console.progress_bar() as progress:
        speed = bench_model(model, grid([PROMPT], [OUTPUT_TOKENS], [1]), repeats=3, seed=0, progress=progress)
    return {"label": label, "quality": quality, "bytes": speed["weight_bytes"], "runs": speed["runs"]}


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table("SmolLM2-135M", title=f"{WINDOWS} × {CTX} tokens of text; {PROMPT} tokens in, {OUTPUT_TOKENS} out")
    for heading in ("MB", "perplexity", "mean KL", "top-1", "tokens/s", "TTFT, ms"):
        table.add_column(heading, justify="right")
    for row in rows:
        divergence = row["quality"]["divergence"]
        prefill, decode = row["runs"]
        table.add_row(
            row["label"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['quality']['perplexity']['value']:.2f}",
            "" if divergence is None else f"{divergence['mean_kl']:.4f}",
            "" if divergence is None else f"{divergence['top1']:.1%}",
            f"{decode['tokens_per_s']['median']:.1f}",
            f"{prefill['ttft_ms']['median']:.0f}",
        )
    console.output(None).print(
        table,
        "Embedding and head are kept in 16 bits in GPTQ, AWQ and INT8, in 8 bits in GGUF; tokens/s is the decoding "
        "speed of one stream.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
