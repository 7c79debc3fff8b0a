import dataclasses
import re

import pytest

from mpoe.mpo import WAYS, SiteDims, low_rank_dims, machine_of, plan, site_dims
from mpoe.mpo.machine import CPU, Machine, Product
from mpoe.mpo.plan import expected_active, plan_rows

LOW_RANK, BALANCED = low_rank_dims(3072, 768), site_dims(3072, 768)
MATRIX_BYTES = 4 * 3072 * 768
ENOUGH = 64 * MATRIX_BYTES


@pytest.mark.parametrize(
    ("dims", "max_bond_dim", "tokens", "needs_grad", "cache_bytes", "way"),
    [
        (LOW_RANK, 100, 4096, True, 0, "apply"),
        (LOW_RANK, 100, 1, False, ENOUGH, "apply"),
        (BALANCED, None, 4096, True, ENOUGH, "rebuild"),
        (BALANCED, None, 4096, False, 0, "rebuild"),
        (BALANCED, None, 4096, False, ENOUGH, "cached"),
        (BALANCED, None, 1, False, ENOUGH, "cached"),
        (BALANCED, 4, 8, True, 0, "apply"),
        (BALANCED, 4, 8, False, ENOUGH, "apply"),
        (BALANCED, 16, 8192, True, 0, "rebuild"),
    ],
)
def test_choices_that_are_beyond_doubt(dims, max_bond_dim, tokens, needs_grad, cache_bytes, way):
    made = plan(dims, max_bond_dim, 8, tokens, needs_grad=needs_grad, cache_bytes=cache_bytes)
    assert made.way == way
    assert made.costs[way].seconds == min(cost.seconds for cost in made.costs.values())


def test_the_cache_must_hold_the_matrices_of_all_experts():
    for cache_bytes, is_possible in ((8 * MATRIX_BYTES - 1, False), (8 * MATRIX_BYTES, True)):
        made = plan(BALANCED, None, 8, 512, cache_bytes=cache_bytes)
        assert ("cached" in made.costs, "cached" in made.refused) == (is_possible, not is_possible)
    assert made.costs["cached"].memory == 8 * MATRIX_BYTES
    assert "cached" in plan(BALANCED, None, 8, 512, dtype_bytes=2, cache_bytes=4 * MATRIX_BYTES).costs


@pytest.mark.parametrize("num_experts", [1, 2, 64])
def test_flops_in_closed_form(num_experts):
    """Two factors cost their ranks whatever the number of experts; a rebuild is worth 577 tokens of dense work."""
    tokens = 4096
    dense = 2 * tokens * 3072 * 768
    of = plan(LOW_RANK, 100, num_experts, tokens, cache_bytes=ENOUGH)
    assert of.dense.flops == dense
    # and the third site, of one element
    assert 0 < of.costs["apply"].flops - 2 * tokens * 100 * (3072 + 768) <= 2 * tokens * 100
    assert of.costs["cached"].flops == pytest.approx(dense)
    rebuild = plan(BALANCED, None, num_experts, tokens).costs["rebuild"].flops
    arms = 2 * (12 * 12 * 16 * 192 + 384 * 24 * 16 * 16)
    assert rebuild == pytest.approx(dense + num_experts * (2 * 3072 * 768 * (192 + 384) + arms))


def test_gradients_cost_two_products_for_each_and_what_is_multiplied_again():
    forward, step = (plan(BALANCED, None, 8, 512, needs_grad=needs_grad) for needs_grad in (False, True))
    assert step.dense.flops == 3 * forward.dense.flops
    assert step.costs["apply"].flops == 3 * forward.costs["apply"].flops
    again = 8 * 2 * 3072 * 768 * (192 + 384)  # the merged arms are kept
    assert step.costs["rebuild"].flops == pytest.approx(3 * forward.costs["rebuild"].flops + again)
    for way in ("apply", "rebuild"):
        assert step.costs[way].seconds > 2 * forward.costs[way].seconds


def test_only_active_experts_cost():
    few, many = (plan(BALANCED, None, 64, 512, active) for active in (2, 64))
    assert many.costs["rebuild"].seconds > 10 * few.costs["rebuild"].seconds
    expected = plan(BALANCED, None, 64, 512).costs  # 63.98 of them
    assert expected["rebuild"].seconds == pytest.approx(many.costs["rebuild"].seconds, rel=1e-3)


@pytest.mark.parametrize(
    ("num_experts", "tokens", "expected"), [(8, 1, 1.0), (8, 10**6, 8.0), (1, 5, 1.0), (2, 2, 1.5)]
)
def test_expected_active(num_experts, tokens, expected):
    assert expected_active(num_experts, tokens) == pytest.approx(expected)


@pytest.mark.parametrize("dims", [LOW_RANK, BALANCED, site_dims(31, 47), SiteDims((6,), (5,), 6, 5)])
@pytest.mark.parametrize("max_bond_dim", [None, 1, 7])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_costs_are_positive_and_grow_with_tokens(dims, max_bond_dim, device):
    counts = (0, 1, 3, 50, 700, 10_000)
    made = [plan(dims, max_bond_dim, 4, n, cache_bytes=2**40, machine=machine_of(device)) for n in counts]
    for way in WAYS:
        seconds = [one.costs[way].seconds for one in made]
        assert seconds[0] > 0
        assert seconds == sorted(seconds)
        assert all(min(dataclasses.astuple(one.costs[way])) >= 0 for one in made)


def test_about_as_many_tokens_share_a_plan():
    assert plan(BALANCED, None, 8, 1000) is plan(BALANCED, None, 8, 1024)
    assert plan(BALANCED, None, 8, 1000) is not plan(BALANCED, None, 8, 2048)


def test_a_way_can_be_asked_for():
    for way in WAYS:
        made = plan(BALANCED, None, 8, 512, way=way)
        assert made.way == way
        assert f"{way}:" in made.explain().splitlines()[1]
        assert "chosen, asked for" in made.explain().splitlines()[1]


def test_only_ratios_of_a_machines_constants_decide():
    """A machine that is slower in everything chooses the same; one whose calls are dear chooses the fewest."""
    speeds = ("flops", "bandwidth", "memory_bandwidth", "fresh_bandwidth", "reorder_bandwidth")
    slow = {name: getattr(CPU, name) / 10 for name in speeds} | {"overhead": CPU.overhead * 10}
    slow = dataclasses.replace(CPU, **slow)
    dear = dataclasses.replace(CPU, overhead=1.0)
    for tokens in (1, 30, 1000):
        usual, slower = (plan(BALANCED, 16, 8, tokens, cache_bytes=ENOUGH, machine=machine) for machine in (CPU, slow))
        assert usual.way == slower.way
        assert slower.over_dense("apply") == pytest.approx(usual.over_dense("apply"))
        assert plan(BALANCED, 16, 8, tokens, cache_bytes=ENOUGH, machine=dear).way == "cached"


def test_a_product_by_hand():
    machine = Machine(
        name="by hand", flops=100.0, thin=2.0, bandwidth=8.0, memory_bandwidth=4.0, parts_bandwidth=6.0,
        cache_bytes=400.0, fresh_bandwidth=1.0, fresh_bytes=300.0, reorder_bandwidth=2.0, overhead=0.5,
    )  # fmt: skip
    product = Product(4, 2, 5)
    assert product.flops == 80
    assert product.elements == 8 + 10 + 20
    in_cache = 80 * (1 + 2 / 2) / 100 + 4 * 2 * 9 / 8 + 0.5
    assert machine.seconds(product) == pytest.approx(in_cache)
    assert machine.seconds(product, working_set=800) == pytest.approx(in_cache - 72 / 8 + 72 * (0.5 / 8 + 0.5 / 4))
    in_parts = machine.seconds(Product(4, 2, 5, is_in_parts=True), working_set=800)
    assert in_parts == pytest.approx(in_cache - 72 / 8 + 72 * (0.5 / 8 + 0.5 / 6))
    assert machine.seconds(Product(1, 3, 5)) == pytest.approx(4 * 3 * 6 / 8 + 0.5)  # one vector: arithmetic is hidden
    assert machine.seconds(Product(4, 2, 5, copied=8)) == pytest.approx(in_cache + 2 * 4 * 8 / 2 + 0.5)
    assert machine.fresh_seconds(301) == 301
    assert machine.fresh_seconds(300) == 0


def test_explanation():
    lines = plan(BALANCED, None, 8, 512, needs_grad=True).explain().splitlines()
    assert lines[0] == (
        "3072×768 (bonds (1, 12, 192, 384, 16, 1)), 8 experts, about 512 tokens (64 for each of 8 active experts), "
        "4 bytes a number, with gradients, on cpu:"
    )
    assert re.fullmatch(r"  rebuild: [\d.]+× the time of a dense layer, .* MiB of memory; chosen, cheapest", lines[1])
    assert re.fullmatch(r"  apply: .*; [\d.]+× the time of rebuild", lines[2])
    assert lines[3] == "  cached: not possible, cached matrices have no gradients"
    assert "the cache must have 72 MiB" in plan(BALANCED, None, 8, 512, cache_bytes=10).explain()


def test_rows_of_the_table():
    rows = plan_rows(BALANCED, 16, 8, (1, 4096), cache_bytes=ENOUGH)
    assert [row.tokens for row in rows] == [1, 1, 1, 4096, 4096, 4096]
    for first, second, third in (rows[:3], rows[3:]):
        assert {first.way, second.way, third.way} == set(WAYS)
        assert [first.is_chosen, second.is_chosen, third.is_chosen] == [True, False, False]
        assert first.over_dense <= second.over_dense <= third.over_dense
    made = plan(BALANCED, 16, 8, 4096, cache_bytes=ENOUGH)
    for row in rows[3:]:
        cost = made.costs[row.way]
        assert (row.flops, row.bytes_moved, row.memory) == (cost.flops, cost.bytes_moved, cost.memory)
    assert {row.way for row in plan_rows(BALANCED, 16, 8, (1,), needs_grad=True)} == {"apply", "rebuild"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": -1}, r"tokens and cache_bytes must be >= 0 .* got -1, 0 and 8"),
        ({"cache_bytes": -1}, r"tokens and cache_bytes must be >= 0"),
        ({"num_experts": 0}, r"num_experts >= 1"),
        ({"active_experts": 9}, r"active_experts must be in 0\.\.num_experts = 8; got 9"),
        ({"way": "guess"}, r"way must be one of \('apply', 'rebuild', 'cached'\) or None; got 'guess'"),
        ({"way": "cached", "needs_grad": True}, r"must be without gradients"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(**{"dims": BALANCED, "max_bond_dim": None, "num_experts": 8, "tokens": 512, **arguments})
