"""Conversion of T5-base's 48 feed-forward matrices to MPOs with 8 experts, exact and truncated, over a numpy TT-SVD.

    python benchmarks/convert.py [--short] [--matrices 48] [--layouts separable]

"load" is `MPOExperts.load_matrix` for every matrix, modules and their memory included, in every gauge; "upcycle" is
`mpoe.upcycle` of the whole model, whose building is not counted. The numpy TT-SVD goes site by site from left to right
(Oseledets 2011) and converts one matrix of each shape; all times of "load" are scaled to 48 matrices. Inside, numpy
computes an SVD in float64 whatever the matrix is. Truncated means to half of the matrix's parameters, those of one
expert. Weights are standard normal, which truncate worst; errors are relative Frobenius.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import mpoe
from contenders import BASE, TINY, t5
from harness import DTYPES, Row, Samples, Target, compare, parse, parser, write_results
from mpoe import MPOEConfig
from mpoe.mpo import MPO, SiteDims, site_dims, truncation_error
from mpoe.nn import MPOExperts

NUMPY = "numpy TT-SVD"
T5_BASE: dict[str, Any] = {"d_model": 768, "d_ff": 3072, "d_kv": 64, "num_layers": 12, "num_heads": 12}
MATRICES, NUM_EXPERTS = 48, 8
LAYOUTS = ("separable", "balanced")
GAUGES = {"exact": ("identity", "central", "sqrt"), "half": ("identity", "sqrt")}
SECONDS = {"exact": Target(3.0), "half": Target(8.0)}
OVER_NUMPY = Target(0.2)
BUDGET_S = {"full": 60, "short": 0, "tiny": 0}  # of a comparison, which has 3 rounds at least; seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    made = parser("Conversion of T5-base's feed-forward matrices to MPOs.")
    made.add_argument("--matrices", type=int, help="of ours, even, count; times are scaled to 48 (48; short: 8)")
    made.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="(both; short: separable)")
    args = parse(made, arguments)
    args.matrices = args.matrices or {"full": MATRICES, "short": 8, "tiny": 2}[args.size]
    args.layouts = args.layouts or LAYOUTS[: 1 if args.size == "short" else 2]
    if args.matrices < 2 or args.matrices % 2:
        made.error(f"--matrices must be even and >= 2, half of each shape; got {args.matrices}")
    D, F = (TINY["d_model"], TINY["d_ff"]) if args.size == "tiny" else BASE
    pair = [torch.randn(size, device=args.device, dtype=DTYPES[args.dtype]) for size in ((F, D), (D, F))]
    rows: list[Row] = []
    for layout in args.layouts:
        for cut in GAUGES:
            rows += load_rows(pair, layout, cut, args)
    write_results("convert", rows + upcycle_rows(args), args)


def load_rows(pair: list[Tensor], layout: str, cut: str, args: argparse.Namespace) -> list[Row]:
    """Every gauge beside numpy.

    Args:
        pair: A matrix of each shape.
        layout: As in `site_dims`.
        cut: "exact" or "half".
        args: From `parse`.
    """
    all_dims = [site_dims(*matrix.shape, layout=layout) for matrix in pair]
    bonds = [bond_for_budget(dims, 0.5) if cut == "half" else None for dims in all_dims]
    # `clone`, so that every matrix comes from memory
    matrices = [[matrix.clone() for _ in range(args.matrices // 2)] for matrix in pair]
    arrays = [matrix.to(torch.promote_types(matrix.dtype, torch.float32)).cpu().numpy() for matrix in pair]

    def in_numpy() -> list[MPO]:
        return [tt_svd(*each) for each in zip(arrays, all_dims, bonds, strict=True)]

    def ours(gauge: str) -> list[MPOExperts]:
        return [
            load(matrix, dims, bond, gauge)
            for same_size, dims, bond in zip(matrices, all_dims, bonds, strict=True)
            for matrix in same_size
        ]

    ways: dict[str, Callable[[], Any]] = {NUMPY: in_numpy} | {g: lambda g=g: ours(g) for g in GAUGES[cut]}
    times = compare(ways, args.repeats, warmup=1, budget_s=BUDGET_S[args.size])
    scaled = {
        way: samples.map(lambda s, n=2 if way == NUMPY else args.matrices: s * MATRICES / n)
        for way, samples in times.items()
    }
    errors = {way: error(made()[0], pair[0]) for way, made in ways.items()}
    note = "" if cut == "exact" else f"bonds at most {bonds[0]}, "
    return [
        Row(
            f"load {MATRICES}, {cut}, {layout}",
            way,
            scaled[way],
            samples.over(scaled[NUMPY]),
            NUMPY,
            None if way == NUMPY else OVER_NUMPY,
            "s",
            f"{note}error {errors[way]:.2g}",
        )
        for way, samples in scaled.items()
    ]


def error(made: MPO | MPOExperts, matrix: Tensor) -> float:
    """Relative Frobenius error of what a way has made of a matrix."""
    operator = made.expert(0) if isinstance(made, MPOExperts) else made
    return truncation_error(operator, matrix.to(operator.central.device))


def load(matrix: Tensor, dims: SiteDims, bond: int | None, gauge: str) -> MPOExperts:
    """Experts that start as one matrix, as `mpoe.upcycle` makes them."""
    with torch.device(matrix.device):
        experts = MPOExperts(dims, NUM_EXPERTS, bond, gauge).to(matrix.dtype)
    experts.load_matrix(matrix)
    return experts


def tt_svd(matrix: np.ndarray, dims: SiteDims, max_bond_dim: int | None) -> MPO:
    """The tensor-train SVD of a matrix, in numpy: site by site from left to right, the rest carries the norm."""
    m = dims.num_sites
    rest = matrix.reshape(*dims.out_dims, *dims.in_dims).transpose([n for k in range(m) for n in (k, m + k)])
    sites, bond = [], 1
    for o, i in list(zip(dims.out_dims, dims.in_dims, strict=True))[:-1]:
        u, s, v = np.linalg.svd(rest.reshape(bond * o * i, -1), full_matrices=False)
        kept = len(s[:max_bond_dim])
        sites.append(u[:, :kept].reshape(bond, o, i, kept))
        rest, bond = s[:kept, None] * v[:kept], kept
    sites.append(rest.reshape(bond, dims.out_dims[-1], dims.in_dims[-1], 1))
    return MPO(tuple(torch.from_numpy(np.ascontiguousarray(site)) for site in sites), dims)


def bond_for_budget(dims: SiteDims, fraction: float) -> int:
    """The largest `max_bond_dim` for which an MPO has at most this fraction of its matrix's parameters."""
    budget = fraction * dims.out_features * dims.in_features
    return max(bond for bond in range(1, max(dims.bond_dims()) + 1) if sum(dims.num_parameters(bond)) <= budget)


def upcycle_rows(args: argparse.Namespace) -> list[Row]:
    """The whole model, a fresh copy every time."""
    base = t5(TINY if args.size == "tiny" else T5_BASE).to(args.device, DTYPES[args.dtype])
    shape = base.config.d_ff, base.config.d_model
    ways = {
        (cut, layout, gauge): MPOEConfig(
            num_experts=NUM_EXPERTS,
            layout=layout,
            gauge=gauge,
            max_bond_dim=bond_for_budget(site_dims(*shape, layout=layout), 0.5) if cut == "half" else None,
        )
        for layout in args.layouts
        for cut, gauges in GAUGES.items()
        for gauge in gauges
    }
    seconds: dict[tuple[str, str, str], list[float]] = {key: [] for key in ways}
    upcycle_time(base, MPOEConfig())  # the first fetches libraries' code
    start = time.perf_counter()
    for n in range(args.repeats):
        if n and time.perf_counter() - start > BUDGET_S[args.size]:
            break
        for key, config in ways.items():
            seconds[key].append(upcycle_time(base, config))
    return [
        Row(f"upcycle, {cut}, {layout}", gauge, Samples(tuple(values)), target=SECONDS[cut], unit="s")
        for (cut, layout, gauge), values in seconds.items()
    ]


def upcycle_time(base: PreTrainedModel, config: MPOEConfig) -> float:
    """Seconds of `mpoe.upcycle` of a copy."""
    model = copy.deepcopy(base)
    start = time.perf_counter()
    mpoe.upcycle(model, config)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
