"""The balance loss reaches the routers the same way in every way to train."""

import copy

import pytest
import torch

import mpoe
from mpoe.models import mixtures, take_router_loss
from tiny import enable_checkpointing, moved, tiny_batch, tiny_t5
from tiny_families import family_batch, tiny_model

COEF = 0.5


def make_model(**options):
    torch.manual_seed(0)
    config = mpoe.MPOEConfig(num_experts=4, balancing="loss", load_balancing_coef=COEF, **options)
    return moved(mpoe.upcycle(tiny_t5(dropout_rate=0.0), config)).train()


def router_gradients(model):
    return torch.cat([layer.router.weight.grad.flatten() for layer in mixtures(model).values()])


def test_it_is_added_in_training_only():
    model, batch = make_model(), tiny_batch()
    trained = model(**batch).loss
    by_layer = [route.load_balancing_loss for route in routes_of(model, batch)]
    clean = model.eval()(**batch).loss
    assert trained.item() == pytest.approx(clean.item() + COEF * torch.stack(by_layer).mean().item(), rel=1e-5)


@pytest.mark.parametrize("moe_type", ["switch", "moe"])
def test_the_z_loss_has_a_weight_of_its_own(moe_type):
    model, batch = make_model(router_z_loss_coef=0.25, moe_type=moe_type), tiny_batch()
    trained = model(**batch).loss
    routes = routes_of(model, batch)
    expected = torch.stack([COEF * r.load_balancing_loss + 0.25 * r.z_loss for r in routes]).mean()
    assert trained.item() == pytest.approx(model.eval()(**batch).loss.item() + expected.item(), rel=1e-5)


def routes_of(model, batch):
    """What the routers say to the encoder's real tokens and to the decoder's, which are not padded here."""
    masks = [batch["attention_mask"].bool().flatten()] * 2 + [None] * 2
    layers = zip(mixtures(model).values(), inputs(model, batch), masks, strict=True)
    return [layer.router(x if mask is None else x[mask]) for layer, x, mask in layers]


def inputs(model, batch):
    """What each mixture of the model sees."""
    seen = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: seen.append(args[0].reshape(-1, args[0].shape[-1])))
        for layer in mixtures(model).values()
    ]
    with torch.no_grad():
        copy.deepcopy(model).eval() and model.eval()(**batch)
    model.train()
    for hook in hooks:
        hook.remove()
    return seen


def test_it_is_taken_once():
    model, batch = make_model(), tiny_batch()
    model(**{k: v for k, v in batch.items() if k != "labels"}, decoder_input_ids=batch["labels"])
    assert take_router_loss(model) is not None
    assert take_router_loss(model) is None
    model(**batch)
    assert take_router_loss(model) is None, "the hook had taken it"


def test_non_reentrant_checkpointing_gives_the_same_gradients():
    plain, batch = make_model(), tiny_batch()
    checkpointed = copy.deepcopy(plain)
    enable_checkpointing(checkpointed, use_reentrant=False)
    for model in (plain, checkpointed):
        model(**batch).loss.backward()
    torch.testing.assert_close(router_gradients(checkpointed), router_gradients(plain))


def test_reentrant_checkpointing_is_refused():
    model = make_model()
    enable_checkpointing(model, use_reentrant=True)
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant"):
        model(**tiny_batch())


def test_a_model_can_be_copied_after_a_step():
    model, batch = make_model(), tiny_batch()
    model(**batch).loss.backward()
    copied = copy.deepcopy(model).eval()
    torch.testing.assert_close(copied(**batch).logits, model.eval()(**batch).logits)


def test_a_tuple_has_it_too():
    model, batch = make_model(), tiny_batch()
    assert model(**batch, return_dict=False)[0].item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    clean = model.eval()(**batch, return_dict=False)[0]
    assert clean.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)


def test_balancing_by_bias_adds_nothing():
    config = mpoe.MPOEConfig(num_experts=4)
    model, batch = moved(mpoe.upcycle(tiny_t5(dropout_rate=0.0), config)).train(), tiny_batch()
    trained = model(**batch).loss
    assert trained.item() == pytest.approx(model.eval()(**batch).loss.item(), rel=1e-6)
    assert take_router_loss(model.train()) is None


def test_the_micro_batches_of_a_step_have_their_shares():
    """Of a loop that passes the targets of the whole step, and divides by nothing."""
    torch.manual_seed(0)
    config = mpoe.MPOEConfig(num_experts=4, balancing="loss", load_balancing_coef=COEF)
    model = moved(mpoe.upcycle(tiny_model("llama"), config)).train()
    batch = family_batch("llama", rows=4)
    targets = (batch["labels"][:, 1:] != -100).sum()
    model(**batch, num_items_in_batch=targets).loss.backward()
    expected = router_gradients(model)
    model.zero_grad()
    for _ in range(4):  # the same batch four times
        model(**batch, num_items_in_batch=4 * targets).loss.backward()
    torch.testing.assert_close(router_gradients(model), expected, rtol=1e-4, atol=1e-7)
