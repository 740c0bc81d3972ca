"""What a quantization scheme is: how many bits, in which groups, with or without a zero point.

A scheme says nothing about how codes are chosen (that is a method) nor about how they are stored (that is a format).
"""

import difflib
from dataclasses import dataclass, replace

from llmopt.errors import InputError

PER_CHANNEL = -1  # the field's own spelling of "one group for the whole row"
USUAL_GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class Scheme:
    """How a weight matrix is represented.

    Attributes:
        name: what the command line calls it.
        bits: width of a code; 16 means that the weight stays in floating point.
        symmetric: zero is always the middle code, so that no zero points are stored.
        group_size: inputs that share a scale; `PER_CHANNEL` for one scale per output row; None where the
            user has not chosen yet (see `for_widths`).
        fixed_group: the group size is part of the scheme (GGUF's block types) and cannot be chosen.
        signed_scale: the scale takes the sign that puts the largest value on the end of the range that reaches
            further, as GGUF's 4-bit blocks do.
        gguf_type: the GGUF tensor type that holds it, None for schemes of the other formats.
        activation_bits: 8 where activations are also rounded, per token, at run time; None where they stay in float.
    """

    name: str
    bits: int
    symmetric: bool = True
    group_size: int | None = None
    fixed_group: bool = False
    signed_scale: bool = False
    gguf_type: str | None = None
    activation_bits: int | None = None

    @property
    def is_dense(self) -> bool:
        return self.bits == 16

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
        bad = sorted(width for width in widths if width % self.group_size)
        if bad:
            possible = (
                f"of the usual sizes {', '.join(map(str, dividing))} would" if dividing else "use -1 for whole rows"
            )
            raise InputError(f"group size {self.group_size} does not divide rows of {bad[0]}; {possible}")
        return self


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("w4a16", bits=4),
        Scheme("w4a16-asym", bits=4, symmetric=False),
        Scheme("w8a16", bits=8),
        Scheme("w8a8", bits=8, group_size=PER_CHANNEL, fixed_group=True, activation_bits=8),
        Scheme("f16", bits=16, gguf_type="F16"),
        Scheme("q8_0", bits=8, group_size=32, fixed_group=True, gguf_type="Q8_0"),
        Scheme("q4_0", bits=4, group_size=32, fixed_group=True, signed_scale=True, gguf_type="Q4_0"),
    )
}


def find_scheme(name: str) -> Scheme:
    """The scheme of that name. Raises InputError that lists the known ones."""
    if name not in SCHEMES:
        raise InputError(f"unknown scheme {name!r}{nearest(name, SCHEMES)}; known: {', '.join(SCHEMES)}")
    return SCHEMES[name]


def nearest(word: str, known) -> str:
    """' (did you mean X?)' where one of the known words is close, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
