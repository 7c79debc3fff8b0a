import copy

import pytest
import torch
from transformers import T5EncoderModel

import mpoe
from mpoe.models import count_parameters, expert_shares, mixtures, reset_usage
from mpoe.mpo import decompose
from tiny import V1_0, V1_1, logits_of, moved, tiny_batch, tiny_t5

VERSIONS = pytest.mark.parametrize("version", [V1_0, V1_1], ids=["v1.0", "v1.1"])
LAYOUTS = pytest.mark.parametrize("layout", ["extended", "balanced"])
KINDS = {
    "extended": {},
    "activation": {"expert_activation": "gelu"},
    "one expert a token": {"moe_type": "switch"},
    "identity": {"layout": "balanced"},
    "central": {"layout": "balanced", "gauge": "central"},
    "sqrt": {"layout": "balanced", "gauge": "sqrt"},
    "whole": {"mpo_layers": ()},
}


@pytest.mark.parametrize("kind", KINDS)
@VERSIONS
def test_the_function_is_preserved(version, kind):
    dense, batch = tiny_t5(version), tiny_batch()
    mixture = mpoe.upcycle(copy.deepcopy(dense), mpoe.MPOEConfig(num_experts=4, **KINDS[kind]))
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


@pytest.mark.parametrize("gradient", ["router", "none", "all", None])
def test_experts_that_cannot_move_train_like_the_dense_model(gradient):
    """Unless routers push the tokens, as the reference's do."""
    dense, batch = tiny_t5().double(), tiny_batch()
    if gradient is None:
        config = mpoe.MPOEConfig(num_experts=3, expert_scale=1e-9)
    else:
        config = mpoe.MPOEConfig(num_experts=3, layout="balanced", offset_scale=1e-9, router_gradient=gradient)
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


@pytest.mark.parametrize(("layout", "end"), [("extended", ".base.weight"), ("balanced", ".central")])
def test_central_is_stored_once_per_matrix(layout, end):
    model = mpoe.upcycle(tiny_t5(V1_0), mpoe.MPOEConfig(num_experts=8, layout=layout))
    central = [name for name, _ in model.named_parameters() if name.endswith(end)]
    assert len(central) == 2 * 4  # two matrices in each of four layers


def test_stacks_and_layers_are_a_choice():
    model = mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(stacks=["encoder"], layers=[1]))
    assert list(mixtures(model)) == ["encoder.block.1.layer.1.DenseReluDense"]
    encoder = T5EncoderModel(tiny_t5().config)
    assert len(mixtures(mpoe.upcycle(encoder, mpoe.MPOEConfig()))) == 2


def test_noise_breaks_the_symmetry_and_the_seed_repeats_it():
    dense, batch = tiny_t5(), tiny_batch()
    noisy = [
        logits_of(
            mpoe.upcycle(copy.deepcopy(dense), mpoe.MPOEConfig(layout="balanced", expert_noise=0.1, seed=seed)), batch
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])
    assert not torch.equal(noisy[0], logits_of(dense, batch))


def test_truncation_is_the_decompositions():
    dense = tiny_t5()
    matrix = dense.encoder.block[0].layer[1].DenseReluDense.wo.weight.detach().clone()
    experts = next(
        iter(mixtures(mpoe.upcycle(dense, mpoe.MPOEConfig(layout="balanced", max_bond_dim=5))).values())
    ).down
    assert max(experts.expert(3).bond_dims) == 5
    torch.testing.assert_close(experts.expert_matrix(3), decompose(matrix, experts.dims, 5).to_matrix())


@LAYOUTS
def test_dtype_and_frozen_weights_are_kept(layout):
    """Of what is the base's; factors and routers are in float32 and train."""
    dense = tiny_t5().bfloat16()
    dense.requires_grad_(False)
    layer = next(iter(mixtures(mpoe.upcycle(dense, mpoe.MPOEConfig(layout=layout))).values()))
    dtypes = {name: p.dtype for name, p in layer.named_parameters()}
    of_base = {name for name in dtypes if "router" not in name and (".base." in name or layout == "balanced")}
    assert {dtypes.pop(name) for name in of_base} == {torch.bfloat16}
    assert set(dtypes.values()) == {torch.float32}
    assert not layer.up.central.requires_grad
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in layer.named_parameters() if not name.endswith(("central", "base.weight"))}


def test_a_frozen_base_is_upcycled_and_its_factors_train():
    model, batch = tiny_t5().requires_grad_(False), tiny_batch(8, 20)
    mpoe.upcycle(model, mpoe.MPOEConfig(num_experts=4)).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, p in model.named_parameters():
        is_new = name.endswith(("offsets_U", "offsets_V", "router.weight"))
        assert torch.equal(p, before[name]) != is_new, name


def test_without_a_router_all_gates_are_one():
    """A low-rank layer of rank E·r beside the base, the control of the same size."""
    dense, batch = tiny_t5(V1_0), tiny_batch()
    config = mpoe.MPOEConfig(num_experts=3, expert_rank=2, moe_type="none")
    model = moved(mpoe.upcycle(copy.deepcopy(dense), config))
    assert mixtures(model) == {}
    layer = model.encoder.block[0].layer[1].DenseReluDense
    assert layer.up.offsets_U.shape == (6, 32)
    x = torch.randn(2, 5, 32)
    up, down = (e.base.weight + e.scale * e.offsets_V @ e.offsets_U for e in (layer.up, layer.down))
    torch.testing.assert_close(layer(x), (x @ up.T).relu() @ down.T, rtol=1e-4, atol=1e-5)
    assert (logits_of(model, batch) - logits_of(dense, batch)).abs().max() > 1e-2


def test_own_site_dimensions():
    config = mpoe.MPOEConfig(layout="balanced", site_dims={"64x32": [[4, 4, 4], [2, 4, 4]]})
    layer = next(iter(mixtures(mpoe.upcycle(tiny_t5(), config)).values()))
    assert layer.up.dims.out_dims == (4, 4, 4)
    with pytest.raises(ValueError, match="must equal output_features = 64"):
        mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(layout="balanced", site_dims={"64x32": [[4, 4, 8], [2, 4, 4]]}))


def test_errors_say_what_the_model_has():
    with pytest.raises(ValueError, match="has been upcycled before"):
        mpoe.upcycle(mpoe.upcycle(tiny_t5()))
    with pytest.raises(ValueError, match=r"layers must be among the model's 0\.\.1; got \[7\]"):
        mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(layers=[7]))
    with pytest.raises(ValueError, match=r"stacks must be among the model's \['encoder'\]"):
        mpoe.upcycle(T5EncoderModel(tiny_t5().config), mpoe.MPOEConfig(stacks=["decoder"]))


def unfinished(model):
    """The modules and what they are, and every tensor."""
    modules = {name: (id(module), type(module)) for name, module in model.named_modules()}
    return modules, {name: (id(p), p.requires_grad, p.clone()) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "balanced", "site_dims": {"32x64": [[4, 4, 8], [2, 4, 4]]}}, "must equal"),  # of the last matrix
        ({"layers": [0, 7]}, "layers must be among"),
        ({"routing": "sequence"}, "a decoder's tokens must not see"),
        ({"layout": "balanced", "mpo_layers": ("mlp", "word_embed"), "tied_head": True}, "tied_head must be"),
    ],
)
def test_a_failed_upcycle_leaves_the_model_as_it_was(options, message):
    model = tiny_t5()
    modules, tensors = unfinished(model)
    with pytest.raises(ValueError, match=message):
        mpoe.upcycle(model, mpoe.MPOEConfig(num_experts=3, **options))
    modules_after, tensors_after = unfinished(model)
    assert modules_after == modules
    assert tensors_after.keys() == tensors.keys()
    for name, (identity, requires_grad, value) in tensors.items():
        assert tensors_after[name][:2] == (identity, requires_grad)
        assert torch.equal(tensors_after[name][2], value)
    assert not hasattr(model.config, "quantization_config")
    mpoe.upcycle(model, mpoe.MPOEConfig(num_experts=3))


@LAYOUTS
def test_a_mixture_is_not_upcycled_again_and_stays_as_it_is(layout):
    model, batch = mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(num_experts=3, layout=layout)), tiny_batch()
    before = logits_of(moved(model), batch)
    with pytest.raises(ValueError, match="has been upcycled before"):
        mpoe.upcycle(model, mpoe.MPOEConfig())
    assert torch.equal(logits_of(model, batch), before)
    assert model.config.quantization_config.num_experts == 3


@pytest.mark.parametrize(
    ("layout", "auxiliary", "router", "share"),
    [
        ("extended", 4 * 8 * (64 + 32), 4 * 32, 2),  # U and V of rank 8; two experts a token
        # of 64 x 32 = (2 2 4 2 2) x (2 2 2 2 2), whose bonds are 4, 16, 16, 4
        ("balanced", 4 * (4 * 4 + 4 * 4 * 16 + 16 * 4 * 4 + 4 * 4), 4 * 33, 4),
    ],
)
def test_parameter_counts(layout, auxiliary, router, share):
    dense = tiny_t5(V1_0)
    before = sum(p.numel() for p in dense.parameters())
    model = mpoe.upcycle(copy.deepcopy(dense), mpoe.MPOEConfig(num_experts=4, layout=layout))
    whole = mpoe.upcycle(copy.deepcopy(dense), mpoe.MPOEConfig(num_experts=4, mpo_layers=()))
    count = count_parameters(model)
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.dense == before
    assert count.central == 4 * 2 * 64 * 32
    assert count.auxiliary == 4 * 2 * auxiliary
    assert count.router == 4 * router
    assert count_parameters(whole).total == count_parameters(whole).whole_experts
    assert count.whole_experts - count.router == count_parameters(whole).total - count_parameters(whole).router
    assert count.active == before + count.router + count.auxiliary // share
    assert count_parameters(dense).total == count_parameters(dense).dense == before


def test_usage_is_counted():
    model = mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(num_experts=4))
    logits_of(model, tiny_batch())
    assert expert_shares(model) == {}, "nobody has asked for it"
    reset_usage(model)
    assert expert_shares(model) == {}
    logits_of(model, tiny_batch())
    shares = expert_shares(model)
    assert len(shares) == 4
    assert all(sum(layer) == pytest.approx(1) for layer in shares.values())
    reset_usage(model)
    assert expert_shares(model) == {}
