"""What a model is made of, and what its experts do: numbers only, no tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from mpoe.models.router_loss import mixtures, routers
from mpoe.nn import (
    DenseExperts,
    ExtendedExperts,
    MoEFeedForward,
    MPOEmbedding,
    MPOExperts,
    MPOLinear,
    RouterStatistics,
    UnsharedMPOExperts,
)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model by what they are for; every field is a count.

    Attributes:
        other: Everything that is no MPO, no expert and no router.
        central: Central tensors, or the experts' matrices where they are whole.
        auxiliary: Auxiliary tensors of all experts.
        router: Routers.
        trained: Those that require a gradient.
        dense: The model before it was upcycled.
        whole_experts: The same mixture if every expert had matrices of its own.
        active: Those that one token meets.
    """

    other: int
    central: int
    auxiliary: int
    router: int
    trained: int
    dense: int
    whole_experts: int
    active: int

    @property
    def total(self) -> int:
        """All parameters, count."""
        return self.other + self.central + self.auxiliary + self.router


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of a model, mixture or not; tied ones once. Works on the meta device.

    Args:
        model: Any model.
    """
    central = auxiliary = dense = whole = one_token = 0
    total = sum(p.numel() for p in model.parameters())
    router = sum(p.numel() for r in routers(model).values() for p in r.parameters())
    top_k = {id(e): layer.router.top_k for layer in mixtures(model).values() for e in layer.modules() if layer.router}
    for experts in model.modules():
        if isinstance(experts, MPOExperts | ExtendedExperts):
            own = sum(p.numel() for p in experts.auxiliary.values())
            matrix = experts.out_features * experts.in_features
            shared = matrix
            if experts.central is not None:
                shared = experts.central.numel()
            elif isinstance(experts, ExtendedExperts) and experts.base_weight is not None:  # packed: fewer numbers
                total += matrix - experts.base_weight.numel()
            central += shared
            auxiliary += own
            one_token += shared + own // experts.num_experts * top_k.get(id(experts), _used(experts))
        elif isinstance(experts, UnsharedMPOExperts):  # its MPOs are counted by themselves, each as a matrix
            unmet = experts.num_experts - top_k.get(id(experts), 1)
            one_token -= unmet * sum(p.numel() for p in experts.mpos[0].parameters())
            dense -= (experts.num_experts - 1) * experts.out_features * experts.in_features
            continue
        elif isinstance(experts, DenseExperts):
            matrix = experts.weight[0].numel()
            central += experts.weight.numel()
            one_token += matrix * top_k.get(id(experts), 1)
        else:
            continue
        dense += matrix
        whole += matrix * experts.num_experts
    other = total - central - auxiliary - router
    return ParameterCount(
        other=other,
        central=central,
        auxiliary=auxiliary,
        router=router,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        dense=other + dense,
        whole_experts=other + whole + router,
        active=other + one_token + router,
    )


def _used(experts: MPOExperts | ExtendedExperts) -> int:
    """How many experts a token meets where there is no router."""
    return 1 if experts.mixes_outputs else experts.num_experts


def expert_shares(model: nn.Module) -> dict[str, list[float]]:
    """The share of tokens that every expert of every layer got since `reset_usage`, by the layer's name; sums to 1.

    Args:
        model: A mixture. Layers that have seen no token are left out.
    """
    return {name: statistics.share for name, statistics in router_statistics(model).items()}


def router_statistics(model: nn.Module) -> dict[str, RouterStatistics]:
    """How every layer's router has spread its tokens since `reset_usage`, by the layer's name.

    Args:
        model: A mixture. Layers that have seen no token are left out.
    """
    usages = {name: layer.total_usage() for name, layer in mixtures(model).items()}
    return {name: usage.statistics() for name, usage in usages.items() if usage is not None and usage.tokens > 0}


def mpo_experts(model: nn.Module) -> dict[str, MPOExperts]:
    """The MPOs of a model by name, in its order: of its mixtures, and of layers without experts.

    Args:
        model: Any model; a dense one has none.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, MPOExperts)}


def sharing_experts(model: nn.Module) -> dict[str, MPOExperts | ExtendedExperts]:
    """The matrices of a model that have a central tensor and auxiliary tensors, by name, in its order.

    Args:
        model: Any model; a dense one has none.
    """
    kinds = (MPOExperts, ExtendedExperts)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def is_upcycled(model: nn.Module) -> bool:
    """Whether a model has MPOs or experts."""
    return any(isinstance(module, MPOExperts | DenseExperts | ExtendedExperts) for module in model.modules())


def component_modules(model: PreTrainedModel) -> dict[str, dict[str, nn.Module]]:
    """The modules that upcycling has put into a model, by component and name; components without any are left out.

    Args:
        model: Any; a dense one has none.
    """
    head = model.get_output_embeddings()
    found: dict[str, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, MoEFeedForward):
            found.setdefault("mlp", {})[name] = module
        elif isinstance(module, MPOEmbedding) or (isinstance(module, MPOLinear) and module is head):
            found.setdefault("word_embed", {})[name] = module
        elif isinstance(module, MPOLinear):
            found.setdefault("attention", {})[name] = module
    return found


def sum_usage(model: nn.Module) -> None:
    """Count the tokens of all processes of a distributed run, in each of them; nothing to do in a single one.

    Args:
        model: A mixture, the same one in every process.
    """
    if dist.is_available() and dist.is_initialized():
        for layer in mixtures(model).values():
            layer.usage, layer.taken_usage = layer.total_usage(), None
            if layer.usage is not None:
                layer.usage.sum_over_processes()


def reset_usage(model: nn.Module) -> None:
    """Start counting the experts' tokens anew.

    Args:
        model: A mixture.
    """
    for layer in mixtures(model).values():
        layer.reset_usage()
