"""The files that the engines run, each made once, under build/bench-peers, and what there is to say of each.

All come from the one built-in model. llama.cpp's go the way of its own users, a 16-bit GGUF through llama-quantize, and
vLLM's is a plain checkpoint in bfloat16.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from environments import PEERS, llama_tool

from llmopt.errors import LlmoptError
from llmopt.model.source import GGUFSource, ModelSource, as_dense, open_source
from llmopt.model.tokenizer_files import write_tokenizer
from llmopt.quant.export import parameter_order
from llmopt.weights.artifact import ArtifactFile, ArtifactFolder
from llmopt.weights.quantized import QuantizedTensor
from llmopt.weights.shards import ShardWriter

WORK = PEERS.parent / "bench-peers"
MODEL = "smollm2"
LLMOPT = (sys.executable, "-m", "llmopt.cli.main")
_SHOWN = 2000  # characters of what a failed command said last
_OURS = {
    "llmopt-q4_0": ("llmopt-q4_0.gguf", ("--scheme", "q4_0")),
    "llmopt-q4_1": ("llmopt-q4_1.gguf", ("--scheme", "q4_1")),
    "llmopt-gptq": ("llmopt-gptq", ("--scheme", "w4a16", "--group-size", "64", "--format", "gptq")),
    "llmopt-gptq-head8": (
        "llmopt-gptq-head8",
        ("--scheme", "w4a16", "--group-size", "64", "--format", "gptq", "--head", "w8a16"),
    ),
    "llmopt-w8a8": ("llmopt-w8a8", ("--scheme", "w8a8")),
}


def run(command: list[str], **options: Any) -> str:
    """What a command writes on standard output. Raises LlmoptError with the command and its last words."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", **options)
    except subprocess.TimeoutExpired as error:
        raise LlmoptError(f"{' '.join(command)} was not done within {error.timeout} s") from None
    if done.returncode != 0:
        raise LlmoptError(
            f"{' '.join(command)} failed with status {done.returncode}: ...{(done.stderr or done.stdout)[-_SHOWN:]}"
        )
    return done.stdout


def flags(values: Mapping[str, int | float | str | Path]) -> list[str]:
    """Options of a command and their values, one after the other."""
    return [str(part) for option in values.items() for part in option]


def our_artifact(engine: str) -> Path:
    """The artifact that llmopt runs under this name. Rounding to nearest is as fast to run as any method's result."""
    name, options = _OURS[engine]
    return _quantized(name, options)


def _quantized(name: str, options: tuple[str, ...]) -> Path:
    output = WORK / name
    if not output.exists():
        run([*LLMOPT, "quantize", MODEL, "--method", "rtn", *options, "--output", str(output)])
    return output


def llama_cpp_gguf(kind: str) -> Path:
    """llama.cpp's own quantization of the model to a type such as Q4_K_M."""
    output = WORK / f"llama.cpp-{kind}.gguf"
    if not output.exists():
        source = _quantized("f16.gguf", ("--scheme", "f16"))
        with ArtifactFile(output) as path:
            run([str(llama_tool("quantize")), str(source), str(path), kind])
    return output


def bfloat16_folder() -> Path:
    """The model as a Hugging Face checkpoint that is not quantized."""
    output = WORK / "bfloat16"
    if not output.exists():
        source = open_source(MODEL)
        with ArtifactFolder(output) as folder:
            shards = ShardWriter(folder)
            for name in parameter_order(source):
                shards.add(name, as_dense(source.weight(name), torch.bfloat16))
            shards.close()
            config = source.hf_config | {"torch_dtype": "bfloat16", "dtype": "bfloat16"}
            (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
            write_tokenizer(source, folder)
    return output


def describe(artifact: Path) -> dict[str, Any]:
    """Where it is, the bytes of its weights that a step reads, and the type that the matrix of the output layer is
    stored in: in a small model that is a third of them. Of an embedding that is not the head too a step reads a few
    rows only."""
    source = open_source(str(artifact))
    return {
        "artifact": str(artifact),
        "weight_bytes": sum(file.stat().st_size for file in source.files()) - _embedding_bytes(source),
        "head": _head_type(source),
    }


def _embedding_bytes(source: ModelSource) -> int:
    """Of an embedding that is not the head too."""
    if source.config.tie_word_embeddings:
        return 0
    if isinstance(source, GGUFSource):
        return source.file.tensors["token_embd.weight"].nbytes
    embedding = source.embedding
    return embedding.nbytes if isinstance(embedding, torch.Tensor) else 0


def _head_type(source: ModelSource) -> str:
    if isinstance(source, GGUFSource):
        return source.file.tensors["token_embd.weight" if source.config.tie_word_embeddings else "output.weight"].type
    head = source.head
    if isinstance(head, QuantizedTensor):
        return f"{head.number}{head.bits}, groups of {head.group_size}"
    return str(head.dtype).removeprefix("torch.")
