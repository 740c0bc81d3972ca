"""What a quantization scheme is: how many bits, in which groups, with or without a zero point.

A scheme says nothing about how codes are chosen (that is a method) nor about how they are stored (that is a format).
"""

import difflib
from dataclasses import dataclass, replace

from llmopt.errors import InputError
from llmopt.weights.numbers import FP4, FP8, INT

PER_CHANNEL = -1  # the field's own spelling of "one group for the whole row"
USUAL_GROUP_SIZES = (128, 64, 32)
SUPER_BLOCK = 256  # weights that share the factors of a K-quant's scales and minimums


@dataclass(frozen=True)
class Scheme:
    """How a weight matrix is represented.

    Attributes:
        name: what the command line calls it.
        bits: width of a code; 16 means that the weight stays in floating point.
        number: `int`, `fp4` or `fp8`, what a code stands for.
        symmetric: zero is always the middle code (of floating-point codes, 0), so that no zero points are stored.
        minimums: not symmetric by what code 0 stands for, a floating-point number, rather than by a zero point.
        group_size: inputs that share a scale; `PER_CHANNEL` for one scale per output row; None where the
            user has not chosen yet (see `for_widths`).
        fixed_group: the group size is part of the scheme (GGUF's block types) and cannot be chosen.
        scales: what a scale (and a minimum) is stored in: `float16`; `float32`; `fp8`, times one float32 for the whole
            matrix; `e8m0`, a power of two; `int6` and `int8`, times a float16 for each `SUPER_BLOCK` weights.
        gguf_type: the GGUF tensor type that holds it, None for schemes of the other formats.
        activations: `int8` or `fp8` where activations are rounded too, per token, at run time; None where they stay.
    """

    name: str
    bits: int
    number: str = INT
    symmetric: bool = True
    minimums: bool = False
    group_size: int | None = None
    fixed_group: bool = False
    scales: str = "float16"
    gguf_type: str | None = None
    activations: str | None = None

    @property
    def is_dense(self) -> bool:
        return self.bits == 16

    @property
    def largest_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def row_multiple(self) -> int:
        """What the length of a row must be a multiple of, once the group size is settled."""
        if self.scales in ("int6", "int8"):
            return SUPER_BLOCK
        return 1 if self.group_size in (None, PER_CHANNEL) else self.group_size

    def with_group_size(self, group_size: int) -> "Scheme":
        """The same scheme with another group size. Raises InputError where the scheme fixes it."""
        if self.is_dense:
            raise InputError(f"{self.name} is not quantized, so it has no group size")
        if self.fixed_group and group_size != self.group_size:
            raise InputError(f"{self.name} has a fixed group size of {self.group_size}, {group_size} is not possible")
        if group_size != PER_CHANNEL and group_size < 1:
            raise InputError(f"group size {group_size} is not possible: give a positive number, or -1 for whole rows")
        return replace(self, group_size=group_size)

    def for_widths(self, widths: set[int]) -> "Scheme":
        """Settle the group size for rows of these lengths: the largest usual one that divides them all.

        Raises InputError when the chosen group size does not divide one of them.
        """
        if self.is_dense or self.group_size == PER_CHANNEL:
            return self
        dividing = [size for size in USUAL_GROUP_SIZES if all(width % size == 0 for width in widths)]
        if self.group_size is None:
            if not dividing:
                raise InputError(f"no usual group size divides rows of {sorted(widths)}: give --group-size")
            return replace(self, group_size=dividing[0])
        bad = sorted(width for width in widths if width % self.row_multiple)
        if bad:
            possible = (
                f"of the usual sizes {', '.join(map(str, dividing))} would" if dividing else "use -1 for whole rows"
            )
            if self.fixed_group:
                raise InputError(f"{self.name} needs rows of a multiple of {self.row_multiple}, not of {bad[0]}")
            raise InputError(f"group size {self.group_size} does not divide rows of {bad[0]}; {possible}")
        return self

    def stored_bits(self, width: int) -> float:
        """Bits that one weight of a row this wide takes in a file: its code, and its share of scales and zero points.

        The group size must be settled.
        """
        if self.is_dense or self.group_size is None:
            return float(self.bits)
        group = width if self.group_size == PER_CHANNEL else self.group_size
        scale = _SCALE_BITS[self.scales]
        extra = scale if self.minimums else 0 if self.symmetric else self.bits
        shared = 16 * (2 if self.minimums else 1) / SUPER_BLOCK if self.scales in ("int6", "int8") else 0
        return self.bits + (scale + extra) / group + shared


_SCALE_BITS = {"float16": 16, "float32": 32, "fp8": 8, "e8m0": 8, "int6": 6, "int8": 8}


def _gguf(name: str, bits: int, group_size: int = 32, **how: bool | str) -> Scheme:
    return Scheme(name, bits, group_size=group_size, fixed_group=True, gguf_type=name.upper(), **how)  # type: ignore[arg-type]


def _with_minimums(name: str, bits: int, scales: str = "float16") -> Scheme:
    return _gguf(name, bits, symmetric=False, minimums=True, scales=scales)


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("w2a16", bits=2),
        Scheme("w2a16-asym", bits=2, symmetric=False),
        Scheme("w3a16", bits=3),
        Scheme("w3a16-asym", bits=3, symmetric=False),
        Scheme("w4a16", bits=4),
        Scheme("w4a16-asym", bits=4, symmetric=False),
        Scheme("w8a16", bits=8),
        Scheme("w8a16-asym", bits=8, symmetric=False),
        Scheme("w8a8", bits=8, group_size=PER_CHANNEL, fixed_group=True, scales="float32", activations="int8"),
        Scheme("fp8", 8, FP8, group_size=PER_CHANNEL, fixed_group=True, scales="float32", activations="fp8"),
        Scheme("nvfp4", 4, FP4, group_size=16, fixed_group=True, scales="fp8"),
        Scheme("mxfp4", 4, FP4, group_size=32, fixed_group=True, scales="e8m0", gguf_type="MXFP4"),
        Scheme("f16", bits=16, gguf_type="F16"),
        Scheme("bf16", bits=16, gguf_type="BF16"),
        _gguf("q8_0", 8),
        _gguf("q4_0", 4),
        _gguf("q5_0", 5),
        _with_minimums("q4_1", 4),
        _with_minimums("q5_1", 5),
        _with_minimums("q4_k", 4, scales="int6"),
        _with_minimums("q5_k", 5, scales="int6"),
        _gguf("q6_k", 6, group_size=16, scales="int8"),
    )
}
"""Every scheme by its name. GGUF's names that mix several of them are in `formats/gguf_mixes.py`."""


def find_scheme(name: str) -> Scheme:
    """The scheme of that name. Raises InputError that lists the known ones."""
    if name not in SCHEMES:
        raise InputError(f"unknown scheme {name!r}{nearest(name, SCHEMES)}; known: {', '.join(SCHEMES)}")
    return SCHEMES[name]


def nearest(word: str, known) -> str:
    """' (did you mean X?)' where one of the known words is close, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
