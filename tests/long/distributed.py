"""`make distributed`: what two processes compute, beside what one computes, on the CPU (gloo).

    make distributed

Every case trains 50 steps and compares the weights with those of one process that takes the same rows a step in two
micro-batches. The counts of balancing are whole numbers, and have to be equal; `balancing_ranks.py` looks at them on
both processes. Sharded training (FSDP2) is Accelerate's own, which it keeps from CPUs: here it is told that these are
GPUs. DeepSpeed's ZeRO-3 runs where the package `deepspeed` is installed.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import KILL_AFTER, tiny_t5, tiny_tokenizer, write_cola, write_sentiment

TOLERANCE = 1e-5  # of a weight after 50 steps
FLAGS = (
    "--model_name_or_path model --data_dir data --num_experts 4 --max_steps 50 --save_steps 15 --use_cpu "
    "--per_device_train_batch_size 4 --gradient_mask_prob 0.5 --disable_tqdm True"
).split()
LAYOUTS = {"extended": [], "balanced": ["--layout", "balanced"]}
SHARDED = ["--fsdp", "--fsdp_config", json.dumps({"transformer_layer_cls_to_wrap": ["T5Block"]})]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# "multi_gpu" is Accelerate's word for processes on one machine; --use_cpu puts them on the CPU.
ACCELERATE = (
    f"{sys.executable} -m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no"
).split()
ZERO_3 = ["--deepspeed", str(Path(__file__).parents[2] / "configs" / "deepspeed_zero3.json")]
_CHILD = """
import sys
how = sys.argv.pop(1)
if how == "ZeRO-3":
    import deepspeed
    deepspeed.init_distributed("gloo")
if how != "whole":
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    state_init = PartialState.__init__
    def init(self, *args, **kwargs):
        state_init(self, *args, **kwargs)
        if self._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    PartialState.__init__ = init
"""


def main() -> None:
    """Run everything; the exit status is 1 if anything was not as it should be."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    with tempfile.TemporaryDirectory(prefix="mpoe-distributed-") as folder:
        os.chdir(folder)
        tiny_t5().save_pretrained("model")
        tiny_tokenizer().save_pretrained("model")
        write_cola(write_sentiment(Path("data"), rows=90), rows=96)
        Path("child.py").write_text(_CHILD + KILL_AFTER)
        table = Table(title="Two processes beside one", title_justify="left")
        for column in ("case", "largest difference", ""):
            table.add_column(column)
        good = True
        for case, difference, note in _cases(console):
            passed = difference <= TOLERANCE
            good &= passed
            table.add_row(case, f"{difference:.1e}", note if passed else f"WRONG: above {TOLERANCE:g}; {note}")
            console.print(f"{case}: {difference:.1e}")
        console.print(table)
    sys.exit(0 if good else 1)


def _cases(console: Console) -> Iterator[tuple[str, float, str]]:
    for layout, flags in LAYOUTS.items():
        flags = [*flags, "--tasks", "cola"]
        console.print(f"{layout}: one process ...")
        one = _one(f"one-{layout}", flags)
        two = _two(f"two-{layout}", flags)
        yield f"{layout}, DDP", _difference(one, two), _same_results(one, two)
        sharded = _two(f"sharded-{layout}", [*flags, *SHARDED], how="FSDP2")
        yield f"{layout}, FSDP2", _difference(one, sharded), _same_results(one, sharded)
        yield f"{layout}, FSDP2, loaded in one process", _logits_difference(one, sharded), "logits, over the largest"
        if importlib.util.find_spec("deepspeed") is None:
            console.print("DeepSpeed is not installed: ZeRO-3 not run")
        else:
            unmasked = [*flags, "--gradient_mask_prob", "0"]
            parted = _two(f"parted-{layout}", [*unmasked, *ZERO_3], how="ZeRO-3")
            one_unmasked = _one(f"unmasked-{layout}", unmasked)
            yield f"{layout}, DeepSpeed ZeRO-3", _difference(one_unmasked, parted), _same_results(one_unmasked, parted)
        moved = f"moved-{layout}"
        _two(moved, flags, killed_after=20)
        _one(moved, flags, killed_after=35)
        yield f"{layout}, killed and moved 2 -> 1 -> 2", _difference(one, _two(moved, flags)), ""
    tasks = ["--tasks", "cola", "sentiment"]
    one, two = _one("one-tasks", tasks), _two("two-tasks", tasks)
    yield "two tasks by temperature, DDP", _difference(one, two), _same_results(one, two)
    one = Path("one-extended")
    launched = _two("launched", ["--tasks", "cola"], launcher=ACCELERATE)
    yield "accelerate launch, DDP", _difference(one, launched), _same_results(one, launched)
    yield "SIGTERM to both, then again", _difference(one, _stopped("stopped", ["--tasks", "cola"])), "saved at one step"
    for layout in LAYOUTS:
        idle = _script("idle_expert.py", layout)
        yield f"{layout}, DDP, an expert without tokens on one process", idle, "gradients"
        ranks = _script("balancing_ranks.py", layout)
        yield f"{layout}, DDP, balancing's counts on both processes", ranks, "beside one process with all rows"


def _script(name: str, layout: str) -> float:
    """What a script beside this one prints last, run by two processes."""
    command = [*TORCHRUN, str(Path(__file__).with_name(name)), layout]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    _check(done)
    return float(done.stdout.split()[-1])


def _one(out: str, flags: list[str], killed_after: int = 0) -> Path:
    command = [sys.executable, "child.py", "whole", str(killed_after), *FLAGS, "--gradient_accumulation_steps", "2"]
    done = subprocess.run([*command, *flags, "--output_dir", out], capture_output=True, text=True, check=False)
    _check(done, killed=bool(killed_after))
    return Path(out)


def _two(
    out: str, flags: list[str], how: str = "whole", killed_after: int = 0, launcher: Sequence[str] = TORCHRUN
) -> Path:
    done = subprocess.run(_of_two(out, flags, how, killed_after, launcher), capture_output=True, text=True, check=False)
    _check(done, killed=bool(killed_after))
    return Path(out)


def _of_two(
    out: str, flags: list[str], how: str = "whole", killed_after: int = 0, launcher: Sequence[str] = TORCHRUN
) -> list[str]:
    return [*launcher, "child.py", how, str(killed_after), *FLAGS, *flags, "--output_dir", out]


def _stopped(out: str, flags: list[str]) -> Path:
    """Told to stop by SIGTERM after its first checkpoint, then run again."""
    process = subprocess.Popen(_of_two(out, flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(Path(out).glob("checkpoint-*/checksums.json")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    if "which is saved" not in stderr:
        raise RuntimeError(f"it was to be saved:\n{stderr[-3000:]}")
    return _two(out, flags)


def _check(done: subprocess.CompletedProcess[str], killed: bool = False) -> None:
    if (done.returncode != 0) is not killed:
        raise RuntimeError(f"exit status {done.returncode}:\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}")


def _difference(one: Path, other: Path) -> float:
    """The largest of a weight; infinite if a count of balancing differs."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    counts = [name for name in first if name.endswith((".balancing.steps", ".balancing.pending"))]
    if not counts:
        raise RuntimeError(f"{one} has no counts of balancing")
    if not all(torch.equal(first[name], second[name]) for name in counts):
        return math.inf
    # sharding gathers a tied weight under each of its names
    return max((second[name] - tensor).abs().max().item() for name, tensor in first.items())


def _same_results(one: Path, other: Path) -> str:
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (one, other))
    different = [k for k in ("tasks", "steps", "gradient_mask", "parameters") if not _alike(first[k], second[k])]
    if different:
        raise RuntimeError(f"results.json of {one} and {other} differ in {different}")
    shares = [[router["share"] for router in r["routers"].values()] for r in (first, second)]
    if shares[0] == shares[1]:
        return "same results, same shares of tokens"
    return "same results; shares of tokens count the rows that fill the last batch too"


def _alike(first: object, second: object) -> bool:
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_alike(first[k], second[k]) for k in first)
    if isinstance(first, float) and isinstance(second, float):
        return abs(first - second) <= 1e-4 * max(1.0, abs(first))
    return first == second


def _logits_difference(one: Path, other: Path) -> float:
    import mpoe

    inputs = {"input_ids": torch.arange(3, 23).reshape(2, 10), "decoder_input_ids": torch.zeros(2, 1, dtype=torch.long)}
    with torch.no_grad():
        first, second = (mpoe.from_pretrained(folder).eval()(**inputs).logits for folder in (one, other))
    return ((first - second).abs().max() / first.abs().max()).item()


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    main()
