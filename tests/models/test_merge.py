"""What `merge` makes of extended experts; `test_families` has the other layouts."""

import copy

import pytest
import torch
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import mpoe
from mpoe.models import mixtures, reset_usage, router_statistics
from mpoe.models.difference import logit_difference
from tiny import logits_of, moved
from tiny_families import family_batch, tiny_model


def mixture_of(name, **options):
    return moved(mpoe.upcycle(tiny_model(name), mpoe.MPOEConfig(**{"num_experts": 4, **options})))


def by_hand(experts, gates):
    """W + s · Σ_e g_e V_e U_e, outputs first."""
    weight = experts.base.weight.T if isinstance(experts.base, Conv1D) else experts.base.weight
    matrix = weight.detach().clone()
    for e, gate in enumerate(gates):
        own = slice(e * experts.rank, (e + 1) * experts.rank)
        matrix += experts.scale * gate * experts.offsets_V.detach()[:, own] @ experts.offsets_U.detach()[own]
    return matrix


def seen_gates(model, batches):
    """The mean gate of every expert over the tokens that are no padding, by layer."""
    sums = {name: torch.zeros(4) for name in mixtures(model)}
    tokens = dict.fromkeys(sums, 0)

    def add(name, route):
        gates = route.gates if route.mask is None else route.gates[route.mask]
        sums[name] += gates.sum(dim=0)
        tokens[name] += len(gates)

    hooks = [
        layer.router.register_forward_hook(lambda router, args, route, name=name: add(name, route))
        for name, layer in mixtures(model).items()
    ]
    for batch in batches:
        logits_of(model, batch)
    for hook in hooks:
        hook.remove()
    return {name: sums[name] / tokens[name] for name in sums}


@pytest.mark.parametrize("is_measured", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5-v1.0", "bert"])
def test_the_gates_are_their_mean_over_the_data_or_uniform(name, is_measured):
    """Conv1D, gated, biased and split feed-forward networks."""
    model = mixture_of(name)
    batches = [family_batch(name), family_batch(name, rows=2, length=7)]
    merged = mpoe.merge(model, batches=batches if is_measured else None)
    gates = seen_gates(model, batches)
    places = {"gpt2": "c_proj", "llama": "down_proj", "t5-v1.0": "wo"}
    for layer_name, layer in mixtures(model).items():
        if name == "bert":
            owner = layer_name.partition(".intermediate")[0]
            dense = merged.get_submodule(f"{owner}.output.dense")
        else:
            dense = merged.get_submodule(f"{layer_name}.{places[name]}")
        of_layer = gates[layer_name].tolist() if is_measured else [0.25] * 4
        matrix = dense.weight.T if isinstance(dense, Conv1D) else dense.weight
        torch.testing.assert_close(matrix, by_hand(layer.down, of_layer), rtol=1e-4, atol=1e-5)
        if layer.down.base.bias is not None:
            assert torch.equal(dense.bias, layer.down.base.bias)


def test_measuring_leaves_no_trace():
    model = mixture_of("llama").train()
    reset_usage(model)
    model(**family_batch("llama"))
    before = {name: statistics.share for name, statistics in router_statistics(model).items()}
    state = copy.deepcopy(model.state_dict())
    merged = mpoe.merge(model, batches=[family_batch("llama")])
    assert model.training
    assert merged.training
    assert {name: statistics.share for name, statistics in router_statistics(model).items()} == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_without_a_router_it_is_exact_and_loads_without_mpoe(tmp_path):
    model, batch = mixture_of("gpt2", moe_type="none"), family_batch("gpt2")
    merged = mpoe.merge(model)
    torch.testing.assert_close(logits_of(merged, batch), logits_of(model, batch), rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits_of(GPT2LMHeadModel.from_pretrained(tmp_path), batch), logits_of(merged, batch))


def test_measured_gates_are_nearer_than_uniform_ones():
    """Where the router has a favourite."""
    model, batches = mixture_of("llama", top_k=1), [family_batch("llama", rows=8)]
    for layer in mixtures(model).values():
        layer.router.balancing.steps.copy_(torch.tensor([10**6, 0, 0, 0]))
    uniform, measured = (
        logit_difference(model, mpoe.merge(model, batches=data).eval(), batches) for data in (None, batches)
    )
    assert measured.kl < uniform.kl
    own, merged = measured.losses
    assert own == pytest.approx(uniform.losses[0])
    assert merged != pytest.approx(own)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"expert": 0}, "expert must be None with layout 'extended'"),
        ({"expert_activation": "gelu"}, {}, "expert_activation is 'gelu'"),
        ({"layout": "balanced"}, {"batches": []}, "batches is for layout 'extended'"),
        ({}, {"batches": []}, "has seen no token"),
    ],
)
def test_what_cannot_be_merged_is_refused(options, arguments, message):
    model = mixture_of("llama", **options)
    with pytest.raises(ValueError, match=message):
        mpoe.merge(model, **arguments)
    with pytest.raises(ValueError, match="only a mixture can be merged"):
        mpoe.merge(tiny_model("llama"))
