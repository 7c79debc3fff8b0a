"""The cost of a step on n devices: formulas by hand, limits, and what DDP really sums."""

import dataclasses
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import mpoe
from mpoe.config import MPOEConfig
from mpoe.models import routers, sharing_experts
from mpoe.report.model_shape import ModelShape, model_shape
from mpoe.report.scaling import Hardware, Step, Traffic, all_reduce, all_to_all, reduce_scatter, step_cost
from mpoe.report.scaling_table import SCALE_DEVICES, step_table, variant_table
from mpoe.report.variants import variants
from tiny import tiny_batch, tiny_t5

TINY = ModelShape("tiny", {"decoder": 2}, (("up", 8, 4), ("down", 4, 8)), 4, other_parameters=36, lookup_parameters=0)
NAMES = ("dense", "MPOE extended", "MPOE adapter", "MPOE balanced", "Switch", "Switch EP")
HARDWARE = Hardware(
    device_flops=1000.0,
    achieved=0.5,
    device_memory=3000.0,
    node_devices=2,
    node_bandwidth=100.0,
    network_bandwidth=20.0,
)
STEP = Step(tokens_per_device=10, extended_overhead=2.0, balanced_overhead=3.0)
COUNTS = st.integers(1, 4096)


def named(shape=TINY, **options):
    return {variant.name: variant for variant in variants(shape, MPOEConfig(**{"num_experts": 2, **options}))}


def cost(variant, devices, is_sharded=False, step=STEP, hardware=HARDWARE):
    return step_cost(variant, devices, is_sharded, step, hardware)


def test_collectives_by_hand():
    assert reduce_scatter(800, 8, 8) == Traffic(700, 0)
    assert reduce_scatter(800, 16, 8) == Traffic(700, 50)
    assert all_reduce(800, 4, 1) == Traffic(0, 1200)
    assert all_reduce(800, 32, 8) == Traffic(1400, 2 * 3 / 4 * 100)
    assert all_to_all(800, 4, 8) == Traffic(600, 0)
    assert all_to_all(800, 16, 8) == Traffic(350, 400)
    assert Traffic(300, 40).seconds(HARDWARE) == 3 + 2


@given(size=st.integers(0, 10**12), devices=COUNTS, more=COUNTS, node_devices=st.integers(1, 16))
def test_collectives_send_what_the_bandwidth_optimal_ones_do(size, devices, more, node_devices):
    """However the bytes are divided between near and far; none for one device, and never less for more devices."""
    for collective, times in ((reduce_scatter, 1), (all_reduce, 2), (all_to_all, 1)):
        sent, larger = collective(size, devices, node_devices), collective(size, devices + more, node_devices)
        assert sent.total == pytest.approx(times * size * (devices - 1) / devices)
        assert sent.local >= 0
        assert sent.network == 0 or devices > node_devices
        assert larger.network >= sent.network
        assert larger.total >= sent.total * (1 - 1e-12)
        assert collective(size, 1, node_devices) == Traffic(0, 0)


def test_dense_by_hand():
    """164 parameters; 4 devices, two in a node."""
    dense = named()["dense"]
    copies, shards = cost(dense, 4), cost(dense, 4, is_sharded=True)
    assert copies.tokens == 40
    assert copies.compute_s == shards.compute_s == 10 * 6 * 164 / 500
    assert copies.reduced == Traffic(2 / 2 * 328, 2 / 2 * 328 / 2)
    assert copies.communication_s == 328 / 100 + 164 / 20
    assert copies.memory == 164 * 16 + 10 * 4 * 2 * 2
    assert shards.reduced == Traffic(3 / 2 * 328, 3 / 2 * 328 / 2)
    assert shards.memory == 164 * 16 / 4 + 82 * 2 + 10 * 4 * 2 * 2
    assert copies.in_turn == 40 / (copies.compute_s + copies.communication_s)
    assert copies.at_once == 40 / copies.compute_s
    assert shards.at_once == pytest.approx(40 / max(shards.compute_s, shards.communication_s))


def test_mpoe_by_hand():
    """E = 2, R = 8: factors of 8×4 and 4×8, routers of 2·4, in both blocks."""
    found = named()
    extended, adapter, balanced = (found[f"MPOE {name}"] for name in ("extended", "adapter", "balanced"))
    own = 2 * (2 * 2 * 8 * (8 + 4) + 2 * 4)
    assert (extended.total, extended.total_trained, adapter.total_trained) == (164 + own, 164 + own, own)
    assert cost(extended, 2).reduced == Traffic(2 / 2 * (164 + own) * 2, 0)
    assert cost(adapter, 2).reduced == Traffic(2 / 2 * own * 2, 0)
    gathers, gradients = 2 / 2 * (164 + own) * 2, 1 / 2 * own * 2
    assert cost(adapter, 2, is_sharded=True).reduced == Traffic(gathers + gradients, 0)
    assert cost(adapter, 1).memory == (164 + own) * 2 + own * 14 + 160
    assert cost(extended, 1).compute_s == (10 * extended.plain_flops + 2 * 10 * extended.shared_flops) / 500
    rebuilt = 3 * (10 * balanced.shared_flops + balanced.rebuild_flops)
    assert cost(balanced, 1).compute_s == (10 * balanced.plain_flops + rebuilt) / 500
    assert cost(balanced, 1).memory == balanced.total * 16 + 2 * 64 * 4 + 160
    assert {cost(variant, n, sharded).exchanged.total for variant in (extended, adapter, balanced)
            for n in (1, 8, 1000) for sharded in (False, True)} == {0}  # fmt: skip


def test_switch_by_hand():
    """E = 2: 36 shared, 20 in routers, 2·128 in experts; 4 devices, two in a node, which share a set of experts."""
    found = named()
    switch, parallel = found["Switch"], found["Switch EP"]
    assert (switch.total, parallel.total, parallel.parameters) == (312, 312, 56)
    assert cost(switch, 4).reduced == Traffic(624, 312)
    copies, shards = cost(parallel, 4), cost(parallel, 4, is_sharded=True)
    # the shared part over all devices; each expert with the one that the other node has
    assert copies.reduced == Traffic(112, 56) + Traffic(0, 2 / 2 * 256)
    assert shards.reduced == Traffic(168, 84) + Traffic(0, 3 / 2 * 256)
    # there and back, twice, in buffers of 1.25 times the tokens, in both blocks; half of it stays on the device
    assert copies.exchanged == shards.exchanged == Traffic(10 * 4 * 1.25 * 4 * 2 * 2 / 2, 0)
    assert copies.memory == 56 * 16 + 128 * 16 + 160
    assert shards.memory == (56 + 256) * 16 / 4 + (56 + 128) / 2 * 2 + 160
    far = cost(parallel, 4, hardware=dataclasses.replace(HARDWARE, node_devices=1))
    assert far.exchanged == Traffic(0, 400)


def test_experts_that_are_not_divided_are_copied():
    found = named(layout="balanced", capacity_factor=1.0)
    one_set = dataclasses.replace(STEP, expert_devices=1)
    for is_sharded in (False, True):
        divided, copied = (cost(found[name], 6, is_sharded, one_set) for name in ("Switch EP", "Switch"))
        assert divided.exchanged.total == 0
        assert divided.memory == pytest.approx(copied.memory)
        assert divided.reduced.total == pytest.approx(copied.reduced.total)
        assert divided.compute_s == copied.compute_s


@pytest.mark.parametrize("name", NAMES)
def test_one_device_sends_nothing(name):
    for is_sharded in (False, True):
        alone = cost(named()[name], 1, is_sharded)
        assert alone.communication_s == alone.reduced.total == alone.exchanged.total == 0
        assert alone.in_turn == alone.at_once
    assert cost(named()[name], 1, is_sharded=True) == cost(named()[name], 1)


@given(
    devices=st.integers(2, 2000), more=st.integers(1, 2000), tokens=COUNTS, experts=st.integers(2, 64),
    name=st.sampled_from(NAMES),
)  # fmt: skip
def test_more_devices_never_need_more_memory_each_and_never_compute_slower(devices, more, tokens, experts, name):
    variant, step = named(num_experts=experts)[name], Step(tokens_per_device=tokens)
    for is_sharded in (False, True):
        few, many = (cost(variant, n, is_sharded, step) for n in (devices, devices + more))
        assert many.memory <= few.memory * (1 + 1e-12)
        assert many.compute_s == few.compute_s
        assert many.at_once >= many.in_turn
        assert many.tokens > few.tokens
        if variant.expert_parameters == 0:
            assert many.communication_s >= few.communication_s * (1 - 1e-12)
    assert cost(variant, devices, True, step).reduced.total >= 0


@given(devices=st.integers(2, 2000), experts=st.integers(2, 32))
def test_the_order_of_what_is_sent(devices, experts):
    """Auxiliaries alone < dense < MPOE < whole experts on every device."""
    found = named(
        ModelShape("one", {"decoder": 2}, (("up", 96, 24), ("down", 24, 96)), 24, 999, 0),
        num_experts=experts,
        expert_rank=2,
    )
    sent = [cost(found[name], devices).reduced.total for name in ("dense", "MPOE extended", "Switch")]
    assert sent == sorted(sent)
    assert cost(found["MPOE adapter"], devices).reduced.total < sent[1]
    extra = cost(found["MPOE adapter"], devices).reduced.total
    assert sent[1] == pytest.approx(sent[0] + extra), "what experts add is what they own"


@pytest.mark.parametrize("trained", ["everything", "adapter"])
def test_ddp_sums_just_the_gradients_that_the_model_says(trained, tmp_path):
    """The bytes of DDP's own buckets, whatever expert got tokens; there is no other collective."""
    model = mpoe.upcycle(tiny_t5(), MPOEConfig(num_experts=4)).train()
    shape = model_shape(model.config, "tiny")
    found = named(shape, num_experts=4)
    if trained == "adapter":
        model.requires_grad_(False)
        own = [factor for experts in sharing_experts(model).values() for factor in experts.auxiliary.values()]
        for parameter in (*own, *(p for router in routers(model).values() for p in router.parameters())):
            parameter.requires_grad_(True)
    sent = []

    def hook(group, bucket):
        sent.append(bucket.buffer().nbytes)
        return default_hooks.allreduce_hook(group, bucket)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        parallel.register_comm_hook(None, hook)
        parallel(**tiny_batch(rows=1, length=2, label_length=1)).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    variant = found["MPOE extended" if trained == "everything" else "MPOE adapter"]
    assert sum(sent) == 4 * variant.total_trained


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Step(tokens_per_device=0), "tokens_per_device must be > 0 and finite; got 0"),
        (lambda: Step(optimizer_bytes=-1.0), "optimizer_bytes must be > 0 and finite; got -1.0"),
        (lambda: Step(expert_devices=-2), "expert_devices must be > 0 and finite; got -2"),
        (lambda: Hardware(node_bandwidth=float("nan")), "node_bandwidth must be > 0 and finite; got nan"),
        (lambda: Hardware(device_flops=float("inf")), "device_flops must be > 0 and finite; got inf"),
        (lambda: Hardware(achieved=1.5), r"achieved must be in \(0, 1\]; got 1.5"),
        (lambda: cost(named()["dense"], 0), "devices must be >= 1; got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def printed(table):
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(table)
    return console.file.getvalue().splitlines()


def test_tables_hold_the_numbers_and_fit_a_terminal():
    llama = ModelShape(
        "llama", {"decoder": 80}, (("g", 28672, 8192), ("u", 28672, 8192), ("d", 8192, 28672)), 8192, 12_605_202_432, 0
    )
    found, step, hardware = variants(llama, MPOEConfig()), Step(), Hardware()
    table = variant_table(found, step, "llama")
    lines = printed(table)
    (dense,) = [line.split() for line in lines if "dense " in line and "/" not in line]
    assert dense == ["dense", "68,976.6", "68,976.6", "1.000", f"{6 * 68_976.6 / 1e3:.0f}", "1.000"]
    for devices in SCALE_DEVICES:
        lines += printed(step_table(found, devices, step, hardware))
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    rows = [line.split() for line in printed(step_table(found, 64, step, hardware)) if "dense" in line]
    # 16 bytes a parameter do not fit; 63/64 of 2 times 138 GB; 8192 tokens of 414 GFLOP at 0.4 of 989 TFLOP/s
    assert rows[0][1:3] == ["1,114!", f"{2 * 63 / 64 * 137.953:.0f}"]
    assert rows[0][4] == f"{6 * 68.9766e9 * 8192 / (0.4 * 989e12) * 1e3:,.0f}"
    assert rows[0][-2:] == ["-", "-"]
    assert float(rows[1][1]) == pytest.approx(
        (68.9766 * 16 / 64) + 68.9766 * 2 / 80 + 8192 * 8192 * 80 * 2e-9, abs=0.05
    )
    assert float(rows[1][-1]) > float(rows[1][-2]) > 0
