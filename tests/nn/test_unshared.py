import pytest
import torch

from mpoe.mpo import site_dims
from mpoe.nn import MPOExperts, UnsharedMPOExperts


def make_experts(bias="expert", dtype=torch.float64):
    dims = site_dims(40, 24)
    experts = UnsharedMPOExperts([MPOExperts(dims, 1) for _ in range(3)], bias)
    experts.load_matrix(torch.randn(40, 24), torch.randn(40))
    experts.add_noise(0.2, torch.Generator().manual_seed(0))
    return experts.to(dtype)


@pytest.mark.parametrize("bias", ["none", "shared", "expert"])
@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 7, 0], [0, 0, 0]], ids=str)
def test_tokens_meet_their_experts_matrix(bias, counts):
    experts = make_experts(bias)
    x = torch.randn(sum(counts), 24, dtype=torch.float64, requires_grad=True)
    fast = experts(x, counts)
    assert fast.shape == (sum(counts), 40)
    if not len(x):
        return
    expert_of_token = [e for e, count in enumerate(counts) for _ in range(count)]
    plain = torch.stack([experts.expert_matrix(e) @ token for e, token in zip(expert_of_token, x, strict=True)])
    if experts.bias is not None:
        plain = plain + torch.stack([experts.bias[min(e, len(experts.bias) - 1)] for e in expert_of_token])
    torch.testing.assert_close(fast, plain)
    upstream = torch.randn_like(fast)
    leaves = [x, *experts.parameters()]
    expected = torch.autograd.grad(plain, leaves, upstream, allow_unused=True)
    for leaf, a, b in zip(leaves, torch.autograd.grad(fast, leaves, upstream), expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(leaf) if b is None else b)


def test_counts_on_the_device_are_asked_for():
    experts = make_experts()
    x = torch.randn(7, 24, dtype=torch.float64)
    assert torch.equal(experts(x, torch.tensor([3, 0, 4])), experts(x, [3, 0, 4]))


def test_nothing_is_shared():
    experts = make_experts()
    x = torch.randn(4, 24, dtype=torch.float64)
    before = experts(x, [0, 4, 0])
    with torch.no_grad():
        experts.mpos[0].central.zero_()
    assert torch.equal(experts(x, [0, 4, 0]), before)
    assert not (experts(x, [4, 0, 0]) - experts.bias[0]).any()
