"""Checkpoints of the method's reference implementation, read into a mixture of ours, exactly.

Nothing is decomposed, multiplied out or rounded: every site tensor goes to where `MPOExperts` has it, the central ones
once a matrix, and all other tensors keep their values. A tensor without a place and a place without a tensor are
errors. No code in a pickle is ever executed.

Shape letters: E experts, D model width; a, b bonds; o, i output and input dimensions of one site; m sites.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, T5Config, T5ForConditionalGeneration

from mpoe.config import MPOEConfig
from mpoe.models.find import find_feed_forwards
from mpoe.models.reference_file import read_checkpoint
from mpoe.models.reference_names import ReferenceLayout, ReferenceMatrix, check_names, find_matrices, plain_names
from mpoe.models.upcycle import swap_modules
from mpoe.mpo import SiteDims

ORIENTATIONS = ("out-in", "in-out")

_CAPS = {"mlp": "max_bond_dim", "attention": "attention_bond_dim", "word_embed": "word_embed_bond_dim"}


def import_reference(
    checkpoint: str | Path | Mapping[str, Tensor],
    config: PreTrainedConfig,
    orientation: str | None = None,
    is_scale_prob: bool = False,
) -> PreTrainedModel:
    """Make a mixture of a reference checkpoint of T5.

    The gauge is "sqrt", the reference's own, with starts of 0: an auxiliary tensor is its parameter times a power of
    two, which is the checkpoint's tensor bit for bit. Of `moe` all second experts are used and no token is dropped; the
    reference draws second experts at random even in evaluation.

    Args:
        checkpoint: A file for `read_checkpoint`, or what that function returned.
        config: Of the dense base model, T5 v1.0.
        orientation: How to read square matrices, "out-in" or "in-out": whether the first dimensions of their sites are
            the outputs; the shapes of all others tell. None: like the others, and "out-in" if all are square.
        is_scale_prob: Whether the checkpoint was trained with the reference's flag of this name; only for `switch`.

    Returns:
        The mixture in evaluation mode, ready for `save_pretrained`.

    Raises:
        ValueError: A file that cannot be read, names that are missing or unknown, shapes that do not fit the config,
            experts with central tensors of their own, bonds or site dimensions that an `MPOEConfig` cannot say.

    Source: MPOE (Gao et al., COLING 2022) and the checkpoints of its authors' code (RUCAIBox/MPOE).
    """
    if orientation is not None and orientation not in ORIENTATIONS:
        raise ValueError(f"orientation must be one of {ORIENTATIONS} or None; got {orientation!r}")
    tensors = dict(checkpoint) if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint)
    layout = ReferenceLayout.of(tensors)
    if is_scale_prob and layout.moe_type != "switch":
        raise ValueError("is_scale_prob must be False for the top-2 routers of a moe checkpoint: leave it out")
    model = _base_on_meta(config, layout.has_own_head)
    feed_forwards = [found.name for found in find_feed_forwards(model, "t5", MPOEConfig())]
    matrices = find_matrices(model, feed_forwards, layout)
    names = plain_names(model, feed_forwards, matrices, layout)
    check_names(tensors, {*names.values(), *(key for matrix in matrices for key in matrix.keys(layout))})

    chains = [_read_chain(tensors, matrix, layout) for matrix in matrices]
    chains = _oriented(chains, orientation)
    biases = _read_biases(tensors, matrices, layout)
    mixture = _mixture_config(layout, chains, biases, is_scale_prob)
    swap_modules(model, mixture)
    state = {name: tensors[key].T if key.endswith("w_gating") else tensors[key] for name, key in names.items()} | biases
    if layout.moe_type == "moe":  # its gates have no bias
        state |= {f"{name}.router.bias": torch.zeros(layout.num_experts) for name in feed_forwards}
    for chain in chains:
        state |= chain.state(mixture.offset_scale)
    _check_shapes(state, model, names)
    return _load(model.config, mixture, state)


@dataclass(frozen=True)
class _Chain:
    """The values of a matrix's site tensors.

    Attributes:
        matrix: Which.
        sites: Site k of shape (E, a, o, i, b), the central one without E; E = 1 where nothing is routed.
    """

    matrix: ReferenceMatrix
    sites: tuple[Tensor, ...]

    @property
    def bond_dims(self) -> tuple[int, ...]:
        """The bonds d_0 .. d_m."""
        return (self.sites[0].shape[-4], *(site.shape[-1] for site in self.sites))

    def dims(self) -> SiteDims:
        """The site dimensions.

        Raises:
            ValueError: They do not multiply out to the base's shape.
        """
        return SiteDims(
            tuple(site.shape[-3] for site in self.sites),
            tuple(site.shape[-2] for site in self.sites),
            *self.matrix.shape,
        )

    def fits(self) -> bool:
        """Whether the site dimensions multiply out to the base's shape."""
        try:
            self.dims()
        except ValueError:
            return False
        return True

    def transposed(self) -> _Chain:
        """The chain of the transposed matrix, with the same base shape."""
        return _Chain(self.matrix, tuple(site.transpose(-3, -2) for site in self.sites))

    def state(self, offset_scale: float) -> dict[str, Tensor]:
        """The tensors of `MPOExperts` by their names."""
        dims, prefix = self.dims(), self.matrix.experts
        central = self.sites[dims.central]
        auxiliary = [self.sites[k] for k in dims.auxiliary]
        scales = [_power_of_two(offset_scale, site, central) for site in auxiliary]
        return {
            f"{prefix}.central": central,
            f"{prefix}.scales": torch.stack(scales),
            **{f"{prefix}.offsets.{n}": site / scales[n] for n, site in enumerate(auxiliary)},
            **{f"{prefix}.start_{k}": torch.zeros_like(self.sites[k][0]) for k in dims.auxiliary},
        }


def _power_of_two(offset_scale: float, auxiliary: Tensor, central: Tensor) -> Tensor:
    """The largest power of two up to the scale that `MPOExperts` would choose; 1 where dividing by it would round."""
    rms = [tensor.double().square().mean().sqrt().item() for tensor in (auxiliary, central)]
    wanted = offset_scale * rms[0] / (rms[1] or 1.0)
    scale = torch.tensor(2.0 ** math.floor(math.log2(wanted)) if wanted else 1.0, dtype=auxiliary.dtype)
    return scale if torch.equal(scale * (auxiliary / scale), auxiliary) else torch.ones_like(scale)


def _base_on_meta(config: PreTrainedConfig, has_own_head: bool) -> T5ForConditionalGeneration:
    """The dense base model without values."""
    if not isinstance(config, T5Config) or config.feed_forward_proj != "relu" or config.is_gated_act:
        raise ValueError(
            "config must be of T5 v1.0 with its plain ReLU network, which the reference has; got model_type "
            f"{config.model_type!r} and feed_forward_proj {getattr(config, 'feed_forward_proj', None)!r}"
        )
    try:
        with torch.device("meta"):
            model = T5ForConditionalGeneration(copy.deepcopy(config))
    except (TypeError, ValueError, LookupError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config must be of a T5 that can be built; {reason}: correct the config.json") from error
    if not model.encoder.block and not model.decoder.block:
        raise ValueError("config must be of a T5 with layers; this one's num_layers and num_decoder_layers are 0")
    with torch.device("meta"):
        if has_own_head:
            model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    return model


def _read_chain(tensors: Mapping[str, Tensor], matrix: ReferenceMatrix, layout: ReferenceLayout) -> _Chain:
    """A matrix's site tensors as they are, experts stacked and the central tensor once."""
    num_experts = layout.num_experts if matrix.component == "mlp" else 1
    central = layout.num_sites // 2
    sites = []
    for k in range(layout.num_sites):
        found = [tensors[f"{prefix}{k}"] for prefix in matrix.prefixes]
        if len(found) == 1 and found[0].ndim == 5:
            found = list(found[0].unbind(0))
        where = f"{matrix.prefixes[0]}{k}"
        is_shared = k == central and len(found) == 1
        if len(found) != (1 if is_shared else num_experts) or any(
            f.ndim != 4 or f.shape != found[0].shape for f in found
        ):
            raise ValueError(
                f"site tensors must have shape (d_(k-1), i_k, j_k, d_k) for each of {num_experts} experts; {where} has "
                f"{len(found)} of shapes {sorted({tuple(f.shape) for f in found})}"
            )
        if k == central and not all(torch.equal(f, found[0]) for f in found):
            difference = max((f.double() - found[0].double()).abs().max().item() for f in found)
            raise ValueError(
                f"all experts of a layer must have one central tensor; those of {where} differ by up to "
                f"{difference:.3g}: a mixture of independent experts cannot be imported"
            )
        sites.append(found[0] if k == central else torch.stack(found))
    chain = _Chain(matrix, tuple(sites))
    left = (*(site.shape[-4] for site in sites), 1)
    if chain.bond_dims != left or left[0] != 1:
        raise ValueError(
            f"the bonds of neighbouring site tensors must be equal, and 1 at the ends; {matrix.prefixes[0]}* has "
            f"{left[:-1]} to the left and {chain.bond_dims[1:]} to the right"
        )
    return chain


def _oriented(chains: list[_Chain], orientation: str | None) -> list[_Chain]:
    """The chains with outputs first."""
    fits = [(chain.fits(), chain.transposed().fits()) for chain in chains]
    for chain, fit in zip(chains, fits, strict=True):
        if not any(fit):
            pairs = [tuple(site.shape[-3:-1]) for site in chain.sites]
            raise ValueError(
                f"products of site dimensions must be the {' × '.join(map(str, chain.matrix.shape))} of the config's "
                f"{chain.matrix.weight}, either way round; {chain.matrix.prefixes[0]}* has {pairs}. Is it "
                "the config of this checkpoint's base?"
            )
    if orientation is None:
        told = {ORIENTATIONS[fit.index(True)] for fit in fits if fit != (True, True)}
        orientation = told.pop() if len(told) == 1 else "out-in"
    as_they_are = [fit[0] and (not fit[1] or orientation == "out-in") for fit in fits]
    return [chain if keep else chain.transposed() for chain, keep in zip(chains, as_they_are, strict=True)]


def _read_biases(
    tensors: Mapping[str, Tensor], matrices: list[ReferenceMatrix], layout: ReferenceLayout
) -> dict[str, Tensor]:
    """The experts' biases by our name, (1, out) or (E, out) all of them; none if all are 0."""
    biases = {}
    for matrix in matrices:
        if matrix.bias is not None:
            bias, size = tensors[matrix.bias], matrix.shape[0]
            if not bias.ndim or bias.shape[-1] != size or bias.numel() not in (size, layout.num_experts * size):
                raise ValueError(
                    f"a bias must have {size} elements, or as many for each of {layout.num_experts} experts; "
                    f"{matrix.bias} has shape {tuple(bias.shape)}"
                )
            biases[f"{matrix.experts}.bias"] = bias.reshape(-1, size)
    if not any(bias.any() for bias in biases.values()):
        return {}
    rows = max(map(len, biases.values()))
    return {name: bias.expand(rows, -1) for name, bias in biases.items()}


def _mixture_config(
    layout: ReferenceLayout, chains: list[_Chain], biases: Mapping[str, Tensor], is_scale_prob: bool
) -> MPOEConfig:
    named: dict[str, Any] = {}
    for chain in chains:
        dims, shape = chain.dims(), "x".join(map(str, chain.matrix.shape))
        key = f"{chain.matrix.weight.split('.')[-2]}:{shape}"
        pair = [list(dims.out_dims), list(dims.in_dims)]
        if named.setdefault(key, pair) != pair:
            raise ValueError(
                f"matrices of one name and shape must have the same site dimensions; those of {key} have {named[key]}, "
                f"but {chain.matrix.prefixes[0]}* has {pair}"
            )
    # By shape where that says it all. In T5-base q, k, v and o are all 768 × 768, and o is cut in another way.
    by_shape: dict[str, list[Any]] = {}
    for key, pair in named.items():
        by_shape.setdefault(key.partition(":")[2], []).append(pair)
    plain = {shape for shape, pairs in by_shape.items() if all(pair == pairs[0] for pair in pairs)}
    site_dims = {shape if (shape := key.partition(":")[2]) in plain else key: pair for key, pair in named.items()}
    caps: dict[str, Any] = {
        _CAPS[name]: _cap([c for c in chains if c.matrix.component == name]) for name in layout.components
    }
    rows = {len(bias) for bias in biases.values()}
    return MPOEConfig(
        num_experts=layout.num_experts,
        moe_type=layout.moe_type,
        mpo_layers=layout.components,
        layout="balanced",
        balancing="loss",
        num_sites=layout.num_sites,
        site_dims=site_dims,
        gauge="sqrt",
        tied_head=not layout.has_own_head if "word_embed" in layout.components else None,
        is_scale_prob=is_scale_prob,
        router_gradient="all",
        expert_bias="none" if not rows else "shared" if rows == {1} else "expert",
        router_input_norm=False,
        **caps,
    )


def _cap(chains: list[_Chain]) -> int | None:
    """The one number to which all truncated bonds were cut; None if all are full."""
    full = [chain.dims().bond_dims() for chain in chains]
    cut = [b for chain, f in zip(chains, full, strict=True) for b, g in zip(chain.bond_dims, f, strict=True) if b != g]
    cap = min(cut, default=None)
    for chain in chains:
        if chain.bond_dims != chain.dims().bond_dims(cap):
            raise ValueError(
                f"bonds must be full, or cut to one number in all matrices of a kind; {chain.matrix.prefixes[0]}* has "
                f"{chain.bond_dims} of full {chain.dims().bond_dims()}, others are cut to {cap}"
            )
    return cap


def _check_shapes(state: Mapping[str, Tensor], model: nn.Module, names: Mapping[str, str]) -> None:
    expected = model.state_dict()
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{names.get(name, name)} must have the {expected[name].numel()} elements of shape "
                f"{tuple(expected[name].shape)} in the config's model; got shape {tuple(tensor.shape)}"
            )


def _load(config: PreTrainedConfig, mixture: MPOEConfig, state: dict[str, Tensor]) -> PreTrainedModel:
    """Through Transformers' loader, so that an imported model is what a saved one is when it is loaded."""
    config.quantization_config = mixture.to_dict()
    # The loader keeps the tensors that it gets; these may be views, or their owner may go on using them.
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in state.values()), torch.float32)
    model, info = cast(Any, T5ForConditionalGeneration).from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    if any(info.values()):
        what = ", ".join(f"{kind}: {', '.join(map(str, list(found)[:3]))}" for kind, found in info.items() if found)
        raise ValueError(
            f"the checkpoint must hold its base model's tensors and no others; got {what}. Is it complete?"
        )
    return model.eval()
