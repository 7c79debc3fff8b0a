"""Parameters and FLOPs of the variants, against models and numbers worked out by hand."""

import pytest
import torch
from transformers import T5ForConditionalGeneration

from mpoe.config import MPOEConfig
from mpoe.models import count_parameters, read_config
from mpoe.models.upcycle import swap_modules
from mpoe.mpo import SiteDims, site_dims
from mpoe.mpo.plan import plan
from mpoe.report.model_shape import ModelShape, model_shape
from mpoe.report.variants import matmul_flops, mixture_blocks, rebuild_adds, separable_adds, variants

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
        {"num_experts": 4, "max_auxiliary_bond": 16},
        {"num_experts": 3, "stacks": ("encoder",)},
        {"num_experts": 5, "layers": (0, 3), "max_bond_dim": 40, "gauge": "central"},
        {"num_experts": 2, "layout": "balanced", "num_sites": 3},
    ],
    ids=str,
)
def test_parameters_are_those_of_the_upcycled_model(options):
    found = named(model_shape(read_config("t5-small"), "t5-small"), **options)
    layout = options.pop("layout", "separable")
    count = on_meta(**options, layout=layout)
    mpoe = found[f"MPOE {layout}"]
    assert (mpoe.total, mpoe.total_trained) == (count.total, count.total)
    if layout == "separable":
        assert found["MPOE adapter"].total == count.total
        assert found["MPOE adapter"].total_trained == count.auxiliary + count.router
    whole = on_meta(**options, layout=layout, mpo_layers=())
    assert {found[name].total for name in ("Switch", "Switch EP")} == {whole.total}
    assert found["dense"].total == whole.dense


def test_the_layout_that_is_not_named_has_sites_of_its_own():
    own = {"site_dims": {"2048x512": [[256, 8, 1], [1, 4, 128]], "512x2048": [[128, 4, 1], [1, 8, 256]]}}
    found = named(model_shape(read_config("t5-small"), "t5-small"), **own)
    assert found["MPOE separable"].total == on_meta(**own).total
    assert found["MPOE balanced"].total == on_meta(layout="balanced").total


def test_t5_base_is_as_in_the_paper_and_the_design():
    matrix = 3072 * 768
    assert separable_adds(site_dims(3072, 768, layout="separable")) == (matrix, 0.375 * matrix)
    # 192·192·32·384 + 192·32·384·384, and the arms 12·12·16·192 and 384·24·16·16
    assert rebuild_adds(site_dims(3072, 768)) == 1_358_954_496 + 442_368 + 2_359_296
    assert rebuild_adds(site_dims(3072, 768)) // matrix == 577


def test_flops_of_small_layers_by_hand():
    # p = 4, a = 4, o = 2, i = 1, b = 4, q = 4
    assert separable_adds(SiteDims((4, 2, 1), (1, 1, 4), 8, 4)) == (32, 16 + 32)
    # truncated to 2: centre 2·2·1·2, ends 1·2·4 and 2·4·2
    assert separable_adds(SiteDims((4, 2, 1), (1, 1, 4), 8, 4), max_bond_dim=2) == (8, 8 + 16)
    # p = q = a = b = 4, o = i = 2: 4·4·16 and 4·4·16; an arm of one site is there already
    assert rebuild_adds(SiteDims((2, 2, 2), (2, 2, 2), 8, 8)) == 2 * 4 * 4 * 4 * 4
    assert (matmul_flops(10), matmul_flops(10, 2)) == (60, 40)


@pytest.mark.parametrize("tokens", [1, 64, 1024])
@pytest.mark.parametrize("bond", [None, 24])
def test_flops_of_the_forward_are_the_planners(tokens, bond):
    """Which costs the same in its own way, rows and active experts included."""
    separable, balanced = site_dims(96, 60, layout="separable"), site_dims(96, 60)
    costs = plan(separable, bond, 1, tokens).costs
    assert costs["apply"].flops == 2 * tokens * sum(separable_adds(separable, bond))
    costs = plan(balanced, bond, 1, tokens).costs
    assert costs["rebuild"].flops == 2 * (rebuild_adds(balanced, bond) + tokens * 96 * 60)


def test_what_a_token_costs():
    """E = 2, K = 1; in the tiny model's separable FFN, 8×4 and 4×8, one end of each matrix has but one dimension."""
    found = named(TINY, num_experts=2)
    dense, mpoe, adapter = found["dense"], found["MPOE separable"], found["MPOE adapter"]
    router = 2 * (4 + 1) * 2
    assert dense.flops_per_token(7) == 6 * (36 - 6 + 2 * 64)
    assert site_dims(8, 4, 3, "separable").in_dims == (1, 2, 2)
    assert site_dims(4, 8, 3, "separable").out_dims == (2, 2, 1)
    ends = (2 * 2 * 2 + 0) + (2 * 2 * 2 + 0)
    assert mpoe.plain_flops == 6 * (30 + router)
    assert mpoe.mpo_flops == 6 * 2 * (64 + ends)
    assert adapter.plain_flops == 4 * 30 + 6 * router
    assert adapter.mpo_flops == 2 * (4 * 64 + 6 * ends)
    assert found["Switch"].plain_flops == 6 * (30 + router + 2 * 64)
    assert found["Switch EP"].plain_flops == 6 * (30 + router + 1.25 * 2 * 64)
    assert found["Switch EP"].exchanged == 4 * 1.25 * 4 * 2
    assert mpoe.exchanged == found["Switch"].exchanged == 0


def test_two_experts_a_token_and_another_capacity():
    one, two = named(TINY, num_experts=4), named(TINY, num_experts=4, moe_type="moe", capacity_factor=2.0)
    assert two["MPOE separable"].mpo_flops == 2 * one["MPOE separable"].mpo_flops
    assert two["MPOE balanced"].rebuild_flops == one["MPOE balanced"].rebuild_flops
    assert two["Switch EP"].exchanged == 2 * 2.0 / 1.25 * one["Switch EP"].exchanged
    assert two["Switch"].plain_flops - one["Switch"].plain_flops == 6 * 2 * 64


def test_a_token_of_an_encoder_decoder_passes_one_stack():
    both = ModelShape("both", {"encoder": 2, "decoder": 2}, TINY.ffn, 4, other_parameters=66, lookup_parameters=6)
    one = ModelShape("one", {"decoder": 2}, TINY.ffn, 4, other_parameters=36, lookup_parameters=6)
    for mine, other in zip(variants(both, MPOEConfig()), variants(one, MPOEConfig()), strict=True):
        assert mine.plain_flops == other.plain_flops
        assert mine.mpo_flops == other.mpo_flops
        assert mine.exchanged == other.exchanged


def test_only_the_balanced_layout_multiplies_out():
    found = named(TINY, num_experts=3)
    assert found["MPOE balanced"].multiplied_out == 3 * 64
    assert found["MPOE balanced"].rebuild_flops > 0
    assert found["MPOE separable"].multiplied_out == found["MPOE separable"].rebuild_flops == 0
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


@pytest.mark.parametrize("options", [{"num_experts": 1}, {"moe_type": "none"}, {"mpo_layers": ("mlp", "attention")}])
def test_other_mixtures_are_refused(options):
    with pytest.raises(ValueError, match="only mixtures of MPO feed-forward layers are costed"):
        variants(TINY, MPOEConfig(**options))
