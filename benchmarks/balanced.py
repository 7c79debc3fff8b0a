"""The paper's layout: a layer's training step over one that computes as the MPOE reference does.

    python benchmarks/balanced.py [--short]

The layer is T5-base's FFN with 8 experts. "step" is forward and backward; "step memory" is the peak of tensors in it,
above parameters and input. "accumulation" is four micro-batches before one optimizer step, with the experts' matrices
materialized in each micro-batch or once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import nn

from contenders import BASE, LAYOUTS, dense_layer, our_layer, reference_style_layer, step_of
from harness import DTYPES, Row, Samples, Target, compare, parse, parser, rows_over, write_results
from measures import tensor_peak
from mpoe.nn import Accumulation

REFERENCE = "reference-style"
TOKENS = {"full": 4096, "short": 512, "tiny": 3}
MICRO_BATCH = {"full": 512, "short": 512, "tiny": 3}
MICRO_BATCHES = 4
CASE_S = 60.0  # a case stops after the round in which it has taken so long, seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    args = parse(parser("Training of a layer in the paper's layout."), arguments)
    D, F = (32, 64) if args.size == "tiny" else BASE
    dense = dense_layer(D, F)
    layers = {
        "dense": dense,
        "balanced": our_layer(dense, **LAYOUTS["balanced"]),
        REFERENCE: reference_style_layer(dense),
    }
    layers = {name: layer.to(args.device, DTYPES[args.dtype]) for name, layer in layers.items()}
    write_results("balanced", step_rows(layers, D, args) + accumulation_rows(layers, D, args), args)


def step_rows(layers: dict[str, nn.Module], D: int, args: argparse.Namespace) -> list[Row]:
    """Time and memory of one step."""
    x = torch.randn(1, TOKENS[args.size], D, device=args.device, dtype=DTYPES[args.dtype])
    ways = {name: step_of([layer], x) for name, layer in layers.items()}
    times = compare(ways, args.repeats, warmup=1, budget_s=CASE_S)
    peaks = {name: Samples((float(tensor_peak(way)),)) for name, way in ways.items()}
    case = f"{x.shape[1]} tokens"
    return [
        *rows_over(f"step, {case}", times, {("balanced", REFERENCE): Target(1.0)}),
        *rows_over(f"step memory, {case}", peaks, {("balanced", REFERENCE): Target(0.4)}, "MiB"),
    ]


def accumulation_rows(layers: dict[str, nn.Module], D: int, args: argparse.Namespace) -> list[Row]:
    """Several micro-batches, with matrices materialized in each or once."""
    x = torch.randn(1, MICRO_BATCH[args.size], D, device=args.device, dtype=DTYPES[args.dtype])
    balanced = layers["balanced"].train()
    accumulation = Accumulation(balanced)
    ways = {name: _repeated(step_of([layers[name]], x)) for name in ("dense", "balanced")}

    def materialized_once() -> None:
        with accumulation.step():
            for _ in range(MICRO_BATCHES):
                balanced(x).backward(x)
        balanced.zero_grad()

    ways["balanced, materialized once"] = materialized_once
    times = compare(ways, args.repeats, warmup=1, budget_s=CASE_S)
    targets = {("balanced, materialized once", "balanced"): Target(0.4)}
    return rows_over(f"accumulation, {MICRO_BATCHES} times {x.shape[1]} tokens", times, targets)


def _repeated(step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(MICRO_BATCHES):
            step()

    return run


if __name__ == "__main__":
    main()
