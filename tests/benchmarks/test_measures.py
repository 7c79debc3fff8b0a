import pytest
import torch
from torch import nn

import measures
from mpoe.nn import ExtendedExperts


def test_peak_counts_what_lives_together():
    x = torch.randn(256, 256)
    one = x.nbytes
    assert measures.tensor_peak(lambda: x + x) == one
    assert measures.tensor_peak(lambda: [x + x for _ in range(3)]) == 3 * one
    assert measures.tensor_peak(lambda: [(x + x).sum().item() for _ in range(3)]) < 2 * one


def test_peak_counts_the_backward_pass():
    x = torch.randn(256, 256)
    weight = torch.randn(256, 256, requires_grad=True)
    # at its end, the gradient of the product, the product that exp keeps, and the weight's gradient to be
    peak = measures.tensor_peak(lambda: (x @ weight).exp().sum().backward())
    assert 2 * x.nbytes <= peak <= 3 * x.nbytes + 4096


def test_process_peak_is_at_least_what_is_there():
    block = torch.ones(2**25)
    assert measures.process_peak() >= block.nbytes


def test_flops_of_products():
    x, weight = torch.randn(3, 5), torch.randn(5, 7, requires_grad=True)
    assert measures.flops(lambda: x @ weight) == 2 * 3 * 5 * 7
    assert measures.flops(lambda: (x @ weight).sum().backward()) == 2 * 2 * 3 * 5 * 7  # x needs no gradient


def test_flops_of_attention():
    q = torch.randn(2, 3, 4, 8, requires_grad=True)
    k, v = torch.randn(2, 2, 3, 6, 8).unbind()
    attend = nn.functional.scaled_dot_product_attention
    forward = 2 * (2 * 2 * 3 * 4 * 6 * 8)  # two products
    assert measures.flops(lambda: attend(q, k, v)) == forward
    # the scores again, and a gradient for each operand of both products
    assert measures.flops(lambda: attend(q, k, v).sum().backward()) == forward + forward * 5 // 2


@pytest.mark.parametrize("tokens", [1, 5])
def test_flops_of_extended_experts(tokens):
    D, F, E, R = 12, 20, 3, 2
    experts = ExtendedExperts(nn.Linear(D, F, bias=False), F, D, E, R)
    experts.initialize(torch.Generator())
    x, gates = torch.randn(tokens, D), torch.rand(tokens, E)
    with torch.no_grad():
        counted = measures.flops(lambda: experts(x, gates))
    assert counted == 2 * tokens * (D * F + E * R * (D + F))
