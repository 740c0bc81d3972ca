"""Writes a model's tokenizer beside its weights, for a Hugging Face folder or a GGUF header."""

import json
import shutil
from pathlib import Path
from typing import Any

from llmopt.model.gguf_tokenizer import describe_encoder
from llmopt.model.source import FolderSource, GGUFSource, ModelSource
from llmopt.model.tokenizer import Tokenizer

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def write_tokenizer(source: ModelSource, folder: Path) -> None:
    """Put the tokenizer and the chat template into a folder: copies, where the source has files of them."""
    if isinstance(source, FolderSource):
        for name in _FILES:
            if (source.path / name).exists():
                shutil.copyfile(source.path / name, folder / name)
        return
    tokenizer = source.tokenizer
    tokenizer.encoder.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_settings(tokenizer, source), indent=2) + "\n")


def gguf_tokenizer_entries(source: ModelSource) -> dict[str, Any]:
    """The `tokenizer.*` entries of a GGUF header. Raises InputError for a tokenizer that GGUF cannot hold."""
    if isinstance(source, GGUFSource):
        return {key: value for key, value in source.file.metadata.items() if key.startswith("tokenizer.")}
    tokenizer = source.tokenizer
    entries = describe_encoder(tokenizer.encoder, source.config.vocab_size)
    ends = source.config.eos_token_ids or tuple(sorted(tokenizer.eos_ids))
    ids = {
        "bos": tokenizer.bos_id,
        "eos": ends[0] if ends else None,
        "eot": ends[1] if len(ends) > 1 else None,
        "padding": tokenizer.pad_id,
    }
    entries |= {f"tokenizer.ggml.{kind}_token_id": value for kind, value in ids.items() if value is not None}
    if tokenizer.chat_template is not None:
        entries["tokenizer.chat_template"] = tokenizer.chat_template
    return entries


def _settings(tokenizer: Tokenizer, source: ModelSource) -> dict[str, Any]:
    """A tokenizer_config.json. The class is one that transformers 4 and 5 both know."""
    text = tokenizer.encoder.id_to_token
    tokens = {
        "bos_token": tokenizer.bos_id,
        "eos_token": min(tokenizer.eos_ids, default=None),
        "pad_token": tokenizer.pad_id,
    }
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": source.config.max_position,
        "clean_up_tokenization_spaces": False,
        **{name: text(token) for name, token in tokens.items() if token is not None},
    }
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    return settings
