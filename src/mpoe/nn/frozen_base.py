"""`FrozenBaseExperts`: experts around a linear layer of the base model, which stays as it is, frozen, often quantised.

In the separable layout and the identity gauge the central tensor is the weight matrix itself, in the same order. So the
base's own layer can compute the product with it: y_t = L_{e(t)} (C (R_{e(t)} x_t)) + b_{e(t)}, where only C sits in the
base. It may be any linear module: one of torchao's int8 tensors, bitsandbytes' 4-bit layers, or a plain `nn.Linear`.

Shape letters: T tokens, E experts; a, b the bonds left and right of the central tensor; o, i the central site's output
and input dimensions; p, q the dimensions at the output end and the input end, p = a and q = b.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mpoe.mpo import SiteDims
from mpoe.nn.autocast import compute_dtype, without_autocast
from mpoe.nn.experts import add_bias, empty_bias, load_bias, root_mean_square
from mpoe.nn.grouped import Counts
from mpoe.nn.separable import End, multiply_end


class FrozenBaseExperts(nn.Module):
    """E matrices as MPOs whose shared central tensor is the weight of a frozen linear layer.

    The public behaviour is that of `MPOExperts` in the separable layout and the identity gauge, without truncation:
    every expert starts as the base's matrix, the offsets begin at 0, their scales come from the weights.

    Args:
        base: A linear layer with `weight`, `in_features` and `out_features`. It is kept and frozen, neither copied nor
            reshaped. Its bias, which belongs behind the left end, is taken out of it.
        dims: Site dimensions of the separable layout, without padding.
        num_experts: E, count.
        offset_scale: See `MPOEConfig.offset_scale`.
        bias: "none", "shared" by all experts, or one for each "expert". They start as the base's, or as 0.

    Attributes:
        base: The layer.
        offsets: One tensor per end, (E, 1, p, 1, a) and (E, b, 1, q, 1), in the dtype that the layer computes in.
        scales: One number per end.
        bias: (1 or E, out_features), or None.

    Raises:
        ValueError: Site dimensions of another layout, with padding or of another matrix; a bias without a place.
    """

    def __init__(
        self, base: nn.Module, dims: SiteDims, num_experts: int, offset_scale: float = 0.3, bias: str = "none"
    ) -> None:
        super().__init__()
        _check_dims(base, dims)
        if base.bias is not None and bias == "none":
            raise ValueError("bias must be 'shared' or 'expert' around a linear layer with a bias; got 'none'")
        self.base = base.requires_grad_(False)
        self.dims = dims
        self.num_experts = num_experts
        base_bias: Any = base.bias
        base.bias = None  # pyright: ignore[reportArgumentType]
        matrix = dense_weight(base)
        like = {"dtype": matrix.dtype, "device": matrix.device}
        shapes = dims.site_shapes()
        self.offsets = nn.ParameterList(torch.zeros(num_experts, *shapes[k], **like) for k in dims.auxiliary)
        central_rms = root_mean_square(matrix) or 1.0
        self.scales: Tensor
        self.register_buffer("scales", torch.tensor([offset_scale * rms / central_rms for rms in self._rms()], **like))
        empty = empty_bias(bias, num_experts, dims.out_features)
        self.bias = None if empty is None else nn.Parameter(empty.to(**like))
        with torch.no_grad():
            load_bias(self.bias, base_bias)

    @torch.no_grad()
    def add_noise(self, relative_std: float, generator: torch.Generator) -> None:
        """Break the symmetry between experts: normal noise on every end; arguments as in `MPOExperts.add_noise`."""
        for offset, rms, scale in zip(self.offsets, self._rms(), self.scales.tolist(), strict=True):
            offset.add_(torch.randn(offset.shape, generator=generator).to(offset) * (relative_std * rms / scale))

    def expert_matrix(self, index: int) -> Float[Tensor, "out_features in_features"]:
        """W_e, multiplied out from the base's weight in floating point; differentiable."""
        left, right = (
            torch.eye(len(offset[index]), dtype=offset.dtype, device=offset.device) + scale * offset[index]
            for offset, scale in zip(self._offset_matrices(), self.scales, strict=True)
        )
        (_, o, _), (_, i, _) = self.dims.out_dims, self.dims.in_dims
        central = dense_weight(self.base).view(len(left), o, i, len(right))
        chain = torch.einsum("pa,aoib,bq->poiq", left, central, right)
        return chain.reshape(self.dims.out_features, self.dims.in_features)

    def auxiliary_stacks(self, dtype: torch.dtype) -> list[Tensor]:
        """The auxiliary tensors of all experts as matrices, I + scale · offset: (E, p, a) and (E, b, q).

        Args:
            dtype: Of the results.
        """
        return [
            torch.eye(offsets.shape[1], dtype=dtype, device=offsets.device) + scale * offsets.to(dtype)
            for offsets, scale in zip(self._offset_matrices(), self.scales.to(dtype), strict=True)
        ]

    def forward(self, x: Float[Tensor, "T in_features"], counts: Counts) -> Float[Tensor, "T out_features"]:
        """y_t = W_{e(t)} x_t + b_{e(t)}.

        Args:
            x: Tokens, sorted by expert.
            counts: Tokens of every expert; they sum to T.
        """
        x = x.to(compute_dtype(self.offsets[0]))
        left, right = self._ends(x.dtype)
        (p, o, _), (_, i, q), n = self.dims.out_dims, self.dims.in_dims, len(x)
        with without_autocast(x.device):
            z = x if right is None else multiply_end(right, x.reshape(n, i, q), counts).reshape(n, i * q)
        # Under the caller's autocast, because what the base computes in is the base's own affair.
        u = frozen_linear(self.base, z)
        with without_autocast(x.device):
            if left is not None:
                u = multiply_end(left, u.view(n, p, o).transpose(1, 2), counts).transpose(1, 2).reshape(n, p * o)
            return add_bias(u, self.bias, counts)

    def _ends(self, dtype: torch.dtype) -> tuple[End | None, End | None]:
        """Of the outputs and the inputs; one that has a single dimension is a factor of the other."""
        left, right = (offset.to(dtype) for offset in self._offset_matrices())
        of_left, of_right = self.scales.to(dtype)
        if right.shape[1] == 1:
            return End(left, 1 + of_right * right.flatten(), None, of_left), None
        if left.shape[1] == 1:
            return None, End(right, 1 + of_left * left.flatten(), None, of_right)
        return End(left, None, None, of_left), End(right, None, None, of_right)

    def _offset_matrices(self) -> tuple[Tensor, Tensor]:
        """The offsets as (E, p, a) and (E, b, q)."""
        return self.offsets[0][:, 0, :, 0, :], self.offsets[1][:, :, 0, :, 0]

    def _rms(self) -> list[float]:
        """Of what each end starts as, a unit matrix."""
        return [self.offsets[0].shape[2] ** -0.5, self.offsets[1].shape[3] ** -0.5]

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return (
            f"{self.dims.out_features}×{self.dims.in_features}, num_experts={self.num_experts}, "
            f"out_dims={self.dims.out_dims}, in_dims={self.dims.in_dims}"
        )


def dense_weight(linear: nn.Module) -> Tensor:
    """The matrix of a linear layer without a bias, in floating point, without a graph.

    Args:
        linear: Any. What its weight does not tell, its product with the unit matrix does.

    Returns:
        (out_features, in_features), in the dtype that the layer computes in.
    """
    weight: Any = linear.weight
    if is_traceable_wrapper_subclass(linear.weight):
        return weight.dequantize()
    if weight.is_floating_point():
        return weight.detach()
    dtype = getattr(linear, "compute_dtype", None) or torch.get_default_dtype()
    with torch.no_grad():
        unit = torch.eye(linear.in_features, dtype=dtype, device=weight.device)  # pyright: ignore[reportArgumentType]
        return linear(unit).T.contiguous()


def frozen_linear(linear: nn.Module, x: Float[Tensor, "*N k"]) -> Float[Tensor, "*N l"]:
    """A frozen linear layer's product without its bias, that keeps nothing for the backward but the layer.

    torchao's own would keep its weight multiplied out in floating point from forward to backward, one in each layer:
    more memory than the quantised weights have saved. A compiled graph multiplies it out again by itself.

    Args:
        linear: A layer, of which only one with torchao's weight may have a bias.
        x: Tokens; the result has their dtype.
    """
    weight: Any = linear.weight
    if not is_traceable_wrapper_subclass(linear.weight):
        return linear(x).to(x.dtype)
    if torch.compiler.is_compiling():
        return nn.functional.linear(x, weight).to(x.dtype)
    return _FrozenProduct.apply(x, weight)  # pyright: ignore[reportReturnType]


class FrozenLinear(nn.Linear):
    """An `nn.Linear` with torchao's weight, frozen, that keeps nothing multiplied out, see `frozen_linear`.

    It is made of an `nn.Linear` by setting its `__class__`: nothing but the forward is another.
    """

    def forward(self, input: Float[Tensor, "*N k"]) -> Float[Tensor, "*N l"]:
        """Y = W x + b."""
        y = frozen_linear(self, input)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.weight = weight
        return nn.functional.linear(x, weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_outputs: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return of_outputs[0] @ ctx.weight.dequantize().to(of_outputs[0].dtype), None


def _check_dims(base: nn.Module, dims: SiteDims) -> None:
    shape = (base.out_features, base.in_features)
    if (dims.out_features, dims.in_features) != shape:
        raise ValueError(
            f"site dimensions must be those of the base's matrix, {shape[0]}x{shape[1]}; got ones of "
            f"{dims.out_features}x{dims.in_features}: mpoe.mpo.site_dims(..., layout='separable') gives them"
        )
    sizes, bonds = (dims.out_dims, dims.in_dims), dims.bond_dims()
    if not dims.is_separable or dims.num_sites != 3 or (dims.padded_out, dims.padded_in) != shape:
        raise ValueError(
            "around a frozen base the site dimensions must be separable, 3 sites, without padding, so that the central "
            f"tensor is the base's {shape[0]}x{shape[1]} matrix; got {sizes}: name others in site_dims"
        )
    if bonds[1:3] != (dims.out_dims[0], dims.in_dims[2]):
        raise ValueError(
            f"around a frozen base an end must be no larger than the rest of the chain, so that the central tensor is "
            f"the base's {shape[0]}x{shape[1]} matrix; got {sizes}: name others in site_dims"
        )
