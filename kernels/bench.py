"""Times the CPU kernels on SmolLM2's shapes, beside torch in float32 and the machine's own limits.

Run as `python -m llmopt.kernels.bench`; prints a Markdown table, with `--sampling` that of sampling. The limit of a
product is the longer of two times: to read the packed weight once at the memory's measured bandwidth, and to do its
multiplications and additions at the speed that torch's float32 product of two square matrices reaches here. Both of
these come from their fastest round, because a limit is what the machine can do at all; times are medians of rounds in
which the kernel and torch take turns. On a machine that others use, compare the two columns of times and mistrust the
rest.

With `--attention` it times attention over the paged cache instead, of all 30 layers of SmolLM2-135M, each with a cache
of its own whose blocks lie in random order. Layers take turns, and each one's fastest counts.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from llmopt.kernels._cpu import AttentionShape, LayerCache, Multiplier, PackedWeight, PagedStep, instruction_sets

COLD_BYTES = 96 << 20  # copies of a weight are used in turn, so many bytes of them that caches do not hold them
ROUNDS = 9
ROUND_SECONDS = 0.003  # a round repeats short products for about so long

SAMPLED_ROWS, SAMPLED_VOCABULARY = 32, 49152
PENALISED = 500  # tokens of each row


@dataclass(frozen=True)
class Shape:
    """A weight [outputs, inputs] in groups, with float activations or rounded ones."""

    name: str
    outputs: int
    inputs: int
    bits: int = 4
    group_size: int = 64
    int8: bool = False


SHAPES = (
    Shape("q, k, v", 960, 576),
    Shape("attention out", 576, 576),
    Shape("gate, up", 3072, 576),
    Shape("down", 576, 1536),
    Shape("gate, up w8a8", 3072, 576, bits=8, group_size=576, int8=True),
    Shape("head", 49152, 576, bits=8),
)


LAYERS, HEADS, KV_HEADS, HEAD_DIM, BLOCK = 30, 9, 3, 64, 16
ATTENTION_SECONDS = 1.0
CACHES = {"bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Attention:
    """A step of sequences that each have so many tokens in the cache, the last `queries` of them new."""

    sequences: int
    context: int
    queries: int = 1


ATTENTIONS = (Attention(1, 128), Attention(32, 192), Attention(1, 8192), Attention(1, 512, queries=512))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the CPU kernels beside torch and the machine's limits.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--instruction-set", default="auto", choices=["auto", *instruction_sets()])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--sampling", action="store_true", help="time sampling in place of products")
    parser.add_argument("--attention", action="store_true", help="time attention over the paged cache instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    multiplier = Multiplier(options.threads, options.instruction_set)
    if options.sampling:
        print_sampling(multiplier)
        return
    if options.attention:
        print(f"{multiplier.instruction_set}, {options.threads} threads; memory {memory_bandwidth() / 1e9:.1f} GB/s\n")
        print("| sequences | context | queries | cache | store µs | attend µs | GB/s | GFLOPS |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for attention in ATTENTIONS:
            for kind in CACHES:
                print(measure_attention(multiplier, attention, kind), flush=True)
        return
    bandwidth, flops = memory_bandwidth(), torch_flops()
    print(
        f"{multiplier.instruction_set}, {options.threads} threads; memory {bandwidth / 1e9:.1f} GB/s, "
        f"torch float32 {flops / 1e9:.0f} GFLOPS\n"
    )
    print("| weight | bits | tokens | µs | limit µs | reached | GB/s | GFLOPS | torch float32 µs |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for shape in SHAPES:
        weights = cold_weights(shape)
        for tokens in options.tokens:
            print(measure(multiplier, shape, weights, tokens, bandwidth, flops), flush=True)


def measure(
    multiplier: Multiplier,
    shape: Shape,
    weights: list[PackedWeight],
    tokens: int,
    bandwidth: float,
    flops: float,
) -> str:
    """One row of the table."""
    x, y = torch.randn(tokens, shape.inputs), torch.empty(tokens, shape.outputs)
    copies = itertools.cycle(weights)
    dense_bytes = 4 * shape.outputs * shape.inputs
    dense = itertools.cycle([torch.randn(shape.outputs, shape.inputs) for _ in range(1 + COLD_BYTES // dense_bytes)])

    def kernel() -> None:
        multiplier.multiply(next(copies), x.data_ptr(), shape.inputs, tokens, y.data_ptr(), shape.outputs)

    def by_torch() -> None:
        torch.nn.functional.linear(x, next(dense))

    seconds, torch_seconds = (median(times) for times in rounds(kernel, by_torch))
    work = 2 * tokens * shape.outputs * shape.inputs
    limit = max(weights[0].nbytes / bandwidth, work / flops)
    return (
        f"| {shape.name} {shape.outputs}×{shape.inputs} | {shape.bits} | {tokens} | {1e6 * seconds:.0f} "
        f"| {1e6 * limit:.0f} | {100 * limit / seconds:.0f}% | {weights[0].nbytes / seconds / 1e9:.1f} "
        f"| {work / seconds / 1e9:.0f} | {1e6 * torch_seconds:.0f} |"
    )


def print_sampling(multiplier: Multiplier) -> None:
    """The table of sampling: medians for SAMPLED_ROWS rows of random logits with a standard deviation of 3."""
    rows, vocabulary = SAMPLED_ROWS, SAMPLED_VOCABULARY
    logits, tokens = 3 * torch.randn(rows, vocabulary), torch.empty(rows, dtype=torch.int64)
    one = torch.ones(rows)
    # Penalties of nothing are as much work as others, and leave the logits as they are for the next round.
    starts, seen = PENALISED * torch.arange(rows + 1), torch.randint(vocabulary, (rows * PENALISED,), dtype=torch.int32)
    penalties = (one, 0 * one, 0 * one, starts, seen, torch.ones_like(seen))

    def draws(top_k: int, top_p: float, min_p: float) -> tuple[torch.Tensor, ...]:
        all_top_k = torch.full((rows,), top_k)
        return 0.8 * one, all_top_k, top_p * one, min_p * one, torch.rand(rows, dtype=torch.float64)

    print(f"| sampling {rows} × {vocabulary:,}, {multiplier.instruction_set}, {multiplier.threads} threads | ms |")
    print("| --- | --- |")
    for name, settings in (
        ("greedy", (None, None, None)),
        ("temperature", (draws(0, 1, 0), None, None)),
        ("penalties, temperature, top-k 50, top-p 0.95, min-p 0.05", (draws(50, 0.95, 0.05), None, penalties)),
    ):
        arguments = (logits.data_ptr(), rows, vocabulary, tokens.data_ptr(), *settings, None, None)
        (times,) = rounds(partial(multiplier.sample, *arguments))
        print(f"| {name} | {1e3 * median(times):.2f} |")


def measure_attention(multiplier: Multiplier, attention: Attention, kind: str) -> str:
    """One row of the table of attention; bytes and operations are those of attending, not of storing."""
    sequences, queries, context = attention.sequences, attention.queries, attention.context
    count, blocks = sequences * queries, sequences * context // BLOCK
    tables = torch.randperm(blocks).int().view(sequences, -1)
    positions = torch.arange(context - queries, context)
    slots = tables[:, positions // BLOCK].long() * BLOCK + positions % BLOCK
    starts = torch.arange(sequences + 1, dtype=torch.int32) * queries
    contexts = torch.full((sequences,), context, dtype=torch.int32)
    angles = torch.rand(count, HEAD_DIM // 2)
    cos, sin = angles.cos(), angles.sin()
    addresses = (array.data_ptr() for array in (starts, contexts, tables, slots, cos, sin))
    step = PagedStep(sequences, count, tables.shape[1], *addresses)
    shape = AttentionShape(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM, BLOCK, 0, HEAD_DIM**-0.5, kind=kind)
    qkv, out = torch.randn(count, HEADS + 2 * KV_HEADS, HEAD_DIM), torch.empty(count, HEADS, HEAD_DIM)
    numbers = [torch.randn(2, blocks, KV_HEADS * BLOCK * HEAD_DIM).to(CACHES[kind]) for _ in range(LAYERS)]
    scales = torch.rand(2, LAYERS, blocks, KV_HEADS * BLOCK)
    layers = [
        LayerCache(keys.data_ptr(), values.data_ptr(), scales[0, layer].data_ptr(), scales[1, layer].data_ptr())
        for layer, (keys, values) in enumerate(numbers)
    ]

    stored = fastest(layers, lambda layer: multiplier.rotate_and_store(shape, step, qkv.data_ptr(), layer))
    attended = fastest(
        layers, lambda layer: multiplier.attend_paged(shape, step, qkv.data_ptr(), out.data_ptr(), layer)
    )
    read = LAYERS * (2 * sequences * context * KV_HEADS * HEAD_DIM * CACHES[kind].itemsize)
    work = LAYERS * 4 * HEADS * HEAD_DIM * sequences * int((positions + 1).sum())
    return (
        f"| {sequences} | {context} | {queries} | {kind} | {1e6 * stored:.0f} | {1e6 * attended:.0f} "
        f"| {read / attended / 1e9:.1f} | {work / attended / 1e9:.0f} |"
    )


def fastest(layers: list[LayerCache], function: Callable[[LayerCache], object]) -> float:
    """Seconds of one call with each layer, each in its fastest of many turns."""
    times = [math.inf] * len(layers)
    end = time.perf_counter() + ATTENTION_SECONDS
    while time.perf_counter() < end:
        for index, layer in enumerate(layers):
            start = time.perf_counter()
            function(layer)
            times[index] = min(times[index], time.perf_counter() - start)
    return sum(times)


def cold_weights(shape: Shape) -> list[PackedWeight]:
    """Copies of one random weight, more than the caches hold."""
    groups = shape.inputs // shape.group_size
    codes = torch.randint(0, 1 << shape.bits, (shape.outputs, shape.inputs), dtype=torch.uint8)
    scales = torch.rand(shape.outputs, groups)
    count = 1 + COLD_BYTES * 8 // (shape.outputs * shape.inputs * shape.bits)
    return [
        PackedWeight(
            codes=codes,
            scales=scales,
            zeros=None,
            bias=None,
            order=None,
            bits=shape.bits,
            integer_activations=shape.int8,
        )
        for _ in range(count)
    ]


def rounds(*functions: Callable[[], object]) -> list[list[float]]:
    """Seconds of one call of each function, in every round; within a round they take turns."""
    repeats = []
    for function in functions:
        function()
        start = time.perf_counter()
        function()
        repeats.append(max(1, round(ROUND_SECONDS / (time.perf_counter() - start))))
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(ROUNDS):
        for function, count, into in zip(functions, repeats, times, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                function()
            into.append((time.perf_counter() - start) / count)
    return times


def memory_bandwidth() -> float:
    """Bytes per second at which torch sums an array that no cache holds."""
    array = torch.ones(64 << 20)
    return array.nbytes / min(rounds(array.sum)[0])


def torch_flops() -> float:
    """Floating-point operations per second of torch's product of two square matrices."""
    size = 1024
    matrix = torch.randn(size, size)
    return 2 * size**3 / min(rounds(lambda: matrix @ matrix)[0])


if __name__ == "__main__":
    main()
