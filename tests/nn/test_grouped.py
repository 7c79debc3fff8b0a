import pytest
import torch

from mpoe.mpo.plan import VERY_FEW_ROWS
from mpoe.nn.grouped import FEW_ROWS, blockwise, linear, linear_per_expert, rows_of_experts

COUNTS = [[3, 0, 4], [0, 0, 5], [2, 2, 2], [1, 0, 0], [0, 0, 0]]


def plain(x, counts, weight):
    experts = [e for e, count in enumerate(counts) for _ in range(count)]
    rows = [weight[e] @ row for e, row in zip(experts, x, strict=True)]
    return torch.stack(rows) if rows else x.new_empty(0, weight.shape[1])


@pytest.mark.parametrize("is_known", [True, False], ids=["list", "tensor"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("sizes", [(8, 16), (7, 5)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, {}), (torch.float32, {}), (torch.bfloat16, {"rtol": 0.1, "atol": 0.1})],
)
def test_it_is_each_rows_expert(sizes, counts, is_known, dtype, tolerance):
    x = torch.randn(sum(counts), sizes[1], dtype=dtype, requires_grad=True)
    weight = torch.randn(3, *sizes, dtype=dtype, requires_grad=True)
    fast = linear_per_expert(x, counts if is_known else torch.tensor(counts), weight)
    slow = plain(x, counts, weight)
    torch.testing.assert_close(fast, slow, **tolerance)
    if sum(counts):
        upstream = torch.randn_like(fast)
        gradients = (torch.autograd.grad(y, (x, weight), upstream) for y in (fast, slow))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, **tolerance)


def test_the_operator_keeps_pytorchs_contract():
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(3, 5, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.mpoe.grouped_linear.default, (x, torch.tensor([2, 0, 4]), weight))
    torch.library.opcheck(
        torch.ops.mpoe.grouped_outer.default, (torch.randn(6, 5), torch.tensor([2, 0, 4]), x.detach())
    )


def test_one_expert_needs_no_counts():
    x, weight = torch.randn(4, 3), torch.randn(1, 2, 3)
    assert torch.equal(linear_per_expert(x, torch.tensor([4]), weight), linear(x, weight[0]))


@pytest.mark.parametrize("outputs", [7, 12])
@pytest.mark.parametrize("rows", [0, 1, 2, VERY_FEW_ROWS - 1, VERY_FEW_ROWS, FEW_ROWS - 1, FEW_ROWS])
def test_few_rows_take_another_road_to_the_same_product(rows, outputs, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    x = torch.randn(rows, 12, requires_grad=True)
    weight = torch.randn(outputs, 12, requires_grad=True)
    upstream = torch.randn(rows, outputs)
    results = [linear(x, weight), torch.nn.functional.linear(x, weight)]
    torch.testing.assert_close(*results)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), upstream) for y in results), strict=True):
        torch.testing.assert_close(a, b)


def test_blockwise_calls_experts_that_have_rows():
    called = []

    def of_expert(rows, expert):
        called.append((expert, len(rows)))
        return rows * expert

    x = torch.ones(5, 2)
    assert blockwise(x, [2, 0, 3], of_expert).tolist() == [[0, 0]] * 2 + [[2, 2]] * 3
    assert called == [(0, 2), (2, 3)]


def test_rows_of_experts():
    of_expert = torch.tensor([[1.0], [2.0], [3.0]])
    for counts in ([1, 0, 2], torch.tensor([1, 0, 2])):
        assert rows_of_experts(of_expert, counts, 3).flatten().tolist() == [1, 3, 3]
