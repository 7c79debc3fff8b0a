import copy
import pickle

import pytest
import torch
from torch import nn

from mpoe.mpo import decompose, site_dims
from mpoe.nn import MPOEmbedding, MPOExperts, MPOLinear, MPOTiedHead

GAUGES = pytest.mark.parametrize("gauge", ["identity", "central", "sqrt"])
BONDS = pytest.mark.parametrize("max_bond_dim", [None, 6])
SIZES = [(96, 64), (31, 47), (7, 13), (41, 9)]
TABLES = [(64, 32), (61, 32), (67, 41), (9, 5)]
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, {"rtol": 1e-4, "atol": 1e-4}), (torch.bfloat16, {"rtol": 0.1, "atol": 0.3})],
)


def make_experts(size, gauge="identity", max_bond_dim=None, dtype=torch.float64, bias="none"):
    """One expert away from its start, padding included: what is behind the last row and column must not be seen."""
    experts = MPOExperts(site_dims(*size), 1, max_bond_dim, gauge, bias=bias).to(dtype)
    experts.load_matrix(torch.randn(*size, dtype=dtype), torch.randn(size[0], dtype=dtype))
    experts.add_noise(0.3, torch.Generator().manual_seed(torch.randint(1000, ()).item()))
    with torch.no_grad():
        experts.central.add_(torch.randn_like(experts.central))
    return experts


def assert_same_gradients(of_mpo, of_dense, leaves, **tolerance):
    torch.testing.assert_close(of_mpo, of_dense, **tolerance)
    upstream = torch.randn_like(of_mpo)
    for ours, plain in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (of_mpo, of_dense)), strict=True):
        torch.testing.assert_close(ours, plain, **tolerance)


@pytest.mark.parametrize("bias", ["none", "shared"])
@BONDS
@GAUGES
@pytest.mark.parametrize("size", SIZES)
def test_a_linear_layer_is_pytorchs_with_the_matrix_multiplied_out(size, gauge, max_bond_dim, bias):
    experts = make_experts(size, gauge, max_bond_dim, bias=bias)
    layer = MPOLinear(experts)
    assert (layer.out_features, layer.in_features) == size
    for shape in ((5,), (2, 3), ()):
        x = torch.randn(*shape, size[1], dtype=torch.float64, requires_grad=True)
        dense = nn.functional.linear(x, experts.expert_matrix(0), None if bias == "none" else experts.bias[0])
        assert_same_gradients(layer(x), dense, [x, *layer.parameters()])
    assert layer(torch.empty(0, 2, size[1], dtype=torch.float64)).shape == (0, 2, size[0])


@BONDS
@GAUGES
@pytest.mark.parametrize("size", TABLES)
def test_an_embedding_is_pytorchs_with_the_table_multiplied_out(size, gauge, max_bond_dim):
    experts = make_experts(size, gauge, max_bond_dim)
    embedding = MPOEmbedding(experts)
    assert (embedding.num_embeddings, embedding.embedding_dim) == size
    for shape in ((2, 30), (1,), ()):
        token_ids = torch.randint(size[0], shape)
        dense = nn.functional.embedding(token_ids, experts.expert_matrix(0))
        assert_same_gradients(embedding(token_ids), dense, list(embedding.parameters()))
    assert embedding(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, size[1])


@BONDS
@pytest.mark.parametrize("size", TABLES)
def test_a_tied_head_adds_to_the_gradients_of_its_embedding(size, max_bond_dim):
    experts = make_experts(size, "identity", max_bond_dim)
    embedding = MPOEmbedding(experts)
    head = MPOTiedHead(embedding)
    token_ids = torch.randint(size[0], (2, 6))
    logits = head(embedding(token_ids).tanh())
    assert logits.shape == (2, 6, size[0])
    table = experts.expert_matrix(0)
    dense = nn.functional.linear(nn.functional.embedding(token_ids, table).tanh(), table)
    assert_same_gradients(logits, dense, list(embedding.parameters()))


@DTYPES
def test_lower_precision(dtype, tolerance):
    experts = make_experts((67, 32), dtype=dtype)
    embedding, linear = MPOEmbedding(experts), MPOLinear(make_experts((41, 32), dtype=dtype))
    token_ids, x = torch.randint(67, (2, 5)), torch.randn(3, 32, dtype=dtype)
    for ours, plain, leaves in (
        (embedding(token_ids), nn.functional.embedding(token_ids, experts.expert_matrix(0)), embedding.parameters()),
        (MPOTiedHead(embedding)(x), x @ experts.expert_matrix(0).T, embedding.parameters()),
        (linear(x), x @ linear.experts.expert_matrix(0).T, linear.parameters()),
    ):
        assert ours.dtype == dtype
        assert_same_gradients(ours, plain, list(leaves), **tolerance)


def test_an_untrained_embedding_gives_the_very_rows_of_its_table():
    """In the identity gauge the auxiliaries are unit matrices: nothing is rounded, whatever the dtype."""
    table = torch.randn(61, 32).bfloat16()
    experts = MPOExperts(site_dims(61, 32), 1).bfloat16()
    experts.load_matrix(table)
    token_ids = torch.randint(61, (3, 20))
    assert torch.equal(MPOEmbedding(experts)(token_ids), nn.functional.embedding(token_ids, table))


def test_autocast_treats_them_as_pytorchs_layers():
    experts = make_experts((61, 32), dtype=torch.float32)
    embedding, table = MPOEmbedding(experts), nn.Embedding(61, 32)
    linear, dense = MPOLinear(experts), nn.Linear(32, 61, bias=False)
    token_ids = torch.randint(61, (2, 5))
    expected = embedding(token_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(embedding(token_ids), expected)
        assert table(token_ids).dtype == expected.dtype == torch.float32
        for x in (torch.randn(3, 32), torch.randn(3, 32).bfloat16()):
            assert MPOTiedHead(embedding)(x).dtype == linear(x).dtype == dense(x).dtype == torch.bfloat16


def test_truncation_is_the_decompositions():
    table, dims = torch.randn(61, 32), site_dims(61, 32)
    experts = MPOExperts(dims, 1, max_bond_dim=5)
    experts.load_matrix(table)
    truncated = decompose(table, dims, 5).to_matrix()
    assert not torch.allclose(truncated, table, atol=0.1)
    torch.testing.assert_close(MPOEmbedding(experts)(torch.arange(61)), truncated, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(MPOLinear(experts)(torch.eye(32)).T, truncated, rtol=1e-4, atol=1e-4)


def test_a_tied_head_owns_nothing_and_follows_its_embedding():
    embedding = MPOEmbedding(make_experts((61, 32)))
    pair = nn.ModuleDict({"embedding": embedding, "head": MPOTiedHead(embedding)})
    assert list(pair.state_dict()) == [f"embedding.{name}" for name in embedding.state_dict()]
    assert sum(p.numel() for p in pair.parameters()) == sum(p.numel() for p in embedding.parameters())
    for other in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert other["head"].embedding is other["embedding"] is not embedding
    pair.to(torch.float32)
    assert pair["head"](torch.randn(2, 32)).dtype == torch.float32
    pair["head"].requires_grad_(False)
    assert not any(p.requires_grad for p in embedding.parameters())


@pytest.mark.parametrize("token_id", [-1, 61, 1000])
def test_ids_outside_of_the_table_are_refused(token_id):
    embedding = MPOEmbedding(make_experts((61, 32)))
    with pytest.raises(ValueError, match=r"token ids must be in 0\.\.60; got"):
        embedding(torch.tensor([3, token_id]))


def test_errors():
    mixture = MPOExperts(site_dims(8, 8), 2)
    for kind in (MPOLinear, MPOEmbedding):
        with pytest.raises(ValueError, match="must have num_experts = 1; got 2"):
            kind(mixture)
    with pytest.raises(ValueError, match="an embedding has no bias"):
        MPOEmbedding(MPOExperts(site_dims(8, 8), 1, bias="shared"))
