import pytest
import torch

from mpoe.nn import panels, separable
from mpoe.nn.separable import End, separable_product

COUNTS = [[3, 0, 4], [0, 0, 5], [1, 0, 0], [2, 9, 1], [400, 3, 250]]
TOLERANCES = [
    (torch.float64, {}),
    (torch.float32, {"rtol": 1e-5, "atol": 1e-5}),
    (torch.bfloat16, {"rtol": 0.05, "atol": 0.05}),
]


def make_end(out_size, in_size, has_start, has_factors, dtype):
    return End(
        torch.randn(3, out_size, in_size, dtype=dtype, requires_grad=True),
        torch.randn(3, dtype=dtype, requires_grad=True) if has_factors else None,
        torch.randn(out_size, in_size, dtype=dtype) if has_start else None,
        torch.tensor(0.3, dtype=dtype),
    )


def plain(x, counts, central, right, left):
    """Every expert's chain written out as one sum."""
    a, o, _, b = central.shape
    chains = []
    for e in range(3):
        matrices = []
        for end, size in ((left, a), (right, b)):
            if end is None:
                matrices.append(torch.eye(size, dtype=x.dtype))
                continue
            start = torch.eye(end.offsets.shape[1], dtype=x.dtype) if end.start is None else end.start
            matrices.append((1 if end.factors is None else end.factors[e]) * (start + end.scale * end.offsets[e]))
        chain = torch.einsum("pa,aoib,bq->poiq", matrices[0], central, matrices[1])
        chains.append(chain.reshape(chain.shape[0] * o, -1))
    experts = [e for e, count in enumerate(counts) for _ in range(count)]
    return torch.einsum("nk,nlk->nl", x, torch.stack(chains)[experts])


@pytest.fixture(params=[False, True], ids=["recompute", "keep"])
def is_kept(request, monkeypatch):
    """The backward multiplies R x again, or takes it from memory; and one batch of panels and ends of all kinds."""
    monkeypatch.setattr(separable, "KEPT_BOND", 0 if request.param else 10**9)
    monkeypatch.setattr(separable, "COLUMNS_SIZE", 40)
    monkeypatch.setattr(panels, "MIN_ROWS", 6)
    monkeypatch.setattr(panels, "ALONE_ROWS", 4)
    monkeypatch.setattr(panels, "MAX_ROWS", 100)


@pytest.mark.usefixtures("is_kept")
@pytest.mark.parametrize("is_known", [True, False], ids=["list", "tensor"])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("ends", ["both", "right", "left", "rectangular", "right with factors", "left with factors"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_outputs_and_gradients_are_those_of_the_chain(counts, ends, dtype, tolerance, is_known):
    a, o, i, b, p, q = 5, 2, 3, 4, 5, 4
    right, left = make_end(b, q, False, "right with" in ends, dtype), make_end(p, a, False, "left with" in ends, dtype)
    if ends == "rectangular":  # as truncated bonds have them
        p, q = 6, 7
        right, left = make_end(b, q, True, False, dtype), make_end(p, a, True, False, dtype)
    right, left = (None if ends.startswith("left") else right), (None if ends.startswith("right") else left)
    central = torch.randn(a, o, i, b, dtype=dtype, requires_grad=True)
    x = torch.randn(sum(counts), i * q, dtype=dtype, requires_grad=True)
    fast = separable_product(x, counts if is_known else torch.tensor(counts), central, right, left)
    parts = [part for end in (right, left) if end for part in (end.offsets, end.factors) if part is not None]
    leaves = [x, central, *parts]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    rest = iter(wide[2:])
    as_wide = [
        None if end is None else End(
            next(rest), None if end.factors is None else next(rest),
            None if end.start is None else end.start.double(), end.scale.double(),
        )
        for end in (right, left)
    ]  # fmt: skip
    slow = plain(wide[0], counts, wide[1], *as_wide)
    scale_of_y = slow.detach().abs().max().item()
    torch.testing.assert_close(fast.double() / scale_of_y, slow / scale_of_y, **tolerance)
    upstream = torch.randn_like(fast)
    found = torch.autograd.grad(fast, leaves, upstream)
    expected = torch.autograd.grad(slow, wide, upstream.double())
    scale = max(gradient.abs().max().item() for gradient in expected)  # a factor's is a long sum that may cancel
    for of_fast, of_slow in zip(found, expected, strict=True):
        torch.testing.assert_close(of_fast.double() / scale, of_slow / scale, **tolerance)
    with torch.no_grad():
        again = separable_product(x, counts, central, right, left)
        torch.testing.assert_close(again.double() / scale_of_y, fast.double() / scale_of_y, **tolerance)


@pytest.mark.usefixtures("is_kept")
@pytest.mark.parametrize("frozen", ["x", "central", "right", "left", "all but x"])
def test_only_what_trains_gets_a_gradient(frozen):
    right, left = make_end(4, 4, False, False, torch.float64), make_end(5, 5, False, False, torch.float64)
    leaves = {
        "x": torch.randn(12, 12, dtype=torch.float64, requires_grad=True),
        "central": torch.randn(5, 2, 3, 4, dtype=torch.float64, requires_grad=True),
        "right": right.offsets,
        "left": left.offsets,
    }
    upstream = torch.randn(12, 10, dtype=torch.float64)

    def gradients():
        y = separable_product(leaves["x"], [3, 0, 9], leaves["central"], right, left)
        trained = [leaf for leaf in leaves.values() if leaf.requires_grad]
        return {id(leaf): of for leaf, of in zip(trained, torch.autograd.grad(y, trained, upstream), strict=True)}

    expected = gradients()
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == "x" if frozen == "all but x" else name != frozen)
    found = gradients()
    assert found
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key])


def test_there_is_no_second_derivative_and_it_is_said():
    right = make_end(4, 4, False, False, torch.float64)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    central = torch.randn(5, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    y = separable_product(x, [1, 1, 1], central, right, None)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
