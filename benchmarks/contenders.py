"""The layers and models that the benchmarks compare, with the same sizes and the same weights' scale.

Every layer maps (1, T, D) to (1, T, D) and is a plain two-matrix FFN with ReLU, as T5's; dropout is 0. Inputs are
standard normal, for which all routers here spread tokens over all experts.

Shape letters: T tokens, D model width, F FFN width, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, SwitchTransformersConfig, T5Config, T5ForConditionalGeneration
from transformers.integrations.moe import use_experts_implementation
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP
from transformers.models.t5.modeling_t5 import T5DenseActDense

import mpoe
from mpoe import MPOEConfig
from mpoe.mpo import decompose, site_dims
from reference_style import ReferenceStyleLayer

NOISE = 0.02  # of the experts' weights, relative: experts differ, as trained ones do
BASE = (768, 3072)  # D and F of T5-base
SMALL: dict[str, Any] = {"d_model": 512, "d_ff": 2048, "d_kv": 64, "num_layers": 6, "num_heads": 8}
TINY: dict[str, Any] = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 64}


def layouts() -> dict[str, dict[str, Any]]:
    """Config options of the layouts that are measured, by the names that the tables use."""
    return {
        "separable": {},
        "narrow": {"auxiliary_sides": "narrow"},
        "ends of 64": {"max_auxiliary_bond": 64},
        "balanced": {"layout": "balanced"},
    }


def t5(sizes: dict[str, Any], dropout: float = 0.1) -> T5ForConditionalGeneration:
    """A T5 v1.0 with random weights."""
    options: dict[str, Any] = {"decoder_start_token_id": 0, "dropout_rate": dropout}
    model = T5ForConditionalGeneration(T5Config(**options, **sizes))
    model.generation_config.eos_token_id = None  # generation goes on for as long as it is told to
    return model


def t5_mixtures() -> dict[str, dict[str, Any]]:
    """Config options of the mixtures of a T5 that are measured: whole experts, which is Switch, and our layouts."""
    return {"Switch": {"mpo_layers": ()}, **layouts()}


def mixture(base: PreTrainedModel, num_experts: int = 8, **options: Any) -> PreTrainedModel:
    """A dense model upcycled in place, as users do it, with experts that differ."""
    return mpoe.upcycle(base, MPOEConfig(num_experts=num_experts, expert_noise=NOISE, **options))


def t5_models(size: str, num_experts: int = 8) -> dict[str, PreTrainedModel]:
    """The dense T5-small and its mixtures, of the same weights.

    Args:
        size: "tiny" is a much smaller one.
        num_experts: E, count.
    """
    base = t5(TINY if size == "tiny" else SMALL)
    named = t5_mixtures()
    return {"dense": base} | {
        name: mixture(copy.deepcopy(base), num_experts, **options) for name, options in named.items()
    }


def dense_layer(D: int, F: int) -> T5DenseActDense:
    """Transformers' own FFN of T5."""
    return T5DenseActDense(T5Config(d_model=D, d_ff=F, dropout_rate=0.0))


def our_layer(dense: T5DenseActDense, num_experts: int = 8, **options: Any) -> nn.Module:
    """The layer that `mpoe.upcycle` puts in the place of a dense one."""
    F, D = dense.wi.weight.shape
    model = t5({**TINY, "d_model": D, "d_ff": F}, dropout=0.0)
    place = "encoder.block.0.layer.1.DenseReluDense"
    model.set_submodule(place, copy.deepcopy(dense))
    mixture(model, num_experts, stacks=("encoder",), **options)
    return model.get_submodule(place)


def switch_layer(D: int, F: int, num_experts: int = 8) -> SwitchTransformersSparseMLP:
    """Transformers' Switch layer, with a capacity that no number of tokens here reaches: nothing is dropped."""
    config = SwitchTransformersConfig(
        d_model=D, d_ff=F, num_experts=num_experts, expert_capacity=10**9, dropout_rate=0.0, router_jitter_noise=0.0
    )
    return SwitchTransformersSparseMLP(config)


def reference_style_layer(dense: T5DenseActDense, num_experts: int = 8) -> ReferenceStyleLayer:
    """See `reference_style`."""
    return ReferenceStyleLayer(dense.wi.weight.detach(), dense.wo.weight.detach(), num_experts, NOISE)


def forward_of(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A function that applies a layer in evaluation, without gradients.

    Args:
        layer: Put into evaluation mode.
        x: (1, T, D).
    """

    def run() -> Tensor:
        with torch.no_grad():
            return layer(x)

    layer.eval()
    return run


def step_of(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """A function that does forward and backward, the input's gradient included, as between two optimizer steps.

    Args:
        layer: Put into training mode.
        x: (1, T, D).
    """
    x = x.detach().requires_grad_()
    gradient = torch.randn_like(x)

    def run() -> None:
        layer(x).backward(gradient)
        x.grad = None
        layer.zero_grad()

    layer.train()
    return run


class TransformersExperts(nn.Module):
    """Transformers' experts interface (`batched_mm`, `grouped_mm`) behind Mixtral's router, top-1.

    Args:
        D: Model width, count.
        F: FFN width, count.
        implementation: A name in Transformers' `ExpertsInterface`.
        num_experts: E, count.
    """

    def __init__(self, D: int, F: int, implementation: str, num_experts: int = 8) -> None:
        super().__init__()
        self.router = MixtralTopKRouter(
            SimpleNamespace(num_experts_per_tok=1, num_local_experts=num_experts, hidden_size=D)
        )
        nn.init.normal_(self.router.weight, std=D**-0.5)
        self.experts = _Experts(SimpleNamespace(_experts_implementation=implementation), D, F, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """(.., D) to (.., D)."""
        x_TD = x.reshape(-1, x.shape[-1])
        _, weights, index = self.router(x_TD)
        return self.experts(x_TD, index, weights).view(x.shape)


@use_experts_implementation(has_gate=False)
class _Experts(nn.Module):
    """The parameters under the names that Transformers' implementations look for."""

    def __init__(self, config: Any, D: int, F: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.up_proj = nn.Parameter(torch.randn(num_experts, F, D) * D**-0.5)
        self.down_proj = nn.Parameter(torch.randn(num_experts, D, F) * F**-0.5)
        self.act_fn = nn.ReLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Only the implementations of the interface are measured."""
        raise NotImplementedError


def tensorly_layer(dense: T5DenseActDense, implementation: str) -> nn.Module:
    """tensorly-torch's `FactorizedLinear` twice, in the paper's layout with full bonds: one expert, no router.

    Args:
        dense: Whose matrices its tensors multiply out to.
        implementation: "reconstructed" or "factorized".

    Raises:
        ImportError: tensorly-torch is not installed.
    """
    from tltorch import FactorizedLinear  # pyright: ignore[reportMissingImports]

    def linear(matrix: Tensor) -> nn.Module:
        dims = site_dims(*matrix.shape, layout="balanced")
        made = FactorizedLinear(
            dims.in_dims, dims.out_dims, bias=False, factorization="blocktt", rank=dims.bond_dims(),
            implementation=implementation,
        )  # fmt: skip
        # not its own normal_, whose product is about 1e-18 and would be timed with denormal numbers
        for factor, site in zip(made.weight.factors, decompose(matrix, dims, gauge="sqrt").sites, strict=True):
            factor.data.copy_(site)
        return made

    return nn.Sequential(linear(dense.wi.weight.detach()), nn.ReLU(), linear(dense.wo.weight.detach()))
