"""What the machine is and how fast it reads memory, which bounds decoding: a step reads every weight once."""

import os
import platform
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

PROBE_BYTES = 512 << 20  # several times the largest caches
PROBE_SECONDS = 0.5


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The report's `machine`: the processor's name, the cores this process may use, the read bandwidth of the memory
    of `device` in 10⁹ bytes per second, and the GPU's name where it is one.

    Call it after the engine has set its number of threads: the probe reads with as many.
    """
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb_per_s": round(read_bandwidth(device, PROBE_BYTES, PROBE_SECONDS) / 1e9, 2),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def cpu_name() -> str:
    """The processor's own name, or the machine's kind where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def read_bandwidth(device: torch.device, size: int, seconds: float) -> float:
    """Bytes per second at which an array of `size` bytes is summed: the median of the rounds that fit in `seconds`,
    at least three."""
    array = torch.ones(size // 4, dtype=torch.float32, device=device)
    _read(array)
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        _read(array)
        times.append(time.perf_counter() - start)
    return array.nbytes / median(times)


def _read(array: torch.Tensor) -> None:
    array.sum().item()  # item() also waits for a GPU
