"""A small mixture with random experts, and what it means: a loop over tokens and experts."""

import torch

from mpoe.mpo import site_dims
from mpoe.nn import DenseExperts, ExtendedExperts, MoEFeedForward, MPOExperts, TopKRouter
from mpoe.nn.extended import ACTIVATIONS

EXPERTS = 3
RANK = 2


def make_layer(
    experts="extended", gated=True, dropout=0.0, noise=0.2, bias="none", activation=None, has_loss=False, **routing
):
    def matrix(out_features, in_features):
        generator = torch.Generator().manual_seed(1)
        if experts == "extended":
            base = torch.nn.Linear(in_features, out_features, bias != "none")
            made = ExtendedExperts(base, out_features, in_features, EXPERTS, RANK, activation=activation)
            made.initialize(generator)
            torch.nn.init.normal_(made.offsets_V, std=5 * noise)
            return made
        if experts == "dense":
            made = DenseExperts(out_features, in_features, EXPERTS, bias)
        else:
            made = MPOExperts(site_dims(out_features, in_features), EXPERTS, bias=bias)
        made.load_matrix(torch.randn(out_features, in_features) * in_features**-0.5, torch.randn(out_features))
        made.add_noise(noise, generator)
        return made

    routing = {"is_scale_prob": experts == "extended", **routing}
    router = TopKRouter(24, EXPERTS, **{"is_scale_prob": experts == "extended", **routing})
    router.initialize(torch.Generator().manual_seed(2))
    gate = matrix(40, 24) if gated else None
    layer = MoEFeedForward(
        router, matrix(40, 24), matrix(24, 40), torch.nn.functional.silu, gate, dropout, has_loss=has_loss
    )
    return layer.double()


def by_hand(layer, x):
    """Token by token and expert by expert, with every matrix materialized."""
    rows = []
    x_TD = x.reshape(-1, x.shape[-1])
    route = layer.router(x_TD)
    of_token = _extended_token if isinstance(layer.up, ExtendedExperts) else _mixed_token
    for t, token in enumerate(x_TD):
        kept = [True] * route.expert_index.shape[1] if route.kept is None else route.kept[t].tolist()
        choices = zip(route.expert_index[t].tolist(), route.weight[t], kept, strict=True)
        rows.append(of_token(layer, token, [(e, weight) for e, weight, is_kept in choices if is_kept]))
    return torch.stack(rows).reshape(x.shape)


def plain_extended(experts, token, gates, base=None):
    """W x + b + s · Σ_e g_e V_e act(U_e x) for one token.

    Args:
        experts: ExtendedExperts.
        token: x, (D,).
        gates: Pairs of expert and gate.
        base: The base's layer as a function; None is its weight and bias.
    """
    y = base(token) if base else experts.base.weight @ token + (0 if experts.base.bias is None else experts.base.bias)
    for e, gate in gates:
        own = slice(e * experts.rank, (e + 1) * experts.rank)
        u = experts.offsets_U[own] @ token
        if experts.activation:
            u = ACTIVATIONS[experts.activation](u)
        y = y + experts.scale * gate * (experts.offsets_V[:, own] @ u)
    return y


def _extended_token(layer, token, gates):
    hidden = plain_extended(layer.up, token, gates)
    if layer.gate is None:
        hidden = layer.activation(hidden)
    else:
        hidden = layer.activation(plain_extended(layer.gate, token, gates)) * hidden
    return plain_extended(layer.down, hidden, gates)


def _mixed_token(layer, token, gates):
    def linear(experts, e, token):
        bias = 0 if experts.bias is None else experts.bias[e if len(experts.bias) > 1 else 0]
        return experts.expert_matrix(e) @ token + bias

    row = torch.zeros_like(token)
    for e, weight in gates:
        hidden = linear(layer.up, e, token)
        if layer.gate is None:
            hidden = layer.activation(hidden)
        else:
            hidden = layer.activation(linear(layer.gate, e, token)) * hidden
        row = row + weight * linear(layer.down, e, hidden)
    return row
