"""The compiled CPU kernels behind the backend's door."""

import torch

from llmopt.backend.reference import ReferenceBackend
from llmopt.kernels import _cpu  # noqa: F401  (its absence is what makes this import fail)


class CpuBackend(ReferenceBackend):
    """Activations in float32 on the processor."""

    name = "cpu"

    def __init__(self, threads: int) -> None:
        super().__init__("cpu", torch.float32)
        self.threads = threads
