"""What a machine needs for a matrix product: the constants by which ways to compute are compared.

Only ratios decide, so constants that are all wrong by the same factor do no harm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Count = int | float
"""Of elements or bytes; an average may have a fraction."""


@dataclass(frozen=True)
class Product:
    """One step as a matrix product (rows × inner) · (inner × columns).

    Attributes:
        rows: Elements of what only the first operand has, count.
        inner: Elements of what both have, count.
        columns: Elements of what only the second operand has, count.
        is_sum: Whether there is anything that both have; an outer product sums nothing.
        copied: Elements of operands whose dimensions are not in the order of a matrix and that are copied first.
        is_in_parts: Whether every core reads its part of the first operand, as `mpoe.nn.grouped.linear` has it.
    """

    rows: Count
    inner: Count
    columns: Count
    is_sum: bool = True
    copied: Count = 0
    is_in_parts: bool = False

    @property
    def flops(self) -> Count:
        """Multiplications and additions."""
        return self.rows * self.inner * self.columns * (2 if self.is_sum else 1)

    @property
    def elements(self) -> Count:
        """Elements read and written."""
        return self.rows * self.inner + self.inner * self.columns + self.rows * self.columns


@dataclass(frozen=True)
class Machine:
    """Constants of one kind of device.

    A product takes its FLOPs at a rate that thin products do not reach, plus the time to read its operands, plus a
    constant.

    Attributes:
        name: Of the device kind.
        flops: Of a large float32 matrix product, FLOP/s; a number that does not take 4 bytes counts in proportion.
        thin: Rows, or inner elements, at which a product reaches half of `flops`, count, >= 0; few columns are as good
            as many.
        bandwidth: Reading operands that are in the cache, B/s.
        memory_bandwidth: Reading operands that are not, B/s.
        parts_bandwidth: The same where every core reads its part, B/s.
        cache_bytes: What the cache can hold of the operands, bytes.
        fresh_bandwidth: Writing a large result, for which memory is taken anew every time, B/s.
        fresh_bytes: How large such a result is, bytes.
        reorder_bandwidth: Reading and writing elements in another order, B/s.
        overhead: Of one call of an operator, s.
    """

    name: str
    flops: float
    thin: float
    bandwidth: float
    memory_bandwidth: float
    parts_bandwidth: float
    cache_bytes: float
    fresh_bandwidth: float
    fresh_bytes: float
    reorder_bandwidth: float
    overhead: float

    def seconds(self, product: Product, dtype_bytes: int = 4, working_set: Count = 0) -> float:
        """The time of one product, s.

        Args:
            product: Its sizes.
            dtype_bytes: Of an element.
            working_set: What else is read before the same operands come again, bytes.
        """
        rows, inner, columns = product.rows, product.inner, product.columns
        # a matrix times one vector only waits for the matrix
        flops = product.flops if min(rows, inner, columns) > 1 else 0
        read = dtype_bytes * inner * (rows + columns)
        memory_bandwidth = self.parts_bandwidth if product.is_in_parts else self.memory_bandwidth
        hits = min(1.0, self.cache_bytes / max(read, working_set, 1))
        return (
            flops * (1 + self.thin / max(1, min(rows, inner))) * dtype_bytes / 4 / self.flops
            + read * (hits / self.bandwidth + (1 - hits) / memory_bandwidth)
            + self.fresh_seconds(dtype_bytes * rows * columns)
            + (self.reorder_seconds(product.copied, dtype_bytes) if product.copied else 0.0)
            + self.overhead
        )

    def fresh_seconds(self, result_bytes: Count) -> float:
        """What a result costs beside its computation, s: the time to take memory for it, if it is large."""
        return result_bytes / self.fresh_bandwidth if result_bytes > self.fresh_bytes else 0.0

    def reorder_seconds(self, elements: Count, dtype_bytes: int = 4) -> float:
        """The time to write elements in another order, s."""
        return 2 * dtype_bytes * elements / self.reorder_bandwidth + self.overhead


CPU = Machine(
    name="cpu",
    flops=200e9,
    thin=3.0,
    bandwidth=75e9,
    memory_bandwidth=20e9,
    parts_bandwidth=32e9,
    cache_bytes=16e6,
    fresh_bandwidth=4e9,
    fresh_bytes=2.0**25,
    reorder_bandwidth=20e9,
    overhead=5e-6,
)
"""Measured: 2 cores of an AMD EPYC with AVX-512, 32 MiB of shared cache, torch 2.13. From 32 MiB on, glibc's malloc
asks the system for every result's memory."""

CUDA = Machine(
    name="cuda",
    flops=495e12,
    thin=64.0,
    bandwidth=5.5e12,
    memory_bandwidth=3.35e12,
    parts_bandwidth=3.35e12,
    cache_bytes=50e6,
    fresh_bandwidth=math.inf,
    fresh_bytes=math.inf,
    reorder_bandwidth=1.7e12,
    overhead=5e-6,
)
"""Not measured: an H100 SXM by NVIDIA's data sheet (dense TF32, HBM3, 50 MB of cache). How thin products, the cache and
reordering behave, and what a launch takes, are guesses."""


def machine_of(device_type: str) -> Machine:
    """The constants for tensors on a device of this type; those of "cuda" for any accelerator."""
    return CPU if device_type == "cpu" else CUDA
