"""One safetensors file: the library reads what is written here and the other way round; broken ones are refused."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from llmopt.errors import InputError
from llmopt.weights.safetensors_file import DTYPES, SafetensorsFile
from llmopt.weights.safetensors_writer import SafetensorsWriter

TENSORS = {
    "bytes": torch.arange(5, dtype=torch.uint8),
    "wide": torch.rand(2, 3),
    "half": torch.rand(3).half(),
    "none": torch.empty(0, 4),
    "one": torch.tensor(7, dtype=torch.int64),
    'ü"\n': torch.tensor([True, False, True]),
}
WHOLE = save(TENSORS, {"format": "pt", "by": "é"})
HEADER_END = 8 + int.from_bytes(WHOLE[:8], "little")


def read(path: Path, content: bytes) -> dict[str, torch.Tensor]:
    path.write_bytes(content)
    file = SafetensorsFile(path)
    return {name: file.load(name) for name in file.tensors}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def file_of(header: object, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("safetensors") / "x.safetensors"


def test_reads_what_the_library_writes(scratch: Path) -> None:
    assert same(read(scratch, WHOLE), TENSORS)
    assert SafetensorsFile(scratch).metadata == {"format": "pt", "by": "é"}


@settings(max_examples=60, deadline=2000)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(list(DTYPES.values())),
            st.lists(st.integers(0, 5), max_size=3),
            st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
        ),
        max_size=6,
        unique_by=lambda tensor: tensor[2],
    )
)
def test_the_library_reads_what_is_written_here(scratch: Path, tensors: list) -> None:
    given = {
        name: torch.arange(100).to(dtype).repeat(2)[: torch.Size(shape).numel()].view(shape)
        for dtype, shape, name in tensors
        if name != "__metadata__"
    }
    writer = SafetensorsWriter(scratch)
    for name, tensor in given.items():
        writer.add(name, tensor)
    writer.finish({"format": "pt"})
    assert same_bytes(by_the_library(scratch), given)
    assert same_bytes(read(scratch, scratch.read_bytes()), given)
    assert [path.name for path in scratch.parent.iterdir()] == [scratch.name]


def by_the_library(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict


def same_bytes(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """As `same`, for dtypes too that torch cannot compare."""
    return found.keys() == expected.keys() and all(
        (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        and found[name].flatten().view(torch.uint8).tolist() == tensor.flatten().view(torch.uint8).tolist()
        for name, tensor in expected.items()
    )


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "of its 0 bytes"),
        (b"\xff" * 8, "18446744073709551615 would be the header"),
        (struct.pack("<Q", 1 << 40) + bytes(64), "1099511627776 would be the header"),
        (struct.pack("<Q", 65) + bytes(64), "65 would be the header"),
        (file_of(b"{"), "not JSON"),
        (file_of(b"[" * 100_000), "not JSON"),
        (file_of(b'{"a": ' + b"1" * 5000 + b"}"), "not JSON"),
        (file_of(b"\xff\xfe"), "not JSON"),
        (file_of([]), "not an object"),
        (file_of({"a": A | {"shape": [3]}}), "'a' has 8 bytes, and F32 .3. would have others"),
        (file_of({"a": A | {"shape": [1 << 62, 1 << 62]}}), "would have others"),
        (file_of({"a": A | {"shape": [-1, -2]}}), "not a dtype, a shape"),
        (file_of({"a": A | {"shape": [2.0]}}), "not a dtype, a shape"),
        (file_of({"a": A | {"shape": [True, 2]}}), "not a dtype, a shape"),
        (file_of({"a": A | {"data_offsets": [8, 0]}}), "not a dtype, a shape"),
        (file_of({"a": A | {"data_offsets": [0]}}), "not a dtype, a shape"),
        (file_of({"a": None}), "not a dtype, a shape"),
        (file_of({"a": A, "__metadata__": {"a": 1}}), "metadata"),
        (file_of({"a": A, "b": A}), "'b' begins at byte .*, where .* is next"),
        (file_of({"a": A}, bytes(9)), "its tensors end at"),
        (file_of({"a": A}, bytes(7)), "its tensors end at"),
        (file_of({"a": A | {"data_offsets": [8, 16]}}, bytes(16)), "begins at"),
    ],
)
def test_what_is_no_whole_file_is_refused(scratch: Path, content: bytes, says: str) -> None:
    with pytest.raises(InputError, match=rf"is not a whole safetensors file: .*{says}") as caught:
        read(scratch, content)
    assert "\n" not in str(caught.value)


def test_a_dtype_that_torch_lacks_is_in_nobodys_way_until_it_is_asked_for(scratch: Path) -> None:
    scratch.write_bytes(file_of({"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}))
    with pytest.raises(InputError, match="a is F4, which is not known here"):
        SafetensorsFile(scratch).load("a")


def test_a_file_that_is_cut_short_after_it_was_opened_is_said(scratch: Path) -> None:
    scratch.write_bytes(WHOLE)
    file = SafetensorsFile(scratch)
    scratch.write_bytes(WHOLE[:-1])
    with pytest.raises(InputError, match="cut short since it was opened"):
        for name in file.tensors:
            file.load(name)


@settings(max_examples=400, deadline=2000)
@given(st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_what_the_library_refuses_is_refused_here(scratch: Path, flips: list[tuple[int, int]]) -> None:
    """Flipped bytes in the header: an InputError or the tensors that the library reads, and nothing else."""
    content = bytearray(WHOLE)
    for place, value in flips:
        content[place] = value
    try:
        found = read(scratch, bytes(content))
    except InputError:
        return
    try:
        theirs = by_the_library(scratch)
    except (SafetensorError, AttributeError):
        # It is stricter where that changes nothing: about keys of an entry that nobody reads.
        assert {name: tensor.nbytes for name, tensor in found.items()}
        return
    assert same_bytes(found, theirs)
