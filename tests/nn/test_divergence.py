import pytest
import torch

from mpoe.mpo import site_dims
from mpoe.nn import DenseExperts, FrozenBaseExperts, MoEFeedForward, MPOExperts, UnsharedMPOExperts, divergence

OUT, IN, E = 12, 8, 3


def layer_of(make):
    """A layer of one kind of experts, each a little away from the matrix that all began as."""
    up, down = make(OUT, IN), make(IN, OUT)
    for experts, shape in ((up, (OUT, IN)), (down, (IN, OUT))):
        if not isinstance(experts, FrozenBaseExperts):
            experts.load_matrix(torch.randn(*shape))
    return MoEFeedForward(None, up, down, torch.relu)


def shared(out, in_, layout="separable", gauge="identity"):
    return MPOExperts(site_dims(out, in_, layout=layout), E, gauge=gauge)


KINDS = {
    "separable": shared,
    "balanced": lambda out, in_: shared(out, in_, "balanced", "sqrt"),
    "whole": lambda out, in_: DenseExperts(out, in_, E),
    "unshared": lambda out, in_: UnsharedMPOExperts(
        [MPOExperts(site_dims(out, in_, layout="separable"), 1) for _ in range(E)]
    ),
    "frozen": lambda out, in_: FrozenBaseExperts(
        torch.nn.Linear(in_, out, bias=False), site_dims(out, in_, layout="separable"), E
    ),
}


def own_tensors(experts):
    """By the experts' own operators, one after the other."""
    if isinstance(experts, DenseExperts):
        return [[experts.expert_matrix(e)] for e in range(E)]
    if isinstance(experts, MPOExperts):
        return [experts.expert(e).auxiliary for e in range(E)]
    if isinstance(experts, UnsharedMPOExperts):
        return [mpo.expert(0).auxiliary for mpo in experts.mpos]
    return [
        [
            torch.eye(o.shape[n]) + s * o[e].squeeze()
            for n, o, s in zip((2, 1), experts.offsets, experts.scales, strict=True)
        ]
        for e in range(E)
    ]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_the_relative_distance_from_the_mean(kind):
    layer = layer_of(KINDS[kind])
    assert divergence(layer) == pytest.approx(0, abs=1e-6), "all experts began as the same matrix"
    generator = torch.Generator().manual_seed(0)
    for experts in (layer.up, layer.down):
        experts.add_noise(0.1, generator)
    squares = []
    for experts in (layer.up, layer.down):
        for of_site in zip(*own_tensors(experts), strict=True):
            mean = sum(of_site) / E
            squares += [float((tensor - mean).norm() / mean.norm()) ** 2 for tensor in of_site]
    assert float(divergence(layer)) == pytest.approx((sum(squares) / len(squares)) ** 0.5, rel=1e-4)
    with torch.enable_grad():
        assert not divergence(layer).requires_grad


def test_it_is_linear_in_the_distance():
    layer = layer_of(shared)
    layer.up.add_noise(0.01, torch.Generator().manual_seed(0))
    once = float(divergence(layer))
    with torch.no_grad():
        for offset in layer.up.offsets:
            offset.sub_(offset.mean(dim=0)).mul_(2)
    assert float(divergence(layer)) == pytest.approx(2 * once, rel=1e-2)
