"""Time of one T5-base feed-forward layer over the dense one, forward and training step, ours and others'.

    python benchmarks/layer.py [--short] [--phases forward step] [--tokens 512 4096] [--ways narrow Switch]

"forward" is evaluation without gradients, of up to 32 tokens through four layers; "step" is forward and backward in
training mode, the input's gradient included. "step memory" is what tensors take in a step above the layer's parameters
and input. "accumulation" is four micro-batches before one optimizer step, with the balanced matrices multiplied out in
each or once.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

from contenders import (
    BASE,
    TransformersExperts,
    dense_layer,
    forward_of,
    layouts,
    our_layer,
    reference_style_layer,
    step_of,
    switch_layer,
    tensorly_layer,
)
from harness import DTYPES, Row, Samples, Target, compare, parse, parser, rows_over_dense, tensor_peak, write_results
from mpoe.nn import Accumulation

PHASES = ("forward", "step", "accumulation")
MICRO_BATCHES = 4
TOKENS = {"full": (1, 32, 512, 4096), "short": (1, 512), "tiny": (3,)}
# A few tokens go through several layers one after the other, as in a model: the weights of one would stay in the cache.
DEPTH, DEEP_TOKENS = 4, 32
ACCUMULATED_TOKENS = {"full": 512, "short": 512, "tiny": 3}
# What needs a copy of an expert's matrices a token, or as many FLOPs as hundreds of dense layers.
ONLY_FEW_TOKENS = {"Transformers batched_mm": 32, "tensorly-torch factorized": 32}
MANY = "separable, 64 experts"

TARGETS: dict[tuple[str, int], dict[tuple[str, str], Target]] = {
    ("forward", 1): {
        ("separable", "dense"): Target(1.6),
        ("narrow", "dense"): Target(1.4),
        ("balanced", "Switch"): Target(1.0),
    },
    ("forward", 32): {
        ("separable", "dense"): Target(1.9),
        ("narrow", "dense"): Target(1.4),
        ("balanced", "Switch"): Target(1.0),
    },
    ("forward", 512): {
        ("separable", "dense"): Target(1.6),
        ("narrow", "dense"): Target(1.2),
        ("balanced", "Switch"): Target(1.0),
        (MANY, "separable"): Target(1.15),
    },
    ("forward", 4096): {
        ("separable", "dense"): Target(1.5),
        ("narrow", "dense"): Target(1.2),
        ("balanced", "dense"): Target(1.1),
        ("balanced", "Switch"): Target(1.0),
        (MANY, "separable"): Target(1.15),
    },
    ("step", 512): {
        ("separable", "dense"): Target(1.5),
        ("narrow", "dense"): Target(1.25),
        (MANY, "separable"): Target(1.15),
    },
    ("step", 4096): {
        ("separable", "dense"): Target(1.5),
        ("narrow", "dense"): Target(1.2),
        ("balanced", "reference-style"): Target(1.0),
        (MANY, "separable"): Target(1.15),
    },
    ("accumulation", 512): {("balanced, rebuilt once", "balanced"): Target(0.4)},
    ("step memory", 4096): {("balanced", "reference-style"): Target(0.4)},
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    made = parser("Time of one feed-forward layer over the dense one.")
    made.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    made.add_argument("--tokens", nargs="+", type=int, help="of a batch, counts")
    made.add_argument("--ways", nargs="+", help="only these (and dense), by their names in the table")
    args = parse(made, arguments)
    layers = build(args)
    rows: list[Row] = []
    for phase in args.phases:
        for tokens in args.tokens or TOKENS[args.size]:
            if phase == "step" and args.size == "full" and not args.tokens and tokens <= DEEP_TOKENS:
                continue  # minutes for what nobody trains with
            if phase == "accumulation":
                rows += _measure_accumulation(tokens, layers, args)
            else:
                rows += _measure(phase, tokens, layers, args)
    write_results("layer", rows, args)


def build(args: argparse.Namespace) -> dict[str, nn.Module]:
    """The layers by name, on their device; those that cannot be had are named and left out."""
    D, F = (32, 64) if args.size == "tiny" else BASE
    dense = dense_layer(D, F)
    makers: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: dense,
        "Switch": lambda: switch_layer(D, F),
        "Transformers grouped_mm": lambda: TransformersExperts(D, F, "grouped_mm"),
        "Transformers batched_mm": lambda: TransformersExperts(D, F, "batched_mm"),
        "tensorly-torch reconstructed": lambda: tensorly_layer(dense, "reconstructed"),
        "tensorly-torch factorized": lambda: tensorly_layer(dense, "factorized"),
        "reference-style": lambda: reference_style_layer(dense),
        **{name: lambda o=options: our_layer(dense, **o) for name, options in layouts().items()},
        MANY: lambda: our_layer(dense, num_experts=64),
    }
    layers = {}
    for name, make in makers.items():
        if not args.ways or name in ("dense", *args.ways):
            try:
                layers[name] = make().to(args.device, DTYPES[args.dtype])
            except ImportError as error:
                print(f"{name} is left out: {error} (pip install tensorly-torch)")
    return layers


def _measure(phase: str, tokens: int, layers: dict[str, nn.Module], args: argparse.Namespace) -> list[Row]:
    x, case = _inputs(tokens, args), f"{phase}, {tokens} tokens"
    measured = {name: layer for name, layer in layers.items() if tokens <= ONLY_FEW_TOKENS.get(name, tokens)}
    if phase == "forward":
        depth = DEPTH if tokens <= DEEP_TOKENS else 1
        case += f", {depth} layers" if depth > 1 else ""
        ways = {name: forward_of(_stack(layer, depth), x) for name, layer in measured.items()}
    else:
        ways = {name: step_of(layer, x) for name, layer in measured.items()}
    rows = rows_over_dense(case, compare(ways, args.repeats), TARGETS.get((phase, tokens), {}))
    if phase == "step":
        peaks = {name: Samples((float(tensor_peak(way)),)) for name, way in ways.items()}
        targets = TARGETS.get(("step memory", tokens), {})
        rows += rows_over_dense(f"step memory, {tokens} tokens", peaks, targets, "MiB")
    return rows


def _measure_accumulation(tokens: int, layers: dict[str, nn.Module], args: argparse.Namespace) -> list[Row]:
    if "balanced" not in layers or tokens != ACCUMULATED_TOKENS[args.size]:
        return []
    x, balanced = _inputs(tokens, args), layers["balanced"]
    accumulation = Accumulation(balanced)
    ways = {name: _several(step_of(layers[name], x)) for name in ("dense", "balanced")}

    def rebuilt_once() -> None:
        with accumulation.step():
            for _ in range(MICRO_BATCHES):
                balanced(x).backward(x)
        balanced.zero_grad()

    ways["balanced, rebuilt once"] = rebuilt_once
    case = f"accumulation, {MICRO_BATCHES} times {tokens} tokens"
    return rows_over_dense(case, compare(ways, args.repeats), TARGETS.get(("accumulation", tokens), {}))


def _stack(layer: nn.Module, depth: int) -> nn.Module:
    return nn.Sequential(layer, *(copy.deepcopy(layer) for _ in range(depth - 1)))


def _several(step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(MICRO_BATCHES):
            step()

    return run


def _inputs(tokens: int, args: argparse.Namespace) -> torch.Tensor:
    width = 32 if args.size == "tiny" else BASE[0]
    return torch.randn(1, tokens, width, device=args.device, dtype=DTYPES[args.dtype])


if __name__ == "__main__":
    main()
