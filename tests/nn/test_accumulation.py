"""Accumulated gradients are those of plain micro-batches, however the step goes; none is lost without a word."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mpoe.mpo import site_dims
from mpoe.nn import MPOExperts
from mpoe.nn.accumulation import Accumulation

COUNTS = [[3, 0, 4], [0, 2, 5], [7, 0, 0], [0, 0, 7]]  # the last micro-batch has only one of the experts used before


class Net(nn.Module):
    """Two layers of three experts."""

    def __init__(self, max_bond_dim=None, dtype=torch.float64):
        super().__init__()
        self.up = make_experts((96, 64), max_bond_dim, dtype)
        self.down = make_experts((31, 96), max_bond_dim, dtype)

    def forward(self, x, counts):
        return self.down(torch.relu(self.up(x, counts)), counts)


def make_experts(size, max_bond_dim, dtype):
    experts = MPOExperts(site_dims(*size), 3, max_bond_dim, "identity").to(dtype)
    experts.load_matrix(torch.randn(*size, dtype=dtype) / size[1] ** 0.5)
    experts.add_noise(0.3, torch.Generator().manual_seed(torch.randint(1000, ()).item()))
    experts.way = "rebuild"
    return experts


def make_batches(dtype=torch.float64):
    return [(torch.randn(sum(counts), 64, dtype=dtype, requires_grad=True), counts) for counts in COUNTS]


def backward(net, batches):
    for x, counts in batches:
        net(x, counts).square().sum().backward()


def taken_gradients(net, batches=()):
    """Of parameters and inputs, which lose them."""
    tensors = [*net.parameters(), *(x for x, _ in batches)]
    gradients = [t.grad for t in tensors]
    for t in tensors:
        t.grad = None
    return gradients


def assert_same(found, expected, **tolerance):
    tolerance = tolerance or {"rtol": 1e-10, "atol": 1e-10}
    assert len(found) == len(expected)
    for of_found, of_expected in zip(found, expected, strict=True):
        assert (of_found is None) == (of_expected is None)
        if of_found is not None:
            torch.testing.assert_close(of_found, of_expected, **tolerance)


def plain_gradients(net, batches):
    backward(net, batches)
    return taken_gradients(net, batches)


class Last:
    """Says whether a micro-batch is the last, as a trainer does."""

    def __init__(self, batches):
        self.batches, self.now = batches, None

    def __iter__(self):
        for now, batch in enumerate(self.batches):
            self.now = now
            yield batch

    def __call__(self):
        return self.now == len(self.batches) - 1


@pytest.mark.parametrize("says_last", [False, True])
@pytest.mark.parametrize("max_bond_dim", [None, 6])
def test_it_is_plain_accumulation(max_bond_dim, says_last):
    net, batches = Net(max_bond_dim), make_batches()
    expected = plain_gradients(net, batches)
    last = Last(batches)
    accumulation = Accumulation(net)
    with accumulation.step(last if says_last else None):
        backward(net, last)
        assert accumulation.pending != says_last
        if says_last:  # before the block ends: here a trainer clips
            assert_same(taken_gradients(net, batches), expected)
    if not says_last:
        assert_same(taken_gradients(net, batches), expected)
    assert (accumulation.is_active, accumulation.pending, accumulation.bytes) == (False, False, 0)
    assert_same(plain_gradients(net, batches), expected)  # out of a step it does nothing


def test_matrices_are_multiplied_out_once():
    net, (x, _) = Net(), make_batches()[0]
    accumulation, counts = Accumulation(net), [1, 2, 4]

    def flops():
        with FlopCounterMode(display=False) as counter:
            backward(net, [(x, counts)])
        return counter.get_total_flops()

    plain = flops()
    of_products = 3 * 2 * len(x) * (96 * 64 + 31 * 96)
    with accumulation.step():
        first, second, third = flops(), flops(), flops()
        assert second == third <= of_products < first < plain  # PyTorch does not count addmm_
        assert accumulation.bytes == 2 * 3 * 8 * (96 * 64 + 31 * 96)


@pytest.mark.parametrize("says_last", [False, True])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
def test_training_is_plain_training(options, says_last):
    net = Net()
    plain = copy.deepcopy(net)
    accumulation = Accumulation(net)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2, **options) for model in (net, plain)]
    for _ in range(3):
        batches = make_batches()
        last = Last(batches)
        with accumulation.step(last if says_last else None):
            backward(net, last)
        backward(plain, batches)
        for model, optimizer in zip((net, plain), optimizers, strict=True):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert_same([p.data for p in net.parameters()], [p.data for p in plain.parameters()], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("says_last", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, says_last):
    net, batches = Net(), make_batches()
    expected = plain_gradients(net, batches)
    last = Last(batches)
    with Accumulation(net).step(last if says_last else None):
        for x, counts in last:
            checkpoint(net, x, counts, use_reentrant=use_reentrant).square().sum().backward()
    assert_same(taken_gradients(net, batches), expected)


@pytest.mark.parametrize("says_last", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_layer_that_is_used_twice(checkpointed, says_last):
    """With other experts the second time."""
    net = nn.ModuleList([make_experts((64, 64), None, torch.float64)])
    batches = make_batches()

    def run(batches):
        for x, counts in batches:
            other = counts[::-1]
            if checkpointed:
                y = checkpoint(net[0], checkpoint(net[0], x, counts, use_reentrant=False), other, use_reentrant=False)
            else:
                y = net[0](net[0](x, counts), other)
            y.square().sum().backward()

    run(batches)
    expected = taken_gradients(net, batches)
    last = Last(batches)
    with Accumulation(net).step(last if says_last else None):
        run(last)
    assert_same(taken_gradients(net, batches), expected)


@pytest.mark.parametrize("says_last", [False, True])
@pytest.mark.parametrize("trained", ["central", "offsets.0", "offsets.3", "nothing"])
def test_frozen_parts(trained, says_last):
    net, batches = Net(), make_batches()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.endswith(trained))
    expected = plain_gradients(net, batches)
    last = Last(batches)
    with Accumulation(net).step(last if says_last else None):
        backward(net, last)
    assert_same(taken_gradients(net, batches), expected)


def test_inputs_that_need_no_gradient():
    net = Net()
    batches = [(x.detach(), counts) for x, counts in make_batches()]
    expected = plain_gradients(net, batches)
    with Accumulation(net).step():
        backward(net, batches)
    assert_same(taken_gradients(net), expected[:-4])


def test_micro_batches_without_tokens_and_layers_left_out_of_the_last():
    net, batches = Net(), make_batches()
    empty = torch.empty(0, 64, dtype=torch.float64)
    expected = plain_gradients(net, batches)
    for batch in [(empty, [0, 0, 0]), None]:
        last = Last([*batches, batch])
        with Accumulation(net).step(last):
            backward(net, (batch for batch in last if batch is not None))
        assert_same(taken_gradients(net, batches), expected)


def test_a_flush_in_the_middle():
    net, batches = Net(), make_batches()
    expected = plain_gradients(net, batches)
    accumulation = Accumulation(net)
    with accumulation.step():
        backward(net, batches[:2])
        accumulation.flush()
        assert not accumulation.pending
        backward(net, batches[2:])
    assert_same(taken_gradients(net, batches), expected)


def test_evaluation_in_the_middle():
    net, batches = Net(), make_batches()
    expected = plain_gradients(net, batches)
    with torch.no_grad():
        outputs = [net(*batch) for batch in batches]
    with Accumulation(net).step():
        for batch, output in zip(batches, outputs, strict=True):
            backward(net, [batch])
            with torch.no_grad():
                torch.testing.assert_close(net(*batch), output)
    assert_same(taken_gradients(net, batches), expected)


@pytest.mark.parametrize("layers_that_fit", [0, 1])
def test_a_memory_limit(layers_that_fit):
    net, batches = Net(), make_batches()
    expected = plain_gradients(net, batches)
    limit = layers_that_fit * 2 * 3 * 8 * 96 * 64 + 100
    accumulation, last = Accumulation(net, limit), Last(batches)
    with accumulation.step(last):
        for batch in last:
            backward(net, [batch])
            assert (accumulation.bytes > 0) == (layers_that_fit > 0)
            assert accumulation.bytes <= limit
    assert_same(taken_gradients(net, batches), expected)


def test_after_an_exception_gradients_are_where_plain_accumulation_has_them():
    net, batches = Net(), make_batches()
    expected = plain_gradients(net, batches[:2])
    accumulation = Accumulation(net)
    with pytest.raises(TypeError), accumulation.step():
        backward(net, [*batches[:2], (None, None)])
    assert_same(taken_gradients(net, batches[:2]), expected)
    assert not accumulation.is_active


@pytest.mark.parametrize("says_last", [False, True])
def test_autocast(says_last):
    net, batches = Net(dtype=torch.float32), make_batches(torch.float32)
    exact = plain_gradients(net, batches)
    results = []
    accumulation = Accumulation(net)
    for step in (None, accumulation.step):
        last = Last(batches)
        with torch.autocast("cpu", torch.bfloat16):
            if step is None:
                backward(net, last)
            else:
                with step(last if says_last else None):
                    backward(net, last)
        results.append(taken_gradients(net, batches))
    for plain, accumulated, right in zip(*results, exact, strict=True):
        assert accumulated.dtype == torch.float32
        # one rounding of a sum, where plain accumulation sums up roundings that are half as large for 4 micro-batches
        assert (accumulated - right).norm() < 2 * (plain - right).norm()


def test_an_optimizer_must_not_step_before_the_gradients_are_there():
    net, batches = Net(), make_batches()
    accumulation = Accumulation(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    before = [p.clone() for p in net.parameters()]
    with accumulation.step():
        backward(net, batches)
        with pytest.raises(RuntimeError, match=r"before optimizer\.step\(\)"):
            optimizer.step()
        other.step()
        assert_same(list(net.parameters()), before)
    optimizer.step()


def test_a_step_must_not_begin_before_the_last_has_ended():
    net, batches = Net(), make_batches()
    accumulation = Accumulation(net)
    expected = plain_gradients(net, batches)
    accumulation.begin()
    backward(net, batches)
    with pytest.raises(RuntimeError, match="before the next step begins"):
        accumulation.begin()
    accumulation.end()
    assert_same(taken_gradients(net, batches), expected)
    accumulation.begin()
    backward(net, batches[:2])
    accumulation.clear()
    accumulation.begin()
    backward(net, batches)
    accumulation.end()
    assert_same(taken_gradients(net), expected[:-4])


@pytest.mark.parametrize("fused", [False, True])
def test_parameters_must_not_change_within_a_step(fused):
    net, batches = Net(), make_batches()
    accumulation = Accumulation(net)
    optimizer = torch.optim.AdamW(net.parameters(), fused=fused)
    accumulation.begin()
    backward(net, batches[:1])
    accumulation.flush()
    optimizer.step()
    with pytest.raises(RuntimeError, match="parameters must stay as they are"):
        net(*batches[1])
    accumulation.clear()
    accumulation.begin()
    backward(net, batches[:1])
    with torch.no_grad():
        net.up.offsets[1].mul_(2)
    with pytest.raises(RuntimeError, match="parameters must stay as they are"):
        accumulation.end()
    assert (accumulation.is_active, accumulation.pending) == (False, False)
    backward(net, batches)


def test_a_backward_pass_after_the_step_is_refused():
    net, batches = Net(), make_batches()
    with Accumulation(net).step():
        y = net(*batches[0])
    with pytest.raises(RuntimeError, match="must run in its step"):
        y.sum().backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_take_no_part_in_the_step(copied):
    net, batches = Net(), make_batches()
    expected = plain_gradients(net, batches)
    with Accumulation(net).step():
        backward(net, batches[:2])
        net_copy = copied(net)
        assert net_copy.up.accumulation is net_copy.down.accumulation is None
        taken_gradients(net_copy, batches)
        assert_same(plain_gradients(net_copy, batches), expected)
        backward(net, batches[2:])
    assert_same(taken_gradients(net), expected[:-4])


def test_replicas_that_live_for_one_pass_send_their_gradients_at_once():
    net, batches = Net(), make_batches()
    expected = plain_gradients(net, batches)
    with Accumulation(net).step():
        for batch in batches:
            replica = Net.__new__(Net)
            nn.Module.__init__(replica)
            replica.up, replica.down = copy.copy(net.up), copy.copy(net.down)
            backward(replica, [batch])
        assert_same(taken_gradients(net, batches), expected)


def test_a_model_without_such_layers():
    with pytest.raises(ValueError, match="layout='balanced'"):
        Accumulation(nn.Linear(2, 3))


def test_several_processes_must_know_the_last_micro_batch(monkeypatch):
    net, batches = Net(), make_batches()
    expected = plain_gradients(net, batches)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    accumulation, last = Accumulation(net), Last(batches)
    with pytest.raises(ValueError, match="is_last must be given"):
        accumulation.begin()
    with accumulation.step(last):
        backward(net, last)
    assert_same(taken_gradients(net, batches), expected)
