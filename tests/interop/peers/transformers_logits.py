"""Runs in transformers' environment: loads an artifact and writes its logits.

    python transformers_logits.py ARTIFACT TOKENS.json LOGITS.npy

TOKENS.json holds sequences of token ids, all of one length; LOGITS.npy becomes float32 [sequences, length, vocabulary].
Computed in float32, so that what differs from llmopt is what is read from the files and not how it is multiplied.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    artifact, tokens, output = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32).eval()
    with torch.inference_mode():
        # Weights of FP4 become bfloat16 at their first use, whatever dtype was asked for; model.float() is refused.
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.tensor([[0]]))
        torch.nn.Module.float(model)
        rows = [
            model(torch.tensor([ids])).logits[0].float().numpy() for ids in json.loads(Path(tokens).read_text("utf-8"))
        ]
    np.save(output, np.stack(rows))


if __name__ == "__main__":
    main()
