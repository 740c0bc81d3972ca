"""Writes a model's tokenizer beside its weights, for a Hugging Face folder or a GGUF header."""

import json
import shutil
from pathlib import Path
from typing import Any

from llmopt.model.gguf_tokenizer import EOS_IDS, describe_encoder, gguf_eos_ids
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
    """The entries of a GGUF header that make up the tokenizer. Raises InputError for one that GGUF cannot hold."""
    if isinstance(source, GGUFSource):
        header = source.file.metadata
        return {key: value for key, value in header.items() if key.startswith("tokenizer.") or key == EOS_IDS}
    tokenizer = source.tokenizer
    entries = describe_encoder(tokenizer.encoder, source.config.vocab_size)
    others = sorted(tokenizer.eos_ids - {tokenizer.eos_id})
    ids = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "eot": others[0] if others else None,
        "padding": tokenizer.pad_id,
    }
    entries |= {f"tokenizer.ggml.{kind}_token_id": value for kind, value in ids.items() if value is not None}
    ends = ([tokenizer.eos_id] if tokenizer.eos_id in tokenizer.eos_ids else []) + others
    if len(ends) > 1 or tuple(ends) != gguf_eos_ids(entries):
        entries[EOS_IDS] = ends
    if tokenizer.chat_template is not None:
        entries["tokenizer.chat_template"] = tokenizer.chat_template
    return entries


def _settings(tokenizer: Tokenizer, source: ModelSource) -> dict[str, Any]:
    """A tokenizer_config.json. The class is one that transformers 4 and 5 both know."""
    text = tokenizer.encoder.id_to_token
    tokens = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
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
