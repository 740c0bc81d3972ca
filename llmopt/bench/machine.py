"""What the machine is, and its two limits: how fast it reads memory, which bounds decoding (a step reads every weight
once), and how fast it multiplies, which bounds prefill."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROBE_BYTES = 512 << 20  # several times the largest caches
PROBE_SIZE = 2048  # rows and columns of the matrices that are multiplied
PROBE_SECONDS = 0.5


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The report's `machine`: the processor's name, the cores this process may use, the read bandwidth of the memory
    of `device` in 10⁹ bytes per second, the speed of torch's float32 product on it in 10⁹ operations per second, and
    the GPU's name where it is one.

    Call it after the engine has set its number of threads: the probes run with as many.
    """
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb_per_s": round(read_bandwidth(device, PROBE_BYTES, PROBE_SECONDS) / 1e9, 2),
        "float32_gflops": round(float32_flops(device, PROBE_SIZE, PROBE_SECONDS) / 1e9, 1),
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
    """Bytes per second at which an array of `size` bytes is summed."""
    array = torch.ones(size // 4, dtype=torch.float32, device=device)
    return array.nbytes / _least_time(lambda: array.sum().item(), seconds)  # item() also waits for a GPU


def float32_flops(device: torch.device, size: int, seconds: float) -> float:
    """Operations per second, two for a multiplication and an addition, of torch's product of two float32 matrices
    [size, size]."""
    matrix = torch.ones(size, size, device=device)
    return 2 * size**3 / _least_time(lambda: (matrix @ matrix)[0, 0].item(), seconds)


def _least_time(probe: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of the rounds that fit in `seconds`, at least three, since a limit is what the machine can
    do at all."""
    probe()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        probe()
        times.append(time.perf_counter() - start)
    return min(times)
