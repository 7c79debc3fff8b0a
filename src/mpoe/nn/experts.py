"""Experts: one weight matrix of a layer, E times. `MPOExperts` shares its central tensor, `DenseExperts` nothing.

Both take tokens sorted by expert and the number of tokens of each expert, and both can multiply out the matrix W_e of
one expert, which defines what is correct: every faster way must agree with `per_token` in output and gradients.

Shape letters: T tokens, E experts; a, b the bonds left and right of the central tensor; o, i the central site's output
and input dimensions; p, q the dimensions at the output end and the input end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mpoe.mpo import MPO, Caps, SiteDims, decompose, machine_of, plan
from mpoe.nn.accumulation import Accumulation
from mpoe.nn.autocast import compute_dtype, without_autocast
from mpoe.nn.grouped import Counts, active, blockwise, linear, linear_per_expert, rows_of_experts
from mpoe.nn.matrix_cache import MatrixCache
from mpoe.nn.rebuild import multiply_out, rebuilt_linear


class MPOExperts(nn.Module):
    """E matrices as MPOs that share their central tensor.

    The auxiliary tensor of expert e at site k is `start_k + scale_k * offset_k[e]`. The start (an identity in the
    identity gauge) is shared and fixed, the offsets are the parameters and begin at 0, the scale is set from the
    weights by `load_matrix`. So Adam's steps, which are absolute, have about the same relative size on all parts of
    the layer.

    Args:
        dims: Site dimensions.
        num_experts: E, count.
        max_bond_dim: Truncation, count, of every bond or one for each inner bond; None is exact.
        gauge: See `mpoe.mpo.decompose`.
        offset_scale: See `MPOEConfig.offset_scale`.
        bias: "none", "shared" by all experts, or one for each "expert".
        has_start: Whether there is a start; without one the parameters are the auxiliary tensors themselves.

    Attributes:
        central: The shared central tensor (a, o, i, b).
        offsets: One tensor per auxiliary site, (E, d_{k-1}, o_k, i_k, d_k).
        scales: One number per auxiliary site.
        bias: (1 or E, out_features), or None.
        way: How to compute it, see `forward`.
        save_bytes: What of matrices may be kept from forward to backward, bytes, see `rebuilt_linear`.
        cache: Where evaluation keeps matrices; None is nowhere.
        accumulation: Of micro-batches, see `Accumulation`; None is none.

    Source: MPOE (Gao et al., COLING 2022), §3.1.
    """

    mixes_outputs = True

    def __init__(
        self,
        dims: SiteDims,
        num_experts: int,
        max_bond_dim: Caps = None,
        gauge: str = "identity",
        offset_scale: float = 0.3,
        bias: str = "none",
        has_start: bool = True,
    ) -> None:
        super().__init__()
        self.dims = dims
        self.num_experts = num_experts
        self.max_bond_dim = max_bond_dim
        self.gauge = gauge
        self.offset_scale = offset_scale
        self.has_start = has_start
        shapes = dims.site_shapes(max_bond_dim)
        self.central = nn.Parameter(torch.empty(shapes[dims.central]))
        self.offsets = nn.ParameterList(torch.empty(num_experts, *shapes[k]) for k in dims.auxiliary)
        self.bias = empty_bias(bias, num_experts, dims.out_features)
        self.way: str | None = None
        self.save_bytes = 0
        self.cache: MatrixCache | None = None
        self.accumulation: Accumulation | None = None
        self.scales: Tensor
        self.register_buffer("scales", torch.empty(len(dims.auxiliary)))
        # In the identity gauge a square start is the unit matrix, which is not stored.
        self._unit_starts = tuple(
            has_start and gauge == "identity" and _is_square(shapes[k], k < dims.central) for k in dims.auxiliary
        )
        for k, is_unit in zip(dims.auxiliary, self._unit_starts, strict=True):
            if has_start and not is_unit:
                self.register_buffer(f"start_{k}", torch.empty(shapes[k]))

    @property
    def auxiliary(self) -> dict[int, nn.Parameter]:
        """The experts' own tensors, by site."""
        return dict(zip(self.dims.auxiliary, self.offsets, strict=True))  # pyright: ignore[reportReturnType]

    @property
    def out_features(self) -> int:
        """Rows of the matrices, count."""
        return self.dims.out_features

    @property
    def in_features(self) -> int:
        """Columns of the matrices, count."""
        return self.dims.in_features

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
        central_rms = root_mean_square(operator.central) or 1.0
        for n, (k, is_unit) in enumerate(zip(self.dims.auxiliary, self._unit_starts, strict=True)):
            start = operator.sites[k]
            if not self.has_start:
                self.scales[n] = 1
                self.offsets[n].copy_(start)
                continue
            self.scales[n] = self.offset_scale * root_mean_square(start) / central_rms
            self.offsets[n].zero_()
            if not is_unit:
                self.get_buffer(f"start_{k}").copy_(start)
        load_bias(self.bias, bias)

    @torch.no_grad()
    def add_noise(self, relative_std: float, generator: torch.Generator) -> None:
        """Break the symmetry between experts: normal noise on every auxiliary tensor.

        Args:
            relative_std: Standard deviation relative to the start's root mean square, dimensionless, >= 0.
            generator: A CPU generator, so that every device draws the same.
        """
        for n, offset in enumerate(self.offsets):
            shared = self._start(n) if self.has_start else offset
            std = relative_std * root_mean_square(shared) / self.scales[n].item()
            offset.add_(torch.randn(offset.shape, generator=generator).to(offset) * std)

    def expert(self, index: int) -> MPO:
        """The MPO of one expert; differentiable."""
        sites = [self._start(n) + self.scales[n] * offset[index] for n, offset in enumerate(self.offsets)]
        c = self.dims.central
        return MPO((*sites[:c], self.central, *sites[c:]), self.dims)

    def expert_matrix(self, index: int) -> Float[Tensor, "out_features in_features"]:
        """W_e, multiplied out."""
        return self.expert(index).to_matrix()

    def expert_matrices(self) -> Float[Tensor, "E out_features in_features"]:
        """All W_e, multiplied out."""
        return torch.stack([self.expert_matrix(e) for e in range(self.num_experts)])

    def forward(
        self, x: Float[Tensor, "T in_features"], counts: Counts, way: str | None = None
    ) -> Float[Tensor, "T out_features"]:
        """y_t = W_{e(t)} x_t + b_{e(t)}.

        Args:
            x: Tokens, sorted by expert.
            counts: Tokens of every expert; they sum to T.
            way: How to compute it, of `mpoe.mpo.WAYS`; None is the layer's own `way`, or what the planner finds
                cheapest. With gradients "cached" is left to the planner too. Where the host does not know the counts,
                all matrices are materialized.
        """
        dtype = compute_dtype(self.central)
        with without_autocast(x.device):
            return add_bias(self._products(x.to(dtype), counts, way or self.way), self.bias, counts)

    def _products(self, x: Tensor, counts: Counts, way: str | None) -> Tensor:
        if isinstance(counts, Tensor):
            return linear_per_expert(x, counts, self.expert_matrices().to(x.dtype))
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        way = self._choose(x, counts, None if way == "cached" and needs_grad else way, needs_grad)
        if way == "rebuild":
            return self._rebuild(x, counts, needs_grad)
        if way == "cached":
            matrices = {e: self.matrix(e, x.dtype) for e in active(counts)}
            return blockwise(x, counts, lambda rows, e: linear(rows, matrices[e]))
        return self._apply_in_turn(x, counts)

    def _choose(self, x: Tensor, counts: Sequence[int], way: str | None, needs_grad: bool) -> str:
        if way is not None:
            return way
        if needs_grad and self.accumulation is not None and self.accumulation.is_active:
            return "rebuild"
        return plan(
            self.dims,
            self.max_bond_dim,
            self.num_experts,
            len(x),
            sum(count > 0 for count in counts),
            x.element_size(),
            needs_grad,
            0 if self.cache is None else self.cache.limit_bytes,
            machine_of(x.device.type),
        ).way

    def _rebuild(self, x: Tensor, counts: Sequence[int], needs_grad: bool) -> Tensor:
        if needs_grad and self.accumulation is not None and self.accumulation.is_active:
            return self.accumulation.linear(self, x, counts)
        experts = active(counts)
        stacks = self.site_stacks(experts, x.dtype)
        return rebuilt_linear(x, [counts[e] for e in experts], *stacks, self.dims, self.save_bytes)

    def _apply_in_turn(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        experts = active(counts)
        central, stacks = self.site_stacks(experts, x.dtype)
        sites = [stack.unbind(0) for stack in stacks]
        sites.insert(self.dims.central, (central,) * len(experts))
        operators = {e: MPO(tuple(site[n] for site in sites), self.dims) for n, e in enumerate(experts)}
        return blockwise(x, counts, lambda rows, e: operators[e].apply(rows))

    def matrix(self, expert: int, dtype: torch.dtype) -> Float[Tensor, "out_features in_features"]:
        """W_e without a graph, multiplied out once as long as the parameters stay the same and the cache has room.

        Args:
            expert: Index.
            dtype: Of the result.
        """

        def multiply() -> Tensor:
            return next(multiply_out(*self.site_stacks([expert], dtype), self.dims))

        return multiply() if self.cache is None else self.cache.get(self, expert, self.sources(), dtype, multiply)

    def sources(self) -> list[Tensor]:
        """Every tensor that the matrices are made of, the central one first."""
        return [self.central, *self.offsets, *(t for name, t in self.named_buffers())]

    def site_stacks(self, experts: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """The central tensor, and of every auxiliary site the given experts' tensors, stacked; differentiable.

        Args:
            experts: Indices, each once.
            dtype: Of the results.
        """
        stacks = []
        for n, offset in enumerate(self.offsets):
            if len(experts) < self.num_experts:
                offset = offset.index_select(0, torch.tensor(experts, dtype=torch.long, device=offset.device))
            stacks.append((self._start(n) + self.scales[n] * offset).to(dtype))
        return self.central.to(dtype), stacks

    @torch.no_grad()
    def divergence(self) -> Float[Tensor, ""]:
        """Return the mean over sites of the experts' squared relative distance from their mean, dimensionless.

        Of each site relative to its own mean, so that no gauge of the chain weighs more than another.
        """
        _, stacks = self.site_stacks(range(self.num_experts), torch.float32)
        if not stacks:  # a single site has no tensor of an expert's own
            return self.central.new_zeros(())
        return torch.stack([relative_spread(stack) for stack in stacks]).mean()

    def _start(self, n: int) -> Tensor:
        """What the n-th auxiliary tensor of every expert starts as, (d_{k-1}, o_k, i_k, d_k)."""
        k, shape = self.dims.auxiliary[n], self.offsets[n].shape[1:]
        if not self.has_start:
            return self.central.new_zeros(()).expand(shape)  # of no memory
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

    mixes_outputs = True
    central = None
    """Nothing is shared."""
    auxiliary: ClassVar[dict[int, nn.Parameter]] = {}
    """There are no sites."""

    def __init__(self, out_features: int, in_features: int, num_experts: int, bias: str = "none") -> None:
        super().__init__()
        self.num_experts = num_experts
        self.out_features = out_features
        self.in_features = in_features
        self.bias = empty_bias(bias, num_experts, out_features)
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))

    @torch.no_grad()
    def load_matrix(
        self, matrix: Float[Tensor, "out_features in_features"], bias: Float[Tensor, " out_features"] | None = None
    ) -> None:
        """Make every expert a copy of the given matrix; arguments as in `MPOExperts.load_matrix`."""
        self.weight.copy_(matrix.expand_as(self.weight))
        load_bias(self.bias, bias)

    @torch.no_grad()
    def add_noise(self, relative_std: float, generator: torch.Generator) -> None:
        """Normal noise on every expert; arguments as in `MPOExperts.add_noise`."""
        std = relative_std * root_mean_square(self.weight)
        self.weight.add_(torch.randn(self.weight.shape, generator=generator).to(self.weight) * std)

    def expert_matrix(self, index: int) -> Float[Tensor, "out_features in_features"]:
        """W_e."""
        return self.weight[index]

    @torch.no_grad()
    def divergence(self) -> Float[Tensor, ""]:
        """Return the mean squared relative distance of the experts from their mean, dimensionless."""
        return relative_spread(self.weight)

    def forward(self, x: Float[Tensor, "T in_features"], counts: Counts) -> Float[Tensor, "T out_features"]:
        """y_t = W_{e(t)} x_t + b_{e(t)}; arguments as in `MPOExperts.forward`."""
        dtype = compute_dtype(self.weight)
        with without_autocast(x.device):
            y = linear_per_expert(x.to(dtype), counts, self.weight.to(dtype))
            return add_bias(y, self.bias, counts)


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


def root_mean_square(tensor: Tensor) -> float:
    """Root mean square; the sum in float64, or it loses four digits for a large matrix."""
    return torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64).item() / tensor.numel() ** 0.5


def relative_spread(stack: Float[Tensor, "E ..."]) -> Float[Tensor, ""]:
    """Return the mean over experts of the squared relative Frobenius distance from their mean, dimensionless."""
    stack = stack.float()
    mean = stack.mean(dim=0)
    tiny = torch.finfo(mean.dtype).tiny  # experts that are all 0 are all equal
    return (stack - mean).square().sum() / (len(stack) * mean.square().sum().clamp(min=tiny))


def empty_bias(kind: str, num_experts: int, out_features: int) -> nn.Parameter | None:
    """Biases without values, (1 or E, out_features); see `MPOExperts` for the kinds."""
    return None if kind == "none" else nn.Parameter(torch.empty(num_experts if kind == "expert" else 1, out_features))


def load_bias(bias: nn.Parameter | None, value: Tensor | None) -> None:
    """Make all biases the base's; None is 0."""
    if bias is not None:
        bias.copy_(torch.zeros_like(bias) if value is None else value.expand_as(bias))


def add_bias(y: Tensor, bias: nn.Parameter | None, counts: Counts) -> Tensor:
    """Rows sorted by expert, each with its expert's bias."""
    if bias is None:
        return y
    if len(bias) == 1:
        return y + bias.to(y.dtype)
    return y + rows_of_experts(bias, counts, len(y)).to(y.dtype)


def _is_square(shape: tuple[int, int, int, int], is_left: bool) -> bool:
    """Whether a site tensor is a square matrix seen from the centre."""
    a, o, i, b = shape
    return a * o * i == b if is_left else o * i * b == a
