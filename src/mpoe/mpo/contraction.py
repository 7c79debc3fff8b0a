"""In which order the site tensors of an MPO and a batch of rows are contracted, two at a time.

Operands 0 .. m - 1 are the sites, operand m is the batch x (N, i_1, .., i_m). A step (s, t) contracts two operands into
a new one; the first step makes operand m + 1, the next one m + 2, and so on. Every index is on two operands at most, so
a step is always a plain matrix product over what the two share.

Shape letters: N rows; m sites; o, i dimensions of a site.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from mpoe.mpo.machine import Count, Machine, Product
from mpoe.mpo.sites import SiteDims

Order = tuple[tuple[int, int], ...]
"""The steps of a contraction, see above."""
Labels = tuple[int, ...]
"""The indices of an operand, in the order of its dimensions."""
MAX_SEARCHED_SITES = 9  # the search looks at 3^m splits: 9 sites take 0.3 s, 13 would take 25 s


def labels(num_sites: int) -> list[Labels]:
    """The index labels of every operand, in the order of its dimensions (with the outer bonds, of size 1, left out).

    Label 0 is the rows, k the output and m + k the input dimension of site k, 2 m + k the bond behind it (k from 1).
    """
    m = num_sites
    sites = []
    for k in range(1, m + 1):
        before, behind = (2 * m + k - 1,) * (k > 1), (2 * m + k,) * (k < m)
        sites.append((*before, k, m + k, *behind))
    return [*sites, (0, *range(m + 1, 2 * m + 1))]


def right_to_left(num_sites: int) -> Order:
    """The plain order: x through one site after the other, the last one first."""
    m = num_sites
    return tuple((m - 1 - n, m + n) for n in range(m))


def apply_order(dims: SiteDims, bonds: tuple[int, ...], rows: int, machine: Machine | None = None) -> Order:
    """The order in which W is applied to about so many rows: the cheapest that makes nothing of the size of W.

    Args:
        dims: Site dimensions.
        bonds: d_0 .. d_m.
        rows: N, count, >= 0.
        machine: See `contraction_order`.
    """
    return contraction_order(dims, bonds, bucket(rows), machine, dims.padded_out * dims.padded_in // 4)


def check_order(order: Order, num_sites: int) -> None:
    """Refuse steps that do not contract every operand exactly once.

    Raises:
        ValueError: It says which operands there are.
    """
    used = sorted(operand for step in order for operand in step)
    in_time = all(max(step) <= num_sites + n for n, step in enumerate(order))
    if used != list(range(2 * num_sites)) or not in_time:
        raise ValueError(
            f"an order for {num_sites} sites must have {num_sites} steps that use every operand once: the sites from "
            f"0, the rows {num_sites}, results of earlier steps from {num_sites + 1}; got {order}. "
            "mpoe.mpo.contraction.contraction_order makes valid ones."
        )


def bucket(count: int) -> int:
    """The nearest power of sqrt(2), at least 1: what holds for it holds for about as many.

    Args:
        count: >= 0.
    """
    return round(2 ** (round(2 * math.log2(count)) / 2)) if count > 1 else 1


def products(dims: SiteDims, bonds: Sequence[int], rows: int, order: Order) -> list[Product]:
    """The steps of an order as matrix products.

    Args:
        dims: Site dimensions.
        bonds: d_0 .. d_m.
        rows: N, count, >= 0.
        order: The steps.
    """
    network = _Network(dims, bonds, rows)
    operands = list(network.operands)
    steps = []
    for s, t in order:
        steps.append(network.product(operands[s], operands[t]))
        operands.append(result_labels(operands[s], operands[t]))
    return steps


def result_labels(first: Labels, second: Labels) -> Labels:
    """The labels of a step's result: what only the first operand has, then what only the second one has."""
    return tuple(label for label in first if label not in second) + tuple(x for x in second if x not in first)


@lru_cache(maxsize=4096)
def contraction_order(
    dims: SiteDims, bonds: tuple[int, ...], rows: int, machine: Machine | None = None, max_merged: int | None = None
) -> Order:
    """The cheapest order of all, outer products included.

    Args:
        dims: Site dimensions. Chains of more than 9 sites are not searched: theirs is the plain order.
        bonds: d_0 .. d_m.
        rows: N, count, >= 1.
        machine: What a step costs is its `seconds`; None is FLOPs.
        max_merged: Elements that a product of site tensors alone may have, count; None is no limit, so that for many
            rows W is multiplied out first.

    Returns:
        Steps, see the module's first lines.

    Source: exact dynamic programming over subsets of the operands; opt_einsum's "optimal" finds the same FLOPs.
    """
    if dims.num_sites > MAX_SEARCHED_SITES:
        return right_to_left(dims.num_sites)
    network = _Network(dims, bonds, rows)
    cost_of = (lambda product: product.flops) if machine is None else machine.seconds
    full, rows_bit = (1 << len(network.operands)) - 1, 1 << dims.num_sites
    limit = math.inf if max_merged is None else max_merged
    found = {1 << n: _Tree(0, names) for n, names in enumerate(network.operands)}
    for subset in range(1, full + 1):  # a part of a subset is a smaller number, so it comes before it
        for part in _halves(subset):
            # the operand that has the rows comes first; it is the highest bit
            first, second = sorted((part, subset ^ part), reverse=True)
            if first not in found or second not in found:
                continue
            trees = found[first], found[second]
            cost, best = trees[0].cost + trees[1].cost, found[subset].cost if subset in found else math.inf
            if cost >= best:
                continue
            product = network.product(trees[0].labels, trees[1].labels)
            if subset < rows_bit and product.rows * product.columns > limit:
                break
            cost += cost_of(product)
            if cost < best:
                found[subset] = _Tree(cost, result_labels(trees[0].labels, trees[1].labels), (first, second))
    return _as_steps(full, found, len(network.operands))


@dataclass(frozen=True)
class _Tree:
    """How to contract some operands: cost, labels of the result, and the two parts, none for a single operand."""

    cost: Count
    labels: Labels
    parts: tuple[int, int] | None = None


class _Network:
    """The operands' labels and sizes."""

    def __init__(self, dims: SiteDims, bonds: Sequence[int], rows: int) -> None:
        self.sizes = (rows, *dims.out_dims, *dims.in_dims, *bonds[1:-1])
        self.operands = labels(dims.num_sites)

    def product(self, first: Labels, second: Labels) -> Product:
        shared = [label for label in first if label in second]
        inner = self._elements(shared)
        rows, columns = self._elements(first) // inner, self._elements(second) // inner
        # One side of size 1 is no dimension; what remains must be the rows and then what is shared, or the reverse.
        wide = [[label for label in names if self.sizes[label] > 1] for names in (first, second)]
        blocks = [[label for label in names if label in shared] for names in wide]
        copied = sum(
            inner * other
            for names, block, other in zip(wide, blocks, (rows, columns), strict=True)
            if block not in (names[: len(block)], names[len(names) - len(block) :])
        )
        if blocks[0] != blocks[1] and not copied:
            copied = inner * min(rows, columns)
        return Product(rows, inner, columns, is_sum=bool(shared), copied=copied)

    def _elements(self, names: Iterable[int]) -> int:
        return math.prod(self.sizes[label] for label in names)


def _halves(subset: int) -> Iterator[int]:
    """Every way to part a set in two: the parts that have its lowest element, but not the whole."""
    lowest = subset & -subset
    others = part = subset ^ lowest
    while part:
        part = (part - 1) & others
        yield part | lowest


def _as_steps(full: int, found: dict[int, _Tree], num_operands: int) -> Order:
    made = {1 << n: n for n in range(num_operands)}
    steps: list[tuple[int, int]] = []

    def make(subset: int) -> int:
        parts = found[subset].parts
        if parts is not None:
            steps.append((make(parts[0]), make(parts[1])))
            made[subset] = num_operands + len(steps) - 1
        return made[subset]

    make(full)
    return tuple(steps)
