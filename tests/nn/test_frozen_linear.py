import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from mpoe.nn.frozen_linear import FrozenLinear


def make_linear(bias, dtype=torch.float32):
    linear = nn.Linear(41, 9, bias=bias, dtype=dtype)
    nn.init.normal_(linear.weight)
    quantize_(linear, Int8WeightOnlyConfig())
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_function_of_the_layer_that_it_was(bias, dtype):
    linear = make_linear(bias, dtype)
    x = torch.randn(2, 3, 41, dtype=dtype, requires_grad=True)
    leaves = [x, linear.bias] if bias else [x]
    before = linear(x)
    linear.__class__ = FrozenLinear
    after, upstream = linear(x), torch.randn_like(before)
    torch.testing.assert_close(after, before)
    for pair in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (after, before)), strict=True):
        torch.testing.assert_close(*pair, **({} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(linear(x), before, rtol=0.05, atol=0.05)


def test_no_dense_weight_is_kept_for_the_backward():
    linear = make_linear(bias=True)
    x = torch.randn(5, 41, requires_grad=True)
    kept = {}
    for kind in (nn.Linear, FrozenLinear):
        linear.__class__ = kind
        sizes = kept[kind] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()), lambda _: None):
            linear(x)
    assert kept[FrozenLinear] == []
    assert max(kept[nn.Linear]) == 41 * 9, "or the class is no longer needed"
