"""Time and memory of one feed-forward layer over the dense one: ours, PEFT's LoRA, and Transformers' mixtures.

    python benchmarks/layer.py [--short] [--phases forward step] [--tokens 512 4096] [--ways extended Switch]

The layer is T5-base's FFN (768 × 3072, float32). Weights are cold, as in a model: each way has eight copies of its
layer and each call takes the next one. A single layer of 19 MB stays in a cache of 32 MB, where a dense layer of one
token takes half the time, and ratios mean nothing.

Phases:
    forward: Evaluation without gradients.
    step: Forward and backward in training mode. The base trains in all ways, LoRA's too. "step memory" is the peak of
        tensors in a step above the layer's parameters and input.
    selected: The time of all experts on all tokens over that of the selected experts alone, each on its own tokens.
    shared: SmolLM2's gated FFN (576 × 1536), whose matrices gate and up read the same input: the time of one product
        with each U, as the layer computes them, over that of one product with both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from contenders import (
    BASE,
    LAYOUTS,
    LORA_RANK,
    MANY,
    TransformersExperts,
    cold_copies,
    dense_layer,
    forward_of,
    gated_layer,
    lora_layer,
    our_layer,
    step_of,
    switch_layer,
)
from harness import DTYPES, Row, Samples, Target, compare, parse, parser, rows_over, write_results
from measures import tensor_peak
from mpoe.nn import ExtendedExperts, MoEFeedForward
from mpoe.nn.dispatch import Dispatch

TOKENS = {"full": (1, 32, 512, 4096), "short": (1, 512), "tiny": (3,)}
STEP_TOKENS = 32  # at least: fewer are nobody's training step
OURS, LORA = "extended", f"LoRA of rank {LORA_RANK}"
SELECTED = ((32, 8), (128, 8), (128, 4), (64, 16))  # experts and their rank
FORMS = {"all experts": False, "selected experts": True}
WORTH_IT = Target(1.3, at_most=False)  # a second implementation stays if it is this much faster
FASTER = Target(1.0, at_most=False)
GATED = {"full": (576, 1536), "short": (576, 1536), "tiny": (16, 24)}
CASE_S, PAIR_S = 40.0, 8.0  # a case, and one of two ways, stops after the round in which it takes this long, seconds

TARGETS: dict[tuple[str, int], dict[str, float]] = {
    ("forward", 1): {OURS: 1.45},
    ("forward", 32): {OURS: 1.25},
    ("forward", 512): {OURS: 1.15, MANY: 1.3},
    ("forward", 4096): {OURS: 1.15, MANY: 1.3},
    ("step", 512): {OURS: 1.2, MANY: 1.3},
    ("step", 4096): {OURS: 1.2, MANY: 1.3},
    ("step memory", 512): {OURS: 1.15},
    ("step memory", 4096): {OURS: 1.15},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    phases = {"forward": forward_rows, "step": step_rows, "selected": selected_rows, "shared": shared_rows}
    made = parser("Time and memory of one feed-forward layer over the dense one.")
    made.add_argument("--phases", nargs="+", choices=phases, default=tuple(phases))
    made.add_argument("--tokens", nargs="+", type=int, help="of a batch, counts")
    made.add_argument("--ways", nargs="+", help="of forward and step, only these and dense")
    args = parse(made, arguments)
    args.tokens = args.tokens or TOKENS[args.size]
    rows: list[Row] = []
    for phase in args.phases:
        rows += phases[phase](args)
    write_results("layer", rows, args)


def forward_rows(args: argparse.Namespace) -> list[Row]:
    """Every way's forward over dense."""
    layers = build(args)
    rows: list[Row] = []
    for tokens in args.tokens:
        x = _inputs(tokens, _base(args)[0], args)
        times = _compare({name: forward_of(copies, x) for name, copies in layers.items()}, args)
        rows += rows_over(f"forward, {tokens} tokens", times, targets_of("forward", tokens))
    return rows


def step_rows(args: argparse.Namespace) -> list[Row]:
    """Every way's training step over dense, in time and memory."""
    layers = build(args)
    rows: list[Row] = []
    for tokens in args.tokens:
        if tokens < STEP_TOKENS and args.size != "tiny":
            continue
        x = _inputs(tokens, _base(args)[0], args)
        ways = {name: step_of(copies, x) for name, copies in layers.items()}
        rows += rows_over(f"step, {tokens} tokens", _compare(ways, args), targets_of("step", tokens))
        peaks = {name: Samples((float(tensor_peak(way)),)) for name, way in ways.items()}
        targets = targets_of("step memory", tokens)
        rows += rows_over(f"step memory, {tokens} tokens", peaks, targets, "MiB")
    return rows


def targets_of(phase: str, tokens: int) -> dict[tuple[str, str], Target]:
    """Return the targets of a case: over dense, and, of times, over Transformers' Switch layer."""
    targets = {(way, "dense"): Target(value) for way, value in TARGETS.get((phase, tokens), {}).items()}
    return targets if phase == "step memory" else targets | {(OURS, "Switch"): Target(1.0)}


def build(args: argparse.Namespace) -> dict[str, list[nn.Module]]:
    """Return the copies of every way's layer, on their device."""
    D, F = _base(args)
    dense = dense_layer(D, F)
    makers: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: dense,
        **{name: lambda o=options: our_layer(dense, **o) for name, options in LAYOUTS.items()},
        LORA: lambda: lora_layer(dense),
        "Switch": lambda: switch_layer(D, F),
        "Transformers grouped_mm": lambda: TransformersExperts(D, F),
    }
    wanted = {name: make for name, make in makers.items() if not args.ways or name in ("dense", *args.ways)}
    return {name: cold_copies(_placed(make(), args), dense) for name, make in wanted.items()}


def selected_rows(args: argparse.Namespace) -> list[Row]:
    """All experts on all tokens over the selected ones alone."""
    D, F = _base(args)
    dense = dense_layer(D, F)
    rows: list[Row] = []
    for experts, rank in SELECTED[: 1 if args.size == "tiny" else None]:
        layer = _placed(our_layer(dense, num_experts=experts, expert_rank=rank), args)
        copies = cold_copies(layer, dense)
        ways = {name: [OneForm(copy, selects) for copy in copies] for name, selects in FORMS.items()}
        rows += _rows_of_two(f"{experts} experts of rank {rank}", ways, WORTH_IT, D, args)
    return rows


class OneForm(nn.Module):
    """A mixture's layer whose experts are computed in one form, whichever the layer would choose.

    Args:
        layer: Has a router and extended experts, without a gate matrix.
        selects: Whether each expert is computed on its own tokens alone.
    """

    def __init__(self, layer: Any, selects: bool) -> None:
        super().__init__()
        self.layer: MoEFeedForward = layer
        self.selects = selects

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, D) to (1, T, D)."""
        layer, x_TD = self.layer, x[0]
        assert layer.router is not None, "the layer has several experts"
        route = layer.router(x_TD)
        if self.selects:
            dispatch = Dispatch.by_expert(route)
            routing = (route.weight.flatten()[dispatch.order], dispatch)
        else:
            routing = (route.gates,)
        return layer.down(layer.activation(layer.up(x_TD, *routing)), *routing)[None]


def shared_rows(args: argparse.Namespace) -> list[Row]:
    """One product with each U over one product with both, in a gated FFN."""
    D, F = GATED[args.size]
    layer = _placed(gated_layer(D, F), args)
    ways = {"two products": cold_copies(layer, layer)}
    ways["one product"] = [OneProduct(copy) for copy in ways["two products"]]
    return _rows_of_two(f"gated FFN {D} × {F}", ways, FASTER, D, args)


class OneProduct(nn.Module):
    """A gated mixture whose matrices gate and up share one product for U.

    Args:
        layer: Has a router and extended experts without an activation.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer: MoEFeedForward = layer

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, D) to (1, T, D)."""
        layer, x_TD = self.layer, x[0]
        gate, up = layer.gate, layer.up
        assert layer.router is not None, "the layer has several experts"
        assert isinstance(gate, ExtendedExperts), "the layer is gated and extended"
        assert isinstance(up, ExtendedExperts), "the layer is gated and extended"
        gates = layer.router(x_TD).gates
        scales = torch.stack([gate.scale, up.scale])
        u = nn.functional.linear(x_TD, torch.cat([gate.offsets_U, up.offsets_U]))
        g = gates[:, None, :, None] * scales[:, None, None]
        h = (u.view(len(u), 2, up.num_experts, up.rank) * g).view(len(u), 2, -1)
        gate_TF = gate.base(x_TD).addmm_(h[:, 0], gate.offsets_V.T)
        up_TF = up.base(x_TD).addmm_(h[:, 1], up.offsets_V.T)
        return layer.down(layer.activation(gate_TF) * up_TF, gates)[None]


def _rows_of_two(
    case: str, ways: Mapping[str, Sequence[nn.Module]], target: Target, D: int, args: argparse.Namespace
) -> list[Row]:
    """Forward and step of two ways, the first over the second."""
    first, second = ways
    rows: list[Row] = []
    for phase, of in (("forward", forward_of), ("step", step_of)):
        for tokens in args.tokens:
            x = _inputs(tokens, D, args)
            if phase == "forward" or tokens >= STEP_TOKENS or args.size == "tiny":
                times = _compare({name: of(copies, x) for name, copies in ways.items()}, args, PAIR_S)
                rows += rows_over(f"{phase}, {tokens} tokens, {case}", times, {(first, second): target}, over=second)
    return rows


def _compare(
    ways: Mapping[str, Callable[[], object]], args: argparse.Namespace, budget_s: float = CASE_S
) -> dict[str, Samples]:
    return compare(ways, args.repeats, warmup=1, budget_s=budget_s)


def _base(args: argparse.Namespace) -> tuple[int, int]:
    return (32, 64) if args.size == "tiny" else BASE


def _placed(layer: nn.Module, args: argparse.Namespace) -> nn.Module:
    return layer.to(args.device, DTYPES[args.dtype])


def _inputs(tokens: int, width: int, args: argparse.Namespace) -> Tensor:
    return torch.randn(1, tokens, width, device=args.device, dtype=DTYPES[args.dtype])


if __name__ == "__main__":
    main()
