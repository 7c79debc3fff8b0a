import pytest
import torch

from mpoe.mpo import site_dims
from mpoe.nn import DenseExperts, ExtendedExperts, MoEFeedForward, MPOExperts, UnsharedMPOExperts, divergence

OUT, IN, E = 12, 8, 3


def layer_of(make):
    """A layer of one kind of experts, which are all alike."""
    up, down = make(OUT, IN), make(IN, OUT)
    for experts, shape in ((up, (OUT, IN)), (down, (IN, OUT))):
        if isinstance(experts, ExtendedExperts):
            experts.initialize(torch.Generator().manual_seed(0))
        else:
            experts.load_matrix(torch.randn(*shape))
    return MoEFeedForward(None, up, down, torch.relu)


def shared(out, in_, gauge="identity"):
    return MPOExperts(site_dims(out, in_), E, gauge=gauge)


KINDS = {
    "balanced": shared,
    "sqrt": lambda out, in_: shared(out, in_, "sqrt"),
    "whole": lambda out, in_: DenseExperts(out, in_, E),
    "unshared": lambda out, in_: UnsharedMPOExperts([MPOExperts(site_dims(out, in_), 1) for _ in range(E)]),
}


def own_tensors(experts):
    """By the experts' own operators, one after the other."""
    if isinstance(experts, DenseExperts):
        return [[experts.expert_matrix(e)] for e in range(E)]
    if isinstance(experts, MPOExperts):
        return [experts.expert(e).auxiliary for e in range(E)]
    return [mpo.expert(0).auxiliary for mpo in experts.mpos]


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


@pytest.mark.parametrize("activation", [None, "gelu"])
@torch.no_grad()
def test_of_extended_experts_it_is_relative_to_the_matrix_that_they_extend(activation):
    out, in_, rank = 96, 128, 4

    def make(out, in_):
        base = torch.nn.Linear(in_, out)
        torch.nn.init.normal_(base.weight, std=3.0)
        return ExtendedExperts(base, out, in_, E, rank, expert_scale=0.7, activation=activation)

    up, down = make(out, in_), make(in_, out)
    for experts in (up, down):
        experts.initialize(torch.Generator().manual_seed(0))
    layer = MoEFeedForward(None, up, down, torch.relu)
    assert divergence(layer) == 0, "V is zero"
    squares = []
    for experts in (up, down):
        experts.offsets_V.normal_()
        columns = [slice(e * rank, (e + 1) * rank) for e in range(E)]
        added = [experts.scale * experts.offsets_V[:, own] @ experts.offsets_U[own] for own in columns]
        mean = sum(added) / E
        squares += [float((matrix - mean).norm() / experts.base.weight.norm()) ** 2 for matrix in added]
    expected = (sum(squares) / len(squares)) ** 0.5
    assert float(divergence(layer)) == pytest.approx(expected, rel=0.05), "the scale estimates the norm by a few probes"
