import re

import pytest
import torch

import mpoe
from mpoe.models import mixtures
from mpoe.training.finetune import mean_loss
from mpoe.training.load import load_experiment, mixture_changes
from tiny import V1_0, moved, tiny_t5


def make_model(**options):
    return moved(mpoe.upcycle(tiny_t5(V1_0), mpoe.MPOEConfig(**{"num_experts": 2, **options})))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("here", "there", "both", "only_here", "only_there"),
    [
        ({"stacks": ("encoder",)}, {"stacks": ("decoder",)}, "none", "encoder.block.0", "decoder.block.0"),
        ({"stacks": ("encoder",)}, {}, "encoder.block.0", "none", "decoder.block.0"),
        ({"layers": (1,)}, {"layers": (0,)}, "none", "decoder.block.1", "decoder.block.0"),
        (
            {"num_experts": 1, "layout": "balanced"},
            {"num_experts": 1, "layout": "balanced", "mpo_layers": ("attention",)},
            "none",
            "decoder.block.0",
            "none",
        ),
    ],
)
def test_weights_come_from_modules_of_the_same_name_or_not_at_all(tmp_path, here, there, both, only_here, only_there):
    make_model(**there).save_pretrained(tmp_path)
    model = make_model(**here)
    before = state(model)
    message = (
        f"load_layer names mlp, .* both have them in {both}.*, only the model in {only_here}.*, "
        f"only {re.escape(str(tmp_path))} in {only_there}.*. Repeat the --mpo_layers, --stacks and --layers"
    )
    with pytest.raises(ValueError, match=message):
        load_experiment(model, str(tmp_path), ["mlp"])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_modules_of_the_same_name_are_taken_whole_and_nothing_else_is(tmp_path):
    source, model = make_model(), make_model()
    source.save_pretrained(tmp_path)
    before, there = state(model), state(source)
    load_experiment(model, str(tmp_path), ["mlp"])
    layers = tuple(f"{name}." for name in mixtures(model))
    assert len(layers) == 4
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (there if name.startswith(layers) else before)[name]), name


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ({}, {"top_k": 2}),
        ({"top_k": 1}, {"moe_type": "switch"}),
        ({"moe_type": "moe"}, {}),
        ({"layout": "balanced"}, {"layout": "balanced", "num_sites": 5, "moe_type": "switch"}),
    ],
)
def test_one_function_said_in_two_ways_is_one(tmp_path, here, there):
    source, model = make_model(**there), make_model(**here)
    source.save_pretrained(tmp_path)
    load_experiment(model, str(tmp_path))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in source.state_dict().items())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"balancing": "loss"}, "balancing: loss there, bias now"),
        ({"balancing_step": 0.5}, "balancing_step: 0.5 there, 0.01 now"),
        ({"expert_activation": "relu"}, "expert_activation: relu there, None now"),
    ],
)
def test_another_function_is_refused(tmp_path, option, message):
    make_model(**option).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"must be one of these flags \({message}\)"):
        load_experiment(make_model(), str(tmp_path))


def test_a_top_k_and_a_type_count_as_what_they_come_to():
    switch, both = mpoe.MPOEConfig(moe_type="switch"), mpoe.MPOEConfig()
    assert mixture_changes(switch, mpoe.MPOEConfig(top_k=1), ["top_k"]) == ""
    assert mixture_changes(both, switch, ["top_k", "num_experts"]) == "top_k: 2 there, 1 now"
    assert mixture_changes(mpoe.MPOEConfig(top_k=3), switch, ["top_k"]) == "top_k: 3 there, 1 now"
    assert mixture_changes(both, mpoe.MPOEConfig(moe_type="moe"), ["moe_type"]) == ""
    assert mixture_changes(mpoe.MPOEConfig(layout="balanced"), switch, ["moe_type"]) == ""
    assert mixture_changes(both, switch, ["moe_type"]) == "moe_type: moe there, switch now"
    assert (both.top_k, both.moe_type) == (None, None), "the configs stay as they are"


def test_mean_loss_weighs_by_steps():
    history = [
        {"loss": 2.0, "step": 20},
        {"eval_loss": 9.0, "step": 20},
        {"loss": 1.0, "step": 40},
        {"loss": 0.5, "step": 50},
        {"train_loss": 0.1, "step": 50},
    ]
    assert mean_loss(history) == pytest.approx((20 * 2.0 + 20 * 1.0 + 10 * 0.5) / 50)
    assert mean_loss([]) is None
