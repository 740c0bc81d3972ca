"""Text to tokens and back, and chat templates. Imports no torch, so that an HTTP process stays small."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Encoder

from llmopt.errors import InputError, LlmoptError
from llmopt.model import chat_template, gguf_tokenizer
from llmopt.model.config import token_ids
from llmopt.model.locate import first_line, locate
from llmopt.weights.gguf_file import GGUFFile


class Tokenizer:
    """A model's vocabulary, its encoder, its end tokens and its chat template.

    Attributes:
        encoder: the byte-pair encoder, added tokens included.
        eos_ids: tokens that end a text.
        eos_id: the one of them that the tokenizer calls its end token, as chat templates do.
        bos_id: the token put before a text, where there is one.
        chat_template: Jinja source, None where the model has none.
    """

    def __init__(
        self,
        encoder: Encoder,
        eos_ids: Sequence[int],
        bos_id: int | None,
        pad_id: int | None,
        chat_template: str | None,
        eos_id: int | None = None,
    ) -> None:
        self.encoder = encoder
        self.encoder.no_truncation()
        self.encoder.no_padding()
        self.eos_ids = frozenset(eos_ids)
        self.eos_id = min(self.eos_ids, default=None) if eos_id is None else eos_id
        self.bos_id = bos_id
        self.pad_id = pad_id
        self.chat_template = chat_template
        self.vocab_size = encoder.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text, with the model's own opening token where `add_special_tokens`."""
        return self.encoder.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return self.encoder.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self.encoder.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        return token_bytes_table(self.encoder)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; nothing for an id outside the vocabulary."""
        table = self._token_bytes
        return table[token_id] if 0 <= token_id < len(table) else b""

    def token_text(self, token_id: int) -> str:
        """A token on its own as text, for reports; half characters show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for a conversation, by the model's chat template.

        Raises InputError where the model has none, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise InputError("the model has no chat template; use completions, or give one with --chat-template")
        special = {"bos_token": self._text_of(self.bos_id), "eos_token": self._text_of(self.eos_id)}
        return chat_template.render(
            self.chat_template, messages=messages, add_generation_prompt=add_generation_prompt, **special, **variables
        )

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """The prompt's tokens; the template writes the special tokens itself."""
        return self.encode(self.render_chat(messages, **variables), add_special_tokens=False)

    def _text_of(self, token_id: int | None) -> str:
        return "" if token_id is None else self.encoder.id_to_token(token_id) or ""


def load_tokenizer(model: str) -> Tokenizer:
    """The tokenizer of MODEL, named as on the command line. Raises InputError where there is none."""
    path = locate(model)
    return tokenizer_from_gguf(GGUFFile(path)) if path.is_file() else tokenizer_from_folder(path)


def tokenizer_from_gguf(file: GGUFFile) -> Tokenizer:
    """The tokenizer in a GGUF header."""
    metadata = file.metadata
    return Tokenizer(
        gguf_tokenizer.build_encoder(metadata, str(file.path)),
        eos_ids=gguf_tokenizer.gguf_eos_ids(metadata),
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        pad_id=metadata.get("tokenizer.ggml.padding_token_id"),
        chat_template=metadata.get("tokenizer.chat_template"),
        eos_id=metadata.get("tokenizer.ggml.eos_token_id"),
    )


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json, or whatever transformers can convert to one."""
    settings = read_json(folder / "tokenizer_config.json", {})
    encoder = _encoder_from_folder(folder)
    named_eos = _named_token(encoder, settings, "eos_token")
    ends = _end_tokens(folder / "generation_config.json") or _end_tokens(folder / "config.json")
    return Tokenizer(
        encoder,
        eos_ids=ends or ([] if named_eos is None else [named_eos]),
        bos_id=_named_token(encoder, settings, "bos_token"),
        pad_id=_named_token(encoder, settings, "pad_token"),
        chat_template=_template_from_folder(folder, settings),
        eos_id=named_eos,
    )


def read_json(path: Path, default: Any = None) -> Any:
    """The object in a JSON file; `default` where there is no such file. Raises InputError where it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if default is not None:
            return default
        raise InputError(f"there is no {path.name} in {path.parent}; a checkpoint folder needs one") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return content


def token_bytes_table(encoder: Encoder) -> list[bytes]:
    """The bytes of every token, by id, for the two kinds of vocabulary there are.

    Byte-level vocabularies (GPT-2's) write each byte as one printable character; SentencePiece's write a space as
    U+2581 and a byte outside the vocabulary as <0xNN>. Added tokens are plain text in both.
    """
    added = {i: token.content.encode() for i, token in encoder.get_added_tokens_decoder().items()}
    kinds = _decoder_types(json.loads(encoder.to_str()).get("decoder"))
    vocabulary = encoder.get_vocab(with_added_tokens=True)
    if "ByteLevel" in kinds:
        convert = _byte_level_bytes
    elif kinds & {"ByteFallback", "Metaspace", "Replace"}:
        convert = _sentencepiece_bytes
    else:
        raise LlmoptError(f"the tokenizer's decoder {sorted(kinds)} is not supported; ByteLevel and ByteFallback are")
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        table[token_id] = added[token_id] if token_id in added else convert(token)
    return table


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where it is printable, else from U+0100 on in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_ALPHABET = byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_ALPHABET[character] for character in token)
    except KeyError:  # a token that was written as plain text
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _decoder_types(decoder: Mapping[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_decoder_types(part) for part in decoder.get("decoders", ())))


def _encoder_from_folder(folder: Path) -> Encoder:
    file = folder / "tokenizer.json"
    if file.exists():
        try:
            return Encoder.from_file(str(file))
        except Exception as error:  # noqa: BLE001 - tokenizers raises a bare Exception for a malformed file
            raise InputError(f"{file} cannot be read: {error}") from None
    if not any((folder / name).exists() for name in ("tokenizer.model", "vocab.json")):
        raise InputError(f"there is no tokenizer in {folder}: it needs a tokenizer.json")
    from transformers import AutoTokenizer

    try:
        encoder = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False).backend_tokenizer
    except Exception as error:  # noqa: BLE001 - its converters raise whatever they meet in a malformed file
        raise InputError(f"the tokenizer in {folder} cannot be converted: {first_line(error)}") from None
    if encoder.get_vocab_size(with_added_tokens=True) <= len(encoder.get_added_tokens_decoder()):
        raise InputError(f"the tokenizer in {folder} has no vocabulary")
    return encoder


def _end_tokens(file: Path) -> tuple[int, ...]:
    return token_ids(read_json(file, {}).get("eos_token_id"), str(file))


def _named_token(encoder: Encoder, settings: Mapping[str, Any], name: str) -> int | None:
    token = settings.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    return encoder.token_to_id(token) if isinstance(token, str) else None


def _template_from_folder(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be read as text: {error}") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None
