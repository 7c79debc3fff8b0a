"""The layers and models that the benchmarks compare, with the same sizes and the same scale of weights.

Every layer maps (1, T, D) to (1, T, D) and is a plain two-matrix FFN with ReLU, as in T5, without dropout. Inputs are
standard normal; with them all routers use all experts.

Shape letters: T tokens, D model width, F FFN width, E experts, R expert rank.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    SwitchTransformersConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations.moe import use_experts_implementation
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP
from transformers.models.t5.modeling_t5 import T5DenseActDense

import mpoe
from mpoe import MPOEConfig
from mpoe.nn import ExtendedExperts
from reference_style import ReferenceStyleLayer

NOISE = 0.02  # standard deviation of what sets experts apart, relative to their weights
BASE = (768, 3072)  # D and F of T5-base
T5_SMALL: dict[str, Any] = {"d_model": 512, "d_ff": 2048, "d_kv": 64, "num_layers": 6, "num_heads": 8}
T5_TINY: dict[str, Any] = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
SMOLLM2: dict[str, Any] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip
LLAMA_TINY: dict[str, Any] = {
    **SMOLLM2, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64,
}  # fmt: skip
MODELS = ("T5-small", "SmolLM2-135M")
LORA_MATRICES = {"t5": ["wi", "wo"], "llama": ["gate_proj", "up_proj", "down_proj"]}

MANY = "extended, 32 experts of rank 4"
LAYOUTS: dict[str, dict[str, Any]] = {
    "extended": {},
    MANY: {"num_experts": 32, "expert_rank": 4},
    "balanced": {"layout": "balanced"},
}
"""Config options of the mixtures that are measured, by their names in the tables."""
LORA_RANK = 64  # the total rank of 8 experts of rank 8

COLD_BYTES = 2**27  # of dense weights, four times a cache of 32 MiB
MOST_COPIES, MOST_BYTES = 16, 2**30


def language_model(name: str, size: str = "full") -> PreTrainedModel:
    """Return a dense model of a known architecture with random weights.

    Args:
        name: One of `MODELS`.
        size: "tiny" is a much smaller model of the same family.
    """
    if name == "T5-small":
        return dense_t5(T5_TINY if size == "tiny" else T5_SMALL)
    return LlamaForCausalLM(LlamaConfig(**(LLAMA_TINY if size == "tiny" else SMOLLM2)))


def dense_t5(sizes: dict[str, Any], dropout: float = 0.1) -> T5ForConditionalGeneration:
    """Return a T5 v1.0 with random weights.

    Args:
        sizes: Of its config.
        dropout: Probability.
    """
    options: dict[str, Any] = {"decoder_start_token_id": 0, "dropout_rate": dropout}
    return T5ForConditionalGeneration(T5Config(**options, **sizes))


def mixture(base: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Upcycle a dense model in place, with experts that differ as trained ones do.

    Args:
        base: Dense.
        options: Of `MPOEConfig`.
    """
    if not MPOEConfig(**options).is_extended:
        return mpoe.upcycle(base, MPOEConfig(expert_noise=NOISE, **options))
    mpoe.upcycle(base, MPOEConfig(**options))
    set_apart(base)
    return base


@torch.no_grad()
def set_apart(module: nn.Module, std: float = NOISE) -> None:
    """Draw the factors V of extended experts, which start at zero.

    Args:
        module: A layer or a model.
        std: Standard deviation of V.
    """
    for experts in module.modules():
        if isinstance(experts, ExtendedExperts):
            experts.offsets_V.normal_(std=std)


def with_lora(module: Any, targets: list[str], rank: int = LORA_RANK) -> Any:
    """Put PEFT's LoRA on matrices, in place. The base trains too, as it does in a mixture.

    Args:
        module: A layer or a model.
        targets: Names of its linear layers.
        rank: Count.
    """
    from peft import LoraConfig, inject_adapter_in_model  # here: it counts in the memory of processes that import it

    # the second matrix starts at random, not at zero
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False)
    return inject_adapter_in_model(config, module).requires_grad_(True)


def model_contenders(name: str, size: str, ways: Sequence[str]) -> dict[str, PreTrainedModel]:
    """Return a dense model and what is made of copies of it.

    Args:
        name: See `language_model`.
        size: See `language_model`.
        ways: Any of "extended", "LoRA" and "Switch", which is a mixture of 8 whole experts.
    """
    base = language_model(name, size)
    models = {"dense": base}
    for way in ways:
        own = copy.deepcopy(base)
        if way == "LoRA":
            models[way] = with_lora(own, LORA_MATRICES[base.config.model_type])
        else:
            models[way] = mixture(own, **({"mpo_layers": ()} if way == "Switch" else LAYOUTS[way]))
    return models


def dense_layer(D: int, F: int) -> T5DenseActDense:
    """Return Transformers' own FFN of T5."""
    return T5DenseActDense(T5Config(d_model=D, d_ff=F, dropout_rate=0.0))


def our_layer(dense: T5DenseActDense, **options: Any) -> nn.Module:
    """Return the layer that `mpoe.upcycle` puts in the place of a dense one.

    Args:
        dense: Its matrices are copied.
        options: Of `MPOEConfig`.
    """
    F, D = dense.wi.weight.shape
    model = dense_t5({**T5_TINY, "d_model": D, "d_ff": F}, dropout=0.0)
    place = "encoder.block.0.layer.1.DenseReluDense"
    model.set_submodule(place, copy.deepcopy(dense))
    mixture(model, stacks=("encoder",), **options)
    return model.get_submodule(place)


def gated_layer(D: int, F: int, **options: Any) -> nn.Module:
    """Return a mixture in the place of a LLaMA's SwiGLU FFN.

    Args:
        D: Model width, count.
        F: FFN width, count.
        options: Of `MPOEConfig`.
    """
    sizes = {"hidden_size": D, "intermediate_size": F, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA_TINY, **sizes}))
    return mixture(model, **options).get_submodule("model.layers.0.mlp")


def lora_layer(dense: T5DenseActDense, rank: int = LORA_RANK) -> nn.Module:
    """Return a copy of a dense layer with PEFT's LoRA on both matrices."""
    return with_lora(copy.deepcopy(dense), LORA_MATRICES["t5"], rank)


def switch_layer(D: int, F: int, num_experts: int = 8) -> SwitchTransformersSparseMLP:
    """Return Transformers' Switch layer, with a capacity that drops no token."""
    config = SwitchTransformersConfig(
        d_model=D, d_ff=F, num_experts=num_experts, expert_capacity=10**9, dropout_rate=0.0, router_jitter_noise=0.0
    )
    return SwitchTransformersSparseMLP(config)


def reference_style_layer(dense: T5DenseActDense, num_experts: int = 8) -> ReferenceStyleLayer:
    """See `reference_style`."""
    return ReferenceStyleLayer(dense.wi.weight.detach(), dense.wo.weight.detach(), num_experts, NOISE)


def cold_copies(layer: nn.Module, dense: nn.Module) -> list[nn.Module]:
    """Return a layer and copies of it. One after the other, they find their weights in memory and not in a cache.

    Args:
        layer: Any.
        dense: The dense layer of the same size: as many copies of it exceed the caches.
    """
    cold = math.ceil(COLD_BYTES / _num_bytes(dense))
    fit = max(1, MOST_BYTES // _num_bytes(layer))
    return [layer, *(copy.deepcopy(layer) for _ in range(min(cold, fit, MOST_COPIES) - 1))]


def _num_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def forward_of(layers: Sequence[nn.Module], x: Tensor) -> Callable[[], Tensor]:
    """Return a function that applies one layer in evaluation without gradients, each time the next one.

    Args:
        layers: Put into evaluation mode.
        x: (1, T, D).
    """
    turns = itertools.cycle([layer.eval() for layer in layers])

    def run() -> Tensor:
        with torch.no_grad():
            return next(turns)(x)

    return run


def step_of(layers: Sequence[nn.Module], x: Tensor) -> Callable[[], None]:
    """Return a function that does forward and backward of one layer, each time the next one.

    The backward pass includes the gradient of the input.

    Args:
        layers: Put into training mode.
        x: (1, T, D).
    """
    turns = itertools.cycle([layer.train() for layer in layers])
    x = x.detach().requires_grad_()
    gradient = torch.randn_like(x)

    def run() -> None:
        layer = next(turns)
        layer(x).backward(gradient)
        x.grad = None
        layer.zero_grad()

    return run


class TransformersExperts(nn.Module):
    """Transformers' `grouped_mm` experts behind Mixtral's router, top-1.

    Args:
        D: Model width, count.
        F: FFN width, count.
        num_experts: E, count.
        implementation: A name in Transformers' `ExpertsInterface`.
    """

    def __init__(self, D: int, F: int, num_experts: int = 8, implementation: str = "grouped_mm") -> None:
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
