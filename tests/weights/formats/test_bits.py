import torch
from hypothesis import given
from hypothesis import strategies as st

from llmopt.weights.formats import bits as bit_stream


def by_big_integer(codes: list[int], bits: int) -> list[int]:
    """The words of a stream, taken from one big integer; each as a signed 32-bit number."""
    stream = sum(code << (i * bits) for i, code in enumerate(codes))
    words = [stream >> (32 * w) & 0xFFFFFFFF for w in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


@st.composite
def coded(draw):
    bits = draw(st.integers(1, 8))
    rows, count = draw(st.integers(1, 3)), draw(st.integers(1, 70))
    code = st.integers(0, (1 << bits) - 1)
    row = st.lists(code, min_size=count, max_size=count)
    return bits, draw(st.lists(row, min_size=rows, max_size=rows))


@given(coded())
def test_words_are_those_of_one_big_integer(case) -> None:
    bits, rows = case
    words = bit_stream.pack(torch.tensor(rows, dtype=torch.uint8), bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [by_big_integer(row, bits) for row in rows]


@given(coded())
def test_unpack_is_the_inverse(case) -> None:
    bits, rows = case
    codes = torch.tensor(rows, dtype=torch.uint8)
    assert torch.equal(bit_stream.unpack(bit_stream.pack(codes, bits), bits, codes.shape[1]), codes)


def test_three_bits_straddle_words() -> None:
    codes = torch.zeros(32, dtype=torch.uint8)
    codes[10] = 0b101  # bits 30 to 32: two in the first word, one in the second
    assert bit_stream.pack(codes, 3).tolist() == [1 << 30, 1, 0]


def test_leading_dimensions_stay() -> None:
    codes = torch.randint(0, 16, (2, 3, 16), dtype=torch.uint8)
    words = bit_stream.pack(codes, 4)
    assert words.shape == (2, 3, 2)
    assert torch.equal(bit_stream.unpack(words, 4, 16), codes)
