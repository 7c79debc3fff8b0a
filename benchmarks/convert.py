"""Conversion of T5-base's 48 feed-forward matrices: to MPOs of the paper's layout, and of the whole model.

    python benchmarks/convert.py [--short] [--matrices 48]

"load" is `MPOExperts.load_matrix` of every matrix with 8 experts, modules and their memory included, in every gauge,
over a TT-SVD in numpy. That goes site by site from left to right (Oseledets, 2011) and converts one matrix of each
shape; all times of "load" are scaled to 48 matrices. Numpy computes an SVD in float64 whatever the matrix is.
"Truncated" means to half of the matrix's parameters. Weights are standard normal, which truncate worst; errors are
relative Frobenius norms.

"upcycle" is `mpoe.upcycle` of the whole model, in the default layout and in the paper's. Its building is not counted.
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
from contenders import BASE, T5_TINY, dense_t5
from harness import DTYPES, Row, Samples, Target, compare, parse, parser, write_results
from mpoe import MPOEConfig
from mpoe.mpo import MPO, SiteDims, site_dims, truncation_error
from mpoe.nn import MPOExperts

NUMPY = "numpy TT-SVD"
T5_BASE: dict[str, Any] = {"d_model": 768, "d_ff": 3072, "d_kv": 64, "num_layers": 12, "num_heads": 12}
MATRICES, NUM_EXPERTS = 48, 8
GAUGES = {"exact": ("identity", "central", "sqrt"), "half": ("identity", "sqrt")}
SECONDS = {"exact": Target(3.0), "half": Target(8.0)}
OVER_NUMPY = Target(0.2)
BUDGET_S = {"full": 60, "short": 0, "tiny": 0}  # of a comparison, which has 3 rounds at least; seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    made = parser("Conversion of T5-base's feed-forward matrices to MPOs.")
    made.add_argument("--matrices", type=int, help="of ours, even, count; times are scaled to 48 (48; short: 8)")
    args = parse(made, arguments)
    args.matrices = args.matrices or {"full": MATRICES, "short": 8, "tiny": 2}[args.size]
    if args.matrices < 2 or args.matrices % 2:
        made.error(f"--matrices must be even and >= 2, half of each shape; got {args.matrices}")
    D, F = (T5_TINY["d_model"], T5_TINY["d_ff"]) if args.size == "tiny" else BASE
    pair = [torch.randn(size, device=args.device, dtype=DTYPES[args.dtype]) for size in ((F, D), (D, F))]
    rows: list[Row] = []
    for cut in GAUGES:
        rows += load_rows(pair, cut, args)
    write_results("convert", rows + upcycle_rows(args), args)


def load_rows(pair: list[Tensor], cut: str, args: argparse.Namespace) -> list[Row]:
    """Every gauge beside numpy.

    Args:
        pair: A matrix of each shape.
        cut: "exact" or "half".
        args: From `parse`.
    """
    all_dims = [site_dims(*matrix.shape) for matrix in pair]
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
            f"load {MATRICES}, {cut}",
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
    base = dense_t5(T5_TINY if args.size == "tiny" else T5_BASE).to(args.device, DTYPES[args.dtype])
    half = bond_for_budget(site_dims(base.config.d_ff, base.config.d_model), 0.5)
    configs = {("exact", "extended"): MPOEConfig(num_experts=NUM_EXPERTS)}
    for cut, gauges in GAUGES.items():
        for gauge in gauges:
            bond = half if cut == "half" else None
            configs[cut, f"balanced, {gauge}"] = MPOEConfig(
                num_experts=NUM_EXPERTS, layout="balanced", gauge=gauge, max_bond_dim=bond
            )
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in configs}
    upcycle_time(base, MPOEConfig())  # the first imports what libraries import late
    start = time.perf_counter()
    for n in range(args.repeats):
        if n and time.perf_counter() - start > BUDGET_S[args.size]:
            break
        for key, config in configs.items():
            seconds[key].append(upcycle_time(base, config))
    return [
        Row(f"upcycle, {cut}", way, Samples(tuple(values)), target=SECONDS[cut], unit="s")
        for (cut, way), values in seconds.items()
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
