"""What a process finds out that imports everything; `mpoe doctor` starts it, so that a crash or a hang is its own.

Prints one line of JSON: `libraries`, an error or null by name, and what torch says of itself and of the devices.
"""

from __future__ import annotations

import importlib
import json
import platform
import time
from typing import Any

LIBRARIES = ("torch", "transformers", "datasets", "accelerate", "mpoe")
SIZE = 512  # of the square matrices that are multiplied, to see how fast a type of number is


def main() -> None:
    """Import, ask and print."""
    started = time.perf_counter()
    errors = {name: _import_error(name) for name in LIBRARIES}
    seconds = time.perf_counter() - started
    found: dict[str, Any] = {"libraries": errors, "import_seconds": seconds, "machine": platform.machine()}
    if errors["torch"] is None:
        found |= _torch()
    print(json.dumps(found))


def _import_error(name: str) -> str | None:
    try:
        module = importlib.import_module(name)
        if name == "mpoe":
            module.import_names()
    except Exception as error:  # a library that is broken raises anything
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _torch() -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return {
        "threads": torch.get_num_threads(),
        "mkl": torch.backends.mkl.is_available(),
        "cuda_build": torch.version.cuda or torch.version.hip,
        "accelerator": None if accelerator is None else accelerator.type,
        "gpus": [_gpu(torch, index) for index in range(torch.cuda.device_count())] if cuda else [],
        "triton": _import_error("triton"),
        "gflops": {name: _gflops(torch, getattr(torch, name)) for name in ("float32", "bfloat16", "float16")},
    }


def _gpu(torch: Any, index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    with torch.cuda.device(index):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return {"name": properties.name, "free": free, "total": total, "bf16": bf16}


def _gflops(torch: Any, dtype: Any) -> float | None:
    """Of a matrix product on the CPU, the better of two; None if this CPU has none for the type."""
    a = torch.ones(SIZE, SIZE, dtype=dtype)
    best = float("inf")
    try:
        for _ in range(3):  # the first one sets things up
            started = time.perf_counter()
            torch.mm(a, a)
            best = min(best, time.perf_counter() - started)
    except RuntimeError:
        return None
    return 2 * SIZE**3 / best / 1e9
