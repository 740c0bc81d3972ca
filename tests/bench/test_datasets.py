import json

import numpy as np
import pytest

from llmopt.bench.datasets import custom_prompts, random_prompts, random_tokens
from llmopt.errors import InputError


def test_random_tokens_have_the_exact_length_and_no_special_token():
    drawn = np.array(random_tokens(20, 50, 10, {0, 3, 9}, np.random.default_rng(0)))
    assert drawn.shape == (20, 50)
    assert set(drawn.ravel()) == {1, 2, 4, 5, 6, 7, 8}


def test_a_vocabulary_of_special_tokens_only_is_refused():
    with pytest.raises(InputError, match="nothing to draw"):
        random_tokens(1, 1, 2, {0, 1}, np.random.default_rng(0))


def test_random_prompts_with_a_tokenizer_are_its_token_ids(tiny_model):
    folder, _ = tiny_model("llama")
    prompts = random_prompts(8, 30, 7, seed=1, tokenizer=str(folder))
    assert all(len(prompt.content) == 30 and prompt.max_tokens == 7 for prompt in prompts)
    assert min(min(prompt.content) for prompt in prompts) >= 3  # 0 to 2 are special
    assert prompts == random_prompts(8, 30, 7, seed=1, tokenizer=str(folder))
    assert prompts != random_prompts(8, 30, 7, seed=2, tokenizer=str(folder))


def test_random_prompts_without_a_tokenizer_are_words():
    prompts = random_prompts(4, 30, 7, seed=1, tokenizer=None)
    assert all(len(prompt.content.split()) == 30 for prompt in prompts)
    assert len({prompt.content for prompt in prompts}) == 4


def test_custom_prompts_come_from_the_file_in_order(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n\n{"prompt": "two", "max_tokens": 3}\n{"prompt": "three"}\n')
    assert [(p.content, p.max_tokens) for p in custom_prompts(2, file, 9)] == [("one", 9), ("two", 3)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "prompt 1: not JSON"),
        ("[]", "needs an object"),
        (json.dumps({"text": "x"}), "needs an object"),
        (json.dumps({"prompt": ""}), "needs an object"),
        (json.dumps({"prompt": "x", "max_tokens": 0}), "at least 1"),
        (json.dumps({"prompt": "x", "max_tokens": True}), "at least 1"),
    ],
)
def test_a_malformed_line_is_refused_with_its_number(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(line)
    with pytest.raises(InputError, match=message):
        custom_prompts(1, file, 9)


def test_too_few_prompts_are_refused_and_not_repeated(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n')
    with pytest.raises(InputError, match="holds 1 prompts"):
        custom_prompts(2, file, 9)
    with pytest.raises(InputError, match="cannot be read"):
        custom_prompts(2, tmp_path / "missing", 9)
