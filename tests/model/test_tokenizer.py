"""Tokenizers from GGUF headers and folders, their bytes, and chat templates."""

import io
import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers

from llmopt.errors import InputError
from llmopt.model import chat_template
from llmopt.model.gguf_tokenizer import EOS_IDS, PRE_TOKENIZERS, build_encoder, describe_encoder, gguf_eos_ids
from llmopt.model.locate import locate
from llmopt.model.source import FolderSource
from llmopt.model.tokenizer import Tokenizer, load_tokenizer, token_bytes_table
from llmopt.model.tokenizer_files import gguf_tokenizer_entries

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
        ({"tokenizer.ggml.merges": ["t h", "the"]}, "a merge of tokens that is not two of them: 'the'"),
        ({"tokenizer.ggml.model": "llama"}, "score"),
        ({"tokenizer.ggml.bos_token_id": 2}, "here.gguf names 2 as its bos token, but its tokens are 0 to 1"),
        ({"tokenizer.ggml.bos_token_id": -1}, "names -1 as its bos token"),
        ({"tokenizer.ggml.bos_token_id": "a"}, "names 'a' as its bos token"),
        (
            {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.scores": [0.0, 0.0],
                "tokenizer.ggml.unknown_token_id": 9,
            },
            "names 9 as its unknown token",
        ),
    ],
)
def test_what_is_not_known_is_refused(changes: dict, says: str) -> None:
    header = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.merges": []}
    with pytest.raises(InputError, match=says):
        build_encoder(header | changes, "here.gguf")


@pytest.mark.parametrize("header", [{}, {"tokenizer.ggml.pre": "default"}])
def test_words_are_split_as_llama_cpp_does_where_nothing_is_named(header: dict) -> None:
    vocabulary = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.merges": []}
    encoder = build_encoder(vocabulary | header, "here")
    pieces = [piece for piece, _ in encoder.pre_tokenizer.pre_tokenize_str("It's 12345 a$==b,  c 1")]
    assert pieces == ["It", "'", "s", "Ġ", "123", "45", "Ġa", "$==", "b", ",", "Ġ", "Ġc", "Ġ", "1"]


def _prefix_space(encoder) -> None:
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def _lowercase(encoder) -> None:
    encoder.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])


def _no_bytes(encoder) -> None:
    encoder.pre_tokenizer = pre_tokenizers.Split(Regex(PRE_TOKENIZERS["gpt-2"][0]), "isolated")


def _inverted(encoder) -> None:
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZERS["gpt-2"][0]), "isolated", invert=True)
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_prefix_space, "splits words in a way that has no name"),
        (_inverted, "splits words in a way that has no name"),
        (_lowercase, "normalises by NFC, Lowercase"),
        (_no_bytes, "only byte-level"),
    ],
)
def test_what_a_header_cannot_say_is_not_left_out(tiny_model, change, says: str) -> None:
    encoder = load_tokenizer(str(tiny_model("llama")[0])).encoder
    describe_encoder(encoder, 320)
    change(encoder)
    with pytest.raises(InputError, match=says):
        describe_encoder(encoder, 320)


def test_more_tokens_than_rows_of_the_embedding_are_refused(tiny_model) -> None:
    encoder = load_tokenizer(str(tiny_model("llama")[0])).encoder
    count = encoder.get_vocab_size()
    describe_encoder(encoder, count)
    with pytest.raises(InputError, match=f"last token is {count - 1}, but .* only {count - 1} rows"):
        describe_encoder(encoder, count - 1)


@pytest.fixture
def several_ends(tiny_model, tmp_path: Path) -> Path:
    """A folder whose config.json names one end token, its generation_config.json four; </s> is 2."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama")[0], folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 2, 7, 0]}))
    return folder


def test_every_end_token_survives_the_way_through_a_header(several_ends: Path) -> None:
    entries = gguf_tokenizer_entries(FolderSource(several_ends))
    assert entries["tokenizer.ggml.eos_token_id"] == 2
    assert entries["tokenizer.ggml.eot_token_id"] == 0
    assert entries[EOS_IDS] == [2, 0, 7, 9]
    assert gguf_eos_ids(entries) == (2, 0, 7, 9)


def test_a_named_end_token_that_ends_nothing_stays_so_in_a_header(several_ends: Path) -> None:
    (several_ends / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    entries = gguf_tokenizer_entries(FolderSource(several_ends))
    assert entries["tokenizer.ggml.eos_token_id"] == 2
    assert gguf_eos_ids(entries) == (9,)


def test_one_end_token_needs_no_list(tiny_model) -> None:
    entries = gguf_tokenizer_entries(FolderSource(tiny_model("llama")[0]))
    assert EOS_IDS not in entries and "tokenizer.ggml.eot_token_id" not in entries
    assert gguf_eos_ids(entries) == (2,)


def test_end_tokens_of_a_header_without_a_list() -> None:
    eos, eot = "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"
    assert gguf_eos_ids({}) == ()
    assert gguf_eos_ids({eot: 0}) == (0,)
    assert gguf_eos_ids({eos: 5, eot: 3}) == (5, 3)
    assert gguf_eos_ids({eos: 5, eot: 5}) == (5,)


def test_a_template_gets_the_end_token_that_the_tokenizer_names(several_ends: Path) -> None:
    tokenizer = load_tokenizer(str(several_ends))
    assert tokenizer.eos_ids == {0, 2, 7, 9}
    assert tokenizer.eos_id == 2
    tokenizer.chat_template = "{{ eos_token }}"
    assert tokenizer.render_chat([]) == "</s>"


def test_without_a_named_end_token_the_first_is_taken(several_ends: Path) -> None:
    (several_ends / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(str(several_ends)).eos_id == 0


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


@pytest.fixture
def sentencepiece_folder(sentencepiece_model, tmp_path: Path) -> Path:
    """A folder of a Llama 2, without weights: its tokenizer is a tokenizer.model alone."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model.serialized_model_proto())
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **tokens}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    return tmp_path


def test_a_folder_with_only_a_sentencepiece_model(sentencepiece_model, sentencepiece_folder: Path) -> None:
    tokenizer = load_tokenizer(str(sentencepiece_folder))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (1, 2, {2})
    for text in ("the cat sat", "another hat  with   spaces", "é日本 🙂", "12 345 999", "x"):
        ids = tokenizer.encode(text)
        assert ids == [1, *sentencepiece_model.encode(text)], text
        assert b"".join(tokenizer.token_bytes(i) for i in ids[1:]) == (" " + text).encode()
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(("content", "says"), [(b"junk", "cannot be converted: "), (b"", "no vocabulary")])
def test_a_sentencepiece_model_that_cannot_be_converted(sentencepiece_folder: Path, content: bytes, says: str) -> None:
    (sentencepiece_folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(InputError, match=f"the tokenizer in {sentencepiece_folder}.*{says}") as caught:
        load_tokenizer(str(sentencepiece_folder))
    assert "\n" not in str(caught.value)


def test_a_template_runs_in_a_sandbox() -> None:
    for attack in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}aaaaaaaaaaaaaaaaaaaa{% endfor %}",
        "{{ 'x' * 10**12 }}",
        "{{ 10**12 * 'x' }}",
        "{% set x = [0] * 10**12 %}",
        "{{ 10 ** 10000000000 > 0 }}",
        "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x > 0 }}",
    ):
        with pytest.raises(InputError, match="chat template"):
            chat_template.render(attack, messages=[])


def test_a_template_may_refuse_messages() -> None:
    with pytest.raises(InputError, match="roles must alternate"):
        chat_template.render("{{ raise_exception('roles must alternate') }}", messages=[])


def test_a_template_can_do_what_models_use() -> None:
    template = "{%- for m in messages %}{% if loop.index0 > 1 %}{% break %}{% endif %}{{ m | tojson }}\n{%- endfor %}"
    assert chat_template.render(template, messages=[{"a": "<é>"}, {}, {}]) == '{"a": "<é>"}{}'


def test_a_template_may_multiply() -> None:
    assert chat_template.render("{{ '-' * 3 }} {{ 3 * 4 }} {{ 2 ** 10 }} {{ 1.5 * 2 }} {{ 4 ** 0.5 }}") == (
        "--- 12 1024 3.0 2.0"
    )


def test_a_template_may_mark_what_the_model_says() -> None:
    template = (
        "{% set x = 'a' %}{% for m in messages %}\n"
        "{% generation %}\n{% set x = 'b' %}{{ m }}{{ x }}{{ loop.index }}{% endgeneration %}{{ x }}\n"
        "{%- endfor %}"
    )
    assert chat_template.render(template, messages=["hi ", "ho "]) == "hi b1aho b2a"


def test_a_name_that_is_no_hub_id() -> None:
    with pytest.raises(InputError, match=r"no hub id: .*foo/my model"):
        locate("foo/my model")


def test_the_hub_is_not_told_who_asks() -> None:
    code = "from llmopt.model import locate; import huggingface_hub.constants as c; assert c.HF_HUB_DISABLE_TELEMETRY"
    subprocess.run([sys.executable, "-c", code], check=True, env={"OMP_NUM_THREADS": "1"})


def test_a_model_without_a_template_says_so(tiny_model) -> None:
    folder, _ = tiny_model("qwen2")
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "x"}])
