"""A small mixture with random experts, and what it means: a loop over tokens and experts."""

import torch

from mpoe.mpo import site_dims
from mpoe.nn import DenseExperts, MoEFeedForward, MPOExperts, TopKRouter


def make_layer(experts="separable", gated=True, dropout=0.0, noise=0.2, bias="none", **routing):
    def matrix(out_features, in_features):
        if experts == "dense":
            made = DenseExperts(out_features, in_features, 3, bias)
        else:
            made = MPOExperts(site_dims(out_features, in_features, layout=experts), 3, bias=bias)
        made.load_matrix(torch.randn(out_features, in_features) * in_features**-0.5, torch.randn(out_features))
        made.add_noise(noise, torch.Generator().manual_seed(1))
        return made

    router = TopKRouter(24, 3, **routing)
    router.initialize(torch.Generator().manual_seed(2))
    gate = matrix(40, 24) if gated else None
    return MoEFeedForward(router, matrix(40, 24), matrix(24, 40), torch.nn.functional.silu, gate, dropout).double()


def by_hand(layer, x):
    """Token by token and expert by expert, with every matrix multiplied out."""
    rows = []
    x_TD = x.reshape(-1, x.shape[-1])
    route = layer.router(x_TD)
    networks = [experts for experts in (layer.up, layer.gate, layer.down) if experts is not None]
    matrices = {experts: [experts.expert_matrix(e) for e in range(layer.router.num_experts)] for experts in networks}

    def linear(experts, e, token):
        bias = 0 if experts.bias is None else experts.bias[e if len(experts.bias) > 1 else 0]
        return matrices[experts][e] @ token + bias

    for t, token in enumerate(x_TD):
        row = torch.zeros_like(token)
        for k, e in enumerate(route.expert_index[t].tolist()):
            hidden = linear(layer.up, e, token)
            if layer.gate is None:
                hidden = layer.activation(hidden)
            else:
                hidden = layer.activation(linear(layer.gate, e, token)) * hidden
            if route.kept is None or route.kept[t, k]:
                row = row + route.weight[t, k] * linear(layer.down, e, hidden)
        rows.append(row)
    return torch.stack(rows).reshape(x.shape)
