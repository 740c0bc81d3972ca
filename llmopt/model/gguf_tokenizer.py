"""Between the vocabulary in a GGUF header and a byte-pair encoder. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llmopt.errors import InputError

# GGUF's token types; control and user-defined tokens are matched in the text as they are.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What llama.cpp does where the header names nothing. Its second pattern lacks GPT-2's last part, which changes nothing:
# a space that no pattern matches is a piece of its own too.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2.removesuffix(r"|\s+"), r"\p{N}+", "[0-9][0-9][0-9]")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_MARKS_AND_SPACE}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_MARKS_AND_SPACE}"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# How `tokenizer.ggml.pre` splits a text into words: patterns applied one after the other. A name that is not here
# would tokenize wrongly in silence, so it is refused.
PRE_TOKENIZERS: dict[str, Sequence[str]] = {
    "gpt-2": (_GPT2,),
    "default": _DEFAULT,
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "refact": (r"\p{N}", _GPT2),
    "command-r": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "tekken": (_TEKKEN,),
}
_WHOLE_WORDS_FIRST = {"llama-bpe", "llama3", "llama-v3", "tekken"}  # a word that is a token is not merged up to
_COMPOSED = {"qwen2", "deepseek-r1-qwen"}  # these normalise to NFC


EOS_IDS = "llmopt.eos_token_ids"
"""The key of a header that lists every end token; GGUF's own keys have room for two."""


def gguf_eos_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The end tokens of a GGUF header: those that llmopt listed there, else its eos and eot."""
    ends = metadata.get(EOS_IDS) or [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    return tuple(dict.fromkeys(end for end in ends if end is not None))


def build_encoder(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """The encoder that a GGUF header describes. Raises InputError for an unknown kind, naming those that are known."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise InputError(f"{where} holds no tokenizer")
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        encoder = _byte_level(metadata, tokens, where)
    elif kind == "llama":
        encoder = _sentencepiece(metadata, tokens, where)
    else:
        raise InputError(f"{where} holds a tokenizer of kind {kind!r}, which is not supported; known: gpt2, llama")
    types = metadata.get("tokenizer.ggml.token_type", ())
    encoder.add_tokens(
        [
            AddedToken(token, special=int(kind) == CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=False)
            if int(kind) in (CONTROL, USER_DEFINED)
        ]
    )
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or _pre(metadata) in _WHOLE_WORDS_FIRST)
    bos = _token_id(metadata, "bos", tokens, where)
    if adds_bos and bos is not None:
        opening = tokens[bos]
        encoder.post_processor = processors.TemplateProcessing(
            single=f"{opening} $A", pair=f"{opening} $A $B", special_tokens=[(opening, bos)]
        )
    return encoder


def _token_id(metadata: Mapping[str, Any], name: str, tokens: Sequence[str], where: str) -> int | None:
    """A special token that the header names. Raises InputError where it is not in the vocabulary."""
    token = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if token is not None and (not isinstance(token, int) or not 0 <= token < len(tokens)):
        raise InputError(f"{where} names {token!r} as its {name} token, but its tokens are 0 to {len(tokens) - 1}")
    return token


def _pre(metadata: Mapping[str, Any]) -> str:
    return metadata.get("tokenizer.ggml.pre", "default")


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], where: str) -> Tokenizer:
    pre = _pre(metadata)
    if pre not in PRE_TOKENIZERS:
        raise InputError(f"{where} splits words as {pre!r}, which is not known; known: {', '.join(PRE_TOKENIZERS)}")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", ())]
    whole = next((merge for merge in merges if len(merge) != 2), None)
    if whole is not None:
        raise InputError(f"{where} holds a merge of tokens that is not two of them: {whole[0]!r:.60}")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _WHOLE_WORDS_FIRST)
    except Exception as error:  # noqa: BLE001 - tokenizers raises a bare Exception for merges outside the vocabulary
        reason = " ".join(str(error).split())  # it may have several lines
        raise InputError(f"{where} holds a tokenizer that does not fit together: {reason}") from None
    encoder = Tokenizer(model)
    if pre in _COMPOSED:
        encoder.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre]]
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    encoder.decoder = decoders.ByteLevel()
    return encoder


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], where: str) -> Tokenizer:
    """SentencePiece's byte-pair vocabulary: it has scores instead of merges, and the best score merges first."""
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise InputError(f"{where} holds a SentencePiece tokenizer without a score for each token")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    ranked = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-float(score), vocabulary[left], vocabulary[right], (left, right)))
    merges = [pair for *_, pair in sorted(ranked)]
    unknown = tokens[_token_id(metadata, "unknown", tokens, where) or 0]
    encoder = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = [normalizers.Prepend("▁")] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    encoder.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    encoder.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return encoder


def describe_encoder(encoder: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The GGUF header entries for a byte-level encoder: the inverse of `build_encoder`.

    The vocabulary is filled up to `vocab_size` where the model's embedding has more rows than there are tokens. Raises
    InputError for an encoder that GGUF has no words for, or that has more tokens than the embedding has rows.
    """
    content = json.loads(encoder.to_str())
    splits = _steps(content.get("pre_tokenizer"), "pretokenizers")
    foreign = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    if (
        content["model"].get("type") != "BPE"
        or any(content["model"].get(option) for option in foreign)
        or not any(split["type"] == "ByteLevel" for split in splits)
    ):
        raise InputError("only byte-level BPE tokenizers can be written to GGUF; this one is of another kind")
    patterns = tuple(pattern for split in splits for pattern in _patterns(split))
    normalised = [step["type"] for step in _steps(content.get("normalizer"), "normalizers")]
    if normalised not in ([], ["NFC"]):
        raise InputError(f"the tokenizer normalises by {', '.join(normalised)}, which GGUF cannot say; NFC it can")
    composed = bool(normalised)
    whole_words = bool(content["model"].get("ignore_merges"))
    names = [
        name
        for name, known in PRE_TOKENIZERS.items()
        if tuple(known) == patterns and (name in _COMPOSED) == composed and (name in _WHOLE_WORDS_FIRST) == whole_words
    ]
    if not names:
        raise InputError(
            "the tokenizer splits words in a way that has no name in GGUF; it would tokenize wrongly there"
        )
    vocabulary = encoder.get_vocab(with_added_tokens=True)
    last = max(vocabulary.values(), default=-1)
    if last >= vocab_size:
        raise InputError(f"the tokenizer's last token is {last}, but the model's embedding has only {vocab_size} rows")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, NORMAL
    for i, added in encoder.get_added_tokens_decoder().items():
        types[i] = CONTROL if added.special else USER_DEFINED
    merges = content["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": names[0],
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "tokenizer.ggml.add_bos_token": bool(encoder.encode("", add_special_tokens=True).ids),
    }


def _steps(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The single steps of a normalizer or a pre-tokenizer; `key` is where a sequence of them has its members."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [single for part in step[key] for single in _steps(part, key)]
    return [step]


def _patterns(split: Mapping[str, Any]) -> list[str]:
    """The patterns by which a pre-tokenizer splits, as in PRE_TOKENIZERS; [""] where none does what it does."""
    kind = split["type"]
    if kind == "ByteLevel" and not split.get("add_prefix_space", True):
        return [_GPT2] if split.get("use_regex", True) else []
    if kind == "Digits" and split.get("individual_digits"):
        return [r"\p{N}"]
    if (
        kind == "Split"
        and "Regex" in split["pattern"]
        and split["behavior"] == "Isolated"
        and not split.get("invert", False)
    ):
        return [split["pattern"]["Regex"]]
    return [""]
