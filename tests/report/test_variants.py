"""Parameters and FLOPs of the variants, against models and numbers worked out by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5ForConditionalGeneration

from mpoe.config import MPOEConfig
from mpoe.models import count_parameters, read_config
from mpoe.models.upcycle import swap_modules
from mpoe.mpo import SiteDims, site_dims
from mpoe.mpo.plan import plan
from mpoe.nn import ExtendedExperts
from mpoe.report.model_shape import ModelShape, model_shape
from mpoe.report.variants import extended_adds, matmul_flops, mixture_blocks, rebuild_adds, variants

TINY = ModelShape("tiny", {"decoder": 2}, (("up", 8, 4), ("down", 4, 8)), 4, other_parameters=36, lookup_parameters=6)


def named(shape, **options):
    return {variant.name: variant for variant in variants(shape, MPOEConfig(**options))}


def on_meta(**options):
    with torch.device("meta"):
        model = T5ForConditionalGeneration(read_config("t5-small"))
        swap_modules(model, MPOEConfig(**options))
    return count_parameters(model)


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": 8},
        {"num_experts": 4, "expert_rank": 3, "top_k": 1},
        {"num_experts": 3, "stacks": ("encoder",)},
        {"num_experts": 5, "layers": (0, 3), "layout": "balanced", "max_bond_dim": 40, "gauge": "central"},
        {"num_experts": 2, "layout": "balanced", "num_sites": 3, "max_auxiliary_bond": 16},
    ],
    ids=str,
)
def test_parameters_are_those_of_the_upcycled_model(options):
    found = named(model_shape(read_config("t5-small"), "t5-small"), **options)
    count = on_meta(**options)
    mpoe = found[f"MPOE {options.get('layout', 'extended')}"]
    assert (mpoe.total, mpoe.total_trained) == (count.total, count.total)
    places = {name: options[name] for name in ("num_experts", "stacks", "layers") if name in options}
    if mpoe is found["MPOE extended"]:
        assert found["MPOE adapter"].total == count.total
        assert found["MPOE adapter"].total_trained == count.auxiliary + count.router
        assert found["MPOE balanced"].total == on_meta(**places, layout="balanced").total
    else:
        assert found["MPOE extended"].total == on_meta(**places).total
    whole = on_meta(**places, mpo_layers=(), layout="balanced")
    assert {found[name].total for name in ("Switch", "Switch EP")} == {whole.total}
    assert found["dense"].total == whole.dense


def test_t5_base_is_as_in_the_paper_and_the_design():
    matrix = 3072 * 768
    # "10% for T5-base with 8 experts and r = 8, 2% for a 7B LLaMA"
    assert extended_adds(MPOEConfig(), 3072, 768) / matrix == pytest.approx(0.104, abs=5e-4)
    assert extended_adds(MPOEConfig(), 11008, 4096) / (11008 * 4096) == pytest.approx(0.021, abs=5e-4)
    # 192·192·32·384 + 192·32·384·384, and the arms 12·12·16·192 and 384·24·16·16
    assert rebuild_adds(site_dims(3072, 768)) == 1_358_954_496 + 442_368 + 2_359_296
    assert rebuild_adds(site_dims(3072, 768)) // matrix == 577


def test_flops_of_small_layers_by_hand():
    assert extended_adds(MPOEConfig(num_experts=3, expert_rank=5), 8, 4) == 3 * (5 * 4 + 5 * 8)
    # p = q = a = b = 4, o = i = 2: 4·4·16 and 4·4·16; an arm of one site is there already
    assert rebuild_adds(SiteDims((2, 2, 2), (2, 2, 2), 8, 8)) == 2 * 4 * 4 * 4 * 4
    assert (matmul_flops(10), matmul_flops(10, 2)) == (60, 40)


@pytest.mark.parametrize("tokens", [1, 64, 1024])
@pytest.mark.parametrize("bond", [None, 24])
def test_flops_of_the_forward_are_the_planners(tokens, bond):
    """Which costs the same in its own way, rows and active experts included."""
    balanced = site_dims(96, 60)
    costs = plan(balanced, bond, 1, tokens).costs
    assert costs["rebuild"].flops == 2 * (rebuild_adds(balanced, bond) + tokens * 96 * 60)


@pytest.mark.parametrize("trained", ["everything", "adapter"])
def test_flops_of_an_extended_layer_are_those_that_torch_counts(trained):
    """Forward and backward of one FFN without router, gradients of the input included."""
    tokens, layers = 7, []
    for out, inner in ((8, 4), (4, 8)):
        base = torch.nn.Linear(inner, out, bias=False).requires_grad_(trained == "everything")
        wrapped = torch.nn.Sequential(base)  # the counter does not know `addmm_`, which a bare layer is added to by
        layers.append(ExtendedExperts(wrapped, out, inner, num_experts=3, rank=2))
        layers[-1].initialize(torch.Generator().manual_seed(0))
    x = torch.randn(tokens, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layers[1](layers[0](x, torch.rand(tokens, 3)), torch.rand(tokens, 3)).sum().backward()
    found = named(TINY, num_experts=3, expert_rank=2)["MPOE extended" if trained == "everything" else "MPOE adapter"]
    assert counter.get_total_flops() == tokens * found.shared_flops / 2, "of one of two blocks"


def test_what_a_token_costs():
    """E = 2, R = 3; matrices of 8×4 and 4×8 in two blocks; whole experts are top-1."""
    found = named(TINY, num_experts=2, expert_rank=3)
    dense, mpoe, adapter = found["dense"], found["MPOE extended"], found["MPOE adapter"]
    router, bias = 2 * 4 * 2, 2 * 2
    own = 2 * 2 * 2 * 3 * (8 + 4)
    assert dense.flops_per_token(7) == 6 * (36 - 6 + 2 * 64)
    assert mpoe.plain_flops == 6 * (30 + router)
    assert mpoe.shared_flops == 6 * (2 * 64 + own)
    assert adapter.plain_flops == 4 * 30 + 6 * router
    assert adapter.shared_flops == 4 * 2 * 64 + 6 * own
    assert found["MPOE balanced"].plain_flops == 6 * (30 + router + bias)
    assert found["Switch"].plain_flops == 6 * (30 + router + bias + 2 * 64)
    assert found["Switch EP"].plain_flops == 6 * (30 + router + bias + 1.25 * 2 * 64)
    assert found["Switch EP"].exchanged == 4 * 1.25 * 4 * 2
    assert mpoe.exchanged == found["Switch"].exchanged == 0


def test_two_experts_a_token_and_another_capacity():
    one = named(TINY, num_experts=4, moe_type="switch", layout="balanced")
    two = named(TINY, num_experts=4, moe_type="moe", layout="balanced", capacity_factor=2.0)
    assert two["MPOE extended"] == one["MPOE extended"], "all experts are computed for every token"
    assert two["MPOE balanced"].shared_flops == 2 * one["MPOE balanced"].shared_flops
    assert two["MPOE balanced"].rebuild_flops == one["MPOE balanced"].rebuild_flops
    assert two["Switch EP"].exchanged == 2 * 2.0 / 1.25 * one["Switch EP"].exchanged
    assert two["Switch"].plain_flops - one["Switch"].plain_flops == 6 * 2 * 64


def test_a_token_of_an_encoder_decoder_passes_one_stack():
    both = ModelShape("both", {"encoder": 2, "decoder": 2}, TINY.ffn, 4, other_parameters=66, lookup_parameters=6)
    one = ModelShape("one", {"decoder": 2}, TINY.ffn, 4, other_parameters=36, lookup_parameters=6)
    for mine, other in zip(variants(both, MPOEConfig()), variants(one, MPOEConfig()), strict=True):
        assert mine.plain_flops == other.plain_flops
        assert mine.shared_flops == other.shared_flops
        assert mine.exchanged == other.exchanged


def test_only_the_balanced_layout_multiplies_out():
    found = named(TINY, num_experts=3)
    assert found["MPOE balanced"].multiplied_out == 3 * 64
    assert found["MPOE balanced"].rebuild_flops > 0
    assert found["MPOE extended"].multiplied_out == found["MPOE extended"].rebuild_flops == 0
    few, many = (found["MPOE balanced"].flops_per_token(tokens) for tokens in (1, 10**9))
    assert few == many + found["MPOE balanced"].rebuild_flops * (1 - 1e-9)
    assert many == pytest.approx(6 * (30 + 2 * (4 + 1) * 3 + 2 * 64))


def test_blocks_are_those_that_the_config_names():
    shape = ModelShape("deep", {"encoder": 2, "decoder": 3}, TINY.ffn, 4, 0, 0)
    assert mixture_blocks(shape, MPOEConfig()) == 5
    assert mixture_blocks(shape, MPOEConfig(stacks=("decoder",))) == 3
    assert mixture_blocks(shape, MPOEConfig(layers=(1, 2))) == 3
    with pytest.raises(ValueError, match=r"layers must be among the model's 0..2; got \[3\]"):
        mixture_blocks(shape, MPOEConfig(layers=(3,)))
    with pytest.raises(ValueError, match=r"stacks must be among the model's \['decoder'\]; got \['encoder'\]"):
        mixture_blocks(TINY, MPOEConfig(stacks=("encoder",)))


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": 1},
        {"moe_type": "none"},
        {"mpo_layers": ()},
        {"mpo_layers": ("mlp", "attention"), "layout": "balanced"},
    ],
)
def test_other_mixtures_are_refused(options):
    with pytest.raises(ValueError, match="only mixtures of feed-forward layers whose experts share a matrix"):
        variants(TINY, MPOEConfig(**options))
