import pytest

from llmopt.errors import InputError
from llmopt.evaluate.text import Text, cut_windows, read_text
from llmopt.model.builtin_text import builtin_text, calibration_text
from llmopt.model.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model("llama")[0]))


def test_windows_follow_each_other_and_have_the_exact_length(tokenizer):
    text = Text("t", "the cat sat on the mat " * 40)
    cut = cut_windows(tokenizer, text, ctx=10, count=3)
    assert [token for window in cut.tokens for token in window] == tokenizer.encode(text.content)[:30]
    assert cut.describe() == {
        "source": "t", "sha256": text.sha256, "ctx": 10, "windows": 3, "predicted_tokens": 27, "bos": False,
    }  # fmt: skip


def test_an_opening_token_stands_before_every_window_where_the_tokenizer_adds_one(tokenizer, monkeypatch):
    encode = tokenizer.encode
    monkeypatch.setattr(
        tokenizer, "encode", lambda text, add_special_tokens=True: [1] * add_special_tokens + encode(text, False)
    )
    content = "the cat sat on the mat " * 40
    cut = cut_windows(tokenizer, Text("t", content), ctx=10, count=3)
    assert cut.bos and all(window[0] == 1 and len(window) == 10 for window in cut.tokens)
    assert [token for window in cut.tokens for token in window[1:]] == encode(content, False)[:27]


def test_too_short_a_text_is_refused_with_what_it_holds(tokenizer):
    with pytest.raises(InputError, match=r"t has \d+ tokens, enough for 1 windows of 10, not for 2"):
        cut_windows(tokenizer, Text("t", "xyzw" * 4), ctx=10, count=2)


@pytest.mark.parametrize(("ctx", "count"), [(1, 1), (0, 1), (8, 0)])
def test_impossible_windows_are_refused(tokenizer, ctx, count):
    with pytest.raises(InputError, match="must be at least"):
        cut_windows(tokenizer, Text("t", "text"), ctx, count)


def test_a_text_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "latin1").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        read_text(tmp_path / "latin1")
    with pytest.raises(InputError, match="No such file"):
        read_text(tmp_path / "missing")


def test_the_built_in_text_is_prose_and_not_the_calibration_text():
    measured, calibrated = builtin_text(), calibration_text()
    assert read_text(None).content == measured
    assert min(len(measured), len(calibrated)) > 100_000
    assert not set(measured.split("\n\n")) & set(calibrated.split("\n\n"))
