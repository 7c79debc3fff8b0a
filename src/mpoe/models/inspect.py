"""What a model is made of, and what its experts do: numbers only, no tables."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mpoe.models.router_loss import mixtures
from mpoe.nn import DenseExperts, MPOExperts


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model by what they are for; every field is a count.

    Attributes:
        other: Everything outside of the mixtures.
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
    central = auxiliary = router = dense = one_token = 0
    for layer in mixtures(model).values():
        router += sum(p.numel() for p in layer.router.parameters())
        for experts in (layer.up, layer.gate, layer.down):
            if isinstance(experts, MPOExperts):
                offsets = sum(p.numel() for p in experts.offsets)
                central += experts.central.numel()
                auxiliary += offsets
                dense += experts.dims.out_features * experts.dims.in_features
                one_token += experts.central.numel() + offsets // experts.num_experts
            elif isinstance(experts, DenseExperts):
                central += experts.weight.numel()
                dense += experts.weight[0].numel()
                one_token += experts.weight[0].numel()
    total = sum(p.numel() for p in model.parameters())
    other = total - central - auxiliary - router
    num_experts = max((layer.router.num_experts for layer in mixtures(model).values()), default=1)
    return ParameterCount(
        other=other,
        central=central,
        auxiliary=auxiliary,
        router=router,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        dense=other + dense,
        whole_experts=other + dense * num_experts + router,
        active=other + one_token + router,
    )


def expert_shares(model: nn.Module) -> dict[str, list[float]]:
    """The share of tokens that every expert of every layer got since `reset_usage`, by the layer's name; sums to 1.

    Args:
        model: A mixture. Layers that have seen no token are left out.
    """
    shares = {}
    for name, layer in mixtures(model).items():
        counts = layer.tokens_per_expert
        if counts is not None and (total := counts.sum()) > 0:
            shares[name] = (counts / total).tolist()
    return shares


def reset_usage(model: nn.Module) -> None:
    """Start counting the experts' tokens anew.

    Args:
        model: A mixture.
    """
    for layer in mixtures(model).values():
        layer.reset_usage()
