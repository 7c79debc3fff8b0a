"""`ExtendedExperts`: a linear layer of the base, whose bonds every expert extends by dimensions of its own.

    y = W x + b + s · V (g ⊙ U x)

W is the base's own layer and stays untouched. Expert e owns r rows of U and r columns of V, and g repeats its gate r
times. In MPO terms the sites are [I, s·V_e] · diag(W, I_r) · [I ; U_e].

Shape letters: T tokens, N assignments of tokens to experts, D input width, F output width, E experts, R expert rank.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mpoe.nn.dispatch import Dispatch
from mpoe.nn.float32 import Float32Module
from mpoe.nn.grouped import linear_per_expert

SELECT_FROM = 1024  # E·R; from here on, and for many tokens, computing the selected experts alone is 1.3 to 1.9 times
SELECT_TOKENS = 256  # as fast on a CPU, and slower for few tokens (benchmarks/layer.py)
PROBES = 64  # Gaussian vectors that measure the scale of a layer
ACTIVATIONS = {"gelu": nn.functional.gelu, "relu": nn.functional.relu, "silu": nn.functional.silu}


class ExtendedExperts(Float32Module):
    """E low-rank experts beside a linear layer that all of them share.

    U starts random and V at zero, so every expert computes what the base computes, and the experts differ from the
    first optimizer step. U, V and the scale stay in float32 whatever dtype the model is cast to.

    Args:
        base: Any linear module D -> F: `nn.Linear`, Conv1D, a quantised layer, a LoRA layer. It is not changed.
        out_features: F, count.
        in_features: D, count.
        num_experts: E, count.
        rank: R, count.
        expert_scale: s = expert_scale · rms(W z) / rms(z) with a Gaussian z, dimensionless; W includes what wraps the
            layer, and not its bias.
        activation: Between U and V, a key of ACTIVATIONS; `None` disables it.

    Attributes:
        offsets_U: (E·R, D), expert by expert.
        offsets_V: (F, E·R), expert by expert.
        scale: s, dimensionless.

    Source: MoLoRA (Zadouri et al., 2023) has the same experts with soft gates; MPOE (Gao et al., COLING 2022) the
    shared central tensor.
    """

    mixes_outputs = False

    def __init__(
        self,
        base: nn.Module,
        out_features: int,
        in_features: int,
        num_experts: int,
        rank: int,
        expert_scale: float = 1.0,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.out_features = out_features
        self.in_features = in_features
        self.num_experts = num_experts
        self.rank = rank
        self.expert_scale = expert_scale
        self.activation = activation
        weight = next(base.parameters())
        like = {"device": weight.device, "dtype": torch.float64 if weight.dtype == torch.float64 else torch.float32}
        self.offsets_U = nn.Parameter(torch.empty(num_experts * rank, in_features, **like))
        self.offsets_V = nn.Parameter(torch.empty(out_features, num_experts * rank, **like))
        self.scale: Tensor
        self.register_buffer("scale", torch.empty((), **like))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw U, set V to zero and measure the scale.

        Args:
            generator: A CPU generator, so that every device draws the same.
        """
        drawn = torch.randn(self.offsets_U.shape, generator=generator) * self.in_features**-0.5
        self.offsets_U.copy_(drawn)
        self.offsets_V.zero_()
        self.scale.fill_(self.expert_scale * (self._base_gain(generator) or 1.0))

    def _base_gain(self, generator: torch.Generator) -> float:
        """The root mean square of W z over that of z, without the bias."""
        z = torch.randn(PROBES, self.in_features, generator=generator)
        weight = next(self.base.parameters())
        dtype = weight.dtype if weight.dtype in (torch.float64, torch.float16, torch.bfloat16) else torch.float32
        z = z.to(weight.device, dtype)
        modes = {module: module.training for module in self.base.modules()}
        self.base.eval()  # without the dropout of a LoRA layer
        try:
            gain = (self.base(z) - self.base(torch.zeros_like(z))).float().square().mean().sqrt()
        finally:
            for module, mode in modes.items():
                module.training = mode
        return gain.item() / z.float().square().mean().sqrt().item()

    def forward(
        self,
        x: Float[Tensor, "T D"],
        gates: Float[Tensor, "T E"] | Float[Tensor, " N"] | None,
        dispatch: Dispatch | None = None,
    ) -> Float[Tensor, "T F"]:
        """Return W x + b + s · V (g ⊙ U x) for every token.

        Args:
            x: Tokens.
            gates: g, 0 for experts that are not selected; None is 1 for all. With `dispatch`, one for each assignment
                in its order.
            dispatch: If given, only the selected experts are computed, each on its own tokens.
        """
        x = self._in_base_dtype(x)
        y = self.base(x)
        if dispatch is not None and gates is not None:
            return self._add_selected(y, x.to(y.dtype), gates, dispatch)
        u = self._activated(nn.functional.linear(x.to(y.dtype), self.offsets_U.to(y.dtype)))
        if gates is None:
            h = u * self.scale.to(u.dtype)
        else:
            g = (gates.to(self.scale.dtype) * self.scale).to(u.dtype)
            h = (u.view(len(u), self.num_experts, self.rank) * g.unsqueeze(2)).view_as(u)
        V = self.offsets_V.to(y.dtype)
        # In place if no hook can hold the base's output. Autocast skips some quantised weights, so dtypes may differ.
        is_own = type(self.base) is nn.Linear and not self.base._forward_hooks and y.dtype == h.dtype
        return y.addmm_(h, V.T) if is_own else torch.addmm(y, h, V.T)

    def _add_selected(self, y: Tensor, x: Tensor, gates_N: Tensor, dispatch: Dispatch) -> Tensor:
        U_ERD = self.offsets_U.to(x.dtype).view(self.num_experts, self.rank, self.in_features)
        V_EFR = self.offsets_V.to(x.dtype).view(self.out_features, self.num_experts, self.rank).transpose(0, 1)
        u_NR = self._activated(linear_per_expert(dispatch.dispatch(x), dispatch.counts, U_ERD))
        h_NR = u_NR * (gates_N.to(self.scale.dtype) * self.scale).to(u_NR.dtype)[:, None]
        y_NF = linear_per_expert(h_NR, dispatch.counts, V_EFR)
        return y.index_add(0, dispatch.token_index, y_NF.to(y.dtype))

    @property
    def base_weight(self) -> Tensor | None:
        """The weight of the base's layer, quantised or not; that which a LoRA layer wraps."""
        return getattr(getattr(self.base, "base_layer", self.base), "weight", None)

    @property
    def central(self) -> nn.Parameter | None:
        """W, or None where no floating-point tensor holds it (a quantised layer)."""
        weight: Any = self.base_weight
        local = weight.to_local() if hasattr(weight, "to_local") else weight
        is_plain = type(local) in (nn.Parameter, Tensor) and local.is_floating_point()  # whole, or one process' shard
        return weight if is_plain else None

    def selects(self, tokens: int) -> bool:
        """Whether computing only the selected experts is faster for this number of tokens."""
        return self.num_experts * self.rank >= SELECT_FROM and tokens >= SELECT_TOKENS

    @property
    def auxiliary(self) -> dict[int, nn.Parameter]:
        """The experts' own tensors, by MPO site: V is site 0, W is site 1, U is site 2."""
        return {0: self.offsets_V, 2: self.offsets_U}

    def offset_matrix(self, gates: Float[Tensor, " E"] | None = None) -> Float[Tensor, "F D"]:
        """Return s · V diag(g) U: what gates that are the same for every token add to W.

        Args:
            gates: g; None is 1 for all.

        Raises:
            ValueError: There is an activation between U and V.
        """
        if self.activation is not None:
            raise ValueError(
                f"experts with an activation are no matrix that can be added to W; expert_activation is "
                f"{self.activation!r}. Keep the mixture, or train one without an activation to merge it"
            )
        U = self.offsets_U if gates is None else self.offsets_U * gates.repeat_interleave(self.rank)[:, None]
        return self.scale * (self.offsets_V @ U)

    @torch.no_grad()
    def divergence(self) -> Float[Tensor, ""]:
        """Return the mean over experts of ‖Δ_e - Δ̄‖² / ‖W‖², with Δ_e = V_e U_e and ‖W‖² estimated from the scale.

        Dimensionless, 0 right after upcycling. With an activation, of the matrices that it is between.
        """
        E, R = self.num_experts, self.rank
        gram_V, gram_U = self.offsets_V.T @ self.offsets_V, self.offsets_U @ self.offsets_U.T
        products = gram_V * gram_U
        of_experts = products.view(E, R, E, R).diagonal(dim1=0, dim2=2).sum()  # Σ_e ‖Δ_e‖²
        spread = (of_experts / E - products.sum() / E**2).clamp(min=0)
        return spread * (self.expert_scale**2 / self.out_features)  # which is s² / ‖W‖²

    def _activated(self, u: Tensor) -> Tensor:
        return u if self.activation is None else ACTIVATIONS[self.activation](u)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return f"num_experts={self.num_experts}, rank={self.rank}{activation}"

    def _in_base_dtype(self, x: Tensor) -> Tensor:
        """T5 keeps one matrix in float32 in a float16 model, and casts its inputs."""
        weight = getattr(self.base, "weight", None)
        if torch.is_autocast_enabled(x.device.type) or type(weight) is not nn.Parameter:
            return x
        return x.to(weight.dtype) if weight.is_floating_point() else x
