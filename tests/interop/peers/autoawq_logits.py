"""Runs in autoawq's environment: loads an AWQ artifact and writes its logits.

    python autoawq_logits.py ARTIFACT TOKENS.json LOGITS.npy

TOKENS.json holds sequences of token ids, all of one length; LOGITS.npy becomes float32 [sequences, length, vocabulary].
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from awq import AutoAWQForCausalLM
from awq.models import base

# On a CPU it insists on Intel's extension, which has no build for this torch. Told of no device that it knows, it takes
# its plain torch multiplication, which reads the same words.
base.get_best_device = lambda: "none"


def main() -> None:
    artifact, tokens, output = sys.argv[1:]
    model = AutoAWQForCausalLM.from_quantized(artifact, fuse_layers=False, device_map={"": "cpu"}).eval()
    with torch.inference_mode():
        rows = [
            model(torch.tensor([ids])).logits[0].float().numpy() for ids in json.loads(Path(tokens).read_text("utf-8"))
        ]
    np.save(output, np.stack(rows))


if __name__ == "__main__":
    main()
