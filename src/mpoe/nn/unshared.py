"""Experts that share nothing, each an MPO of its own: the paper's ablation "w/o weight sharing"."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mpoe.nn.experts import MPOExperts, add_bias, empty_bias, load_bias, relative_spread
from mpoe.nn.grouped import Counts


class UnsharedMPOExperts(nn.Module):
    """E matrices, each an MPO with a central tensor of its own.

    It has more parameters than E whole matrices; what it is for is to tell what sharing does from what the format does.

    Args:
        experts: E MPOs of one expert each, without biases.
        bias: As in `MPOExperts`.

    Source: MPOE (Gao et al., COLING 2022), the ablation of its GPT-2 experiments.
    """

    mixes_outputs = True
    central = None
    """Nothing is shared; the MPOs have central tensors of their own."""
    auxiliary: ClassVar[dict[int, nn.Parameter]] = {}
    """Each MPO has its own."""

    def __init__(self, experts: list[MPOExperts], bias: str = "none") -> None:
        super().__init__()
        self.num_experts = len(experts)
        self.dims = experts[0].dims
        self.out_features, self.in_features = self.dims.out_features, self.dims.in_features
        self.experts = nn.ModuleList(experts)
        self.bias = empty_bias(bias, len(experts), self.dims.out_features)

    @property
    def mpos(self) -> list[MPOExperts]:
        """One for each expert."""
        return [expert for expert in self.experts if isinstance(expert, MPOExperts)]

    @torch.no_grad()
    def load_matrix(
        self, matrix: Float[Tensor, "out_features in_features"], bias: Float[Tensor, " out_features"] | None = None
    ) -> None:
        """Make every expert the given matrix; arguments as in `MPOExperts.load_matrix`."""
        for mpo in self.mpos:
            mpo.load_matrix(matrix)
        load_bias(self.bias, bias)

    def add_noise(self, relative_std: float, generator: torch.Generator) -> None:
        """Normal noise on every auxiliary tensor; arguments as in `MPOExperts.add_noise`."""
        for mpo in self.mpos:
            mpo.add_noise(relative_std, generator)

    def expert_matrix(self, index: int) -> Float[Tensor, "out_features in_features"]:
        """W_e, multiplied out."""
        return self.mpos[index].expert_matrix(0)

    @torch.no_grad()
    def divergence(self) -> Float[Tensor, ""]:
        """As `MPOExperts.divergence`, over the auxiliary tensors."""
        of_experts = [mpo.site_stacks([0], torch.float32)[1] for mpo in self.mpos]
        return torch.stack([relative_spread(torch.cat(site)) for site in zip(*of_experts, strict=True)]).mean()

    def forward(self, x: Float[Tensor, "T in_features"], counts: Counts) -> Float[Tensor, "T out_features"]:
        """y_t = W_{e(t)} x_t + b_{e(t)}; arguments as in `MPOExperts.forward`.

        Counts that only the device knows are asked for: this is for comparison, not for speed.
        """
        if isinstance(counts, Tensor):
            counts = counts.tolist()
        # idle ones too: their gradient shall be 0, not None
        blocks = zip(self.mpos, x.split(list(counts)), strict=True)
        y = torch.cat([mpo(rows, [len(rows)]) for mpo, rows in blocks])
        return add_bias(y, self.bias, counts)
