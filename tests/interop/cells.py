"""The matrix: which peer is to read which format and scheme, and what a peer is known not to be able to do."""

from dataclasses import dataclass

WRITTEN = "w4a16-asym, written by autoawq"
GGUF_BLOCKS = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "mxfp4")
_READS = {
    "auto-gptq": {"gptq": ("w4a16", "w8a16", "w3a16", "w2a16", "w4a16-asym")},
    "autoawq": {"awq": ("w4a16-asym", WRITTEN)},
    "transformers": {"compressed-tensors": ("w4a16", "w8a16", "w8a8", "fp8", "nvfp4", "mxfp4")},
    "vllm": {
        "compressed-tensors": ("w4a16", "w8a16", "w8a8", "fp8", "nvfp4", "mxfp4"),
        "gptq": ("w4a16", "w4a16-asym"),
        "awq": ("w4a16-asym",),
    },
    "llama.cpp": {"gguf": ("f16", "bf16", *GGUF_BLOCKS)},
    "gguf": {"gguf": GGUF_BLOCKS},
}
ENVIRONMENT = {"auto-gptq": "legacy", "autoawq": "legacy"}
"""The environments that are not named as their peer."""

HELP = {
    "auto-gptq": "after loading, our script loads the tied embedding once more, which auto-gptq with accelerate 1.15 "
    "leaves all zero where a checkpoint holds no lm_head: without that, no logit is right",
    "autoawq": "our script keeps it from asking for Intel's extension, without which it loads nothing on a CPU",
}
"""What a peer cannot do by itself here, so that a passing cell does not say more than was seen."""


@dataclass(frozen=True)
class Cell:
    peer: str
    format: str
    scheme: str

    @property
    def name(self) -> str:
        return f"{self.peer}/{self.format}/{self.scheme}"

    @property
    def environment(self) -> str:
        return ENVIRONMENT.get(self.peer, self.peer)


CELLS = [
    Cell(peer, format, scheme)
    for peer, formats in _READS.items()
    for format, schemes in formats.items()
    for scheme in schemes
]


@dataclass(frozen=True)
class KnownFault:
    """A failure of the peer's own: what its message or output must contain to be that failure, and why it is so."""

    evidence: str
    reason: str


KNOWN_FAULTS = {
    Cell("auto-gptq", "gptq", "w4a16-asym"): KnownFault(
        "with every zero point stored one lower it agrees",
        "auto-gptq 0.7.1 is older than `checkpoint_format: gptq_v2` and adds one to every zero point",
    ),
    Cell("vllm", "gptq", "w4a16-asym"): KnownFault(
        "Unsupported quantization config: bits=4, sym=False",
        "vLLM's kernels for GPTQ take symmetric weights only; asymmetric ones go to it as AWQ",
    ),
    Cell("vllm", "compressed-tensors", "w8a16"): KnownFault(
        "CPUWNA16LinearKernel cannot implement",
        "vLLM's CPU build has a kernel for weights of 4 bits only; its GPU builds have one for 8",
    ),
    Cell("vllm", "compressed-tensors", "nvfp4"): KnownFault(
        "MarlinNvFp4LinearKernel is not supported", "vLLM's CPU build has no kernel for FP4; its GPU builds have"
    ),
    Cell("vllm", "compressed-tensors", "mxfp4"): KnownFault(
        "Failed to find a kernel that can implement the MXFP4 linear layer",
        "vLLM's CPU build has no kernel for FP4; its GPU builds have",
    ),
}
