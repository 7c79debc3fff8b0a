"""A layer that computes as the MPOE reference does, to measure against: every expert multiplied out on every forward.

Written for the benchmarks from the description of that code's behaviour; none of it is used by the library.

Shape letters: T tokens, D model width, F FFN width, E experts; a, b bonds; o, i a site's output and input dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpoe.mpo import decompose, site_dims


class ReferenceStyleMatrix(nn.Module):
    """E matrices in the paper's balanced layout, full bonds, with the central tensor shared.

    Args:
        matrix: (out, in), what every expert starts as.
        num_experts: E, count.
        noise: Standard deviation of what sets the experts' auxiliaries apart, relative to their own.
    """

    def __init__(self, matrix: Tensor, num_experts: int, noise: float) -> None:
        super().__init__()
        dims = site_dims(*matrix.shape)
        sites = [site.contiguous() for site in decompose(matrix, dims, gauge="sqrt").sites]
        self.shape = matrix.shape
        self.middle = dims.central
        self.central = nn.Parameter(sites[dims.central].clone())
        self.auxiliaries = nn.ModuleList(
            nn.ParameterList(sites[k] + noise * sites[k].std() * torch.randn(sites[k].shape) for k in dims.auxiliary)
            for _ in range(num_experts)
        )

    def multiplied_out(self) -> list[Tensor]:
        """All W_e (out, in), one site after the other, as autograd's ordinary operations."""
        return [self._matrix([*own[: self.middle], self.central, *own[self.middle :]]) for own in self._parts()]

    def _parts(self) -> list[list[Tensor]]:
        return [list(own) for own in self.auxiliaries]  # pyright: ignore[reportArgumentType]

    def _matrix(self, sites: list[Tensor]) -> Tensor:
        chain = sites[0]
        for site in sites[1:]:
            chain = torch.tensordot(chain, site, dims=1)
        count = len(sites)  # chain is (1, o_1, i_1, .., o_m, i_m, 1)
        outputs_then_inputs = [2 * k for k in range(count)] + [2 * k + 1 for k in range(count)]
        return chain.squeeze((0, -1)).permute(outputs_then_inputs).reshape(self.shape)


class ReferenceStyleLayer(nn.Module):
    """A plain two-matrix FFN with E experts and a top-1 router, its experts used or not.

    Args:
        up: (F, D).
        down: (D, F).
        num_experts: E, count.
        noise: See `ReferenceStyleMatrix`.
    """

    def __init__(self, up: Tensor, down: Tensor, num_experts: int, noise: float) -> None:
        super().__init__()
        self.switch = nn.Linear(up.shape[1], num_experts)
        self.up = ReferenceStyleMatrix(up, num_experts, noise)
        self.down = ReferenceStyleMatrix(down, num_experts, noise)

    def forward(self, x: Tensor) -> Tensor:
        """(.., D) to (.., D)."""
        x_TD = x.reshape(-1, x.shape[-1])
        probability, expert = self.switch(x_TD).softmax(dim=-1).max(dim=-1)
        x_TD = x_TD * (probability / probability.detach())[:, None]
        matrices = zip(self.up.multiplied_out(), self.down.multiplied_out(), strict=True)
        y_TD = torch.zeros_like(x_TD)
        for e, (up, down) in enumerate(matrices):
            (rows,) = torch.where(expert == e)
            y_TD = y_TD.index_copy(0, rows, (x_TD[rows] @ up.T).relu() @ down.T)
        return y_TD.view(x.shape)
