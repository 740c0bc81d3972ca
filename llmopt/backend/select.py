"""Which backend runs the model: what was asked for, what this machine has, and why."""

import logging
from typing import Literal, get_args

import torch

from llmopt.backend.base import Backend
from llmopt.backend.reference import ReferenceBackend
from llmopt.errors import InputError, LlmoptError

BackendName = Literal["auto", "reference", "cpu"]
DeviceName = Literal["auto", "cpu", "cuda"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HOW_TO_BUILD = "install llmopt again with a C++ compiler and Python's headers, or use --backend reference"

_logger = logging.getLogger(__name__)


def select_backend(name: str, device: str, dtype: str, threads: int | None) -> Backend:
    """The backend for these settings; `auto` takes the fastest that this machine has.

    Args:
        name: auto, reference or cpu.
        device: auto (CUDA where there is one), cpu or cuda.
        dtype: of activations; auto is float32 on a CPU and bfloat16 on a GPU. The cpu backend computes in float32
            only, so auto takes reference for another dtype.
        threads: CPU threads, of torch and of the cpu backend; None leaves torch's own choice.

    Raises InputError for settings that contradict each other, LlmoptError for what this machine does not have.
    """
    _check_known(name, dtype)
    place = find_device(name, device)
    if threads is not None:
        torch.set_num_threads(threads)
    if dtype == "auto":
        dtype = "bfloat16" if place == "cuda" else "float32"
    if name == "cpu" and place == "cuda":
        raise InputError("--backend cpu runs on the CPU: give --device cpu, or --backend reference for --device cuda")
    if name == "cpu" and dtype != "float32":
        raise InputError(f"--backend cpu computes in float32, not {dtype}: give --dtype float32 or --backend reference")
    if name == "reference" or place == "cuda":
        return ReferenceBackend(place, DTYPES[dtype])
    if dtype != "float32":
        _logger.warning("running on plain torch: the compiled CPU kernels compute in float32, not %s", dtype)
        return ReferenceBackend(place, DTYPES[dtype])
    return _compiled_backend(name)


def _compiled_backend(name: str) -> Backend:
    """The cpu backend; reference in its place, with a warning, where it is not built and `name` is auto."""
    try:
        from llmopt.backend.cpu import CpuBackend
    except ImportError as error:
        if name == "cpu":
            raise LlmoptError(f"the compiled CPU kernels are not there ({error}): {_HOW_TO_BUILD}") from error
        _logger.warning("running on plain torch: the compiled CPU kernels are not there (%s)", error)
        return ReferenceBackend("cpu", torch.float32)
    return CpuBackend(torch.get_num_threads())


def fast_products(device: str) -> torch.dtype:
    """The dtype in which this machine multiplies matrices fastest with float32 sums: bfloat16 where it has
    instructions for it, else float32."""
    if device == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if torch.backends.mkldnn.is_available() and _has_bfloat16_products() else torch.float32


def _has_bfloat16_products() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _check_known(name: str, dtype: str) -> None:
    for flag, value, known in (
        ("backend", name, get_args(BackendName)),
        ("dtype", dtype, ("auto", *DTYPES)),
    ):
        if value not in known:
            raise InputError(f"unknown {flag} {value!r}; known: {', '.join(known)}")


def find_device(name: str, device: str) -> str:
    """cpu or cuda, for the name of a backend and what was asked for.

    Raises InputError for an unknown device, LlmoptError where CUDA is asked for and torch sees none.
    """
    known: tuple[str, ...] = get_args(DeviceName)
    if device not in known:
        raise InputError(f"unknown device {device!r}; known: {', '.join(known)}")
    if device == "auto":
        return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise LlmoptError("torch sees no CUDA device: give --device cpu, or install a CUDA build of torch")
    return device
