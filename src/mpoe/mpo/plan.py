"""Which way to compute y_t = W_{e(t)} x_t with MPOs costs least: a cost model of the ways, from shapes alone.

"apply": the site tensors are contracted with the tokens of one expert after the other, in the cheapest order; W_e is
never multiplied out.
"rebuild": W_e of every active expert multiplied out, a dense product, and in the backward pass the same again.
"cached": W_e is there from an earlier call; evaluation only.

Shape letters: N tokens, n tokens of one active expert; E experts, A of them active; a, b the bonds left and right of
the central tensor; o, i the central site's output and input dimensions; p, q all dimensions of the left and of the
right arm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from mpoe.mpo.contraction import apply_order, bucket, products
from mpoe.mpo.machine import CPU, Count, Machine, Product
from mpoe.mpo.sites import Caps, SiteDims

WAYS = ("apply", "rebuild", "cached")
VERY_FEW_ROWS = 8  # of a CPU's product; below, every core reads its part of the matrix, see mpoe.nn.grouped.linear


@dataclass(frozen=True)
class Cost:
    """What one way needs for one batch, with the backward pass if there are gradients.

    Attributes:
        seconds: Modelled time; only ratios mean something.
        flops: Multiplications and additions of matrix products.
        bytes_moved: Read and written by products, and by reordering.
        memory: Bytes that are there beside the parameters, x and y: at the peak of a call, or, of the cached way,
            from one call to the next.
    """

    seconds: float
    flops: Count
    bytes_moved: Count
    memory: Count


@dataclass(frozen=True)
class Plan:
    """A choice, and what it was chosen from.

    Attributes:
        way: Of `WAYS`.
        costs: Of every way that is possible.
        dense: The cost of one dense layer of the same size.
        refused: Why the other ways are not possible.
        case: What was planned, in words.
        is_override: Whether the way was asked for.
    """

    way: str
    costs: dict[str, Cost]
    dense: Cost
    refused: dict[str, str] = field(default_factory=dict)
    case: str = ""
    is_override: bool = False

    def over_dense(self, way: str) -> float:
        """The time of a way over that of a dense layer, dimensionless."""
        return self.costs[way].seconds / self.dense.seconds

    def explain(self) -> str:
        """The choice and the alternatives, a line each, cheapest first."""
        best = self.costs[self.way].seconds
        lines = [self.case]
        for way in sorted(self.costs, key=lambda way: (way != self.way, self.costs[way].seconds)):
            cost = self.costs[way]
            reason = ("asked for" if self.is_override else "cheapest") if way == self.way else ""
            verdict = f"chosen, {reason}" if reason else f"{cost.seconds / best:.2f}× the time of {self.way}"
            lines.append(
                f"  {way}: {self.over_dense(way):.2f}× the time of a dense layer, "
                f"{cost.flops / self.dense.flops:.2f}× its FLOPs, {_size(cost.memory)} of memory; {verdict}"
            )
        lines += [f"  {way}: not possible, {why}" for way, why in self.refused.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class PlanRow:
    """One way for one number of tokens, as `mpoe inspect --plan` shows it; attributes as in `Cost` and `Plan`."""

    tokens: int
    way: str
    is_chosen: bool
    over_dense: float
    flops: Count
    bytes_moved: Count
    memory: Count


def plan(
    dims: SiteDims,
    max_bond_dim: Caps,
    num_experts: int,
    tokens: int,
    active_experts: int | None = None,
    dtype_bytes: int = 4,
    needs_grad: bool = False,
    cache_bytes: int = 0,
    machine: Machine = CPU,
    way: str | None = None,
) -> Plan:
    """Choose the way to compute one matrix of a layer of experts.

    Costs are those of the next power of sqrt(2) in tokens and in active experts, so that a plan is made once for all
    batches of about one size; from the second call on it takes some microseconds.

    Args:
        dims: Site dimensions.
        max_bond_dim: Truncation, count; None is full bonds.
        num_experts: E, count, >= 1.
        tokens: N, with a token counted once for each expert that it goes to, count, >= 0.
        active_experts: Experts that have tokens, count; None is what is expected if every expert is as likely.
        dtype_bytes: Of an element.
        needs_grad: Whether a backward pass will follow.
        cache_bytes: Memory for the W_e of all experts of this matrix, bytes, >= 0; 0 is no cache.
        machine: Constants of the device, see `machine_of`.
        way: Of `WAYS`: take this one whatever it costs.

    Raises:
        ValueError: A count that makes no sense, an unknown way, or the cached way with gradients.
    """
    if tokens < 0 or num_experts < 1 or cache_bytes < 0:
        raise ValueError(
            f"tokens and cache_bytes must be >= 0 and num_experts >= 1; got {tokens}, {cache_bytes} and {num_experts}"
        )
    if active_experts is not None:
        if not 0 <= active_experts <= num_experts:
            raise ValueError(f"active_experts must be in 0..num_experts = {num_experts}; got {active_experts}")
        active_experts = bucket(active_experts)
    if way is not None and way not in WAYS:
        raise ValueError(f"way must be one of {WAYS} or None; got {way!r}")
    if way == "cached" and needs_grad:
        raise ValueError("way = 'cached' must be without gradients, cached matrices have none; got needs_grad = True")
    is_cache_large_enough = num_experts * dims.padded_out * dims.padded_in * dtype_bytes <= cache_bytes
    return _plan(
        dims, max_bond_dim, num_experts, bucket(tokens), active_experts, dtype_bytes, needs_grad,
        is_cache_large_enough, machine, way,
    )  # fmt: skip


def plan_rows(
    dims: SiteDims,
    max_bond_dim: Caps,
    num_experts: int,
    token_counts: Iterable[int],
    dtype_bytes: int = 4,
    needs_grad: bool = False,
    cache_bytes: int = 0,
    machine: Machine = CPU,
    way: str | None = None,
) -> list[PlanRow]:
    """Plans for several numbers of tokens as rows of a table: every possible way of each, the chosen one first.

    Args:
        token_counts: N of each plan, count, >= 0.
        dims: This and the others as in `plan`.
        max_bond_dim: See `plan`.
        num_experts: See `plan`.
        dtype_bytes: See `plan`.
        needs_grad: See `plan`.
        cache_bytes: See `plan`.
        machine: See `plan`.
        way: See `plan`.
    """
    rows = []
    for tokens in token_counts:
        made = plan(dims, max_bond_dim, num_experts, tokens, None, dtype_bytes, needs_grad, cache_bytes, machine, way)
        for name in sorted(made.costs, key=lambda name: (name != made.way, made.costs[name].seconds)):
            cost = made.costs[name]
            ratio = made.over_dense(name)
            rows.append(PlanRow(tokens, name, name == made.way, ratio, cost.flops, cost.bytes_moved, cost.memory))
    return rows


def expected_active(num_experts: int, tokens: int) -> float:
    """Experts that get at least one of N tokens if every expert is as likely, count, in 1 .. E."""
    return max(1.0, num_experts * (1 - (1 - 1 / num_experts) ** tokens))


@lru_cache(maxsize=4096)
def _plan(
    dims: SiteDims,
    max_bond_dim: Caps,
    num_experts: int,
    tokens: int,
    active_experts: int | None,
    dtype_bytes: int,
    needs_grad: bool,
    is_cache_large_enough: bool,
    machine: Machine,
    way: str | None,
) -> Plan:
    active = expected_active(num_experts, tokens) if active_experts is None else min(active_experts, tokens)
    layer = _Layer(dims, dims.bond_dims(max_bond_dim), num_experts, tokens, active, dtype_bytes, needs_grad, machine)
    costs = {"apply": layer.apply(), "rebuild": layer.rebuild()}
    refused = {}
    if needs_grad:
        refused["cached"] = "cached matrices have no gradients"
    elif is_cache_large_enough or way == "cached":
        costs["cached"] = layer.cached()
    else:
        refused["cached"] = f"the cache must have {_size(num_experts * layer.matrix_bytes)}, it is smaller"
    case = (
        f"{dims.out_features}×{dims.in_features} (bonds {layer.bonds}), {num_experts} experts, about {tokens} tokens "
        f"({tokens / active:.3g} for each of {active:.3g} active experts), {dtype_bytes} bytes a number, "
        f"{'with' if needs_grad else 'without'} gradients, on {machine.name}:"
    )
    chosen = way or min(costs, key=lambda way: costs[way].seconds)
    return Plan(chosen, costs, layer.dense(), refused, case, way is not None)


class _Layer:
    """The costs of one matrix of a layer; arguments as in `plan`.

    The number of calls beside the products themselves is fitted to the times of small layers on a CPU.
    """

    def __init__(
        self,
        dims: SiteDims,
        bonds: tuple[int, ...],
        num_experts: int,
        tokens: int,
        active: Count,
        dtype_bytes: int,
        needs_grad: bool,
        machine: Machine,
    ) -> None:
        self.dims, self.bonds, self.machine = dims, bonds, machine
        self.num_experts, self.tokens, self.active = num_experts, tokens, active
        self.rows = tokens / active  # of one active expert, on average
        self.dtype_bytes, self.needs_grad = dtype_bytes, needs_grad
        self.matrix_bytes = dims.padded_out * dims.padded_in * dtype_bytes

    def dense(self) -> Cost:
        """One matrix for all tokens."""
        product = Product(self.tokens, self.dims.in_features, self.dims.out_features)
        return self._cost([(1, product)] * (3 if self.needs_grad else 1), is_in_parts=False)

    def cached(self) -> Cost:
        """One dense product per expert, with matrices that together seldom fit the processor's cache."""
        is_in_parts = self.rows < VERY_FEW_ROWS
        product = Product(self.dims.out_features, self.dims.in_features, self.rows, is_in_parts=is_in_parts)
        memory = self.num_experts * self.matrix_bytes
        working_set, calls = self.active * self.matrix_bytes, 10 + 3 * self.active
        return self._cost([(self.active, product)], memory=memory, working_set=working_set, calls=calls)

    def rebuild(self) -> Cost:
        """As `mpoe.nn.rebuild` does it: both arms merged, the central tensor between them, reordered to a matrix."""
        p, a, o, i, b, q = self._environments()
        left_first = p * b * (a + q) <= a * q * (b + p)
        if left_first:
            out = [Product(p, a, o * i * b), Product(p * o * i, b, q)]
        else:
            out = [Product(a * o * i, b, q), Product(p, a, o * i * q)]
        size = self.dims.padded_out * self.dims.padded_in
        dense = Product(self.rows, self.dims.in_features, self.dims.out_features)
        arms = self._arms()
        # with gradients: multiplied out again, and two products for each one of the forward pass
        steps = [*out, *arms, dense] + [*out, *out, *out, *arms, *arms, dense, dense] * self.needs_grad
        return self._cost(
            [(self.active, step) for step in steps],
            reordered=[(self.active, size)] * (3 if self.needs_grad else 1)
            + [(2 * self.active, sum(self._auxiliary()))],
            memory=3 * self.matrix_bytes,
            calls=(5 * len(self.dims.auxiliary) + 25 + 4 * self.active) * (4 if self.needs_grad else 1),
        )

    def apply(self) -> Cost:
        """Nothing multiplied out."""
        machine, size = self.machine, self.dtype_bytes
        rows = round(self.rows)
        steps = products(self.dims, self.bonds, rows, apply_order(self.dims, self.bonds, rows, machine))
        passes = 3 if self.needs_grad else 1
        results = [step.rows * step.columns for step in steps[:-1]]
        kept = self.active * sum(results) if self.needs_grad else max(results, default=0)
        calls = self.active * passes * (2 * len(steps) + 3 * len(self.dims.auxiliary) + 10)
        return self._cost([(self.active * passes, step) for step in steps], memory=size * kept, calls=calls)

    def _environments(self) -> tuple[int, int, int, int, int, int]:
        dims, c = self.dims, self.dims.central
        p, q = (math.prod(dims.out_dims[arm] + dims.in_dims[arm]) for arm in (slice(0, c), slice(c + 1, None)))
        return p, self.bonds[c], dims.out_dims[c], dims.in_dims[c], self.bonds[c + 1], q

    def _auxiliary(self) -> list[int]:
        """Elements of the tensor of one expert at each auxiliary site."""
        bonds, dims = self.bonds, self.dims
        return [bonds[k] * dims.out_dims[k] * dims.in_dims[k] * bonds[k + 1] for k in dims.auxiliary]

    def _result_seconds(self, memory: Count) -> float:
        """The time for results that several products write parts of, beside the products' own: to take memory for them.

        With gradients these are, beside y, what is kept for them, dx, and the gradients of all experts' auxiliary
        tensors, those without tokens too, which are zero at first.
        """
        machine, size, dims = self.machine, self.dtype_bytes, self.dims
        seconds = machine.fresh_seconds(self.tokens * dims.out_features * size)
        if not self.needs_grad:
            return seconds
        counts = [self.num_experts * count for count in self._auxiliary()]
        results = [memory, self.tokens * dims.in_features * size, *(count * size for count in counts)]
        zeros = (machine.reorder_seconds(count, size) for count in counts)
        return seconds + sum(map(machine.fresh_seconds, results)) + sum(zeros)

    def _arms(self) -> list[Product]:
        """The products that merge the arms of one expert."""
        dims, bonds, c = self.dims, self.bonds, self.dims.central
        sizes = [o * i for o, i in zip(dims.out_dims, dims.in_dims, strict=True)]
        left = [Product(math.prod(sizes[:k]), bonds[k], sizes[k] * bonds[k + 1]) for k in range(1, c)]
        right = [
            Product(bonds[k] * sizes[k], bonds[k + 1], math.prod(sizes[k + 1 :]))
            for k in range(c + 1, dims.num_sites - 1)
        ]
        return left + right

    def _cost(
        self,
        steps: Sequence[tuple[Count, Product]],
        reordered: Sequence[tuple[Count, Count]] = (),
        memory: Count = 0,
        working_set: Count = 0,
        calls: Count = 0,
        is_in_parts: bool = True,
    ) -> Cost:
        """The sum over steps and over elements put in another order, each so many times, of calls, and of results."""
        machine, size = self.machine, self.dtype_bytes
        return Cost(
            seconds=sum(times * machine.seconds(step, size, working_set) for times, step in steps)
            + sum(times * machine.reorder_seconds(elements, size) for times, elements in reordered)
            + calls * machine.overhead
            + (self._result_seconds(memory) if is_in_parts else 0.0),
            flops=sum(times * step.flops for times, step in steps),
            bytes_moved=sum(times * size * step.elements for times, step in steps)
            + sum(times * size * 2 * elements for times, elements in reordered),
            memory=memory,
        )


def _size(count: Count) -> str:
    return f"{count / 2**20:.3g} MiB"
