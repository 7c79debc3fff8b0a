"""Linear layers of several experts on rows sorted by expert: one after the other, or all in one grouped product.

On the CPU the host knows how many rows every expert has, and multiplies block by block. On an accelerator asking would
stop the device, and under `torch.compile` it would break the graph: there the counts stay a tensor.

Shape letters: N rows, E experts, l outputs, k inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mpoe.mpo.plan import VERY_FEW_ROWS

FEW_ROWS = 192

Counts = Sequence[int] | Int[Tensor, " E"]
"""Rows of every expert: a list where the host may know them, a tensor on the device where it may not."""


def is_known_to_host(device: torch.device) -> bool:
    """Whether the number of rows of every expert may be asked for without stopping a device or breaking a graph."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def linear_per_expert(x: Float[Tensor, "N k"], counts: Counts, weight: Float[Tensor, "E l k"]) -> Float[Tensor, "N l"]:
    """Each expert's rows times that expert's matrix; experts without rows cost nothing.

    Args:
        x: Rows, sorted by expert, of the weight's dtype.
        counts: Rows of every expert; they sum to N.
        weight: Every expert's matrix.
    """
    if len(weight) == 1:
        return linear(x, weight[0])
    if not isinstance(counts, Tensor):
        # unbind: indexing a stacked parameter in a loop has a backward that fills the whole stack every time
        matrices = weight.unbind(0)
        return blockwise(x, counts, lambda rows, e: linear(rows, matrices[e]))
    if _has_kernel(x, weight):
        return nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))
    return _grouped_linear(x, counts, weight)


def active(counts: Sequence[int]) -> list[int]:
    """The experts that have rows, or, if there are none at all, the first: a result needs a graph all the same.

    Args:
        counts: Rows of every expert.
    """
    return [e for e, count in enumerate(counts) if count] or [0]


def blockwise(
    x: Float[Tensor, "N k"], counts: Sequence[int], of_expert: Callable[[Tensor, int], Tensor]
) -> Float[Tensor, "N l"]:
    """Each expert's rows through that expert's function.

    Args:
        x: Rows, sorted by expert.
        counts: Rows of every expert.
        of_expert: From an expert's rows and its index to its rows of the result. Called for those that have rows, or,
            if there are none at all, for the first.
    """
    blocks = [of_expert(rows, e) for e, rows in enumerate(x.split(list(counts))) if len(rows)]
    if len(blocks) > 1:
        return torch.cat(blocks)
    return blocks[0] if blocks else of_expert(x, 0)


def linear(x: Float[Tensor, "N k"], weight: Float[Tensor, "l k"]) -> Float[Tensor, "N l"]:
    """X Wᵀ, as a CPU does it fastest in float32.

    For a few rows that is (W xᵀ)ᵀ, up to four times faster. For very few it waits for W, which a single product reads
    with one core: cut into one part for each, it is read twice as fast by two.

    Args:
        x: Rows.
        weight: W.
    """
    if 0 < len(x) < FEW_ROWS and x.device.type == "cpu" and x.dtype == torch.float32:
        # how many threads there are is nothing for a compiled graph
        is_in_parts = len(x) < VERY_FEW_ROWS and is_known_to_host(x.device)
        return (_linear_in_parts if is_in_parts else linear_columns)(x, weight).T
    return nn.functional.linear(x, weight)


def _linear_in_parts(x: Float[Tensor, "N k"], weight: Float[Tensor, "l k"]) -> Float[Tensor, "l N"]:
    """W xᵀ, W cut into as many parts as there are threads, or as its rows can be divided into."""
    parts = math.gcd(len(weight), torch.get_num_threads())
    blocks = torch.bmm(weight.reshape(parts, -1, weight.shape[1]), x.expand(parts, *x.shape).mT)
    return blocks.view(len(weight), len(x))


def linear_columns(x: Float[Tensor, "N k"], weight: Float[Tensor, "l k"]) -> Float[Tensor, "l N"]:
    """W xᵀ.

    Args:
        x: Rows.
        weight: W.
    """
    rows = len(x)
    if 8 < rows < FEW_ROWS and rows % 8:  # an odd number of columns can take twice the time
        x = nn.functional.pad(x, (0, 0, 0, -rows % 8))
    return torch.mm(weight, x.T)[:, :rows]


def all_rows(x: Float[Tensor, "N k"]) -> Counts:
    """The counts of a batch that all goes to one expert.

    Args:
        x: The batch.
    """
    return [len(x)] if is_known_to_host(x.device) else torch.full((1,), len(x), device=x.device)


def rows_of_experts(of_expert: Float[Tensor, "E l"], counts: Counts, num_rows: int) -> Float[Tensor, "N l"]:
    """What belongs to each row's expert, once a row.

    Args:
        of_expert: One row for every expert.
        counts: Rows of every expert.
        num_rows: N, their sum.
    """
    repeats = counts if isinstance(counts, Tensor) else torch.tensor(list(counts), device=of_expert.device)
    wide = of_expert.to(torch.promote_types(of_expert.dtype, torch.float32))  # its gradient is a long sum
    return torch.repeat_interleave(wide, repeats, dim=0, output_size=num_rows).to(of_expert.dtype)


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's grouped product runs on the device alone: elsewhere it asks the host, or refuses."""
    return (
        x.is_cuda
        and x.dtype == weight.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and weight.shape[1] % 8 == weight.shape[2] % 8 == 0  # rows aligned to 16 bytes
    )


@torch.library.custom_op(
    "mpoe::grouped_linear", mutates_args=(), schema="(Tensor x, Tensor counts, Tensor weight) -> Tensor"
)
def _grouped_linear(x: Tensor, counts: Tensor, weight: Tensor) -> Tensor:
    """For what no kernel takes: opaque to `torch.compile`, and on a device it waits for the counts."""
    y = x.new_empty(len(x), weight.shape[1])
    for rows, matrix, out in _blocks(counts, x, weight, y):
        torch.mm(rows, matrix.T, out=out)
    return y


@torch.library.custom_op(
    "mpoe::grouped_outer", mutates_args=(), schema="(Tensor dy, Tensor counts, Tensor x) -> Tensor"
)
def _grouped_outer(dy: Tensor, counts: Tensor, x: Tensor) -> Tensor:
    """The gradient of the matrices: dyᵀ x of every expert's rows."""
    gradient = x.new_zeros(len(counts), dy.shape[1], x.shape[1])
    for d_rows, total, rows in _blocks(counts, dy, gradient, x):
        torch.mm(d_rows.T, rows, out=total)
    return gradient


def _blocks(counts: Tensor, rows: Tensor, of_expert: Tensor, other_rows: Tensor) -> Any:
    sizes = counts.tolist()
    blocks = zip(rows.split(sizes), of_expert, other_rows.split(sizes), strict=True)
    return ((first, expert, second) for first, expert, second in blocks if len(first))


@_grouped_linear.register_fake
def _(x: Any, counts: Any, weight: Any) -> Any:
    return x.new_empty(x.shape[0], weight.shape[1])


@_grouped_outer.register_fake
def _(dy: Any, counts: Any, x: Any) -> Any:
    return x.new_empty(counts.shape[0], dy.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    x, counts, weight = ctx.saved_tensors
    return (
        _grouped_linear(dy, counts, weight.transpose(1, 2)) if ctx.needs_input_grad[0] else None,
        None,
        _grouped_outer(dy, counts, x) if ctx.needs_input_grad[2] else None,
    )


_grouped_linear.register_autograd(_backward, setup_context=_keep)
