"""GGUF's block types to and from integer codes, bit for bit as ggml lays them out.

A row is cut into blocks of 32 weights, or of 256 for the K-quants. What a block holds, field by field, is the table
`BLOCK_TYPES` below. The bits of a code lie in one or two planes; the scales of a K-quant's groups are small integers,
which `gguf_k_scales.py` packs, times a float16 for the whole block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.errors import LlmoptError
from llmopt.weights.formats import bits as bit_stream
from llmopt.weights.formats.base import to_float16
from llmopt.weights.formats.gguf_k_scales import K_SCALES
from llmopt.weights.numbers import FP4, INT
from llmopt.weights.quantized import QuantizedTensor, Scales, TwoLevel

SCALE, MINIMUM, POWER = "scale", "minimum", "power"  # fields: two of float16, and one of a byte, 2**(byte - 127)
CODES_AT_ONCE = 1 << 20  # decoded together: intermediate values in a cache cost less than fresh memory
_FIELD_BYTES = {SCALE: 2, MINIMUM: 2, POWER: 1}


@dataclass(frozen=True)
class Plane:
    """A field with some bits of every code of the block.

    The field is cut into runs of bytes. The lowest `width` bits of each byte of a run belong to consecutive codes, the
    next bits of each to the codes that follow those, and so on.

    Attributes:
        width: bits of a code that lie here.
        run: bytes of a run, 1 or a multiple of 8.
        low: which bit of a code is the lowest of them.
    """

    width: int
    run: int
    low: int = 0

    def unpack(self, field: Tensor, codes: Tensor) -> None:
        """Put the bits in a field, uint8 [out, blocks, bytes], in their place in codes, uint8 [out, blocks, weights].
        The plane with the lowest bits overwrites what is there, another adds to it."""
        for place, bits in self._parts(field, codes):
            if self.low:
                place |= bits << self.low
            else:
                place.copy_(bits)

    def _parts(self, field: Tensor, codes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of codes and the bits that belong there; both of bytes, or of eight bytes at once."""
        if self.width == 8:
            yield codes, field
        elif self.run == 1:
            yield codes, bit_stream.spread(field, self.width)
        else:
            words = field.clone(memory_format=torch.contiguous_format).view(torch.int64)
            runs = words.unflatten(2, (-1, self.run // 8))
            places = codes.view(torch.int64).unflatten(2, (-1, 8 // self.width, self.run // 8))
            mask = ((1 << self.width) - 1) * 0x0101010101010101
            for index in range(8 // self.width):
                yield places[:, :, :, index], (runs >> index * self.width).bitwise_and_(mask)

    def pack(self, codes: Tensor) -> Tensor:
        """The inverse of `unpack`."""
        if self.width == 8:
            return codes
        bits = (codes >> self.low & ((1 << self.width) - 1)).unflatten(2, (-1, 8 // self.width, self.run))
        field = bits[..., 0, :].clone()
        for index in range(1, 8 // self.width):
            field |= bits[..., index, :] << index * self.width
        return field.flatten(2)


@dataclass(frozen=True)
class BlockType:
    """How one type of block is laid out.

    Attributes:
        bits: width of a code.
        fields: in order; a name, the name of one of `K_SCALES`, or a Plane.
        group: weights that share a scale.
        block: weights of a block.
        flipped: codes are stored as signed bytes, that is with their highest bit flipped.
    """

    bits: int
    fields: tuple[str | Plane, ...]
    group: int = 32
    block: int = 32
    flipped: bool = False

    @property
    def planes(self) -> list[Plane]:
        """Those with the lowest bits first."""
        return sorted((field for field in self.fields if isinstance(field, Plane)), key=lambda plane: plane.low)

    @property
    def packed_scales(self) -> str | None:
        """The name of the field that holds integer scales of groups, where there is one."""
        return next((field for field in self.fields if field in K_SCALES), None)

    @property
    def has_minimums(self) -> bool:
        return MINIMUM in self.fields

    @property
    def kind(self) -> tuple:
        """What tells tensors of this type from those of the others; `_kind_of` is the same of a tensor."""
        number = FP4 if POWER in self.fields else INT
        return self.bits, number, self.has_minimums, self.group, self.block if self.packed_scales else None

    @property
    def sizes(self) -> list[int]:
        """The bytes of each field."""
        return [
            self.block * field.width // 8 if isinstance(field, Plane) else (_FIELD_BYTES | _K_BYTES)[field]
            for field in self.fields
        ]


_K_BYTES = {name: packing.nbytes for name, packing in K_SCALES.items()}
_NIBBLES, _PAIRS, _HALVES = Plane(4, run=16), Plane(2, run=32), Plane(4, run=32)

BLOCK_TYPES = {
    "Q4_0": BlockType(4, (SCALE, _NIBBLES)),
    "Q4_1": BlockType(4, (SCALE, MINIMUM, _NIBBLES)),
    "Q5_0": BlockType(5, (SCALE, Plane(1, run=1, low=4), _NIBBLES)),
    "Q5_1": BlockType(5, (SCALE, MINIMUM, Plane(1, run=1, low=4), _NIBBLES)),
    "Q8_0": BlockType(8, (SCALE, Plane(8, run=32)), flipped=True),
    "MXFP4": BlockType(4, (POWER, _NIBBLES)),
    "Q2_K": BlockType(2, ("nibbles", _PAIRS, SCALE, MINIMUM), 16, 256),
    "Q3_K": BlockType(3, (Plane(1, run=32, low=2), _PAIRS, "signed sixes", SCALE), 16, 256),
    "Q4_K": BlockType(4, (SCALE, MINIMUM, "sixes", _HALVES), 32, 256),
    "Q5_K": BlockType(5, (SCALE, MINIMUM, "sixes", Plane(1, run=32, low=4), _HALVES), 32, 256),
    "Q6_K": BlockType(6, (Plane(4, run=64), Plane(2, run=32, low=4), "bytes", SCALE), 16, 256),
}
"""ggml's names of the block types that stay codes here."""

_BY_KIND = {layout.kind: name for name, layout in BLOCK_TYPES.items()}


def block_type(weight: QuantizedTensor) -> str:
    """The block type that holds this tensor as it is. Raises LlmoptError where none does."""
    plain = weight.plain_order()
    name = _BY_KIND.get(_kind_of(plain))
    unheld = plain.zeros is not None or plain.group_index is not None
    if name is None or unheld or plain.shape[1] % BLOCK_TYPES[name].block:
        zero = "zero points" if plain.zeros is not None else "no minimums" if plain.minimums is None else "minimums"
        order = "plain order" if plain.group_index is None else "an order of their own"
        raise LlmoptError(
            f"GGUF has no block type for {plain.bits}-bit {plain.number} codes with {zero} in groups of "
            f"{plain.group_size} in {order} in rows of {plain.shape[1]}; its types are {', '.join(BLOCK_TYPES)}"
        )
    return name


def encode_blocks(weight: QuantizedTensor) -> Tensor:
    """The blocks of a tensor that `block_type` accepts, uint8 [out, bytes of a row].

    Raises LlmoptError for another tensor and for scales and minimums that the blocks cannot hold.
    """
    layout = BLOCK_TYPES[block_type(weight)]
    codes = weight.codes.unflatten(1, (-1, layout.block))
    if layout.flipped:
        codes = codes ^ 0x80
    stored = _encode_scales(layout, weight.scales, weight.minimums)
    fields = [field.pack(codes) if isinstance(field, Plane) else stored[field] for field in layout.fields]
    return torch.cat(fields, dim=2).flatten(1)


def decode_blocks(kind: str, blocks: Tensor) -> QuantizedTensor:
    """The codes in blocks of a type of `BLOCK_TYPES`, given as uint8 [out, bytes of a row]."""
    layout = BLOCK_TYPES[kind]
    rows, count = blocks.shape[0], blocks.shape[1] // sum(layout.sizes)
    parts = blocks.unflatten(1, (count, -1)).split(layout.sizes, dim=2)
    found = dict(zip(layout.fields, parts, strict=True))
    codes = blocks.new_empty(rows, count, layout.block)
    step = max(1, CODES_AT_ONCE // (count * layout.block))
    for first in range(0, rows, step):
        some = slice(first, first + step)
        for plane in layout.planes:
            plane.unpack(found[plane][some], codes[some])
        if layout.flipped:
            codes[some] ^= 0x80
    scales, minimums = _decode_scales(layout, found)
    number = FP4 if POWER in found else INT
    return QuantizedTensor(codes.flatten(1), scales, None, None, layout.bits, number=number, minimums=minimums)


def _encode_scales(layout: BlockType, scales: Scales, minimums: Scales | None) -> dict[str, Tensor]:
    """The fields that are no planes, each uint8 [out, blocks, bytes]."""
    if POWER in layout.fields:
        return {POWER: _powers(scales)[..., None]}
    if layout.packed_scales is None:
        return {SCALE: _bytes_of(scales)} | ({} if minimums is None else {MINIMUM: _bytes_of(minimums)})
    parts = [part for part in (scales, minimums) if isinstance(part, TwoLevel)]
    factors = [part.factors.expand(part.shape[0], -1) for part in parts]
    stored = {SCALE: _bytes_of(factors[0])}
    if len(parts) > 1:
        stored[MINIMUM] = _bytes_of(-factors[1])  # a block stores what is taken away
    values = [part.values.unflatten(1, (-1, layout.block // layout.group)) for part in parts]
    return stored | {layout.packed_scales: K_SCALES[layout.packed_scales].pack(*values)}


def _decode_scales(layout: BlockType, fields: dict[str | Plane, Tensor]) -> tuple[Scales, Scales | None]:
    if POWER in fields:
        return fields[POWER].squeeze(2).clone().view(torch.float8_e8m0fnu), None
    halves = [fields[name].clone().view(torch.float16).squeeze(2) for name in (SCALE, MINIMUM) if name in fields]
    if layout.packed_scales is None:
        return halves[0], halves[1] if layout.has_minimums else None
    values = K_SCALES[layout.packed_scales].unpack(fields[layout.packed_scales])
    scales = TwoLevel(values[0].flatten(1), halves[0])
    return scales, TwoLevel(values[1].flatten(1), -halves[1]) if layout.has_minimums else None


def _kind_of(weight: QuantizedTensor) -> tuple:
    """What tells tensors of one block type from those of the others; `BlockType.kind` is the same of a type."""
    parts = [part for part in (weight.scales, weight.minimums) if part is not None]
    blocks = {weight.shape[1] // part.factors.shape[1] if isinstance(part, TwoLevel) else None for part in parts}
    block = blocks.pop() if len(blocks) == 1 else 0  # no type has its scales on two levels and its minimums on one
    return weight.bits, weight.number, weight.minimums is not None, weight.group_size, block


def _bytes_of(numbers: Scales) -> Tensor:
    """Numbers [out, blocks] as float16, uint8 [out, blocks, 2]."""
    return to_float16(numbers.float(), "GGUF blocks")[..., None].view(torch.uint8)


def _powers(scales: Scales) -> Tensor:
    """Powers of two as their exponents, uint8 of the same shape. Raises LlmoptError for other numbers."""
    values = scales.float()
    powers = values.to(torch.float8_e8m0fnu)
    if not torch.equal(powers.float(), values):
        raise LlmoptError("MXFP4's scales are powers of two, and these are not")
    return powers.view(torch.uint8)
