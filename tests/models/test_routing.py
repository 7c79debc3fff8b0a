"""What is routed as one, and what is left of a mixture when its routing is shuffled."""

import copy

import pytest
import torch
from transformers import BertConfig, BertModel

import mpoe
from mpoe.models import count_parameters, is_upcycled, mixtures, reset_usage, router_statistics, shuffled_routing
from tiny import logits_of, moved, tiny_batch, tiny_t5


def make_model(differ=True, **options):
    model = mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(**{"num_experts": 4, "stacks": ("encoder",), **options}))
    return (moved(model) if differ else model).eval()


def routes(model, batch):
    """What every layer's router has decided: (B, S, K) of expert indices."""
    found = []
    layers = mixtures(model).values()
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, args: found.append(
                layer._route(layer.router, args[0]).expert_index.view(*args[0].shape[:2], -1)
            )
        )
        for layer in layers
    ]
    logits_of(model, batch)
    for hook in hooks:
        hook.remove()
    assert len(found) == len(layers)
    return found


@pytest.mark.parametrize("routing", ["sequence", "prefix"])
def test_all_tokens_of_an_input_go_to_one_expert_and_padding_says_nothing(routing):
    model, batch = make_model(routing=routing), tiny_batch(rows=16)
    batch["attention_mask"][:, -3:] = 0
    found = routes(model, batch)
    assert all((index == index[:, :1]).all() for index in found)
    assert any(len(index.unique()) > 1 for index in found)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, -3:] = 5
    assert all(torch.equal(*pair) for pair in zip(found, routes(model, other), strict=True))
    assert torch.equal(logits_of(model, batch), logits_of(model, other))


def test_a_prefix_is_the_first_four_tokens_in_their_order():
    model, batch = make_model(routing="prefix", num_experts=8), tiny_batch(rows=24, length=12)
    first = routes(model, batch)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 4:] = torch.randint(2, 64, (24, 8))
    assert all(torch.equal(*pair) for pair in zip(first, routes(model, changed), strict=True))
    changed["input_ids"][:, :4] = batch["input_ids"][:, :4].flip(1)
    assert not all(torch.equal(*pair) for pair in zip(first, routes(model, changed), strict=True))


def test_a_prefix_needs_token_ids():
    model, batch = make_model(routing="prefix"), tiny_batch()
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    with pytest.raises(ValueError, match="must be called with input_ids"):
        logits_of(model, {**batch, "inputs_embeds": embeds})


@pytest.mark.parametrize("routing", ["sequence", "prefix"])
@pytest.mark.parametrize("moe_type", ["switch", "moe"])
def test_the_function_is_preserved_and_every_parameter_learns(routing, moe_type):
    dense, batch = tiny_t5(), tiny_batch(rows=16)
    config = mpoe.MPOEConfig(num_experts=3, stacks=("encoder",), routing=routing, moe_type=moe_type)
    model = mpoe.upcycle(copy.deepcopy(dense), config)
    torch.testing.assert_close(logits_of(model, batch), logits_of(dense, batch), rtol=1e-4, atol=1e-4)
    model.train()(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    for layer in mixtures(moved(model).train()).values():
        layer.zero_grad()
        model(**batch).loss.backward()
        assert layer.router.weight.grad.any()


@pytest.mark.parametrize("routing", ["sequence", "prefix"])
def test_generation_routes_as_the_forward_does(routing):
    model, batch = make_model(routing=routing), tiny_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(logits_of(model, {**inputs, "decoder_input_ids": tokens[:, :1]})[:, 0].argmax(-1), tokens[:, 1])


def test_saved_and_loaded_it_routes_the_same(tmp_path):
    model, batch = make_model(routing="sequence"), tiny_batch()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(mpoe.from_pretrained(tmp_path), batch), logits_of(model, batch))


def test_an_encoder_without_a_decoder():
    bert = BertModel(
        BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    )
    bert.eval()
    batch = {name: tensor for name, tensor in tiny_batch(rows=8).items() if name != "labels"}
    before = bert(**batch).last_hidden_state
    model = mpoe.upcycle(bert, mpoe.MPOEConfig(num_experts=3, routing="sequence"))
    torch.testing.assert_close(model(**batch).last_hidden_state, before, rtol=1e-4, atol=1e-4)


def test_what_makes_no_sense_is_said():
    model = tiny_t5()
    with pytest.raises(ValueError, match="a decoder's tokens must not see"):
        mpoe.upcycle(model, mpoe.MPOEConfig(routing="sequence"))
    assert not is_upcycled(model), "what is wrong is found before anything is changed"
    with pytest.raises(ValueError, match="capacity_factor must be None with a routing of whole inputs"):
        mpoe.MPOEConfig(layout="balanced", routing="prefix", capacity_factor=1.0)
    with pytest.raises(ValueError, match="routing must be 'token' where nothing is routed"):
        mpoe.MPOEConfig(routing="prefix", num_experts=1)
    with pytest.raises(ValueError, match="share_central must be True, or False for a mixture of MPOs"):
        mpoe.MPOEConfig(layout="balanced", share_central=False, mpo_layers=())
    with pytest.raises(ValueError, match="this model has no routers"), shuffled_routing(tiny_t5()):
        pass


@pytest.mark.parametrize(
    "options",
    [{}, {"moe_type": "switch"}, {"layout": "balanced", "expert_noise": 0.5}, {"routing": "sequence"}],
    ids=str,
)
def test_shuffling_changes_who_gets_what_and_not_how_much(options):
    model, batch = make_model(**options), tiny_batch(rows=16)
    reset_usage(model)
    plain = logits_of(model, batch)
    shares = {name: statistics.share for name, statistics in router_statistics(model).items()}
    masses = {name: statistics.gate_mass for name, statistics in router_statistics(model).items()}
    reset_usage(model)
    with shuffled_routing(model):
        shuffled = logits_of(model, batch)
    first = next(iter(mixtures(model)))
    if "routing" not in options:  # inputs have other lengths, so shares of tokens move with them
        assert router_statistics(model)[first].share == pytest.approx(shares[first])
        assert router_statistics(model)[first].gate_mass == pytest.approx(masses[first], rel=1e-4)
    assert not torch.allclose(shuffled, plain, atol=1e-3)
    with shuffled_routing(model):
        assert torch.equal(logits_of(model, batch), shuffled), "the seed repeats it"
    assert torch.equal(logits_of(model, batch), plain), "the hooks are gone"


def test_shuffling_costs_nothing_where_experts_are_alike():
    model, batch = make_model(differ=False), tiny_batch(rows=16)
    plain = logits_of(model, batch)
    with shuffled_routing(model):
        torch.testing.assert_close(logits_of(model, batch), plain, rtol=1e-4, atol=1e-4)


def test_experts_that_share_nothing():
    dense, batch = tiny_t5(), tiny_batch()
    config = {"num_experts": 4, "layout": "balanced"}
    model = mpoe.upcycle(copy.deepcopy(dense), mpoe.MPOEConfig(**config, share_central=False))
    torch.testing.assert_close(logits_of(model, batch), logits_of(dense, batch), rtol=1e-4, atol=1e-4)
    count, shared = (
        count_parameters(model),
        count_parameters(mpoe.upcycle(copy.deepcopy(dense), mpoe.MPOEConfig(**config))),
    )
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.central == 4 * shared.central
    for name in ("auxiliary", "router", "dense", "whole_experts", "active", "other"):
        assert getattr(count, name) == getattr(shared, name), name
    merged = mpoe.merge(model, expert=1)
    torch.testing.assert_close(logits_of(merged, batch), logits_of(dense, batch), rtol=1e-4, atol=1e-4)
