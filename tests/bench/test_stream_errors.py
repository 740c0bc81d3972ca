import pytest

from llmopt.bench.metrics import RequestTrace, share_out
from llmopt.bench.stream import StreamError, _Reader


@pytest.mark.parametrize("event", [b'{"error": {"message": "out of memory"}}', b'{"error": "out of memory"}'])
def test_an_error_in_a_stream_is_reported_in_the_server_s_words(event):
    with pytest.raises(StreamError, match="out of memory"):
        _Reader(RequestTrace(0.0)).take(event)


def test_an_error_of_null_is_none():
    reader = _Reader(RequestTrace(0.0))
    reader.take(b'{"error": null, "choices": [{"text": "a"}]}')
    assert len(reader.arrivals) == 1


def test_the_first_chunk_has_a_token_even_where_chunks_outnumber_tokens():
    assert share_out(1, 3) == [1, 0, 0]
    assert share_out(7, 3) == [3, 2, 2]
