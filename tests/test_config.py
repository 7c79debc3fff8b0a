import json

import pytest

from mpoe import MPOEConfig


def test_round_trip_through_json():
    config = MPOEConfig(num_experts=4, stacks=["encoder"], layers=(0, 2), balancing="loss", load_balancing_coef=0.5)
    assert MPOEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config = MPOEConfig(layout="balanced", site_dims={"8x8": [[2, 2, 2], [2, 2, 2]]})
    assert MPOEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_diff_names_what_is_not_the_default():
    assert MPOEConfig(num_experts=4).to_diff_dict() == {"num_experts": 4}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 0}, "num_experts must be an integer >= 1; got 0"),
        ({"num_experts": 2**63}, "num_experts must be at most 1,048,576; got 9223372036854775808"),
        ({"num_experts": 2.5}, "num_experts must be an integer >= 1; got 2.5"),
        ({"num_experts": True}, "num_experts must be an integer >= 1; got True"),
        ({"layout": "diagonal"}, r"layout must be one of \('extended', 'balanced'\); got 'diagonal'"),
        ({"gauge": "left"}, "gauge must be one of"),
        ({"max_bond_dim": 0}, "max_bond_dim must be an integer >= 1; got 0"),
        ({"mpo_layers": ["ffn"]}, "mpo_layers must be a list of"),
        ({"stacks": []}, "stacks must be a list of"),
        ({"layers": [-1]}, "layers must be a list of block indices"),
        ({"offset_scale": 0}, "offset_scale must be > 0; got 0"),
        ({"expert_noise": -1.0}, "expert_noise must be >= 0; got -1.0"),
        ({"mpo_layers": 5}, "mpo_layers must be a list; got 5"),
        ({"mpo_layers": [["mlp"]]}, "mpo_layers must be a list of"),
        ({"stacks": {"encoder": 1}}, "stacks must be a list; got"),
        ({"layers": [None]}, "layers must be a list of block indices"),
        ({"layers": [True]}, "layers must be a list of block indices"),
        ({"is_scale_prob": "no"}, "is_scale_prob must be True or False; got 'no'"),
        ({"tied_head": 1}, "tied_head must be True, False or None; got 1"),
        ({"seed": [1]}, r"seed must be an integer from 0 .*; got \[1\]"),
        ({"load_balancing_coef": float("inf")}, "load_balancing_coef must be >= 0; got inf"),
        ({"offset_scale": 1e300}, "offset_scale must be at most 1e6"),
        ({"offset_scale": 1e-300}, "offset_scale must be from 1e-9 to 1e6"),
        ({"eval_capacity_factor": 1e308}, "eval_capacity_factor must be at most 1e6"),
        ({"matrix_cache_gib": 1e308}, "matrix_cache_gib must be at most 1e6"),
        ({"site_dims": {"8x8": "abc"}}, "site_dims must be None or site dimensions by shape"),
        ({"site_dims": {"8x8": [[2, 2.0, 2], [2, 2, 2]]}}, "site_dims must be None or"),
        ({"feed_forward": [1]}, "feed_forward must be None or a description"),
        ({"layout": "x" * 10_000}, r"layout must be one of .{,300}$"),
        ({"load_balancing_coef": "much"}, "load_balancing_coef must be >= 0; got 'much'"),
        ({"expert_rank": 0}, "expert_rank must be an integer >= 1; got 0"),
        ({"expert_scale": 0.0}, "expert_scale must be > 0; got 0.0"),
        ({"expert_activation": "tanh"}, "expert_activation must be one of"),
        ({"balancing": "auxiliary"}, r"balancing must be one of \('bias', 'loss', 'none'\); got 'auxiliary'"),
        ({"balancing_step": -1}, "balancing_step must be > 0; got -1"),
        ({"frozen_router": 1}, "frozen_router must be True or False; got 1"),
        ({"num_experts": 4, "top_k": 5}, "top_k must be at most num_experts = 4; got 5"),
        ({"mpo_layers": ["mlp", "attention"]}, r"mpo_layers \['attention'\] need layout='balanced'"),
        ({"mpo_layers": ["attention"]}, r"mpo_layers \['attention'\] need layout='balanced'"),
        ({"layout": "separable"}, "'separable' is retired; got 'separable'"),
        ({"max_bond_dim": 4}, "max_bond_dim must be left out with layout 'extended', got 4; use layout='balanced'"),
        ({"capacity_factor": 1.0}, "capacity_factor must be left out with layout 'extended'"),
        ({"expert_bias": "expert"}, "expert_bias must be left out with layout 'extended'"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        MPOEConfig(**values)


@pytest.mark.parametrize(
    ("values", "unused"),
    [
        ({"expert_noise": 0.1}, "expert_noise has no effect with layout 'extended'"),
        ({"gauge": "sqrt", "offset_scale": 1.0}, "gauge, offset_scale has no effect with layout 'extended'"),
        (
            {"balancing": "bias", "load_balancing_coef": 0.1},
            "load_balancing_coef has no effect with .* balancing 'bias'",
        ),
        ({"balancing": "loss", "balancing_step": 0.1}, "balancing_step has no effect with .* balancing 'loss'"),
        ({"layout": "balanced", "expert_rank": 4}, "expert_rank has no effect with layout 'balanced'"),
        ({"mpo_layers": (), "expert_scale": 2.0}, "expert_scale has no effect with layout 'whole experts'"),
    ],
)
def test_options_without_an_effect_are_said(values, unused):
    with pytest.warns(UserWarning, match=unused):
        MPOEConfig(**values)


def test_the_number_of_experts_a_token_is_the_layouts_own():
    assert MPOEConfig().experts_per_token == 2
    assert MPOEConfig(layout="balanced").experts_per_token == 1
    assert MPOEConfig(mpo_layers=()).experts_per_token == 1
    assert MPOEConfig(moe_type="switch").experts_per_token == 1
    assert MPOEConfig(top_k=3).experts_per_token == 3
    assert not MPOEConfig(moe_type="none").is_mixture


OLD = {
    "quant_method": "mpoe", "num_experts": 4, "moe_type": "switch", "layout": "balanced", "auxiliary_sides": "both",
    "mpo_layers": ["mlp"], "load_balancing_coef": 0.02, "gauge": "identity",
}  # fmt: skip
"""As mpoe 0.1 wrote it into a config.json."""


def test_what_0_1_wrote_is_read():
    config = MPOEConfig.from_dict(OLD)
    assert (config.layout, config.balancing, config.load_balancing_coef) == ("balanced", "loss", 0.02)
    whole = MPOEConfig.from_dict({**OLD, "layout": "separable", "mpo_layers": []})
    assert (whole.is_extended, whole.balancing, whole.experts_per_token) == (False, "loss", 1)
    assert MPOEConfig.from_dict(whole.to_dict()) == whole
    assert OLD["auxiliary_sides"] == "both", "the caller's own"


@pytest.mark.parametrize("change", [{"layout": "separable"}, {"layout": "separable", "auxiliary_sides": "narrow"}])
def test_separable_of_0_1_names_the_version_that_reads_it(change):
    with pytest.raises(
        ValueError, match=r"layout 'separable' is retired.*0\.1\.0 \(commit \w+\) is the last version"
    ) as caught:
        MPOEConfig.from_dict({**OLD, **change})
    assert "\n" not in str(caught.value)


def test_a_coefficient_of_the_loss_asks_for_the_loss():
    assert MPOEConfig().balancing == "bias"
    assert MPOEConfig(load_balancing_coef=0.1).balancing == "loss"
    assert MPOEConfig(balancing="loss").load_balancing_coef == 0.01
