import json

import pytest

from mpoe import MPOEConfig


def test_round_trip_through_json():
    config = MPOEConfig(num_experts=4, stacks=["encoder"], layers=(0, 2), site_dims={"8x8": [[2, 2, 2], [2, 2, 2]]})
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
        ({"layout": "diagonal"}, r"layout must be one of \('separable', 'balanced'\); got 'diagonal'"),
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
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        MPOEConfig(**values)
