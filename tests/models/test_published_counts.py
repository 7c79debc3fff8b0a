"""The paper's parameter counts, where they can be reproduced, by the code that `mpoe inspect` runs; in millions."""

import pytest
import torch
from transformers import T5ForConditionalGeneration

import mpoe
from mpoe.models import count_parameters, read_config
from mpoe.models.upcycle import swap_modules
from mpoe.mpo import site_dims


def millions(count):
    return round(count / 1e6, 1)


def counted(size, **options):
    with torch.device("meta"):
        model = T5ForConditionalGeneration(read_config(size))
        swap_modules(model, mpoe.MPOEConfig(**options))
    return count_parameters(model)


@pytest.mark.parametrize("moe_type", ["switch", "moe"])
def test_t5_base_with_8_whole_experts(moe_type):
    """The published 1015 M leave the routers out; with them it is 1015.8 M."""
    count = counted("t5-base", num_experts=8, moe_type=moe_type, mpo_layers=(), balancing="loss")
    assert (millions(count.total - count.router), millions(count.total)) == (1015.6, 1015.8)
    assert millions(count.dense) == 222.9


@pytest.mark.parametrize(("num_experts", "published"), [(4, 258.4), (8, 293.8), (16, 364.8)])
def test_t5_base_as_mpoe(num_experts, published):
    """Routers are left out here too."""
    count = counted("t5-base", num_experts=num_experts, layout="balanced")
    assert millions(count.total - count.router) == published


def test_t5_large_is_what_the_arithmetic_gives():
    """The paper prints 956 for the mixture, which no choice of these shapes gives."""
    count = counted("t5-large", num_experts=8, layout="balanced")
    auxiliary = 256 + 16 * 16 * 256 + 512 * 32 * 16 + 256  # of one 4096×1024 matrix, bonds 1, 16, 256, 512, 16, 1
    assert count.auxiliary == 48 * 2 * 8 * auxiliary
    assert millions(count.dense) == 737.7
    assert millions(count.total - count.router) == millions(737_668_096 + 48 * 2 * 8 * auxiliary) == 989.7


def test_gpt2_is_what_the_arithmetic_gives():
    """24 matrices of 3072×768 in 124.4 M parameters; the paper prints 157, 171 and 578."""
    dense, matrices = 124_439_808, 24
    central, auxiliary = site_dims(3072, 768).num_parameters()
    assert central == 3072 * 768
    assert auxiliary == 184_720
    assert millions(dense + matrices * 8 * auxiliary) == 159.9
    assert millions(dense + matrices * 16 * auxiliary) == 195.4
    assert millions(dense + matrices * 7 * central) == 520.8
