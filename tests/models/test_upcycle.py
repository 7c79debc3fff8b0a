import copy

import pytest
import torch
from transformers import T5EncoderModel

import mpoe
from mpoe.models import count_parameters, expert_shares, mixtures, reset_usage
from mpoe.mpo import decompose
from tiny import V1_0, V1_1, logits_of, tiny_batch, tiny_t5

VERSIONS = pytest.mark.parametrize("version", [V1_0, V1_1], ids=["v1.0", "v1.1"])
LAYOUTS = pytest.mark.parametrize("layout", ["separable", "balanced"])


@pytest.mark.parametrize("mpo_layers", [("mlp",), ()], ids=["mpo", "whole"])
@pytest.mark.parametrize("gauge", ["identity", "central", "sqrt"])
@LAYOUTS
@VERSIONS
def test_the_function_is_preserved(version, layout, gauge, mpo_layers):
    dense, batch = tiny_t5(version), tiny_batch()
    config = mpoe.MPOEConfig(num_experts=4, layout=layout, gauge=gauge, mpo_layers=mpo_layers)
    mixture = mpoe.upcycle(copy.deepcopy(dense), config)
    assert len(mixtures(mixture)) == 4
    assert (logits_of(mixture, batch) - logits_of(dense, batch)).abs().max() <= 1e-4
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    generated = [m.generate(**inputs, max_new_tokens=12) for m in (dense, mixture)]
    assert torch.equal(*generated)


@VERSIONS
def test_the_central_tensors_gradients_start_as_the_dense_matrices(version):
    """Of the first layer too, below all other routers."""
    dense, batch = tiny_t5(version).train(), tiny_batch()
    mixture = mpoe.upcycle(copy.deepcopy(dense), mpoe.MPOEConfig(num_experts=3))
    for model in (dense, mixture):
        model(**batch).loss.backward()
    for name in mixtures(mixture):
        wo = dense.get_submodule(name).wo.weight.grad
        central = mixture.get_submodule(name).down.central.grad
        torch.testing.assert_close(central.reshape(wo.shape), wo, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("gradient", ["router", "none", "all"])
def test_experts_that_cannot_move_train_like_the_dense_model(gradient):
    """Unless routers push the tokens, as the reference's do."""
    dense, batch = tiny_t5().double(), tiny_batch()
    config = mpoe.MPOEConfig(num_experts=3, offset_scale=1e-9, router_gradient=gradient)
    mixture = mpoe.upcycle(copy.deepcopy(dense), config)
    for model in (dense, mixture):
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(5):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    away = (logits_of(mixture, batch) - logits_of(dense, batch)).abs().max()
    assert away > 1e-2 if gradient == "all" else away < 1e-5


@LAYOUTS
def test_every_parameter_gets_a_gradient(layout):
    model = mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(num_experts=3, layout=layout)).train()
    model(**tiny_batch(8, 20)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_central_is_stored_once_per_matrix():
    model = mpoe.upcycle(tiny_t5(V1_0), mpoe.MPOEConfig(num_experts=8))
    central = [name for name, _ in model.named_parameters() if name.endswith("central")]
    assert len(central) == 2 * 4  # two matrices in each of four layers


def test_stacks_and_layers_are_a_choice():
    model = mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(stacks=["encoder"], layers=[1]))
    assert list(mixtures(model)) == ["encoder.block.1.layer.1.DenseReluDense"]
    encoder = T5EncoderModel(tiny_t5().config)
    assert len(mixtures(mpoe.upcycle(encoder, mpoe.MPOEConfig()))) == 2


def test_noise_breaks_the_symmetry_and_the_seed_repeats_it():
    dense, batch = tiny_t5(), tiny_batch()
    noisy = [
        logits_of(mpoe.upcycle(copy.deepcopy(dense), mpoe.MPOEConfig(expert_noise=0.1, seed=seed)), batch)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])
    assert not torch.equal(noisy[0], logits_of(dense, batch))


def test_truncation_is_the_decompositions():
    dense = tiny_t5()
    matrix = dense.encoder.block[0].layer[1].DenseReluDense.wo.weight.detach().clone()
    experts = next(iter(mixtures(mpoe.upcycle(dense, mpoe.MPOEConfig(max_bond_dim=5))).values())).down
    assert max(experts.expert(3).bond_dims) == 5
    torch.testing.assert_close(experts.expert_matrix(3), decompose(matrix, experts.dims, 5).to_matrix())


def test_dtype_and_frozen_weights_are_kept():
    dense = tiny_t5().bfloat16()
    dense.requires_grad_(False)
    layer = next(iter(mixtures(mpoe.upcycle(dense, mpoe.MPOEConfig())).values()))
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert not layer.up.central.requires_grad
    assert layer.router.weight.requires_grad


def test_own_site_dimensions():
    config = mpoe.MPOEConfig(site_dims={"64x32": [[4, 4, 4], [2, 4, 4]]})
    layer = next(iter(mixtures(mpoe.upcycle(tiny_t5(), config)).values()))
    assert layer.up.dims.out_dims == (4, 4, 4)
    with pytest.raises(ValueError, match="must equal output_features = 64"):
        mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(site_dims={"64x32": [[4, 4, 8], [2, 4, 4]]}))


def test_errors_say_what_the_model_has():
    with pytest.raises(ValueError, match="has been upcycled before"):
        mpoe.upcycle(mpoe.upcycle(tiny_t5()))
    with pytest.raises(ValueError, match=r"layers must be among the model's 0\.\.1; got \[7\]"):
        mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(layers=[7]))
    with pytest.raises(ValueError, match=r"stacks must be among the model's \['encoder'\]"):
        mpoe.upcycle(T5EncoderModel(tiny_t5().config), mpoe.MPOEConfig(stacks=["decoder"]))


def test_parameter_counts():
    dense = tiny_t5(V1_0)
    before = sum(p.numel() for p in dense.parameters())
    model = mpoe.upcycle(copy.deepcopy(dense), mpoe.MPOEConfig(num_experts=4))
    whole = mpoe.upcycle(copy.deepcopy(dense), mpoe.MPOEConfig(num_experts=4, mpo_layers=()))
    count = count_parameters(model)
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.dense == before
    assert count.central == 4 * 2 * 64 * 32
    assert count.auxiliary == 4 * 2 * 4 * (8**2 + 16**2)
    assert count.router == 4 * 4 * 33
    assert count.whole_experts == sum(p.numel() for p in whole.parameters()) == count_parameters(whole).total
    assert count.active == before + count.router + count.auxiliary // 4
    assert count_parameters(dense).total == count_parameters(dense).dense == before


def test_usage_is_counted():
    model = mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(num_experts=4))
    assert expert_shares(model) == {}
    logits_of(model, tiny_batch())
    shares = expert_shares(model)
    assert len(shares) == 4
    assert all(sum(layer) == pytest.approx(1) for layer in shares.values())
    reset_usage(model)
    assert expert_shares(model) == {}
