"""`make soak`: training, evaluation, saving, loading and answering in one process for an hour; does anything grow?

    make soak [ARGS='--minutes 60']

Each round is one `mpoe finetune`, resumed once, and one `mpoe predict`, with the layouts in turn. Memory, threads, open
files and files in the temporary folder are counted after every round; a line is fitted to the memory of the last three
quarters, after caches and allocators have found their size.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import tiny_t5, tiny_tokenizer, write_cola

MAX_SLOPE = 32.0  # MiB an hour: what a week of training could bear
FLAGS = (
    "--model_name_or_path model --tasks cola --data_dir data --num_experts 4 --max_steps 12 --save_steps 4 "
    "--eval_strategy steps --eval_steps 4 --per_device_train_batch_size 4 --use_cpu --disable_tqdm True "
    "--output_dir run"
).split()
VARIANTS = (
    ["--gradient_mask_prob", "0.5"],
    ["--layout", "balanced", "--gradient_accumulation_steps", "2"],
    ["--mpo_layers", "nompo"],
)


def main() -> None:
    """Run the rounds; the exit status is 1 if something grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default: %(default)s)")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    with tempfile.TemporaryDirectory(prefix="mpoe-soak-") as folder:
        os.chdir(folder)
        tempfile.tempdir = folder  # what libraries leave there is counted
        tiny_t5().save_pretrained("model")
        tiny_tokenizer().save_pretrained("model")
        write_cola(Path("data"), rows=48)
        samples = _rounds(args.minutes * 60, console)
    minutes, memory, threads, descriptors, files = np.array(samples).T
    settled = minutes >= minutes[-1] / 4
    slope = 60 * np.polyfit(minutes[settled], memory[settled], 1)[0]
    console.print(
        f"{len(samples)} rounds in {minutes[-1]:.0f} minutes; memory {memory[0]:.0f} MiB after the first, "
        f"{memory[settled][0]:.0f} after a quarter, {memory[-1]:.0f} at the end: {slope:+.1f} MiB an hour"
    )
    grown = {
        name: f"{int(counts[settled][0])} -> {int(counts[-1])}"
        for name, counts in (("threads", threads), ("open files", descriptors), ("files", files))
        if counts[-1] > counts[settled][0]
    }
    console.print(f"grown: {grown or 'nothing'}; threads {int(threads[-1])}, open files {int(descriptors[-1])}")
    sys.exit(1 if grown or slope > MAX_SLOPE else 0)


def _rounds(seconds: float, console: Console) -> list[tuple[float, float, int, int, int]]:
    """Minutes, MiB, threads, open files and files after every round."""
    samples = []
    started = told = time.monotonic()
    while time.monotonic() - started < seconds:
        _round(VARIANTS[len(samples) % len(VARIANTS)])
        gc.collect()
        now = time.monotonic()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # of links that are gone when they are looked at
        files = sum(len(names) for _, _, names in os.walk("."))
        samples.append(((now - started) / 60, memory, threading.active_count(), descriptors, files))
        if now - told > 60:
            told = now
            console.print(
                f"{samples[-1][0]:.0f} min, {len(samples)} rounds: {memory:.0f} MiB, {samples[-1][2]} threads, "
                f"{descriptors} open files, {files} files"
            )
    return samples


def _round(flags: list[str]) -> None:
    from mpoe.cli.main import main as mpoe

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # twelve steps leave experts unused
        assert mpoe(["finetune", *FLAGS, *flags]) == 0
        results = json.loads(Path("run/results.json").read_text())
        Path("run/results.json").unlink()
        shutil.rmtree("run/checkpoint-12")
        assert mpoe(["finetune", *FLAGS, *flags]) == 0  # goes on from step 8
        assert json.loads(Path("run/results.json").read_text())["tasks"] == results["tasks"]
        assert mpoe(["predict", "run", "--task", "cola", "the film is great ."]) == 0
    shutil.rmtree("run")


if __name__ == "__main__":
    main()
