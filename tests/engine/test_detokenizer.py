"""Text comes out as it becomes certain: whole characters, no beginning of a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.engine.detokenizer import Detokenizer
from llmopt.engine.params import SamplingParams
from llmopt.model.tokenizer import byte_level_alphabet


class ByteTokenizer:
    """Every token is one byte; 256 is special."""

    special_ids = frozenset({256})

    def token_bytes(self, token_id: int) -> bytes:
        return b"<end>" if token_id == 256 else bytes([token_id])


def detokenize(data: bytes, **params) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(ByteTokenizer(), SamplingParams(**params))  # type: ignore[arg-type]
    pieces = []
    for token in data:
        pieces.append(detokenizer.add(token))
        if detokenizer.stopped_by is not None:
            return pieces, detokenizer
    return [*pieces, detokenizer.finish()], detokenizer


@given(st.text())
def test_pieces_are_whole_characters_and_add_up(text: str) -> None:
    pieces, _ = detokenize(text.encode("utf-8", "surrogatepass") if text.isascii() else text.encode(errors="replace"))
    joined = "".join(pieces)
    assert joined == text.encode(errors="replace").decode()
    assert "�" not in joined or "�" in text


@given(st.binary())
def test_invalid_bytes_never_throw_and_become_replacement_characters(data: bytes) -> None:
    pieces, _ = detokenize(data)
    assert "".join(pieces) == data.decode("utf-8", errors="replace")


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    pieces, detokenizer = detokenize(text.encode(), stop=tuple(stops))
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert "".join(pieces) == text
        assert detokenizer.stopped_by is None
        return
    # The stop string that is complete first ends the text; of several that end there, the one that begins first.
    end = min(ends)
    starts = [text.index(stop) for stop in stops if stop in text and text.index(stop) + len(stop) == end]
    assert "".join(pieces) == text[: min(starts)]
    assert detokenizer.stopped_by in stops


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_refuted() -> None:
    pieces, _ = detokenize(b"a STOX b", stop=("STOP",))
    assert pieces[2] == pieces[3] == pieces[4] == ""
    assert pieces[5] == "STOX"


def test_a_stop_string_counts_only_once_it_may() -> None:
    detokenizer = Detokenizer(ByteTokenizer(), SamplingParams(stop=("STOP",)))  # type: ignore[arg-type]
    early = [detokenizer.add(token, check_stop=False) for token in b"a STOP ST"]
    assert "".join(early) == "a STOP "
    late = [detokenizer.add(token) for token in b"OP"]
    assert ("".join(late), detokenizer.stopped_by) == ("", "STOP"), "it began too early and was complete in time"


def test_the_stop_string_can_be_kept() -> None:
    pieces, _ = detokenize(b"one END two", stop=("END",), include_stop_str_in_output=True)
    assert "".join(pieces) == "one END"


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens(skip: bool) -> None:
    detokenizer = Detokenizer(ByteTokenizer(), SamplingParams(skip_special_tokens=skip))  # type: ignore[arg-type]
    assert detokenizer.add(65) + detokenizer.add(256) == ("A" if skip else "A<end>")


def test_byte_level_alphabet_covers_every_byte_once() -> None:
    alphabet = byte_level_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert alphabet["Ġ"] == ord(" ") and alphabet["Ċ"] == ord("\n") and alphabet["A"] == 65
