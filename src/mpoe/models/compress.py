"""`compress`: a model whose matrices are truncated MPOs, to a number of parameters in all.

The bonds are given out over all matrices at once (`mpoe.mpo.budget`). A matrix that is worth more than its MPO would
spare stays whole, as an MPO of a single site.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from mpoe.config import MPOEConfig
from mpoe.models.components import with_tied_head
from mpoe.models.find import find_embedding, find_matrices, matrix_of
from mpoe.models.inspect import count_parameters, is_upcycled
from mpoe.models.merge import empty_like, share_tensors
from mpoe.models.router_loss import mpoe_config
from mpoe.models.upcycle import swap_modules
from mpoe.mpo import MPO, SiteDims, decompose, low_rank_dims, site_dims
from mpoe.mpo.budget import Option, give_out
from mpoe.mpo.truncate import Chain, cut, cuts
from mpoe.nn import MPOExperts

LAYOUTS: dict[str, Callable[[int, int], SiteDims]] = {
    "low_rank": low_rank_dims,
    "balanced": site_dims,
}
"""Site dimensions that a dense matrix may get; "low_rank" makes its MPO the singular value decomposition."""


@dataclass(frozen=True)
class CompressedMatrix:
    """What became of one matrix, or of all experts' matrices in one place.

    Attributes:
        name: Of its layer in the dense model.
        dims: Site dimensions.
        bonds: d_0 .. d_m; a single site is a matrix that stayed whole.
        before: Parameters before, count.
        after: Parameters now, count.
        predicted: Relative error that the cuts alone let expect, >= the measured one for a single expert; of the
            outputs where the inputs' moments were given, else of the matrix, in the Frobenius norm.
        error: The same, measured.
    """

    name: str
    dims: SiteDims
    bonds: tuple[int, ...]
    before: int
    after: int
    predicted: float
    error: float


@dataclass(frozen=True)
class Compressed:
    """A compressed model and what it cost.

    Attributes:
        model: The new model; what is not compressed is shared with the old one, not copied.
        matrices: In the model's order.
    """

    model: PreTrainedModel
    matrices: list[CompressedMatrix]

    @property
    def predicted(self) -> float:
        """Root of the mean over matrices of the square of the predicted relative error, dimensionless."""
        return _root_mean_square([matrix.predicted for matrix in self.matrices])

    @property
    def error(self) -> float:
        """The same of the measured one."""
        return _root_mean_square([matrix.error for matrix in self.matrices])


@torch.no_grad()
def compress(
    model: PreTrainedModel,
    budget: float,
    components: Sequence[str] = ("mlp", "attention"),
    layouts: Sequence[str] = ("low_rank",),
    expert_budget: float | None = None,
    moments: Mapping[str, Tensor] | None = None,
) -> Compressed:
    """Truncate the matrices of a model to a number of parameters.

    Args:
        model: Dense, or a mixture of layout "balanced" that shares its central tensors; it stays as it is.
        budget: Parameters of the result, all of them, as a share of the model's, in (0, 1].
        components: Of a dense model: which matrices become MPOs, of `mpoe.config.COMPONENTS`. Of a mixture: all that
            are MPOs, whatever this says.
        layouts: Of a dense model: keys of LAYOUTS; with several every matrix gets the one that loses least. A mixture
            keeps its site dimensions.
        expert_budget: Of a mixture: parameters of all auxiliary tensors, as a share of those it has, in (0, 1].
        moments: From `input_moments`: the outputs' error is made least, not the matrices'. None is the matrices'.

    Returns:
        The new model, a mixture of the same kind or a model without experts whose matrices are MPOs; it is saved and
        loaded like any other.

    Raises:
        ValueError: Shares out of range, components or a model that cannot be compressed, a budget that is less than
            bonds of 1 need.
    """
    for name, share_of in (("budget", budget), ("expert_budget", expert_budget)):
        if share_of is not None and not 0 < share_of <= 1:
            raise ValueError(f"{name} must be a share in (0, 1] of the parameters that there are; got {share_of}")
    before, dense = count_parameters(model), empty_like(model)
    config = _config_of(model, dense, components, layouts, expert_budget)
    places = find_matrices(dense, config)
    options: list[list[Option]] = []
    there: list[int] = []
    for name, place in _progress(places.items(), "Measuring what bonds are worth"):
        of_matrix = []
        for dims in _choices(model, name, place, layouts):
            chain = _chain(model, name, place, dims)
            if not of_matrix:
                there.append(sum(site.numel() for site in chain))
            lost = tuple(of_bond.lost for of_bond in cuts(chain, dims, _factors(dims, _of(moments, name))))
            of_matrix.append(Option(dims, max(map(len, chain)), lost))
        options.append(of_matrix)
    limit = math.floor(budget * before.total) - (before.total - sum(there))
    auxiliary = None if expert_budget is None else math.floor(expert_budget * before.auxiliary)
    chosen = give_out(options, limit, auxiliary)
    config = dataclasses.replace(config, matrices={
        name: {"site_dims": [list(side) for side in (dims.out_dims, dims.in_dims)], "bonds": list(choice.bonds[1:-1])}
        for name, choice, dims in ((n, c, of[c.option].dims) for n, c, of in zip(places, chosen, options, strict=True))
    })  # fmt: skip
    swap_modules(dense, config)
    share_tensors(model, dense)
    matrices = []
    for (name, place), choice, of_matrix, size in _progress(
        list(zip(places.items(), chosen, options, there, strict=True)), "Cutting"
    ):
        dims = of_matrix[choice.option].dims
        chain = _chain(model, name, place, dims)  # made again: all of them at once are the model several times over
        smaller = cut(chain, dims, choice.bonds, _factors(dims, _of(moments, name)))
        experts = cast(MPOExperts, dense.get_submodule(place))
        _fill(experts, smaller, model, name)
        error = _error(chain, smaller, dims, _of(moments, name))
        matrices.append(
            CompressedMatrix(name, dims, choice.bonds, size, choice.parameters, math.sqrt(choice.lost), error)
        )
    return Compressed(dense, matrices)


@contextmanager
def input_moments(
    model: PreTrainedModel, components: Sequence[str] = ("mlp", "attention")
) -> Iterator[dict[str, Tensor]]:
    """Within it, every forward adds to the second moments of the inputs of the matrices, Σ x xᵀ over tokens.

    Args:
        model: As in `compress`.
        components: As in `compress`. A word embedding has no such moments, because its inputs are tokens.

    Yields:
        By the name of the matrix's layer in the dense model, (in_features, in_features), in float64.
    """
    dense = empty_like(model)
    config = _config_of(model, dense, components, ("low_rank",), None)
    moments: dict[str, Tensor] = {}
    table = find_embedding(dense, dense.config.model_type).table if "word_embed" in config.mpo_layers else None

    def add(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            moments[name] = moments.get(name, 0) + (x.T @ x).double()

        return hook

    handles = [
        model.get_submodule(place if is_upcycled(model) else name).register_forward_pre_hook(add(name))
        for name, place in find_matrices(dense, config).items()
        if name != table
    ]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def _config_of(
    model: PreTrainedModel, dense: PreTrainedModel, components: Sequence[str], layouts: Sequence[str],
    expert_budget: float | None,
) -> MPOEConfig:  # fmt: skip
    """The config of the result, but for its matrices."""
    config = mpoe_config(model)
    if config is None:
        if expert_budget is not None:
            raise ValueError("expert_budget is about the experts of a mixture; this model is dense: leave it out")
        if not components or not layouts or not set(layouts) <= LAYOUTS.keys():
            raise ValueError(f"layouts must be among {', '.join(LAYOUTS)}, and components given; got {list(layouts)}")
        config = MPOEConfig(num_experts=1, moe_type="none", mpo_layers=tuple(components), layout="balanced")
        if "word_embed" in config.mpo_layers:
            config = with_tied_head(model, find_embedding(model, model.config.model_type), config)
    elif not any(isinstance(module, MPOExperts) for module in model.modules()) or not config.share_central:
        raise ValueError(
            "the model must be dense, or a mixture of layout 'balanced' that shares its central tensors; this one's "
            f"experts {'extend the matrices of its base' if config.is_extended else 'share nothing'}. Compress its "
            "dense base instead"
        )
    return dataclasses.replace(
        config, gauge="central", auxiliary_start=False, matrices=None, site_dims=None, max_bond_dim=None,
        attention_bond_dim=None, word_embed_bond_dim=None,
    )  # fmt: skip


def _choices(model: PreTrainedModel, name: str, place: str, layouts: Sequence[str]) -> list[SiteDims]:
    """The site dimensions that a matrix may get, those of the whole matrix first; of experts, those that they have."""
    if is_upcycled(model):
        return [cast(MPOExperts, model.get_submodule(place)).dims]
    rows, columns = matrix_of(model.get_submodule(name)).shape
    whole = SiteDims((rows,), (columns,), rows, columns)
    return list(dict.fromkeys((whole, *(LAYOUTS[layout](rows, columns) for layout in layouts))))


def _chain(model: PreTrainedModel, name: str, place: str, dims: SiteDims) -> Chain:
    """A dense matrix at full bonds; of experts, the chain as it is."""
    if is_upcycled(model):
        experts = cast(MPOExperts, model.get_submodule(place))
        central, stacks = experts.site_stacks(range(experts.num_experts), experts.central.dtype)
        stacks.insert(dims.central, central[None])
        return stacks
    return [site[None] for site in decompose(matrix_of(model.get_submodule(name)).detach(), dims).sites]


def _of(moments: Mapping[str, Tensor] | None, name: str) -> Tensor | None:
    return None if moments is None else moments.get(name)


def _factors(dims: SiteDims, moment: Tensor | None) -> list[Tensor] | None:
    """The Kronecker factors of a second moment: its partial traces, of mean diagonal 1."""
    if moment is None:
        return None
    padding = dims.padded_in - dims.in_features
    padded = nn.functional.pad(moment, (0, padding, 0, padding)).view(*dims.in_dims, *dims.in_dims)
    factors = []
    m = dims.num_sites
    for k in range(m):
        # the sum over all other sites' diagonals
        labels = [chr(ord("a") + n) for n in range(m)]
        right = [label if n != k else label.upper() for n, label in enumerate(labels)]
        traced = torch.einsum(f"{''.join(labels)}{''.join(right)}->{labels[k]}{right[k]}", padded)
        factors.append(traced / traced.diagonal().mean().clamp_min(torch.finfo(traced.dtype).tiny))
    return factors


def _fill(experts: MPOExperts, chain: Chain, model: PreTrainedModel, name: str) -> None:
    """Give experts on the meta device their tensors; a dense layer's bias becomes theirs."""
    central = experts.dims.central
    experts.central = nn.Parameter(chain[central][0])
    experts.offsets = nn.ParameterList(site for k, site in enumerate(chain) if k != central)
    experts.scales = torch.ones(len(experts.offsets), dtype=experts.central.dtype, device=experts.central.device)
    if not is_upcycled(model) and experts.bias is not None:
        experts.bias = nn.Parameter(cast(Tensor, model.get_submodule(name).bias).detach()[None].clone())


def _error(chain: Chain, smaller: Chain, dims: SiteDims, moment: Tensor | None) -> float:
    """The relative error of all experts' matrices, or of their outputs."""
    difference = norm = 0.0
    for e in range(max(len(site) for site in chain)):
        exact, now = (
            MPO(tuple(site[min(e, len(site) - 1)].double() for site in sites), dims).to_matrix()
            for sites in (chain, smaller)
        )
        difference += _squared(now - exact, moment)
        norm += _squared(exact, moment)
    return math.sqrt(difference / norm) if norm else 0.0


def _squared(matrix: Tensor, moment: Tensor | None) -> float:
    """|W|², or tr(W Σ Wᵀ)."""
    return float((matrix * (matrix if moment is None else matrix @ moment.to(matrix))).sum().clamp_min(0))


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / max(len(values), 1))


def _progress(items: Any, text: str) -> Any:
    return logging.tqdm(items, desc=text, total=len(items), delay=2)
