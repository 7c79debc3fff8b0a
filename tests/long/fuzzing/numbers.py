"""Shapes, decompositions, configs, layers: in memory, thousands of tiny cases."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuzzing.cases import JUNK, Case, Property, refusal_of
from mpoe import config as choices
from mpoe.config import MPOEConfig
from mpoe.models import upcycle
from mpoe.mpo import MPO, SiteDims, decompose, site_dims, truncation_bound, truncation_error
from mpoe.nn import BiasBalancing, DenseExperts, ExtendedExperts, MoEFeedForward, MPOExperts, TopKRouter
from mpoe.nn.extended import ACTIVATIONS
from tiny import tiny_t5

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PRIMES = (2, 3, 5, 7, 11, 13, 97, 101, 127, 251, 257, 1009, 7919, 104_729, 1_299_709, 15_485_863, 2_147_483_647)
VALID: dict[str, tuple[Any, ...]] = {
    "num_experts": (1, 2, 3, 8), "moe_type": (None, *choices.MOE_TYPES), "top_k": (None, 1, 2, 3),
    "layout": choices.LAYOUTS,
    "mpo_layers": (("mlp",), ["mlp"], (), ("word_embed", "mlp"), ("attention",), choices.COMPONENTS),
    "num_sites": (None, 3, 5, 1, 7, 2, 4), "max_auxiliary_bond": (None, 1, 4, 100),
    "expert_rank": (1, 2, 8), "expert_scale": (1.0, 0.5), "expert_activation": (None, *choices.ACTIVATIONS),
    "frozen_router": (False, True), "balancing": (None, *choices.BALANCING), "balancing_step": (0.01, 1),
    "max_bond_dim": (None, 1, 3, 1000), "word_embed_bond_dim": (None, 2, 50),
    "attention_bond_dim": (None, 2, 50), "gauge": choices.GAUGES, "share_central": (True, False),
    "auxiliary_start": (True, False),
    "matrices": (
        None, {}, {"encoder.block.0.layer.1.DenseReluDense.wi": {"site_dims": [[4, 4, 1], [1, 4, 2]], "bonds": [2, 1]}},
        {"encoder.block.0.layer.1.DenseReluDense.wo": {"site_dims": [[8], [16]], "bonds": []}},
        {"encoder.block.0.layer.1.DenseReluDense.wi": {"site_dims": [[4, 4, 1], [1, 4, 3]], "bonds": [2, 1]}},
        {"nowhere": {"site_dims": [[4, 4, 1], [1, 4, 2]], "bonds": [2, 1]}},
    ),
    "site_dims": (
        None, {}, {"16x8": [[4, 4, 1], [1, 4, 2]]}, {"wi:16x8": [[2, 2, 2, 2, 1], [1, 2, 2, 2, 1]]},
        {"16x8": [[4, 4], [2, 4]]}, {"16x8": [[4, 4, 1], [1, 4, 3]]}, {"8x16": [[2, 4, 1], [1, 4, 4]]},
    ),
    "feed_forward": (
        None, {"path": "block.*.layer.*.DenseReluDense", "up": "wi_1", "down": "wo", "activation": "act"},
        {"path": "block.*.layer.*.DenseReluDense", "up": "wi_1", "down": "wo", "gate": "wi_0", "activation": "act"},
        {"path": "nowhere.*", "up": "wi", "down": "wo", "activation": "act"}, {"path": "*"},
    ),
    "stacks": (None, ("encoder",), ["decoder"], ("encoder", "decoder")), "layers": (None, (0,), [0], (1,), (0, 5)),
    "offset_scale": (0.3, 1, 1e-3), "expert_noise": (0.0, 0.1, 0), "is_scale_prob": (False, True),
    "router_gradient": choices.ROUTER_GRADIENTS, "expert_bias": choices.BIASES, "expert_dropout": (None, 0, 0.1, 1),
    "routing": choices.ROUTING, "capacity_factor": (None, 1.0, 0.1), "eval_capacity_factor": (None, 2.0),
    "second_policy_train": choices.SECOND_POLICIES, "second_policy_eval": choices.SECOND_POLICIES,
    "second_threshold": (0.2, 1.0), "router_jitter": (0.0, 0.1), "router_input_norm": (True, False),
    "load_balancing_coef": (None, 0.0, 0.01), "router_z_loss_coef": (0.0, 1e-3), "tied_head": (None, True, False),
    "compute": choices.COMPUTE, "matrix_cache_gib": (2.0, 0), "matrix_save_gib": (0.0, 0.1), "seed": (0, 1, 2**31),
}  # fmt: skip


def _size(case: Case) -> int:
    draw = case.random
    return draw.choice((
        draw.randint(1, 12), draw.randint(1, 5000), draw.choice(PRIMES), 2 ** draw.randint(0, 40),
        draw.randint(1, 10**6), draw.choice(PRIMES) * draw.choice(PRIMES), draw.randint(1, 10 ** draw.randint(1, 13)),
    ))  # fmt: skip


def _site_dims(folder: Path) -> Any:
    def attempt(case: Case) -> None:
        draw = case.random
        sizes = _size(case), _size(case)
        rest = {
            "num_sites": draw.choice((None, 1, 2, 3, 5, 7, 9, 21, 0, -1)),
            "max_auxiliary_bond": draw.choice((None, None, 1, 2, 7, 64, 10**6, 0)),
        }
        case.tried = f"site_dims{sizes} with {rest}"
        found: list[SiteDims] = []
        fields = ("_features", "num_sites", "max_auxiliary_bond")
        if refusal_of(lambda: found.append(site_dims(*sizes, **rest)), *fields):
            return
        (dims,) = found
        assert (dims.out_features, dims.in_features) == sizes
        for size, of_sites in zip(sizes, (dims.out_dims, dims.in_dims), strict=True):
            assert size <= math.prod(of_sites) <= size + max(1, size // 16), dims
        assert dims.num_sites in range(1, (rest["num_sites"] or 5) + 1, 2), dims
        bonds = dims.bond_dims()
        cap = rest["max_auxiliary_bond"]
        assert cap is None or max(bonds[dims.central], bonds[dims.central + 1]) <= cap, (bonds, cap)
        assert len(bonds) == dims.num_sites + 1
        assert bonds[0] == bonds[-1] == 1
        assert (dims.padded_out, dims.padded_in) == sizes or "padded" in dims.note

    return attempt


def _dims(case: Case, limit: int = 24) -> SiteDims:
    draw = case.random
    if draw.random() < 0.3:  # of a user
        m = draw.choice((1, 3, 5))
        pair = [[draw.choice((1, 1, 2, 3)) for _ in range(m)] for _ in range(2)]
        return SiteDims.of(pair, *(math.prod(side) for side in pair))
    sites, bond = draw.choice((1, 3, 5, 7)), draw.choice((None, None, 1, 2, 5))
    return site_dims(draw.randint(1, limit), draw.randint(1, limit), sites, bond)


def _decompose(folder: Path) -> Any:
    def attempt(case: Case) -> None:
        draw = case.random
        generator = torch.Generator().manual_seed(draw.getrandbits(40))
        dims, gauge, dtype = _dims(case), draw.choice(choices.GAUGES), draw.choice(DTYPES)
        bond = draw.choice((None, None, 1, 2, 3, 7, 1000))
        kind = draw.choice(("normal", "normal", "zero", "rank 1", "large", "small", "one element"))
        case.tried = f"{dims.out_dims}, {dims.in_dims}, {dims.out_features} × {dims.in_features}, "
        case.tried += f"bond {bond}, gauge {gauge}, {dtype}, {kind}"
        matrix = torch.randn(dims.out_features, dims.in_features, generator=generator, dtype=torch.float64)
        scale = 1.0 if dtype == torch.float16 else {"large": 1e12, "small": 1e-12}.get(kind, 1.0)
        if kind == "rank 1":
            matrix = matrix[:, :1] @ matrix[:1]
        elif kind == "one element":
            matrix = torch.zeros_like(matrix).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(1.0).double())
        matrix = (matrix * (0 if kind == "zero" else scale)).to(dtype)
        operator = decompose(matrix, dims, bond, gauge)
        assert operator.bond_dims == dims.bond_dims(bond)
        assert all(site.dtype == dtype for site in operator.sites)
        back, norm = operator.to_matrix(), matrix.double().norm().item()
        eps = torch.finfo(dtype).eps * (50 if gauge == "sqrt" else 30) * math.sqrt(dims.num_sites)
        assert torch.isfinite(back).all()
        if bond is None or dims.bond_dims() == dims.bond_dims(bond):
            error = (back.double() - matrix.double()).norm().item()
            assert error <= eps * norm, f"{error / max(norm, 1e-300):.3g} of the norm, allowed are {eps:.3g}"
            # an arm that is larger than the rest of the chain is cut, by an eigendecomposition
            is_itself = operator.central.numel() == dims.padded_out * dims.padded_in
            assert gauge != "identity" or not is_itself or torch.equal(back, matrix)
        elif draw.random() < 0.2:
            bound = truncation_bound(matrix, dims, bond)
            assert truncation_error(operator, matrix) <= bound * (1 + 1e-3) + eps, bound
        x = torch.randn(draw.randint(0, 4), dims.in_features, generator=generator, dtype=torch.float64).to(dtype)
        wide = MPO(tuple(site.double() for site in operator.sites), dims)  # apart from rounding, which is the dtype's
        expected = x.double() @ wide.to_matrix().T
        error = (wide.apply(x.double()) - expected).norm()
        assert error <= 1e-9 * (1e3 if gauge == "sqrt" else 1) * (1 + norm) * (1 + x.double().norm()), error
        assert operator.apply(x).shape == (len(x), dims.out_features)

    return attempt


def _configs(folder: Path) -> Any:
    base = tiny_t5(d_model=8, d_ff=16, d_kv=2, num_layers=1, num_heads=2, vocab_size=12)

    def attempt(case: Case) -> None:
        draw = case.random
        values: dict[str, Any] = {}
        for name in draw.sample(sorted(VALID), draw.choice((1, 2, 3, 8, len(VALID)))):
            wrong = draw.random() < (0.5 if len(values) < 3 else 0.02)
            values[name] = copy.deepcopy(draw.choice(JUNK if wrong else VALID[name]))
        case.tried = f"{values!r}"
        found: list[MPOEConfig] = []
        if refusal_of(lambda: found.append(MPOEConfig(**values)), *values):
            return
        (config,) = found
        text = json.dumps(config.to_dict(), allow_nan=False)
        assert MPOEConfig.from_dict(json.loads(text)) == config, "it does not come back from JSON"
        assert json.loads(json.dumps(config.to_diff_dict())).items() <= json.loads(text).items()
        if draw.random() < 0.3 and config.num_experts < 100:  # what memory holds is not what is asked here
            model = copy.deepcopy(base)
            names = (*values, *choices.COMPONENTS, "stack", "site", "block", "feed-forward", "bias")
            if not refusal_of(lambda: upcycle(model, config), *names):
                _compare_with_dense(model, base, config)

    return attempt


def _compare_with_dense(model: Any, base: Any, config: MPOEConfig) -> None:
    ids = torch.tensor([[3, 4, 5, 6, 1], [7, 8, 1, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), "decoder_input_ids": torch.tensor([[0, 3], [0, 4]])}
    with torch.no_grad():
        logits, dense = model(**inputs).logits, base(**inputs).logits
    assert torch.isfinite(logits).all()
    caps = (config.max_bond_dim, config.word_embed_bond_dim, config.attention_bond_dim)
    keeps = (
        not config.is_scale_prob
        and not config.matrices
        and config.second_policy_eval == "all"
        and config.eval_capacity_factor is None
    )
    if keeps and caps == (None, None, None) and config.expert_noise == 0:
        torch.testing.assert_close(logits, dense, rtol=1e-3, atol=1e-3)


def _layer(case: Case, out: int, into: int, experts: int, bias: str, generator: torch.Generator) -> Any:
    draw = case.random
    if draw.random() < 0.15:
        layer: Any = DenseExperts(out, into, experts, bias)
    else:
        bond, gauge = draw.choice((None, None, 1, 2, 6)), draw.choice(choices.GAUGES)
        case.tried += f" {out}×{into} {gauge} bond {bond},"
        layer = MPOExperts(site_dims(out, into), experts, bond, gauge, bias=bias)
        layer.way = draw.choice((None, "apply", "rebuild", "cached"))
        case.tried += f" way {layer.way},"
    layer.double().load_matrix(torch.randn(out, into, generator=generator, dtype=torch.float64))
    layer.add_noise(0.3, generator)
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias, generator=generator)
    return layer


def _one(layer: Any, row: Tensor, expert: int) -> Tensor:
    y = layer.expert_matrix(expert) @ row
    return y if layer.bias is None else y + layer.bias[expert if len(layer.bias) > 1 else 0]


def _mixtures(folder: Path) -> Any:
    def attempt(case: Case) -> None:
        draw = case.random
        generator = torch.Generator().manual_seed(draw.getrandbits(40))
        width, inner, experts = draw.randint(1, 12), draw.randint(1, 16), draw.randint(1, 5)
        bias, tokens, top_k = draw.choice(("none", "shared", "expert")), draw.choice((0, 1, 3, 9)), 1
        if experts > 1 and draw.random() < 0.5:
            top_k = draw.randint(2, experts)
        options: dict[str, Any] = {
            "top_k": top_k, "is_scale_prob": draw.random() < 0.5, "input_norm": draw.random() < 0.5,
            "capacity_factor": draw.choice((None, 0.01, 1.0)), "eval_capacity_factor": draw.choice((None, 0.01, 1.0)),
            "jitter": draw.choice((0.0, 0.2)), "second_policy_train": draw.choice(choices.SECOND_POLICIES),
            "second_policy_eval": draw.choice(choices.SECOND_POLICIES),
            "gradient": draw.choice(choices.ROUTER_GRADIENTS),
        }  # fmt: skip
        case.tried = f"{tokens} tokens of {width}, {experts} experts, bias {bias}, {options},"
        router = TopKRouter(width, experts, **options)
        router.initialize(generator)
        is_gated, is_training = draw.random() < 0.3, draw.random() < 0.5
        up, down, *gate = (
            _layer(case, out, into, experts, bias, generator)
            for out, into in ((inner, width), (width, inner), *([(inner, width)] if is_gated else []))
        )
        layer = MoEFeedForward(router, up, down, torch.relu, *gate).train(is_training)
        x = torch.randn(1, tokens, width, generator=generator, dtype=torch.float64) * draw.choice((1.0, 1.0, 0.0, 1e3))
        if draw.random() < 0.4 and tokens:
            layer.token_mask = torch.rand(1, tokens, generator=generator) < 0.7
        routes = []
        handle = router.register_forward_hook(lambda _, __, route: routes.append(route))
        with torch.set_grad_enabled(is_training):
            y = layer(x)
        handle.remove()
        (route,) = routes
        assert y.shape == x.shape
        assert torch.isfinite(y).all()
        assert torch.isfinite(route.load_balancing_loss + route.z_loss)
        kept = torch.ones_like(route.weight, dtype=torch.bool) if route.kept is None else route.kept
        assert route.tokens_per_expert.sum() == kept.sum()
        expected = torch.zeros(tokens, width, dtype=torch.float64)
        with torch.no_grad():
            for t, k in kept.nonzero().tolist():
                e, row = int(route.expert_index[t, k]), x[0, t]
                h = _one(up, row, e)
                h = torch.relu(_one(gate[0], row, e)) * h if gate else torch.relu(h)
                expected[t] += route.weight[t, k].double() * _one(down, h, e)
        atol = 1e-8 * max(1.0, float(x.abs().amax()) if tokens else 0.0)
        torch.testing.assert_close(y[0].detach(), expected, rtol=1e-6, atol=atol)
        if is_training and tokens:
            (y.sum() + route.load_balancing_loss).backward()
            assert all(p.grad is None or torch.isfinite(p.grad).all() for p in layer.parameters())

    return attempt


def _extended_layer(case: Case, out: int, into: int, experts: int, generator: torch.Generator) -> ExtendedExperts:
    draw = case.random
    rank, activation = draw.randint(1, 4), draw.choice((None, None, *choices.ACTIVATIONS))
    case.tried += f" {out}×{into} rank {rank} {activation},"
    base = torch.nn.Linear(into, out, bias=draw.random() < 0.5).double()
    torch.nn.init.normal_(base.weight, generator=generator)
    layer = ExtendedExperts(base, out, into, experts, rank, draw.choice((1.0, 0.3)), activation)
    layer.initialize(generator)
    torch.nn.init.normal_(layer.offsets_V, generator=generator)
    return layer


def _extended_row(layer: ExtendedExperts, row: Tensor, gates: dict[int, Tensor]) -> Tensor:
    """W x + b + Σ s g V_e act(U_e x), for one token; s g is rounded as g is, to float32 if a router gives it."""
    y, rank = layer.base(row), layer.rank
    act = ACTIVATIONS[layer.activation] if layer.activation else lambda u: u
    for e, gate in gates.items():
        own = slice(e * rank, (e + 1) * rank)
        y = y + (layer.scale * gate).double() * (layer.offsets_V[:, own] @ act(layer.offsets_U[own] @ row))
    return y


def _extended(folder: Path) -> Any:
    def attempt(case: Case) -> None:
        draw = case.random
        generator = torch.Generator().manual_seed(draw.getrandbits(40))
        width, inner, experts = draw.randint(1, 12), draw.randint(1, 16), draw.randint(1, 5)
        tokens, top_k = draw.choice((0, 1, 3, 9)), draw.randint(1, experts)
        balancing = BiasBalancing(experts, width, draw.choice((0.01, 5.0))) if draw.random() < 0.6 else None
        router = TopKRouter(width, experts, top_k, is_scale_prob=True, has_bias=False, balancing=balancing)
        router.initialize(generator)
        if balancing is not None:
            balancing.steps.copy_(torch.randint(-20, 20, (experts,), generator=generator))
        is_gated, is_training, has_router = draw.random() < 0.3, draw.random() < 0.5, draw.random() < 0.8
        case.tried = f"{tokens} tokens of {width}, {experts} experts, top {top_k}, {balancing}, router {has_router},"
        up, down, *gate = (
            _extended_layer(case, out, into, experts, generator)
            for out, into in ((inner, width), (width, inner), *([(inner, width)] if is_gated else []))
        )
        layer = MoEFeedForward(router if has_router else None, up, down, torch.relu, *gate).train(is_training)
        x = torch.randn(1, tokens, width, generator=generator, dtype=torch.float64) * draw.choice((1.0, 1.0, 0.0, 1e3))
        routes = []
        router.register_forward_hook(lambda _, __, route: routes.append(route))
        with torch.set_grad_enabled(is_training):
            y = layer(x)
        assert y.shape == x.shape
        expected = torch.zeros(tokens, width, dtype=torch.float64)
        with torch.no_grad():
            for t in range(tokens):
                gates = dict.fromkeys(range(experts), torch.ones(1).double())
                if has_router:
                    chosen = routes[0].expert_index[t].tolist()
                    assert len(set(chosen)) == top_k
                    gates = {e: routes[0].probabilities[t, e].view(1) for e in chosen}
                h = _extended_row(up, x[0, t], gates)
                h = torch.relu(_extended_row(gate[0], x[0, t], gates)) * h if gate else torch.relu(h)
                expected[t] = _extended_row(down, h, gates)
        atol = 1e-8 * max(1.0, float(x.abs().amax()) ** 2 if tokens else 0.0)
        torch.testing.assert_close(y[0].detach(), expected, rtol=1e-6, atol=atol)
        if balancing is not None and is_training and has_router:
            assert balancing.pending.sum() == tokens * top_k
        if is_training and tokens:
            y.sum().backward()
            assert all(p.grad is None or torch.isfinite(p.grad).all() for p in layer.parameters())

    return attempt


PROPERTIES = (
    Property("site dimensions", _site_dims, 0.3),
    Property("decomposition", _decompose, 0.8),
    Property("MPOEConfig", _configs, 1.2),
    Property("experts and routers", _mixtures, 1.4),
    Property("extended experts", _extended, 1.0),
)
assert VALID.keys() == {field.name for field in dataclasses.fields(MPOEConfig)}
