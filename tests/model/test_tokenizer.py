"""Tokenizers from GGUF headers and folders, their bytes, and chat templates."""

import io
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmopt.errors import InputError
from llmopt.model import chat_template
from llmopt.model.gguf_tokenizer import PRE_TOKENIZERS, build_encoder, describe_encoder
from llmopt.model.tokenizer import Tokenizer, load_tokenizer, token_bytes_table

TEXTS = [
    "Hello, world!",
    "  two spaces,\ttabs\n\n\nand 12345 numbers 3.14",
    "naïve café — “quotes” … 日本語のテキスト 🙂👩‍👩‍👧",
    "def f(x):\n    return x**2  # comment\n",
    "don't we'll I'M THEY'RE",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
]


@pytest.fixture(scope="module")
def real(smollm2: str) -> Tokenizer:
    return load_tokenizer(smollm2)


@pytest.mark.model
def test_smollm2_tokenizes_as_transformers_does(smollm2: str, real: Tokenizer) -> None:
    import transformers

    from llmopt.model.locate import locate

    file = locate(smollm2)
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in TEXTS:
        assert real.encode(text) == theirs(text).input_ids, text


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_of_tokens_add_up_to_the_text(tiny_model, text: str) -> None:
    tokenizer = _small(tiny_model)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()


@cache
def _small(tiny_model) -> Tokenizer:
    return load_tokenizer(str(tiny_model("llama")[0]))


@pytest.mark.model
def test_chat_template_of_the_real_model(real: Tokenizer) -> None:
    prompt = real.render_chat([{"role": "user", "content": "Hi"}])
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert real.special_ids >= {1, 2}
    assert real.encode_chat([{"role": "user", "content": "Hi"}])[0] == 1


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_a_byte_level_encoder_survives_the_way_through_a_header(pre: str) -> None:
    alphabet = [chr(c) for c in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144))]
    tokens = ["<s>", "</s>", *alphabet, "th", "the", "Ġthe"]
    header = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(tokens) - 2)],
        "tokenizer.ggml.merges": ["t h", "th e", "Ġ the"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    encoder = build_encoder(header, "here")
    described = describe_encoder(encoder, len(tokens) + 3)
    assert described["tokenizer.ggml.tokens"][-3:] == [f"[PAD{len(tokens) + i}]" for i in range(3)]
    assert described["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    again = build_encoder(described | {"tokenizer.ggml.bos_token_id": 0}, "here")
    for text in TEXTS:
        assert again.encode(text).ids == encoder.encode(text).ids


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokenizer.ggml.pre": "mystery"}, "mystery.*llama-bpe"),
        ({"tokenizer.ggml.model": "rwkv"}, "rwkv.*gpt2, llama"),
        ({"tokenizer.ggml.tokens": None}, "no tokenizer"),
        ({"tokenizer.ggml.merges": ["x y"]}, "does not fit together"),
        ({"tokenizer.ggml.model": "llama"}, "score"),
    ],
)
def test_what_is_not_known_is_refused(changes: dict, says: str) -> None:
    header = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.merges": []}
    with pytest.raises(InputError, match=says):
        build_encoder(header | changes, "here.gguf")


@pytest.fixture(scope="module")
def sentencepiece_model():
    """A small SentencePiece model of the kind that Llama 2 and Mistral have, trained here."""
    sentencepiece = pytest.importorskip("sentencepiece")
    content = io.BytesIO()
    lines = ["the cat sat on the mat", "there was another cat in the hat", "Numbers like 12 and 345 too!"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=content,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())


def test_sentencepiece_vocabularies_tokenize_as_sentencepiece_does(sentencepiece_model) -> None:
    model = sentencepiece_model
    count = model.get_piece_size()
    header = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in range(count)],
        "tokenizer.ggml.scores": [model.get_score(i) for i in range(count)],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6 if model.is_byte(i) else 1 for i in range(3, count)]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    encoder = build_encoder(header, "here")
    table = token_bytes_table(encoder)
    for text in ("the cat sat", "another hat  with   spaces", "é日本 🙂", "12 345 999", "x"):
        ids = encoder.encode(text).ids
        assert ids == [1, *model.encode(text)], text
        assert b"".join(table[i] for i in ids[1:]) == (" " + text).encode()
        assert encoder.decode(ids) == text


def test_a_template_runs_in_a_sandbox() -> None:
    for attack in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}aaaaaaaaaaaaaaaaaaaa{% endfor %}",
    ):
        with pytest.raises(InputError, match="chat template"):
            chat_template.render(attack, messages=[])


def test_a_template_may_refuse_messages() -> None:
    with pytest.raises(InputError, match="roles must alternate"):
        chat_template.render("{{ raise_exception('roles must alternate') }}", messages=[])


def test_a_template_can_do_what_models_use() -> None:
    template = "{%- for m in messages %}{% if loop.index0 > 1 %}{% break %}{% endif %}{{ m | tojson }}\n{%- endfor %}"
    assert chat_template.render(template, messages=[{"a": "<é>"}, {}, {}]) == '{"a": "<é>"}{}'


def test_a_model_without_a_template_says_so(tiny_model) -> None:
    folder, _ = tiny_model("qwen2")
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "x"}])
