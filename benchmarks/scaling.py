"""How a layer's time over dense grows: with the experts, their rank, the model width, and the tokens of a batch.

    python benchmarks/scaling.py [--short] [--sweeps experts rank width tokens]

One of the four varies at a time, around 8 experts of rank 8, width 768 (F = 4 D) and 512 tokens. "LoRA" has the total
rank of the experts. Weights are cold, as in layer.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

from contenders import cold_copies, dense_layer, forward_of, lora_layer, our_layer, step_of, switch_layer
from harness import DTYPES, Row, compare, parse, parser, rows_over, write_results

AROUND = {"experts": 8, "rank": 8, "width": 768, "tokens": 512}
SWEEPS: dict[str, dict[str, tuple[int, ...]]] = {
    "experts": {"full": (2, 4, 8, 16, 32, 64, 128), "short": (2, 64), "tiny": (2,)},
    "rank": {"full": (1, 4, 16, 64), "short": (16,), "tiny": (2,)},
    "width": {"full": (512, 1024, 2048), "short": (1024,), "tiny": (32,)},
    "tokens": {"full": (1, 8, 32, 128, 2048), "short": (32,), "tiny": (3,)},
}
CASE_S = 6.0  # a case stops after the round in which it has taken so long, seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    made = parser("Time of a layer over dense by experts, rank, width and tokens.")
    made.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=tuple(SWEEPS))
    args = parse(made, arguments)
    rows: list[Row] = []
    for sweep in args.sweeps:
        for value in SWEEPS[sweep][args.size]:
            at = AROUND | ({"width": 32} if args.size == "tiny" else {}) | {sweep: value}
            rows += _measure(sweep, at["experts"], at["rank"], at["width"], at["tokens"], args)
    write_results("scaling", rows, args)


def _measure(sweep: str, experts: int, rank: int, D: int, tokens: int, args: argparse.Namespace) -> list[Row]:
    dense = dense_layer(D, 4 * D)
    layers: dict[str, nn.Module] = {
        "dense": dense,
        "extended": our_layer(dense, num_experts=experts, expert_rank=rank),
        "LoRA": lora_layer(dense, experts * rank),
    }
    if sweep != "rank":  # whole experts have none
        layers["Switch"] = switch_layer(D, 4 * D, experts)
    copies = {name: cold_copies(layer.to(args.device, DTYPES[args.dtype]), dense) for name, layer in layers.items()}
    x = torch.randn(1, tokens, D, device=args.device, dtype=DTYPES[args.dtype])
    case = f"{sweep}: {experts} experts of rank {rank}, width {D}, {tokens} tokens"
    rows: list[Row] = []
    for phase, of in (("forward", forward_of), ("step", step_of)):
        ways = {name: of(same, x) for name, same in copies.items()}
        rows += rows_over(f"{phase}; {case}", compare(ways, args.repeats, warmup=1, budget_s=CASE_S))
    return rows


if __name__ == "__main__":
    main()
