"""Peak resident memory of a whole process that trains, over dense; and of one with a base in int8.

    python benchmarks/memory.py [--short] [--cases training int8]

Every number is that of a fresh process, which imports, builds the model, trains and reports its peak.

Cases:
    training: T5-small trains a few steps as in training.py (1024 tokens, AdamW). "imports alone" stops before it builds
        a model.
    int8: SmolLM2-135M with a frozen base trains 50 steps of 128 tokens as a mixture and saves its adapter. "int8" has
        its base quantised by torchao, "float32" not. Weights are random. The note has the size of the adapter.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import mpoe
from contenders import language_model, model_contenders
from harness import DTYPES, Row, Samples, Target, parse, parser, rows_over, run_child, write_results
from measures import process_peak
from mpoe.models import memory_bytes
from training import training_step

CASES = ("training", "int8")
WAYS = ("imports alone", "dense", "extended", "LoRA", "Switch")
BASES = ("float32", "int8")
TRAINING_STEPS = 3
ADAPTER_STEPS = {"full": 50, "short": 5, "tiny": 2}
LENGTH = 128
TARGETS = {("extended", "dense"): Target(1.1)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write; or be the process that is measured."""
    made = parser("Peak resident memory of training.")
    made.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    made.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="of the training, only these and dense")
    made.add_argument("--train", choices=WAYS, help=argparse.SUPPRESS)  # what the measured processes do
    made.add_argument("--quantize", type=Path, help=argparse.SUPPRESS)
    made.add_argument("--adapt", type=Path, help=argparse.SUPPRESS)
    made.set_defaults(repeats=0, malloc="default")  # kept memory would count as the ways' own
    args = parse(made, arguments)
    if args.train:
        print(json.dumps(train(args)))
    elif args.quantize:
        print(json.dumps(save_bases(args.quantize, args)))
    elif args.adapt:
        print(json.dumps(adapt(args.adapt, args)))
    else:
        rows = {"training": training_rows, "int8": int8_rows}
        write_results("memory", [row for case in args.cases for row in rows[case](args)], args)


def training_rows(args: argparse.Namespace) -> list[Row]:
    """Peaks of processes that train T5-small."""
    peaks: dict[str, list[float]] = {way: [] for way in dict.fromkeys(("dense", *args.ways))}
    for _ in range({"full": 3, "short": 1, "tiny": 1}[args.size]):
        for way, found in peaks.items():
            found.append(float(_child(args, "--train", way)["peak_bytes"]))
    samples = {way: Samples(tuple(found)) for way, found in peaks.items()}
    targets = {} if args.size == "tiny" else TARGETS
    return rows_over("training T5-small, peak resident", samples, targets, "GiB")


def train(args: argparse.Namespace) -> dict[str, int]:
    """Train one model and return the peak of this process."""
    if args.train != "imports alone":
        ways = [] if args.train == "dense" else [args.train]
        model = model_contenders("T5-small", args.size, ways).pop(args.train)
        step = training_step(model.to(args.device, DTYPES[args.dtype]))
        for _ in range(TRAINING_STEPS):
            step()
    return {"peak_bytes": process_peak()}


def int8_rows(args: argparse.Namespace) -> list[Row]:
    """Peaks of processes that train experts around a frozen base, and the size of their adapters."""
    with tempfile.TemporaryDirectory() as folder:
        _child(args, "--quantize", folder)
        found = {base: _child(args, "--adapt", f"{folder}/{base}") for base in BASES}
    peaks = {base: Samples((float(numbers["peak_bytes"]),)) for base, numbers in found.items()}
    case = f"SmolLM2-135M, frozen base, {ADAPTER_STEPS[args.size]} steps, peak resident"
    rows = rows_over(case, peaks, unit="GiB", over="float32")
    notes = {
        base: f"adapter {numbers['adapter_bytes'] / 2**20:.1f} MiB, base {numbers['base_bytes'] / 2**20:.0f} MiB"
        for base, numbers in found.items()
    }
    return [dataclasses.replace(row, note=notes[row.way]) for row in rows]


def save_bases(folder: Path, args: argparse.Namespace) -> dict[str, int]:
    """Save a random SmolLM2 in float32 and in int8."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    language_model("SmolLM2-135M", args.size).save_pretrained(folder / "float32")
    config = TorchAoConfig(Int8WeightOnlyConfig())
    quantized = AutoModelForCausalLM.from_pretrained(folder / "float32", quantization_config=config)
    quantized.save_pretrained(folder / "int8")
    return {}


def adapt(base: Path, args: argparse.Namespace) -> dict[str, int]:
    """Load a base, train a mixture around it, and return the sizes and the peak of this process."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False)
    base_bytes = memory_bytes(model)
    train_experts(mpoe.upcycle(model), ADAPTER_STEPS[args.size])
    adapter = mpoe.save_adapter(model, base.with_name(f"{base.name}-adapter"))
    adapter_bytes = sum(file.stat().st_size for file in adapter.iterdir())
    return {"peak_bytes": process_peak(), "adapter_bytes": adapter_bytes, "base_bytes": base_bytes}


def train_experts(model: PreTrainedModel, steps: int) -> None:
    """Train on random tokens, one sequence a step.

    Args:
        model: Its base is frozen.
        steps: Count.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for _ in range(steps):
        ids = torch.randint(2, model.config.vocab_size, (1, LENGTH))
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _child(args: argparse.Namespace, *flags: str) -> dict[str, int]:
    shared = ["--threads", str(args.threads), "--device", args.device, "--dtype", args.dtype, "--seed", str(args.seed)]
    sizes = {"full": [], "short": ["--short"], "tiny": ["--tiny"]}
    return run_child(__file__, *flags, *shared, *sizes[args.size])


if __name__ == "__main__":
    main()
