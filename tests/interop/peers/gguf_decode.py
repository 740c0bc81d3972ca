"""Runs in the gguf package's environment: decodes every tensor of a GGUF file and writes a digest of its values.

    python gguf_decode.py FILE.gguf TENSORS.json

TENSORS.json becomes {name: {type, sha256}}, the digest of the float32 values, with negative zeros made positive.
"""

import hashlib
import json
import sys
from pathlib import Path

import gguf
import numpy as np


def main() -> None:
    model, output = sys.argv[1:]
    digests = {}
    for tensor in gguf.GGUFReader(model).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32) + np.float32(0)
        digests[tensor.name] = {"type": tensor.tensor_type.name, "sha256": hashlib.sha256(values.tobytes()).hexdigest()}
    Path(output).write_text(json.dumps(digests), "utf-8")


if __name__ == "__main__":
    main()
