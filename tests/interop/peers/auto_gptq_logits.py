"""Runs in auto-gptq's environment: loads a GPTQ artifact and writes its logits.

    python auto_gptq_logits.py ARTIFACT TOKENS.json LOGITS.npy

TOKENS.json holds sequences of token ids, all of one length; LOGITS.npy becomes float32 [sequences, length, vocabulary].
The kernels that need CUDA are off, so that its plain torch layer unpacks the words.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from auto_gptq import AutoGPTQForCausalLM
from safetensors import safe_open

EMBEDDING = "model.embed_tokens.weight"


def main() -> None:
    artifact, tokens, output = sys.argv[1:]
    quantized = AutoGPTQForCausalLM.from_quantized(
        artifact,
        device="cpu",
        torch_dtype=torch.float32,
        use_safetensors=True,
        use_triton=False,
        disable_exllama=True,
        disable_exllamav2=True,
        inject_fused_attention=False,
        inject_fused_mlp=False,
    )
    restore_embedding(quantized.model, Path(artifact))
    with torch.inference_mode():
        rows = [
            quantized.model(torch.tensor([ids])).logits[0].float().numpy()
            for ids in json.loads(Path(tokens).read_text("utf-8"))
        ]
    np.save(output, np.stack(rows))


def restore_embedding(model: torch.nn.Module, artifact: Path) -> None:
    """Load the embedding once more where it is tied to the head.

    Such a checkpoint holds the embedding only. Having loaded it, accelerate ties both again, by the head's memory,
    which nothing was loaded into.
    """
    if model.config.tie_word_embeddings:
        with safe_open(artifact / "model.safetensors", "pt") as file:
            model.get_input_embeddings().weight.data.copy_(file.get_tensor(EMBEDDING))


if __name__ == "__main__":
    main()
