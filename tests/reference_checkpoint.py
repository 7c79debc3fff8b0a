"""Checkpoints in the layout of the method's reference implementation, written from tiny dense models."""

import re

import torch

from mpoe.mpo import decompose
from tiny import V1_0, tiny_t5

# Site dimensions by size; 62 words are padded to 64.
SITES = {
    5: {64: (2, 2, 4, 2, 2), 32: (2, 2, 2, 2, 2), 24: (1, 3, 2, 2, 2), 62: (2, 2, 2, 4, 2)},
    3: {64: (4, 4, 4), 32: (2, 4, 4)},
}


def base(**options):
    """A dense T5 v1.0 whose layer norms are not 1, so that routers see inputs of another scale than 1."""
    model = tiny_t5(V1_0, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("layer_norm.weight"):
                p.uniform_(0.2, 0.8)
    return model


def cores_of(matrix, sites=5, cap=None, transposed=False):
    """Cores [r, I, J, r'] of a matrix; I = out and J = in, or the other way round."""
    pair = [SITES[sites][size] for size in matrix.shape]
    cores = decompose(matrix.detach(), pair, cap, gauge="sqrt").sites
    return [(core.transpose(1, 2) if transposed else core).contiguous() for core in cores]


def perturbed(core):
    return core + 0.3 * core.square().mean().sqrt() * torch.randn_like(core)


def write(dense, kind="switch", experts=3, sites=5, cap=None, transposed=False, parts=()):
    """The state_dict of a dense model turned into a reference mixture whose experts differ."""
    tensors = {name: p.detach().clone() for name, p in dense.named_parameters() if ".DenseReluDense." not in name}
    width, centre = dense.config.d_model, sites // 2
    for name, module in dense.named_modules():
        if name.endswith(".DenseReluDense"):
            layer = name.removesuffix(".DenseReluDense")
            if kind == "switch":
                tensors[f"{layer}.sffn.switch.weight"] = torch.randn(experts, width)
                tensors[f"{layer}.sffn.switch.bias"] = 0.3 * torch.randn(experts)
            else:
                tensors[f"{layer}.moe_layer.gate.w_gating"] = torch.randn(width, experts)
            for n, (dense_name, linear) in enumerate((("wi", module.wi), ("wo", module.wo)), start=1):
                cores = cores_of(linear.weight, sites, cap, transposed)
                for k, core in enumerate(cores):
                    own = [core.clone() if k == centre else perturbed(core) for _ in range(experts)]
                    if kind == "switch":
                        for e in range(experts):
                            tensors[f"{layer}.sffn.experts.{e}.{dense_name}_mpo.tensor_set.{k}"] = own[e]
                    else:
                        key = f"{layer}.moe_layer.experts.w{n}_mpo.{k}"
                        tensors[key] = own[0] if k == centre else torch.stack(own)
                if kind == "moe":
                    tensors[f"{layer}.moe_layer.experts.b{n}"] = torch.randn(linear.out_features)
        elif "attention" in parts and re.search(r"Attention\.[qkvo]$", name):
            del tensors[f"{name}.weight"]
            for k, core in enumerate(cores_of(module.weight, transposed=transposed)):
                tensors[f"{name}_mpo.tensor_set.{k}"] = perturbed(core)
    if "word_embed" in parts:
        del tensors["shared.weight"]
        for k, core in enumerate(cores_of(dense.shared.weight, transposed=transposed)):
            tensors[f"shared_mpo.tensor_set.{k}"] = perturbed(core)
            if "own_head" in parts:
                tensors[f"lm_head_mpo.tensor_set.{k}"] = perturbed(core)
    return tensors
