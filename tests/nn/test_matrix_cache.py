"""A kept matrix is the one that the parameters make now, whatever happened to them."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from mpoe.nn.matrix_cache import MatrixCache, TensorState

BYTES = 3 * 5 * 4


class Layer(nn.Module):
    """Makes (expert + 1) · weight, and counts how often."""

    def __init__(self, cache=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))
        self.other = nn.Parameter(torch.randn(2))
        self.cache = cache
        self.made = []

    def matrix(self, expert=0, dtype=torch.float32):
        def make():
            assert not torch.is_grad_enabled()
            self.made.append(expert)
            return (self.weight * (expert + 1)).to(dtype)

        return self.cache.get(self, expert, [self.weight, self.other], dtype, make)


def optimizer_step(layer, **options):
    layer.weight.grad, layer.other.grad = torch.ones(3, 5), torch.ones(2)
    torch.optim.AdamW(layer.parameters(), lr=0.1, **options).step()


@torch.no_grad()
def in_place(layer):
    layer.weight[1].mul_(2)


def load(layer):
    layer.load_state_dict({"weight": torch.randn(3, 5), "other": torch.randn(2)})


def assign(layer):
    layer.load_state_dict({"weight": torch.randn(3, 5), "other": torch.randn(2)}, assign=True)


def replace(layer):
    layer.weight = nn.Parameter(torch.randn(3, 5))


def through_half_precision(layer):
    """Its old memory may be used again, and the version stays."""
    layer.half().float()


def swap_data(layer):
    layer.weight.data = torch.randn(3, 5)


CHANGES = [
    optimizer_step,
    lambda layer: optimizer_step(layer, foreach=True),
    lambda layer: optimizer_step(layer, fused=True),
    in_place,
    load,
    assign,
    replace,
    through_half_precision,
    swap_data,
    lambda layer: nn.init.zeros_(layer.other),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_parameter_makes_a_new_matrix(change):
    layer = Layer(MatrixCache(10**6))
    for expert in (0, 1):
        layer.matrix(expert)
    kept = layer.matrix(1)
    assert layer.matrix(1) is kept
    assert layer.made == [0, 1]
    change(layer)
    assert layer.cache.bytes == 2 * BYTES
    torch.testing.assert_close(layer.matrix(1), 2 * layer.weight.detach(), rtol=0, atol=0)
    assert layer.made == [0, 1, 1]
    assert layer.cache.bytes == BYTES  # the other expert's is gone too
    torch.testing.assert_close(layer.matrix(0), layer.weight.detach(), rtol=0, atol=0)


def test_a_change_through_data_needs_a_clear():
    layer = Layer(MatrixCache(10**6))
    before = layer.matrix()
    layer.weight.data.mul_(2)
    assert layer.matrix() is before
    layer.cache.clear()
    assert layer.cache.bytes == 0
    torch.testing.assert_close(layer.matrix(), layer.weight.detach())


def test_the_least_recently_used_goes_first():
    cache = MatrixCache(3 * BYTES)
    first, second = Layer(cache), Layer(cache)
    for layer, expert in [(first, 0), (first, 1), (second, 0), (first, 0), (second, 1), (first, 0), (second, 0)]:
        layer.matrix(expert)
        assert cache.bytes <= cache.limit_bytes
    assert first.made == [0, 1]
    assert second.made == [0, 1]
    second.matrix(1)
    assert second.made == [0, 1]
    first.matrix(1)  # had gone for second's 1; now first's 0 has to go
    assert first.made == [0, 1, 1]
    second.matrix(1)
    second.matrix(0)
    assert second.made == [0, 1]
    first.matrix(0)
    assert first.made == [0, 1, 1, 0]


def test_what_never_fits_is_not_kept_and_drives_nothing_out():
    cache = MatrixCache(BYTES)
    layer = Layer(cache)
    layer.matrix(0)
    layer.matrix(1, torch.float64)
    layer.matrix(1, torch.float64)
    assert layer.made == [0, 1, 1]
    layer.matrix(0)
    assert layer.made == [0, 1, 1]
    nothing = Layer(MatrixCache(0))
    assert nothing.matrix() is not nothing.matrix()
    assert nothing.cache.bytes == 0
    with pytest.raises(ValueError, match="must be >= 0; got -1"):
        MatrixCache(-1)


def test_padding_counts():
    cache, layer = MatrixCache(10**6), Layer()
    cache.get(layer, 0, [layer.weight], torch.float32, lambda: torch.zeros(4, 6)[:3, :5])
    assert cache.bytes == 4 * 6 * 4


def test_dtypes_are_kept_apart():
    layer = Layer(MatrixCache(10**6))
    assert [layer.matrix(0, dtype).dtype for dtype in (torch.float32, torch.bfloat16) * 2] == [
        torch.float32, torch.bfloat16, torch.float32, torch.bfloat16,
    ]  # fmt: skip
    assert layer.made == [0, 0]


def test_layers_are_not_kept_alive():
    cache = MatrixCache(10**6)
    layer, other = Layer(cache), Layer(cache)
    layer.matrix()
    other.matrix()
    alive = weakref.ref(layer)
    del layer
    gc.collect()
    assert alive() is None
    assert cache.bytes == BYTES


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_share_an_empty_cache_of_their_own(copied):
    cache = MatrixCache(1234567)
    model = nn.ModuleList([Layer(cache), Layer(cache)])
    for layer in model:
        layer.matrix()
    first, second = copied(model)
    assert first.cache is second.cache
    assert first.cache is not cache
    assert (first.cache.bytes, first.cache.limit_bytes) == (0, 1234567)
    assert cache.bytes == 2 * BYTES
    assert list(model.state_dict()) == ["0.weight", "0.other", "1.weight", "1.other"]


def test_matrices_from_inference_mode_can_be_differentiated_through():
    layer = Layer(MatrixCache(10**6))
    with torch.inference_mode():
        made = layer.matrix()
    x = torch.randn(2, 5, requires_grad=True)
    nn.functional.linear(x, layer.matrix()).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand(2, 5))
    assert layer.matrix() is made


def test_parameters_from_inference_mode_have_no_version_and_are_never_trusted():
    with torch.inference_mode():
        layer = Layer(MatrixCache(10**6))
        layer.matrix()
        layer.weight.mul_(2)
        torch.testing.assert_close(layer.matrix(), layer.weight)
    assert layer.cache.bytes == 0


def test_a_state_is_of_the_very_tensors():
    a, b = torch.randn(3), torch.randn(3)
    state = TensorState([a, b])
    assert state.is_of([a, b])
    assert state.is_of([a.view(1, 3), b])  # another view of the same
    assert not state.is_of([b, a])
    assert not state.is_of([a])
    assert not state.is_of([a, b.clone()])
    a.add_(1)
    assert not state.is_of([a, b])
