"""Where calibration tokens come from: files, data sets, and the model itself."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from llmopt.errors import InputError, LlmoptError
from llmopt.model.source import ModelSource, open_source
from llmopt.progress import silent
from llmopt.quant import documents, samples
from llmopt.quant.samples import calibration_tokens

CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]


@pytest.fixture
def source(tiny_model) -> ModelSource:
    return open_source(str(tiny_model("llama")[0]))


def tokens_of(source: ModelSource, calibration: Any, count: int = 2, seq_len: int = 16, seed: int = 0) -> torch.Tensor:
    tokens = calibration_tokens(str(calibration), source, count, seq_len, seed, "cpu", silent)
    assert tokens.dtype == torch.int64 and tokens.shape == (count, seq_len)
    return tokens


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(count: int) -> str:
    return " ".join(f"the cat {i} sat" for i in range(count))


def test_windows_of_a_text_are_drawn_without_repetition_by_the_seed(source: ModelSource, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(numbered(200))
    whole = source.tokenizer.encode(numbered(200), add_special_tokens=False)
    windows = [tuple(whole[i : i + 16]) for i in range(0, len(whole) - 15, 16)]
    found = [tuple(row) for row in tokens_of(source, file, count=5).tolist()]
    assert set(found) <= set(windows) and len(set(found)) == 5
    assert torch.equal(tokens_of(source, file, 5), tokens_of(source, file, 5))
    assert not torch.equal(tokens_of(source, file, 5), tokens_of(source, file, 5, seed=1))


def test_prose_is_not_wrapped_in_the_chat_template(source: ModelSource, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("the cat sat on the mat " * 50)
    assert "user:" not in source.tokenizer.decode(tokens_of(source, file).flatten().tolist())


def test_only_the_beginning_of_a_long_text_is_read(source: ModelSource, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"the cat sat " * 10_000 + b"\xff")
    tokens_of(source, file)
    with pytest.raises(InputError, match="not UTF-8"):
        tokens_of(source, file, count=500, seq_len=64)


def test_documents_are_joined_by_the_end_token(source: ModelSource, tmp_path: Path) -> None:
    texts = ["the cat sat on the mat", "", "a dog ran", "the end of it all"]
    file = write_lines(tmp_path / "a.jsonl", *({"text": text, "url": 5} for text in texts))
    file.write_text("\n" + file.read_text())  # empty lines do no harm
    expected: list[int] = []
    for text in filter(None, texts):
        expected += [source.tokenizer.eos_id] * bool(expected) + source.tokenizer.encode(text, False)
    assert tokens_of(source, file, count=1, seq_len=len(expected)).tolist() == [expected]


def test_conversations_go_through_the_chat_template(source: ModelSource, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", {"messages": CHAT}, {"text": numbered(20)})
    read = list(documents.read_documents(str(file), source.tokenizer, 100))
    assert read == ["user: the cat\nassistant: sat\n", numbered(20)]
    expected = [source.tokenizer.encode(text, False) for text in read]
    joined = [*expected[0], source.tokenizer.eos_id, *expected[1]]
    assert tokens_of(source, file, count=1, seq_len=len(joined)).tolist() == [joined]


def test_reading_ends_when_there_is_enough(source: ModelSource, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", *({"text": numbered(20)} for _ in range(20)))
    with file.open("a") as more:
        more.write("this is never read")
    tokens_of(source, file)


def test_windows_begin_with_the_token_that_the_tokenizer_puts_first(
    source: ModelSource, tmp_path: Path, monkeypatch
) -> None:
    file = tmp_path / "a.txt"
    file.write_text(numbered(100))
    without = tokens_of(source, file, seq_len=15)
    monkeypatch.setattr(samples, "_opening_of_windows", lambda tokenizer: [tokenizer.bos_id])
    found = tokens_of(source, file)
    assert found[:, 0].tolist() == [source.tokenizer.bos_id] * 2
    assert found[:, 1:].shape == without.shape


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"one two three", "too few for 2 samples of 16; give more text, or a shorter --seq-len"),
        ("a.txt", b"the cat sat on the mat " * 4, "--samples of at most 1"),
        ("a.txt", b"", "has 0 tokens"),
        ("a.bin", bytes(range(256)), "not UTF-8"),
        ("a.bin", bytes(100), "zero bytes"),
        ("a.jsonl", b"", "has 0 tokens"),
        ("a.jsonl", b'{"text": "x"}\n5\n', 'line 2 holds 5; it must be an object with "text"'),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 5}\n', 'line 3: "text" is 5, not a string'),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1 is not UTF-8"),
        ("a.jsonl", b"{text}", "line 1 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.json", b'[{"text": "x"}]', "line 1 holds [{'text': 'x'}]; it must"),
        ("a.jsonl", b'{"txt": "x", "id": 1}', 'line 1 has "txt", "id"; it must be an object with "text"'),
        ("a.jsonl", b"{}", "line 1 has no keys"),
        ("a.jsonl", b'{"messages": []}', '"messages" must be a list'),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', '"messages" must be a list'),
        ("a.jsonl", b'{"messages": ["hello"]}', '"messages" must be a list'),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(
    name: str, content: bytes, says: str, source: ModelSource, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(InputError) as error:
        tokens_of(source, file)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_line_without_end_does_not_fill_the_memory(source: ModelSource, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(documents, "LONGEST_LINE", 100)
    file = write_lines(tmp_path / "a.jsonl", {"text": "x" * 1000})
    with pytest.raises(InputError, match="line 1 is longer than 100 bytes"):
        tokens_of(source, file)


def test_conversations_need_a_chat_template(source: ModelSource, tmp_path: Path) -> None:
    source.tokenizer.chat_template = None
    file = write_lines(tmp_path / "a.jsonl", {"text": "x"}, {"messages": CHAT})
    with pytest.raises(InputError, match='line 2 has "messages", but the model has no chat template'):
        tokens_of(source, file)
    source.tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(InputError, match="line 2: the chat template does not accept these messages: no"):
        tokens_of(source, file)


@pytest.mark.parametrize("name", ["slef", "/nowhere/text", "./a/b", "data/wiki.txt", "a/b/c/d", "a/b:c:d", "", "a/b:"])
def test_what_is_neither_a_file_nor_a_dataset_is_refused(name: str, source: ModelSource) -> None:
    with pytest.raises(InputError, match=r"there is no file .*ORG/NAME|is a folder"):
        tokens_of(source, name)


def test_a_folder_is_refused(source: ModelSource, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder; give a text file"):
        tokens_of(source, tmp_path)


@pytest.fixture
def library(monkeypatch) -> types.SimpleNamespace:
    """Stands in for the `datasets` library: remembers how it was called, gives `rows` or raises `error`."""
    state = types.SimpleNamespace(called=None, rows=[], error=None)

    def load_dataset(path, name=None, **options):
        state.called = (path, name, options)
        if state.error is not None:
            raise state.error
        return iter(state.rows)

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return state


@pytest.mark.parametrize(
    ("name", "config", "split"),
    [
        ("org/name", None, "train"),
        ("org/name:test", None, "test"),
        ("org/name/wikitext-2-raw-v1", "wikitext-2-raw-v1", "train"),
        ("org/name/a.b:validation", "a.b", "validation"),
    ],
)
def test_a_hub_dataset_is_streamed(name: str, config: str, split: str, source: ModelSource, library) -> None:
    def endless():
        while True:
            yield {"text": numbered(10), "id": 7}

    library.rows = endless()
    tokens_of(source, name)
    assert library.called == ("org/name", config, {"split": split, "streaming": True})


def test_a_hub_datasets_rows_are_checked_like_lines(source: ModelSource, library) -> None:
    library.rows = [{"text": "x"}, {"question": "x", "answer": "y"}]
    with pytest.raises(InputError, match='org/name, row 2 has "question", "answer"; it must be an object with "text"'):
        tokens_of(source, "org/name")


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (ConnectionError("Couldn't reach it\non the hub"), LlmoptError, "could not be loaded: Couldn't reach it"),
        (FileNotFoundError("Dataset 'org/name' doesn't exist"), InputError, "no such data set: Dataset 'org/name'"),
        (ValueError("Bad split: valid. Available splits: ['train']"), InputError, "Available splits"),
    ],
)
def test_a_dataset_that_does_not_load_gives_one_line(error, kind, says: str, source: ModelSource, library) -> None:
    library.error = error
    with pytest.raises(LlmoptError) as caught:
        tokens_of(source, "org/name:valid")
    assert type(caught.value) is kind and says in str(caught.value) and "\n" not in str(caught.value)


def test_without_the_library_the_error_says_how_to_get_it(source: ModelSource, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'llmopt\[datasets\]'"):
        tokens_of(source, "org/name")


def test_the_real_library_gives_rows_and_these_errors(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write_lines(tmp_path / "train.jsonl", *({"text": str(i), "id": i} for i in range(5)))
    rows = list(documents._dataset_rows(str(tmp_path), None, "train"))
    assert [row["text"] for row in rows] == list("01234")
    for folder, config, split, says in (
        (tmp_path, None, "valid", "valid"),
        (tmp_path, "other", "train", "other"),
        (tmp_path / "none", None, "train", "no such data set"),
    ):
        with pytest.raises(InputError, match=says):
            list(documents._dataset_rows(str(folder), config, split))


def test_the_model_writes_half_of_its_samples_as_a_user(source: ModelSource) -> None:
    reported: list[tuple[int, int]] = []
    tokens = calibration_tokens(
        "self", source, 6, 24, 0, "cpu", lambda phase, done, total: reported.append((done, total))
    )
    assert tokens.shape == (6, 24)
    chat = source.tokenizer.encode("user: ", False)
    assert all(row[: len(chat)] == chat for row in tokens[::2].tolist())
    assert tokens[1::2, 0].tolist() == [source.tokenizer.bos_id] * 3
    assert len(set(map(tuple, tokens.tolist()))) == 6
    assert reported[0][0] == 0 and all(done <= total for done, total in reported)
    assert torch.equal(tokens, tokens_of(source, "self", 6, 24))
    other = tokens_of(source, "self", 6, 24, seed=1)
    assert not set(map(tuple, tokens.tolist())) & set(map(tuple, other.tolist()))


@pytest.mark.parametrize(
    "template",
    [None, "{{ raise_exception('no users') }}", "nothing of the message", "{{ 'x' * 500 }}{{ messages[0].content }}"],
)
def test_the_model_writes_without_a_usable_template(template: str | None, source: ModelSource) -> None:
    source.tokenizer.chat_template = template
    assert tokens_of(source, "self")[:, 0].tolist() == [source.tokenizer.bos_id] * 2


def test_the_day_in_a_chat_template_does_not_change_the_samples(source: ModelSource) -> None:
    source.tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    opening = samples._opening_of_chats(source.tokenizer)
    assert source.tokenizer.decode(opening).strip() == "01 Jan 2025"


@pytest.mark.model
def test_the_openings_of_a_real_model(smollm2: str) -> None:
    tokenizer = open_source(smollm2).tokenizer
    opening = tokenizer.decode(samples._opening_of_chats(tokenizer), skip_special_tokens=False)
    assert opening.startswith("<|im_start|>system\n") and opening.endswith("<|im_end|>\n<|im_start|>user\n")
