"""Which backend runs the model: what was asked for, what this machine has, and why."""

import logging
from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

import torch

from llmopt.backend.base import Backend
from llmopt.backend.reference import ReferenceBackend
from llmopt.errors import InputError, LlmoptError

if TYPE_CHECKING:
    from llmopt.kernels._cpu import Multiplier

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
        dtype: of activations. On a GPU auto is bfloat16. On a CPU, auto and bfloat16 let the kernels round activations
            where they are multiplied (to 8 bits, see `RoundedCpuBackend`); float32 rounds nothing; float16 is the
            reference's alone. Without kernels auto is float32.
        threads: CPU threads, of torch and of the cpu backend; None leaves torch's own choice.

    Raises InputError for settings that contradict each other, LlmoptError for what this machine does not have.
    """
    _check_known(name, dtype)
    place = find_device(name, device)
    if threads is not None:
        torch.set_num_threads(threads)
    if name == "cpu" and place == "cuda":
        raise InputError("--backend cpu runs on the CPU: give --device cpu, or --backend reference for --device cuda")
    if name == "cpu" and dtype == "float16":
        raise InputError("--backend cpu has no float16: give --dtype auto or float32, or --backend reference")
    if place == "cuda":
        return ReferenceBackend(place, DTYPES["bfloat16" if dtype == "auto" else dtype])
    if name == "auto" and dtype == "float16":
        _logger.warning("running on plain torch: the compiled CPU kernels have no float16")
    if name == "reference" or dtype == "float16":
        return ReferenceBackend(place, DTYPES["float32" if dtype == "auto" else dtype])
    return _compiled_backend(name, dtype)


def _compiled_backend(name: str, dtype: str) -> Backend:
    """The cpu backend; reference in its place, with a warning, where it is not built and `name` is auto."""
    try:
        from llmopt.backend.cpu import CpuBackend
        from llmopt.backend.cpu_rounded import RoundedCpuBackend
    except ImportError as error:
        if name == "cpu":
            raise LlmoptError(f"the compiled CPU kernels are not there ({error}): {_HOW_TO_BUILD}") from error
        _logger.warning("running on plain torch: the compiled CPU kernels are not there (%s)", error)
        return ReferenceBackend("cpu", DTYPES["float32" if dtype == "auto" else dtype])
    return (CpuBackend if dtype == "float32" else RoundedCpuBackend)(torch.get_num_threads())


def multiplier() -> "Multiplier | None":
    """The compiled kernels outside a backend, with as many threads as torch has now; None where they are not there."""
    return _multiplier(torch.get_num_threads())


@cache
def _multiplier(threads: int) -> "Multiplier | None":
    try:
        from llmopt.kernels._cpu import Multiplier
    except ImportError:
        return None
    return Multiplier(threads)


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
