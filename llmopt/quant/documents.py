"""The documents that a calibration text is made of: a text file, JSON lines, or a data set of the Hugging Face hub."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from llmopt.errors import InputError, LlmoptError
from llmopt.model.locate import first_line
from llmopt.model.tokenizer import Tokenizer

JSON_LINES = (".jsonl", ".json")
LONGEST_LINE = 16 * 1024 * 1024  # bytes; a file without line breaks must not fill the memory
FORMS = 'an object with "text", or with "messages" of {"role", "content"}'
SPELLINGS = "a text file, a .jsonl file, a hub data set as ORG/NAME[/CONFIG][:SPLIT], self or builtin"

# A name with such an ending was meant to be a file, so that a mistyped path is not looked for on the hub.
_FILE_ENDINGS = (*JSON_LINES, ".txt", ".text", ".md", ".csv", ".parquet", ".gz", ".zip")
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_DATASET = re.compile(rf"(?P<id>{_PART}/{_PART})(/(?P<config>{_PART}))?(:(?P<split>{_PART}))?")


def read_documents(name: str, tokenizer: Tokenizer, most_characters: int) -> Iterator[str]:
    """The documents of a file or data set, in its order, read as they are asked for.

    A file that ends in .jsonl or .json has one object a line, a data set one a row: {"text"}, or {"messages"}, which
    the model's chat template renders. Any other file is one document, of which the first `most_characters` are read.
    A data set is ORG/NAME, with /CONFIG and :SPLIT (by default train) where needed.

    Raises InputError where there is no such thing or it has another form, naming the line; LlmoptError where a data
    set cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        raise InputError(f"{name} is a folder; give {SPELLINGS}")
    if path.exists():
        return _json_lines(path, tokenizer) if path.suffix in JSON_LINES else iter([_text(path, most_characters)])
    dataset = _DATASET.fullmatch(name)
    if dataset is None or path.suffix in _FILE_ENDINGS:
        raise InputError(f"there is no file {name}; give {SPELLINGS}")
    rows = _dataset_rows(dataset["id"], dataset["config"], dataset["split"] or "train")
    return (_document(row, tokenizer, f"{name}, row {number}") for number, row in enumerate(rows, 1))


def _text(path: Path, most_characters: int) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(most_characters)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; give {SPELLINGS}") from None
    if "\0" in text:
        raise InputError(f"{path} holds zero bytes, so it is no text; give {SPELLINGS}")
    return text


def _json_lines(path: Path, tokenizer: Tokenizer) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            lines = iter(lambda: file.readline(LONGEST_LINE + 1), b"")
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield _document(_parse(line, where), tokenizer, where)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _parse(line: bytes, where: str) -> Any:
    if len(line) > LONGEST_LINE:
        raise InputError(f"{where} is longer than {LONGEST_LINE} bytes; a .jsonl file has one object a line")
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise InputError(f"{where} is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({first_line(error)}); each line must be {FORMS}") from None


def _document(row: Any, tokenizer: Tokenizer, where: str) -> str:
    """The text of one object. Where it has both forms its text is taken, which suits models of every kind."""
    if not isinstance(row, Mapping):
        raise InputError(f"{where} holds {row!r:.40}; it must be {FORMS}")
    if "text" in row:
        if not isinstance(row["text"], str):
            raise InputError(f'{where}: "text" is {row["text"]!r:.40}, not a string')
        return row["text"]
    if "messages" not in row:
        found = ", ".join(json.dumps(key) for key in list(row)[:8]) or "no keys"
        raise InputError(f"{where} has {found}; it must be {FORMS}")
    messages = row["messages"]
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise InputError(f'{where}: "messages" must be a list of {{"role", "content"}} with strings')
    if tokenizer.chat_template is None:
        raise InputError(f'{where} has "messages", but the model has no chat template; give objects with "text"')
    try:
        return tokenizer.render_chat(messages, add_generation_prompt=False, strftime_now=a_fixed_day)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def a_fixed_day(form: str) -> str:
    """Stands in for `strftime_now`, by which chat templates write today's date: calibration must not depend on it."""
    return datetime(2025, 1, 1).strftime(form)


def _dataset_rows(dataset: str, config: str | None, split: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a data set, fetched as they are read; `dataset` may also be a folder, as the library allows.

    No code comes with the data: from its version 4 on the library runs none.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"there is no file {dataset}; to load a hub data set of that name: pip install 'llmopt[datasets]'"
        ) from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # else every attempt without a network is told
    try:
        yield from datasets.load_dataset(dataset, config, split=split, streaming=True)
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"there is no file {dataset}, and no such data set: {first_line(error)}") from None
    except Exception as error:  # noqa: BLE001 - besides its own errors come those of every network client under it
        raise LlmoptError(f"the data set {dataset} could not be loaded: {first_line(error)}") from None
