"""Experts: one weight matrix of a layer, E times. `MPOExperts` shares its central tensor, `DenseExperts` nothing.

Both take tokens sorted by expert and the number of tokens of each expert, and both can multiply out the matrix W_e of
one expert, which defines what is correct: every faster way must agree with `per_token` in output and gradients.

Shape letters: T tokens, E experts; a, b the bonds left and right of the central tensor; o, i the central site's output
and input dimensions; p, q the dimensions at the output end and the input end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mpoe.mpo import MPO, SiteDims, decompose


class MPOExperts(nn.Module):
    """E matrices as MPOs that share their central tensor.

    The auxiliary tensor of expert e at site k is `start_k + scale_k * offset_k[e]`. The start (an identity in the
    identity gauge) is shared and fixed, the offsets are the parameters and begin at 0, the scale is set from the
    weights by `load_matrix`. So Adam's steps, which are absolute, have about the same relative size on all parts of
    the layer.

    Args:
        dims: Site dimensions.
        num_experts: E, count.
        max_bond_dim: Truncation, count; None is exact.
        gauge: See `mpoe.mpo.decompose`.
        offset_scale: See `MPOEConfig.offset_scale`.
        bias: "none", "shared" by all experts, or one for each "expert".

    Attributes:
        central: The shared central tensor (a, o, i, b).
        offsets: One tensor per auxiliary site, (E, d_{k-1}, o_k, i_k, d_k).
        scales: One number per auxiliary site.
        bias: (1 or E, out_features), or None.

    Source: MPOE (Gao et al., COLING 2022), §3.1.
    """

    def __init__(
        self,
        dims: SiteDims,
        num_experts: int,
        max_bond_dim: int | None = None,
        gauge: str = "identity",
        offset_scale: float = 0.3,
        bias: str = "none",
    ) -> None:
        super().__init__()
        self.dims = dims
        self.num_experts = num_experts
        self.max_bond_dim = max_bond_dim
        self.gauge = gauge
        self.offset_scale = offset_scale
        shapes = dims.site_shapes(max_bond_dim)
        self.central = nn.Parameter(torch.empty(shapes[dims.central]))
        self.offsets = nn.ParameterList(torch.empty(num_experts, *shapes[k]) for k in dims.auxiliary)
        self.bias = _empty_bias(bias, num_experts, dims.out_features)
        self.scales: Tensor
        self.register_buffer("scales", torch.empty(len(dims.auxiliary)))
        # In the identity gauge a square start is the unit matrix, which is not stored.
        self._unit_starts = tuple(
            gauge == "identity" and _is_square(shapes[k], k < dims.central) for k in dims.auxiliary
        )
        for k, is_unit in zip(dims.auxiliary, self._unit_starts, strict=True):
            if not is_unit:
                self.register_buffer(f"start_{k}", torch.empty(shapes[k]))

    @torch.no_grad()
    def load_matrix(
        self, matrix: Float[Tensor, "out_features in_features"], bias: Float[Tensor, " out_features"] | None = None
    ) -> None:
        """Make every expert the given matrix (exactly, or truncated), and set the scales of the offsets.

        Args:
            matrix: W, finite.
            bias: Of every expert; None is 0.
        """
        operator = decompose(matrix, self.dims, self.max_bond_dim, self.gauge)
        self.central.copy_(operator.central)
        central_rms = operator.central.double().square().mean().sqrt().item() or 1.0
        for n, (k, is_unit) in enumerate(zip(self.dims.auxiliary, self._unit_starts, strict=True)):
            start = operator.sites[k]
            self.scales[n] = self.offset_scale * start.double().square().mean().sqrt().item() / central_rms
            self.offsets[n].zero_()
            if not is_unit:
                self.get_buffer(f"start_{k}").copy_(start)
        _load_bias(self.bias, bias)

    @torch.no_grad()
    def add_noise(self, relative_std: float, generator: torch.Generator) -> None:
        """Break the symmetry between experts: normal noise on every auxiliary tensor.

        Args:
            relative_std: Standard deviation relative to the start's root mean square, dimensionless, >= 0.
            generator: A CPU generator, so that every device draws the same.
        """
        for n, offset in enumerate(self.offsets):
            std = relative_std * self._start(n).double().square().mean().sqrt().item() / self.scales[n].item()
            offset.add_(torch.randn(offset.shape, generator=generator).to(offset) * std)

    def expert(self, index: int) -> MPO:
        """The MPO of one expert; differentiable."""
        sites = [self._start(n) + self.scales[n] * offset[index] for n, offset in enumerate(self.offsets)]
        c = self.dims.central
        return MPO((*sites[:c], self.central, *sites[c:]), self.dims)

    def expert_matrix(self, index: int) -> Float[Tensor, "out_features in_features"]:
        """W_e, multiplied out."""
        return self.expert(index).to_matrix()

    def forward(self, x: Float[Tensor, "T in_features"], counts: list[int]) -> Float[Tensor, "T out_features"]:
        """y_t = W_{e(t)} x_t + b_{e(t)}.

        Args:
            x: Tokens, sorted by expert.
            counts: Tokens of every expert; they sum to T.
        """
        x = x.to(self.central.dtype)
        if self.dims.is_separable and self.dims.num_sites == 3:
            return _add_bias(self._apply_separable(x, counts), self.bias, counts)
        return _add_bias(linear_per_expert(x, counts, self.expert_matrix), self.bias, counts)

    def _apply_separable(self, x: Tensor, counts: list[int]) -> Tensor:
        """The separable layout: a block product per expert around one dense product for all tokens. Rebuilds nothing.

        Of the three products the middle one is by far the largest, and it is the base model's own.
        """
        tokens = x.shape[0]
        a, o, i, b = self.central.shape
        x_Tiq = nn.functional.pad(x, (0, self.dims.padded_in - self.dims.in_features)).view(
            tokens, i, self.dims.padded_in // i
        )
        z_Tib = self._end_products(1, x_Tiq, counts)
        u_Tao = (z_Tib.reshape(tokens, i * b) @ self.central.reshape(a * o, i * b).T).view(tokens, a, o)
        y_Top = self._end_products(0, u_Tao.transpose(1, 2), counts)
        return y_Top.transpose(1, 2).reshape(tokens, self.dims.padded_out)[:, : self.dims.out_features]

    def _end_products(self, n: int, x_Trk: Tensor, counts: list[int]) -> Tensor:
        """Each expert's block of x times that expert's n-th auxiliary tensor, here a matrix (l, k): (T, r, l).

        Rows are folded into one product per expert; a batched product of small matrices is up to 19 times slower.
        """
        tokens, rows, size = x_Trk.shape
        blocks = x_Trk.reshape(tokens * rows, size).split([count * rows for count in counts])
        ends_Elk = (self.scales[n].to(x_Trk.dtype) * self.offsets[n]).view(self.num_experts, -1, size)
        start = None if self._unit_starts[n] else self._start(n).view(-1, size)
        products = [
            # x + s·A x, not (1 + s·A) x: small offsets are kept that bfloat16 would round away beside a 1.
            torch.addmm(block, block, end_lk.T) if start is None else block @ (start + end_lk).T
            for block, end_lk in zip(blocks, ends_Elk.unbind(0), strict=True)
        ]
        return torch.cat(products).view(tokens, rows, products[0].shape[1])

    def _start(self, n: int) -> Tensor:
        """What the n-th auxiliary tensor of every expert starts as, (d_{k-1}, o_k, i_k, d_k)."""
        k, shape = self.dims.auxiliary[n], self.offsets[n].shape[1:]
        if not self._unit_starts[n]:
            return self.get_buffer(f"start_{k}")
        size = shape[3] if k < self.dims.central else shape[0]
        return torch.eye(size, dtype=self.central.dtype, device=self.central.device).reshape(shape)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return (
            f"{self.dims.out_features}×{self.dims.in_features}, num_experts={self.num_experts}, "
            f"out_dims={self.dims.out_dims}, in_dims={self.dims.in_dims}, "
            f"bond_dims={self.dims.bond_dims(self.max_bond_dim)}, gauge={self.gauge!r}"
        )


class DenseExperts(nn.Module):
    """E whole matrices: the experts of the paper's +MoE and +Switch baselines.

    Args:
        out_features: Rows, count.
        in_features: Columns, count.
        num_experts: E, count.
        bias: As in `MPOExperts`.
    """

    def __init__(self, out_features: int, in_features: int, num_experts: int, bias: str = "none") -> None:
        super().__init__()
        self.num_experts = num_experts
        self.bias = _empty_bias(bias, num_experts, out_features)
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))

    @torch.no_grad()
    def load_matrix(
        self, matrix: Float[Tensor, "out_features in_features"], bias: Float[Tensor, " out_features"] | None = None
    ) -> None:
        """Make every expert a copy of the given matrix; arguments as in `MPOExperts.load_matrix`."""
        self.weight.copy_(matrix.expand_as(self.weight))
        _load_bias(self.bias, bias)

    @torch.no_grad()
    def add_noise(self, relative_std: float, generator: torch.Generator) -> None:
        """Normal noise on every expert; arguments as in `MPOExperts.add_noise`."""
        std = relative_std * self.weight.double().square().mean().sqrt().item()
        self.weight.add_(torch.randn(self.weight.shape, generator=generator).to(self.weight) * std)

    def expert_matrix(self, index: int) -> Float[Tensor, "out_features in_features"]:
        """W_e."""
        return self.weight[index]

    def forward(self, x: Float[Tensor, "T in_features"], counts: list[int]) -> Float[Tensor, "T out_features"]:
        """y_t = W_{e(t)} x_t + b_{e(t)}; arguments as in `MPOExperts.forward`."""
        # unbind: indexing a stacked parameter in a loop has a backward that fills the whole stack every time
        y = linear_per_expert(x.to(self.weight.dtype), counts, self.weight.unbind(0).__getitem__)
        return _add_bias(y, self.bias, counts)


def per_token(
    experts: MPOExperts | DenseExperts, x: Float[Tensor, "T in_features"], counts: list[int]
) -> Float[Tensor, "T out_features"]:
    """The definition of correct: every token by itself, times its expert's matrix multiplied out. Slow.

    Args:
        experts: Any experts.
        x: Tokens, sorted by expert.
        counts: Tokens of every expert.
    """
    expert_of_token = [e for e, count in enumerate(counts) for _ in range(count)]
    y = torch.stack([experts.expert_matrix(e) @ token for e, token in zip(expert_of_token, x, strict=True)])
    if experts.bias is None:
        return y
    return y + torch.stack([experts.bias[min(e, len(experts.bias) - 1)] for e in expert_of_token])


def linear_per_expert(x: Tensor, counts: list[int], matrix: Callable[[int], Tensor]) -> Tensor:
    """Each expert's block of x times that expert's matrix; experts without tokens cost nothing.

    Args:
        x: Rows, sorted by expert.
        counts: Rows of every expert.
        matrix: W_e (out, in) of an expert, called for those that have rows.
    """
    blocks = [nn.functional.linear(block, matrix(e)) for e, block in enumerate(x.split(counts)) if len(block)]
    return torch.cat(blocks) if blocks else nn.functional.linear(x, matrix(0))


def _empty_bias(kind: str, num_experts: int, out_features: int) -> nn.Parameter | None:
    return None if kind == "none" else nn.Parameter(torch.empty(num_experts if kind == "expert" else 1, out_features))


def _load_bias(bias: nn.Parameter | None, value: Tensor | None) -> None:
    if bias is not None:
        bias.copy_(torch.zeros_like(bias) if value is None else value.expand_as(bias))


def _add_bias(y: Tensor, bias: nn.Parameter | None, counts: list[int]) -> Tensor:
    if bias is None:
        return y
    if len(bias) == 1:
        return y + bias.to(y.dtype)
    rows = torch.repeat_interleave(bias, torch.tensor(counts, device=bias.device), dim=0, output_size=len(y))
    return y + rows.to(y.dtype)


def _is_square(shape: tuple[int, int, int, int], is_left: bool) -> bool:
    """Whether a site tensor is a square matrix seen from the centre."""
    a, o, i, b = shape
    return a * o * i == b if is_left else o * i * b == a
