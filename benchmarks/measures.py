"""What is measured beside time: memory and floating-point operations."""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils import flop_counter


def tensor_peak(function: Callable[[], object]) -> int:
    """The most memory that tensors take while a function runs, above what is there before, bytes.

    Every allocation of PyTorch's CPU allocator counts, those inside of an operator and of the backward pass too.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler tells on stderr that it starts and stops
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def flops(function: Callable[[], object]) -> int:
    """Return the floating-point operations of the matrix products and the attention in a call, forward and backward."""
    aten, attention = torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"
    unknown = {  # to PyTorch's counter; functions of shapes
        aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1],
        getattr(aten, attention): lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v),
        getattr(aten, f"{attention}_backward"): lambda dy, q, k, v, *_, **__: flop_counter.sdpa_backward_flop_count(
            dy, q, k, v
        ),
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        function()
    return counter.get_total_flops()


def process_peak() -> int:
    """The most memory that this process has had resident so far, bytes.

    Not the parent's `RUSAGE_CHILDREN`: that is the greatest of all children, and begins at the parent's own size.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
