"""How a layer's time over dense grows: with the number of experts, the model width, and the tokens of a batch.

    python benchmarks/scaling.py [--short] [--sweeps experts width tokens]

One of the three is varied at a time, around 8 experts, width 768 (F = 4 D) and 512 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

from contenders import dense_layer, forward_of, layouts, our_layer, step_of, switch_layer
from harness import DTYPES, Row, compare, parse, parser, rows_over_dense, write_results

EXPERTS, WIDTH, TOKENS = 8, 768, 512
SWEEPS: dict[str, dict[str, tuple[int, ...]]] = {
    "experts": {"full": (2, 4, 8, 16, 32, 64, 128), "short": (2, 64), "tiny": (2,)},
    "width": {"full": (512, 768, 1024, 2048), "short": (512, 1024), "tiny": (32,)},
    "tokens": {"full": (1, 8, 32, 128, 512, 2048, 4096), "short": (32,), "tiny": (3,)},
}
WAYS = ("separable", "narrow", "ends of 64")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    made = parser("Time of a layer over dense by experts, width and tokens.")
    made.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=tuple(SWEEPS))
    args = parse(made, arguments)
    rows: list[Row] = []
    for sweep in args.sweeps:
        for value in SWEEPS[sweep][args.size]:
            at = {"experts": EXPERTS, "width": WIDTH if args.size != "tiny" else 32, "tokens": TOKENS} | {sweep: value}
            rows += _measure(sweep, at["experts"], at["width"], at["tokens"], args)
    write_results("scaling", rows, args)


def _measure(sweep: str, experts: int, D: int, tokens: int, args: argparse.Namespace) -> list[Row]:
    dense = dense_layer(D, 4 * D)
    named = layouts()
    layers: dict[str, nn.Module] = {"dense": dense, "Switch": switch_layer(D, 4 * D, experts)}
    layers |= {name: our_layer(dense, experts, **named[name]) for name in WAYS}
    layers = {name: layer.to(args.device, DTYPES[args.dtype]) for name, layer in layers.items()}
    x = torch.randn(1, tokens, D, device=args.device, dtype=DTYPES[args.dtype])
    case = f"{sweep}: {experts} experts, width {D}, {tokens} tokens"
    forward = compare({name: forward_of(layer, x) for name, layer in layers.items()}, args.repeats)
    step = compare({name: step_of(layer, x) for name, layer in layers.items()}, args.repeats)
    return rows_over_dense(f"forward; {case}", forward, {}) + rows_over_dense(f"step; {case}", step, {})


if __name__ == "__main__":
    main()
