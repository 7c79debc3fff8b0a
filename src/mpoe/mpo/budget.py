"""Give out a number of parameters over many matrices: which bonds each of them gets, by what its cuts lose.

The loss that is made least is the sum over matrices of the bounds of `mpoe.mpo.truncate`. With a price λ for a
parameter each matrix can choose by itself, and λ is raised until all of them together are within the budget (Everett,
Generalized Lagrange multiplier method, Operations Research 11, 1963).

Shape letters: m sites; a, b the bonds left and right of the central tensor; c the central site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpoe.mpo.sites import SiteDims

SWEEPS = 20  # over the bonds of a chain of five sites or more, whose choices depend on each other
STEPS = 60  # of a bisection, each of which halves the logarithm of a price's range
PRICES = (1e-18, 1e3)  # of a parameter, in shares of a matrix's squared norm


@dataclass(frozen=True)
class Option:
    """One way to write a matrix.

    Attributes:
        dims: Its site dimensions.
        num_experts: Of the auxiliary tensors, count.
        lost: By inner bond: what is lost at 1 .. d, as `Cut.lost`. A single site has no bond and loses nothing.
    """

    dims: SiteDims
    num_experts: int
    lost: tuple[Tensor, ...]


@dataclass(frozen=True)
class Choice:
    """What a matrix gets.

    Attributes:
        option: Index of the option.
        bonds: d_0 .. d_m.
        lost: Bound on the square of its relative error.
        central: Elements of its central tensor, count.
        auxiliary: Of its auxiliary tensors, all experts, count.
    """

    option: int
    bonds: tuple[int, ...]
    lost: float
    central: int
    auxiliary: int

    @property
    def parameters(self) -> int:
        """All of it, count."""
        return self.central + self.auxiliary


def give_out(
    matrices: Sequence[Sequence[Option]],
    parameters: int,
    auxiliary_parameters: int | None = None,
) -> list[Choice]:
    """The bonds of every matrix that lose least for a number of parameters in all.

    Args:
        matrices: The options of each.
        parameters: For all of them together, count.
        auxiliary_parameters: Of these, for all auxiliary tensors of all experts, count; None is no limit of their own.

    Returns:
        One choice a matrix, together within both limits.

    Raises:
        ValueError: Limits below what bonds of 1 need.
    """

    def choose(price: float, surcharge: float) -> list[Choice]:
        return [
            min(
                (_best(n, option, price, surcharge) for n, option in enumerate(options)),
                key=lambda choice: choice.lost + price * choice.parameters + surcharge * choice.auxiliary,
            )
            for options in matrices
        ]

    def within(surcharge: float) -> list[Choice]:
        return _least(lambda price: choose(price, surcharge), lambda found: _sum(found, "parameters") <= parameters)

    if auxiliary_parameters is None:
        found = within(0.0)
    else:
        found = _least(within, lambda found: _sum(found, "auxiliary") <= auxiliary_parameters)
    for limit, attribute in ((parameters, "parameters"), (auxiliary_parameters, "auxiliary")):
        if limit is not None and _sum(found, attribute) > limit:
            what = "all parameters" if attribute == "parameters" else "the auxiliary tensors"
            raise ValueError(
                f"the budget of the matrices must leave room for bonds of 1, {_sum(found, attribute):,} for {what}; "
                f"got {max(limit, 0):,}"
            )
    return found


def _sum(choices: Sequence[Choice], attribute: str) -> int:
    return sum(getattr(choice, attribute) for choice in choices)


def _least(choose: Callable[[float], list[Choice]], fits: Callable[[list[Choice]], bool]) -> list[Choice]:
    """What is chosen at about the lowest price at which it fits; at the highest, if it never does."""
    found = choose(0.0)
    if fits(found):
        return found
    low, high = (math.log(price) for price in PRICES)
    found = choose(PRICES[1])
    for _ in range(STEPS):
        middle = (low + high) / 2
        at_middle = choose(math.exp(middle))
        if fits(at_middle):
            high, found = middle, at_middle
        else:
            low = middle
        if high - low < 1e-4:  # of a price
            break
    return found


def _best(index: int, option: Option, price: float, surcharge: float) -> Choice:
    """The bonds of one option at given prices."""
    dims = option.dims
    bonds = list(dims.bond_dims())
    sizes = [o * i for o, i in zip(dims.out_dims, dims.in_dims, strict=True)]
    prices = [
        (price if k == dims.central else (price + surcharge) * option.num_experts) * n for k, n in enumerate(sizes)
    ]
    for _ in range(SWEEPS if dims.num_sites > 3 else 1):
        before = list(bonds)
        if dims.num_sites > 1:
            _choose_pair(bonds, sizes, prices, option.lost, dims.central)
        for k in range(1, dims.num_sites):
            if k not in (dims.central, dims.central + 1):
                _choose_one(bonds, sizes, prices, option.lost, k)
        if bonds == before:
            break
    shapes = dims.site_shapes(tuple(bonds[1:-1]))
    central, auxiliary = (
        sum(math.prod(shape) for k, shape in enumerate(shapes) if (k == dims.central) is is_central)
        for is_central in (True, False)
    )
    share = sum((float(of_bond[bond - 1]) for of_bond, bond in zip(option.lost, bonds[1:-1], strict=True)), 0.0)
    return Choice(index, tuple(bonds), share, central, auxiliary * option.num_experts)


def _choose_pair(bonds: list[int], sizes: list[int], prices: list[float], lost: Sequence[Tensor], c: int) -> None:
    """The two bonds beside the central tensor, whose product is nearly all there is to pay."""
    limit_a, limit_b = bonds[c - 1] * sizes[c - 1], bonds[c + 2] * sizes[c + 1]
    of_a, of_b = lost[c - 1][:limit_a], lost[c][:limit_b]
    a, b = (torch.arange(1, len(of_bond) + 1, dtype=of_bond.dtype) for of_bond in (of_a, of_b))
    cost_a, cost_b = of_a + a * bonds[c - 1] * prices[c - 1], of_b + b * bonds[c + 2] * prices[c + 1]
    costs = torch.outer(a, b * prices[c]).add_(cost_a[:, None]).add_(cost_b)
    costs.masked_fill_((a[:, None] > b * sizes[c]) | (b > a[:, None] * sizes[c]), math.inf)  # wider than can be
    place = int(costs.argmin())
    bonds[c], bonds[c + 1] = place // len(b) + 1, place % len(b) + 1


def _choose_one(bonds: list[int], sizes: list[int], prices: list[float], lost: Sequence[Tensor], k: int) -> None:
    """A bond by itself, its neighbours given."""
    before, after = bonds[k - 1], bonds[k + 1]
    low = max(math.ceil(before / sizes[k - 1]), math.ceil(after / sizes[k]))
    of_bond = lost[k - 1][: min(before * sizes[k - 1], after * sizes[k])]
    d = torch.arange(1, len(of_bond) + 1, dtype=of_bond.dtype)
    costs = of_bond + d * (before * prices[k - 1] + after * prices[k])
    bonds[k] = low + int(costs[low - 1 :].argmin())
