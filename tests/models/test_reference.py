"""Checkpoints in the reference's layout against the layer that the layout describes, spelled out."""

import copy
import math
import re
import string

import pytest
import torch
from torch import nn

import mpoe
from mpoe.models import expert_shares, mixtures, mpoe_config, reset_usage
from mpoe.models.reference import import_reference
from mpoe.mpo import decompose
from reference_checkpoint import base, write
from tiny import V1_0, V1_1, logits_of, tiny_batch, tiny_t5

KINDS = pytest.mark.parametrize("kind", ["switch", "moe"])


def product(cores, transposed=False):
    """The matrix that cores stand for, in one einsum."""
    letters, terms, m = iter(string.ascii_letters), [], len(cores)
    bond = next(letters)
    for _ in cores:
        i, j, right = (next(letters) for _ in range(3))
        terms.append(bond + i + j + right)
        bond = right
    equation = ",".join(terms) + "->" + "".join(term[1] for term in terms) + "".join(term[2] for term in terms)
    sizes = [math.prod(core.shape[axis] for core in cores) for axis in (1, 2)]
    assert m % 2
    matrix = torch.einsum(equation, *(core.double() for core in cores)).reshape(sizes).float()
    return matrix.T if transposed else matrix


class Oracle(nn.Module):
    """The reference's layer, one token after the other."""

    def __init__(self, tensors, layer, kind, transposed, is_scale_prob):
        super().__init__()
        self.kind, self.is_scale_prob = kind, is_scale_prob
        own = {key.removeprefix(f"{layer}."): t for key, t in tensors.items() if key.startswith(f"{layer}.")}

        def matrix(prefix, pick=lambda t: t):
            sites = sum(bool(re.fullmatch(re.escape(prefix) + r"\d+", key)) for key in own)
            return product([pick(own[f"{prefix}{k}"]) for k in range(sites)], transposed)

        if kind == "switch":
            self.gate, self.gate_bias = own["sffn.switch.weight"], own["sffn.switch.bias"]
            self.wi, self.wo = (
                [matrix(f"sffn.experts.{e}.{w}_mpo.tensor_set.") for e in range(len(self.gate))] for w in ("wi", "wo")
            )
        else:
            self.gate, self.gate_bias = own["moe_layer.gate.w_gating"].T, 0
            self.wi, self.wo = (
                [
                    matrix(f"moe_layer.experts.{w}_mpo.", lambda t, e=e: t[e] if t.ndim == 5 else t)
                    for e in range(len(self.gate))
                ]
                for w in ("w1", "w2")
            )
            self.b1, self.b2 = (own.get(f"moe_layer.experts.b{n}", torch.zeros(1)) for n in (1, 2))

    def expert(self, e, x):
        if self.kind == "switch":
            return self.wo[e] @ torch.relu(self.wi[e] @ x)
        b1, b2 = (b.view(-1, b.shape[-1])[e if b.numel() > b.shape[-1] else 0] for b in (self.b1, self.b2))
        return self.wo[e] @ torch.relu(self.wi[e] @ x + b1) + b2

    def token(self, x):
        p = torch.softmax(self.gate @ x + self.gate_bias, dim=0)
        if self.kind == "switch":
            best = int(p.argmax())
            return self.expert(best, x * p[best] if self.is_scale_prob else x)
        first, second = p.argsort(descending=True)[:2].tolist()
        total = p[first] + p[second]
        return p[first] / total * self.expert(first, x) + p[second] / total * self.expert(second, x)

    def forward(self, x):
        return torch.stack([self.token(token) for token in x.flatten(0, 1)]).view_as(x)


def oracle(dense, tensors, kind, transposed=False, is_scale_prob=False):
    """The dense model with the matrices of the checkpoint and `Oracle` in the places of its FFNs."""
    model = copy.deepcopy(dense)
    for name, _ in dense.named_modules():
        if name.endswith(".DenseReluDense"):
            layer = name.removesuffix(".DenseReluDense")
            model.set_submodule(name, Oracle(tensors, layer, kind, transposed, is_scale_prob))
    with torch.no_grad():
        for matrix in [
            m[1] for key in tensors if (m := re.match(r"(.*Attention\.[qkvo]|shared|lm_head)_mpo\.tensor_set\.0", key))
        ]:
            weight = model.get_parameter(f"{matrix}.weight")
            if matrix == "lm_head":
                weight = model.lm_head.weight = nn.Parameter(torch.empty_like(weight))
            cores = [tensors[f"{matrix}_mpo.tensor_set.{k}"] for k in range(5)]
            weight.copy_(product(cores, transposed)[: len(weight)])
    return model


def assert_imported(tmp_path, dense, tensors, kind, transposed=False, **options):
    """The oracle's logits, and the same bits after saving and loading."""
    model, batch = import_reference(tensors, dense.config, **options), tiny_batch(vocab_size=dense.config.vocab_size)
    scaled = options.get("is_scale_prob", False)
    expected = logits_of(oracle(dense, tensors, kind, transposed, scaled), batch)
    reset_usage(model)
    logits = logits_of(model, batch)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert any(len(set(share)) > 1 for share in expert_shares(model).values())
    assert (mpoe_config(model).layout, mpoe_config(model).balancing) == ("balanced", "loss")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(mpoe.from_pretrained(tmp_path / "saved"), batch), logits)
    return model


@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
@KINDS
def test_the_model_is_the_references(tmp_path, kind, transposed):
    dense = base()
    tensors = write(dense, kind, transposed=transposed)
    model = assert_imported(tmp_path, dense, tensors, kind, transposed)
    config = model.config.quantization_config
    assert (config.moe_type, config.num_experts, config.mpo_layers) == (kind, 3, ("mlp",))
    assert config.site_dims == {
        "64x32": [[2, 2, 4, 2, 2], [2, 2, 2, 2, 2]],
        "32x64": [[2, 2, 2, 2, 2], [2, 2, 4, 2, 2]],
    }


@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
@KINDS
def test_every_site_tensor_is_the_checkpoints_bit_for_bit(kind, transposed):
    dense = base()
    tensors = write(dense, kind, transposed=transposed)
    model = import_reference(tensors, dense.config)
    for name, mixture in mixtures(model).items():
        layer = name.removesuffix(".DenseReluDense")
        for experts, wi, w1 in ((mixture.up, "wi", "w1"), (mixture.down, "wo", "w2")):
            assert (experts.scales != 1).all()  # else the next lines would say nothing about scales
            for e in range(3):
                for k, site in enumerate(experts.expert(e).sites):
                    if kind == "switch":
                        core = tensors[f"{layer}.sffn.experts.{e}.{wi}_mpo.tensor_set.{k}"]
                    else:
                        stacked = tensors[f"{layer}.moe_layer.experts.{w1}_mpo.{k}"]
                        core = stacked if k == 2 else stacked[e]
                    assert torch.equal(site, core.transpose(1, 2) if transposed else core)


def test_scales_are_powers_of_two_below_the_librarys_own():
    dense = base()
    up = next(iter(mixtures(import_reference(write(dense), dense.config)).values())).up
    central = up.central.square().mean().sqrt()
    for scale, offsets in zip(up.scales, up.offsets, strict=True):
        wanted = 0.3 * (scale * offsets).square().mean().sqrt() / central
        assert math.log2(scale).is_integer()
        assert wanted / 2 < scale <= wanted


def test_a_tensor_that_a_scale_would_round_is_stored_as_it_is():
    dense, key = base(), "encoder.block.0.layer.1.sffn.experts.1.wi_mpo.tensor_set.1"
    tensors = write(dense)
    for e in range(3):
        tensors[f"encoder.block.0.layer.1.sffn.experts.{e}.wi_mpo.tensor_set.2"] *= 1e-6
    tensors[key].view(-1)[0] = 1e-44  # divided by 2^10 it would be 0
    up = mixtures(import_reference(tensors, dense.config))["encoder.block.0.layer.1.DenseReluDense"].up
    assert up.scales[1] == 1
    assert up.scales[0] > 1
    assert torch.equal(up.expert(1).sites[1], tensors[key])


@KINDS
def test_other_numbers_of_sites_and_experts(tmp_path, kind):
    dense = base()
    assert_imported(tmp_path, dense, write(dense, kind, experts=5, sites=3), kind)


@KINDS
def test_truncated_bonds(tmp_path, kind):
    dense = base()
    tensors = write(dense, kind, cap=6)
    assert assert_imported(tmp_path, dense, tensors, kind).config.quantization_config.max_bond_dim == 6


def test_bonds_of_two_truncations_are_refused():
    dense = base()
    other = {key: t for key, t in write(dense, cap=5).items() if "encoder.block.1" in key}
    with pytest.raises(ValueError, match=r"cut to one number .* \(1, 4, 6, 6, 4, 1\) of full .* others are cut to 5"):
        import_reference({**write(dense, cap=6), **other}, dense.config)


def with_other_sites(tensors, names):
    """The same checkpoint with the attention matrices of these names cut in another way."""
    tensors = dict(tensors)
    for name in names:
        matrix = product([tensors[f"{name}_mpo.tensor_set.{k}"] for k in range(5)])
        for k, core in enumerate(decompose(matrix, [(1, 2, 4, 2, 2), (2, 2, 2, 2, 2)], gauge="sqrt").sites):
            tensors[f"{name}_mpo.tensor_set.{k}"] = core
    return tensors


def test_matrices_of_one_shape_may_be_cut_by_their_names(tmp_path):
    """As T5-base's attention is: o in another way than q, k and v."""
    dense, batch = base(), tiny_batch()
    outputs = [name for name, module in dense.named_modules() if name.endswith("Attention.o")]
    assert len(outputs) > 2
    tensors = write(dense, parts=("attention",))
    found = import_reference(with_other_sites(tensors, outputs), dense.config)
    sites = found.config.quantization_config.site_dims
    assert sites["o:32x32"] != sites["q:32x32"] == sites["v:32x32"]
    with torch.no_grad():
        expected = import_reference(tensors, dense.config)(**batch).logits
        torch.testing.assert_close(found(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        found.save_pretrained(tmp_path)
        assert torch.equal(mpoe.from_pretrained(tmp_path)(**batch).logits, found(**batch).logits)


def test_site_dimensions_that_differ_between_matrices_of_one_name_and_shape_are_refused():
    dense, name = base(), "encoder.block.1.layer.0.SelfAttention.o"
    with pytest.raises(ValueError, match=rf"one name and shape must have .*o:32x32 .*{re.escape(name)}_mpo"):
        import_reference(with_other_sites(write(dense, parts=("attention",)), [name]), dense.config)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (".gate.w_gating", r"at least 2 experts, .* got 0 experts"),
        (".experts.b1", r"a bias must have .*experts\.b1 has shape \(\)"),
    ],
)
def test_a_router_or_bias_that_is_one_number_is_refused(part, message):
    tensors = write(base(), kind="moe")
    for name in [name for name in tensors if name.endswith(part)]:
        tensors[name] = torch.tensor(1.0)
    with pytest.raises(ValueError, match=message):
        import_reference(tensors, base().config)


def test_one_expert_or_an_even_number_of_sites_is_refused():
    dense = base()
    with pytest.raises(
        ValueError, match="at least 2 experts, and its matrices an odd number of site tensors; got 1 experts"
    ):
        import_reference(write(dense, experts=1), dense.config)
    even = {key: t for key, t in write(dense).items() if not key.endswith("tensor_set.4")}
    with pytest.raises(ValueError, match="got 3 experts and 4 site tensors"):
        import_reference(even, dense.config)


def test_is_scale_prob(tmp_path):
    dense = base()
    assert_imported(tmp_path, dense, write(dense), "switch", is_scale_prob=True)
    with pytest.raises(ValueError, match="is_scale_prob must be False"):
        import_reference(write(dense, "moe"), dense.config, is_scale_prob=True)


@pytest.mark.parametrize(
    ("shape", "expected"), [((), "shared"), ((1,), "shared"), ((3,), "expert"), ((3, 1), "expert"), (None, "none")]
)
def test_biases_are_shared_or_one_an_expert(tmp_path, shape, expected):
    dense = base()
    tensors = write(dense, "moe")
    for key in [key for key in tensors if re.search(r"experts\.b\d$", key)]:
        if shape is None:
            tensors[key] = torch.zeros_like(tensors[key])
        else:
            tensors[key] = torch.randn(*shape, *tensors[key].shape)
    model = assert_imported(tmp_path, dense, tensors, "moe")
    assert model.config.quantization_config.expert_bias == expected
    without = {key: t for key, t in tensors.items() if not re.search(r"experts\.b\d$", key)}
    assert import_reference(without, dense.config).config.quantization_config.expert_bias == "none"


@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("parts", [("attention",), ("word_embed",), ("attention", "word_embed", "own_head")])
def test_attention_and_embedding(tmp_path, parts, transposed):
    """Attention of 24 × 32, and rows of the embedding that are padded."""
    dense = base(num_heads=3, vocab_size=62)
    tensors = write(dense, transposed=transposed, parts=parts)
    model = assert_imported(tmp_path, dense, tensors, "switch", transposed)
    components = [name for name in ("mlp", "attention", "word_embed") if name in ("mlp", *parts)]
    assert list(model.config.quantization_config.mpo_layers) == components


@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
def test_square_matrices_are_read_like_the_others_or_as_told(tmp_path, transposed):
    dense = base()
    tensors = write(dense, transposed=transposed, parts=("attention",))
    assert_imported(tmp_path, dense, tensors, "switch", transposed)
    batch = tiny_batch()
    told = [logits_of(import_reference(tensors, dense.config, o), batch) for o in (None, "out-in", "in-out")]
    assert torch.equal(told[0], told[1]) is not transposed
    assert torch.equal(told[0], told[2]) is transposed
    with pytest.raises(ValueError, match="orientation must be one of"):
        import_reference(tensors, dense.config, "rows")


def test_a_dense_head_of_its_own(tmp_path):
    dense = base()
    dense.lm_head.weight = nn.Parameter(torch.randn_like(dense.shared.weight))
    tensors = write(dense)
    assert "lm_head.weight" in tensors
    assert_imported(tmp_path, dense, tensors, "switch")


@KINDS
def test_central_tensors_of_their_own_are_refused(kind):
    dense = base()
    tensors = write(dense, kind)
    if kind == "switch":
        key = "decoder.block.1.layer.2.sffn.experts.{}.wo_mpo.tensor_set.2"
        tensors[key.format(2)].view(-1)[7] += 0.25
        key = key.format(0)
    else:
        key = "decoder.block.1.layer.2.moe_layer.experts.w2_mpo.2"
        tensors[key] = torch.stack([tensors[key]] * 3)
        assert len(mixtures(import_reference(tensors, dense.config))) == 4
        tensors[key][1].view(-1)[7] += 0.25
    with pytest.raises(ValueError, match=rf"one central tensor; those of {re.escape(key)} differ by up to 0\.25"):
        import_reference(tensors, dense.config)


def test_a_dense_model_or_two_kinds_of_mixture_are_refused():
    dense = base()
    with pytest.raises(ValueError, match="one kind of mixture, with names like"):
        import_reference(dense.state_dict(), dense.config)
    with pytest.raises(ValueError, match="one kind of mixture"):
        import_reference({**write(dense), **write(dense, "moe")}, dense.config)


@KINDS
def test_missing_and_unknown_names_are_listed(kind):
    dense = base()
    tensors = write(dense, kind)
    for key in [key for key in tensors if "decoder.block.1.layer.2" in key or key == "shared.weight"]:
        del tensors[key]
    tensors["adapter.weight"] = torch.zeros(1)
    with pytest.raises(
        ValueError, match=r"missing: decoder\.block\.1.*, \.\.\.; 1 unknown: adapter\.weight\. Is"
    ) as caught:
        import_reference(tensors, dense.config)
    assert str(caught.value).count("decoder.block.1.layer.2") == 10
    tensors = write(dense, kind)
    site = next(key for key in tensors if key.endswith(".1") and "_mpo" in key)
    del tensors[site]
    with pytest.raises(ValueError, match=rf"1 missing: {re.escape(site)}"):
        import_reference(tensors, dense.config)


def test_shapes_that_do_not_fit_are_refused():
    dense = base()
    tensors = write(dense)
    key = "encoder.block.0.layer.1.sffn.experts.0.wi_mpo.tensor_set.0"
    with pytest.raises(ValueError, match=rf"must have shape .* {re.escape(key)} has 3 of shapes"):
        import_reference({**tensors, key: tensors[key][..., :2]}, dense.config)
    every = {key.replace("experts.0", f"experts.{e}"): tensors[key][..., :2] for e in range(3)}
    with pytest.raises(ValueError, match="bonds of neighbouring site tensors must be equal"):
        import_reference({**tensors, **every}, dense.config)
    gate = "encoder.block.0.layer.1.sffn.switch.weight"
    with pytest.raises(ValueError, match=rf"{re.escape(gate)} must have the 96 elements of shape \(3, 32\)"):
        import_reference({**tensors, gate: tensors[gate][:2]}, dense.config)
    bias = "encoder.block.0.layer.1.moe_layer.experts.b1"
    with pytest.raises(ValueError, match="a bias must have 64 elements, or as many for each of 3 experts"):
        import_reference({**write(dense, "moe"), bias: torch.zeros(2, 64)}, dense.config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 64}, r"must be the 64 × 64 of the config's .*\. Is it the config of this checkpoint's base\?"),
        ({"num_layers": 3}, r"81 missing: decoder\.block\.2\..*Is it the config"),
        ({"num_layers": 1}, r"unknown: .*decoder\.block\.1\..*Is it the config"),
        ({"vocab_size": 70}, r"shared\.weight must have the 2240 elements"),
        ({"num_layers": 0, "num_decoder_layers": 0}, "config must be of a T5 with layers"),
        (V1_1, r"must be of T5 v1\.0 .*got model_type 't5' and feed_forward_proj 'gated-gelu'"),
    ],
)
def test_a_config_of_another_model_is_refused(options, message):
    tensors = write(base())
    with pytest.raises(ValueError, match=message):
        import_reference(tensors, tiny_t5(**{"version": V1_0, **options}).config)


@pytest.mark.parametrize(
    "change", [{"dropout_rate": 2.0}, {"d_kv": -1}, {"dense_act_fn": "no"}, {"is_gated_act": True}]
)
def test_a_config_of_no_model_is_refused(change):
    config = base().config
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=r"config must be of (a T5 that can be built|T5 v1\.0)"):
        import_reference(write(base()), config)
