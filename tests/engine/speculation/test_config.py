"""What --speculative-config takes, and in which words it refuses the rest."""

import pytest

from llmopt.engine.llm import LLM
from llmopt.engine.speculation.config import SpeculativeConfig
from llmopt.errors import InputError


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ('"ngram"', "JSON object"),
        ('{"method": "ngram", "prompt_lookup": 3}', "no 'prompt_lookup'; known: method, model, num_speculative_tokens"),
        ('{"method": "eagle"}', "ngram, draft_model, not 'eagle'"),
        ("{}", "ngram, draft_model, not None"),
        ('{"method": "ngram", "num_speculative_tokens": 0}', "from 1 to 32, not 0"),
        ('{"method": "ngram", "num_speculative_tokens": true}', "from 1 to 32, not True"),
        ('{"method": "ngram", "num_speculative_tokens": "4"}', "from 1 to 32, not '4'"),
        ('{"method": "ngram", "prompt_lookup_min": 4, "prompt_lookup_max": 3}', "must not exceed"),
        ('{"method": "ngram", "model": "smollm2"}', "without a model"),
        ('{"method": "draft_model"}', "needs the draft"),
        ('{"method": "draft_model", "model": 3}', "needs the draft"),
        ('{"model": "smollm2", "prompt_lookup_max": 3}', "of the method ngram"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        SpeculativeConfig.parse(text)


def test_what_is_left_out_is_settled() -> None:
    assert SpeculativeConfig.parse(None) is None
    ngram = SpeculativeConfig.of({"method": "ngram"})
    assert (ngram.most, ngram.lookup) == (8, (3, 5))
    assert SpeculativeConfig.of({"method": "ngram", "prompt_lookup_max": 4}).lookup == (4, 4)
    assert SpeculativeConfig.of({"method": "ngram", "prompt_lookup_min": 2}).lookup == (2, 2)
    draft = SpeculativeConfig.parse('{"model": "smollm2", "num_speculative_tokens": 3}')
    assert draft is not None and (draft.method, draft.most) == ("draft_model", 3)


def test_a_draft_must_have_the_vocabulary(tiny_model, tmp_path) -> None:
    import shutil

    import transformers

    folder = tiny_model("llama")[0]
    smaller = transformers.LlamaConfig(
        vocab_size=319, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.AutoModelForCausalLM.from_config(smaller).save_pretrained(tmp_path / "smaller")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / "smaller")
    with pytest.raises(InputError, match="319 tokens and the target one of 320"):
        LLM(str(folder), speculative_config={"method": "draft_model", "model": str(tmp_path / "smaller")})
    other = shutil.copytree(folder, tmp_path / "other")
    words = (other / "tokenizer.json").read_text("utf-8")
    (other / "tokenizer.json").write_text(words.replace('"</s>"', '"<end>"'), "utf-8")
    with pytest.raises(InputError, match="other tokens in its vocabulary"):
        LLM(str(folder), speculative_config={"method": "draft_model", "model": str(other)})
