"""`make chaos`: training runs killed at random moments, and disks that fill up or lie, on real processes and files.

    make chaos [ARGS='--kills 20 --seed 0']

Every killed run is repeated by the same command, and has to end with the same bytes as a run that nobody killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from mpoe.training.run_folder import LOG_FILE
from tiny import tiny_t5, tiny_tokenizer, write_cola

# Where a run is killed: what begins a phase, by its name. A thread of the child kills it some time after the beginning.
PHASES = {
    "a training step": "transformers.Trainer.training_step",
    "a checkpoint's files": "transformers.Trainer._save_checkpoint",
    "a checkpoint's seal": "mpoe.training.checkpoint_files.CheckpointCallback.on_save",
    "an evaluation": "transformers.Seq2SeqTrainer.evaluate",
    "the final save": "mpoe.training.run_folder.RunFolder.save",
}
_CHILD = """
import functools, importlib, json, os, signal, sys, threading, time
phases, phase, nth, delay, measured = json.loads(sys.argv[1])
seconds = {name: [] for name in phases}

def watched(name, original):
    @functools.wraps(original)
    def call(*args, **kwargs):
        if name == phase and len(seconds[name]) == nth:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        started = time.perf_counter()
        seconds[name].append(0.0)
        done = original(*args, **kwargs)
        seconds[name][-1] = time.perf_counter() - started
        return done
    return call

for name, place in phases.items():
    module, owner, method = place.rsplit(".", 2)
    owner = getattr(importlib.import_module(module), owner)
    setattr(owner, method, watched(name, getattr(owner, method)))
from mpoe.cli.main import main
status = main(["finetune", *sys.argv[2:]])
if measured:
    with open(measured, "w") as file: json.dump(seconds, file)
sys.exit(status)
"""
FLAGS = (
    "--model_name_or_path model --tasks cola --data_dir data --num_experts 4 --max_steps 12 --save_steps 3 "
    "--eval_strategy steps --eval_steps 3 --load_best_model_at_end --metric_for_best_model average_metrics "
    "--per_device_train_batch_size 4 --logging_steps 2 --dropout 0.1 --use_cpu --disable_tqdm True"
).split()
VARIANTS = {
    "extended, gradient mask": ["--gradient_mask_prob", "0.5"],
    "balanced, two micro-batches": ["--layout", "balanced", "--gradient_accumulation_steps", "2"],
}
_OF_THE_CLOCK = ("seconds_per_step", "tokens_per_second", "peak_memory")


@dataclass
class Kill:
    """One killed run.

    Attributes:
        variant: Of VARIANTS.
        phase: Of PHASES.
        nth: Which of the run's, from 0.
        delay: Seconds after it has begun.
    """

    variant: str
    phase: str
    nth: int
    delay: float


def main() -> None:
    """Run everything; the exit status is 1 if anything was not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="killed runs, count (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    with tempfile.TemporaryDirectory(prefix="mpoe-chaos-") as folder:
        os.chdir(folder)
        tiny_t5(dropout_rate=0.1).save_pretrained("model")
        tiny_tokenizer().save_pretrained("model")
        write_cola(Path("data"), rows=96)
        good = _kills(args, console)
        for title, cases in (("Signals", _signals), ("Damaged checkpoints", _damage), ("A full disk", _full_disk)):
            console.print(f"\n[bold]{title}[/bold]")
            for passed, case, message in cases():
                good &= passed
                console.print(f"{'as it should be' if passed else 'WRONG'}: {case}")
                console.print(f"  {message}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(0 if good else 1)


def _kills(args: argparse.Namespace, console: Console) -> bool:
    measured = {variant: _reference(variant) for variant in VARIANTS}
    rng = random.Random(args.seed)
    kills = []
    for i in range(args.kills):
        variant, phase = list(VARIANTS)[i % 2], list(PHASES)[i // 2 % len(PHASES)]
        nth = rng.randrange(len(measured[variant][phase]))
        kills.append(Kill(variant, phase, nth, rng.random() * measured[variant][phase][nth]))
    table = Table(title=f"Runs killed with SIGKILL, then repeated (seed {args.seed})", title_justify="left")
    for column in ("run", "killed in", "after, ms", "then", "end"):
        table.add_column(column)
    equal = 0
    with ThreadPoolExecutor(2) as pool:
        for kill, resumed, differences in track(
            pool.map(_kill_and_repeat, range(len(kills)), kills), "Killing", len(kills), console=console
        ):
            equal += not differences
            place = f"{kill.phase}, number {kill.nth + 1}"
            table.add_row(kill.variant, place, f"{kill.delay * 1000:.1f}", resumed, ", ".join(differences) or "equal")
    console.print(table)
    console.print(f"{equal} of {len(kills)} kills resumed equal")
    return equal == len(kills)


def _reference(variant: str) -> dict[str, list[float]]:
    """An unbroken run; how long each phase took, every time."""
    out = _name(variant)
    done = _child([PHASES, None, 0, 0, f"{out}.seconds"], variant, out)
    assert done.returncode == 0, done.stderr
    return json.loads(Path(f"{out}.seconds").read_text())


def _kill_and_repeat(number: int, kill: Kill) -> tuple[Kill, str, list[str]]:
    out = f"kill-{number}"
    while True:
        done = _child([PHASES, kill.phase, kill.nth, kill.delay, None], kill.variant, out)
        if done.returncode == -signal.SIGKILL:
            break
        kill.delay /= 2  # it was over sooner than the time before
        shutil.rmtree(out)
    again = _mpoe(out, kill.variant)
    resumed = [line.rpartition("/")[2] for line in again.stdout.splitlines() if "resuming from" in line]
    differences = _differences(Path(_name(kill.variant)), Path(out)) if again.returncode == 0 else [again.stderr[-300:]]
    shutil.rmtree(out)
    # killed after its last file, a run has nothing left to do
    otherwise = "it had finished" if "Found a finished run" in again.stdout else "from the beginning"
    return kill, resumed[0] if resumed else otherwise, differences


def _differences(expected: Path, got: Path) -> list[str]:
    """Files that two finished runs do not have alike; what a clock has measured does not count."""
    names = {
        str(path.relative_to(folder))
        for folder in (expected, got)
        for path in folder.rglob("*")
        if (path.is_file() and path.parent == folder) or path.suffix in (".safetensors", ".pt", ".pth")
    }
    different = []
    for name in sorted(names - {"training_args.bin"}):  # has the folder's name
        first, second = expected / name, got / name
        if not (first.is_file() and second.is_file()):
            different.append(f"{name} is in one")
        elif name == "results.json":
            both = [json.loads(path.read_text()) for path in (first, second)]
            different += [f"{name}: {k}" for k in both[0] if k not in _OF_THE_CLOCK and both[0][k] != both[1][k]]
        elif first.suffix != ".pt" and first.read_bytes() != second.read_bytes():
            different.append(name)
    return different


def _signals():
    """SIGTERM and Ctrl-C: a checkpoint of the step that ran, and an end as of an unbroken run."""
    variant = next(iter(VARIANTS))
    for number in (signal.SIGTERM, signal.SIGINT):
        out = f"signal-{number.name}"
        process = subprocess.Popen(
            [*_COMMAND, *_flags(variant, out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while not list(Path(out).glob("checkpoint-*")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=120)
        again = _mpoe(out, variant)
        differences = _differences(Path(_name(variant)), Path(out))
        # the step at which it stopped was saved and logged too
        differences = [name for name in differences if not name.startswith("checkpoint-") and name != LOG_FILE]
        passed = process.returncode == 128 + number and "is saved" in stderr and again.returncode == 0
        yield passed and not differences, f"{number.name}, exit status {process.returncode}", _last(stderr)


def _damage():
    """A checkpoint that was cut or has another bit is named, and the one before it does."""
    variant = next(iter(VARIANTS))
    _child([PHASES, "the final save", 0, 0.0, None], variant, "killed")
    last, before = sorted(Path("killed").glob("checkpoint-*"), key=lambda path: -int(path.name[11:]))[:2]

    def damaged(case: tuple[str, str]) -> tuple[bool, str, str]:
        file, way = case
        out = Path(f"damaged-{file}-{way}".replace(" ", "-"))
        shutil.copytree("killed", out)
        path = out / last.name / file
        data = bytearray(path.read_bytes())
        if way == "cut":
            data = data[: len(data) // 2]
        else:
            data[random.Random(file).randrange(len(data))] ^= 1
        path.write_bytes(data)
        refused = _mpoe(str(out), variant)
        passed = refused.returncode == 2 and file in refused.stderr and before.name in refused.stderr
        if file == "model.safetensors":
            shutil.rmtree(out / last.name)
            passed &= _mpoe(str(out), variant).returncode == 0
            passed &= not _differences(Path(_name(variant)), out)
        return passed, f"{last.name}/{file}: {way}", _last(refused.stderr)

    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(
            damaged, [(path.name, way) for path in sorted(last.iterdir()) for way in ("cut", "one bit")]
        )


def _full_disk():
    """A disk with room for one checkpoint, and then for all."""
    variant = next(iter(VARIANTS))
    size = sum(path.stat().st_size for path in Path(_name(variant)).glob("checkpoint-12/*"))
    command = " ".join([*_COMMAND, *_flags(variant, "disk/run")])
    for room, what in ((1.5, "one checkpoint"), (0.3, "no checkpoint")):
        script = (
            f"mkdir -p disk && mount -t tmpfs -o size={int(room * size)} tmpfs disk && ({command}; echo status $?; "
            f"mount -o remount,size={20 * size} disk; find disk -name '*.part' -o -name .saving; {command} && "
            f"cp -r disk/run grown)"
        )
        done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
        if "mount:" in done.stderr or "unshare:" in done.stderr:
            yield True, f"room for {what}: not run, a tmpfs cannot be mounted here", _last(done.stderr)
            continue
        errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        passed = done.returncode == 0 and "status 2" in done.stdout and len(errors) == 1 and "is full" in errors[0]
        passed &= "Traceback" not in done.stderr and ".part" not in done.stdout and ".saving" not in done.stdout
        differences = _differences(Path(_name(variant)), Path("grown")) if passed else ["it failed"]
        shutil.rmtree("grown", ignore_errors=True)
        yield passed and not differences, f"room for {what}, then for all", errors[0] if errors else done.stderr[-2000:]


_COMMAND = (sys.executable, "-m", "mpoe.cli.main", "finetune")


def _mpoe(out: str, variant: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*_COMMAND, *_flags(variant, out)], capture_output=True, text=True, check=False)


def _child(plan: list[object], variant: str, out: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _CHILD, json.dumps(plan), *_flags(variant, out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _flags(variant: str, out: str) -> list[str]:
    return [*FLAGS, *VARIANTS[variant], "--output_dir", out]


def _name(variant: str) -> str:
    return variant.split(",")[0]


def _last(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "(nothing)"


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
