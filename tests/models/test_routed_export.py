"""A mixture in Transformers' own sparse formats computes what it computed."""

import copy
import re

import pytest
import torch
from transformers import AutoConfig

import mpoe
from mpoe.models import mixtures, routers
from mpoe.models.difference import logit_difference
from mpoe.models.routed_export import FORMATS, differences, to_sparse
from mpoe.models.router_inputs import measured_inputs
from tiny import V1_0, logits_of, moved
from tiny_families import family_batch, tiny_model

PLAIN_T5 = [("t5-v1.0", {}), ("mt5", {"feed_forward_proj": "relu"})]
DECODERS = [("llama", {}), ("mistral", {}), ("qwen3", {})]
NOT_SCALED = {"router_input_norm": False}


def mixture(name, options, bias=0.0, **model_options):
    """Experts that differ, in evaluation mode; a bias beyond what an initial router has, or none."""
    model = tiny_model(name, **model_options)
    mpoe.upcycle(model, mpoe.MPOEConfig(**{"num_experts": 4, "layout": "balanced", "expert_noise": 0.3, **options}))
    moved(model)
    with torch.no_grad():
        for router in routers(model).values():
            router.bias.copy_(torch.randn(4) * bias)
    return model


def reloaded(sparse, folder, **options):
    sparse.save_pretrained(folder)
    assert not hasattr(AutoConfig.from_pretrained(folder), "quantization_config")
    return type(sparse).from_pretrained(folder, **options).eval()


def assert_same(model, sparse, name, folder):
    batch = family_batch(name)
    expected = logits_of(model, batch)
    counts = batch.get("attention_mask").bool() if expected.shape[1] == 9 else slice(None)
    torch.testing.assert_close(logits_of(sparse, batch)[counts], expected[counts], atol=2e-5, rtol=1e-5)
    again = reloaded(sparse, folder)
    torch.testing.assert_close(logits_of(again, batch), logits_of(sparse, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mpo_layers": ("mlp", "attention", "word_embed")},
        {"mpo_layers": ()},
        {"share_central": False},
        {"layers": [0]},
        {"layers": [1]},
        NOT_SCALED,
    ],
    ids=str,
)
@pytest.mark.parametrize(("name", "model_options"), PLAIN_T5 + DECODERS)
def test_one_expert_a_token_is_exact(name, model_options, options, tmp_path):
    model = mixture(name, options, **model_options)
    before = copy.deepcopy(model.state_dict())
    assert differences(model) == []
    sparse = to_sparse(model)
    assert type(sparse).__name__ == FORMATS[type(model).__name__]
    assert_same(model, sparse, name, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    experts = {name: router.logits.argmax(-1) for name, router in outputs(model, family_batch(name)).items()}
    assert any(len(choices.unique()) > 1 for choices in experts.values()), "or the routers were not tested"


def outputs(model, batch):
    """What every router decides, by its layer."""
    found, hooks = {}, []
    for name, router in routers(model).items():
        hooks.append(router.register_forward_hook(lambda _, args, out, name=name: found.__setitem__(name, out)))
    logits_of(model, batch)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("stacks", [["encoder"], ["decoder"]])
def test_a_stack_without_experts_stays_dense(stacks, tmp_path):
    model = mixture("t5-v1.0", {"stacks": stacks})
    sparse = to_sparse(model)
    assert_same(model, sparse, "t5-v1.0", tmp_path)
    for stack in ("encoder", "decoder"):
        kinds = {type(block.layer[-1].mlp).__name__ for block in getattr(sparse, stack).block}
        is_sparse = stack in stacks
        assert kinds == {"SwitchTransformersSparseMLP" if is_sparse else "SwitchTransformersDenseActDense"}


def test_layers_that_the_format_cannot_leave_out_have_experts_that_are_alike(tmp_path):
    model = mixture("t5-v1.0", {"layers": [0], "stacks": ["encoder"]}, num_layers=3, num_decoder_layers=2)
    sparse = to_sparse(model)
    assert_same(model, sparse, "t5-v1.0", tmp_path)
    alike = sparse.encoder.block[2].layer[1].mlp
    assert torch.equal(alike.experts["expert_0"].wi.weight, alike.experts["expert_3"].wi.weight)
    assert sparse.config.router_bias
    model = mixture("llama", {"layers": [0], "moe_type": "moe", **NOT_SCALED})
    assert_same(model, to_sparse(model), "llama", tmp_path / "llama")
    model = mixture("qwen3", {"layers": [1]})
    assert to_sparse(model).config.mlp_only_layers == [0]


@pytest.mark.parametrize(("name", "model_options"), DECODERS)
@pytest.mark.parametrize("top_k", [2, 3])
def test_several_experts_a_token_are_exact_without_scaled_inputs(name, model_options, top_k, tmp_path):
    model = mixture(name, {"top_k": top_k, **NOT_SCALED}, **model_options)
    assert_same(model, to_sparse(model), name, tmp_path)


@pytest.mark.parametrize(("name", "model_options", "top_k"), [("t5-v1.0", {}, 1), ("qwen3", {}, 1), ("qwen3", {}, 2)])
def test_weights_of_experts_may_be_probabilities(name, model_options, top_k, tmp_path):
    model = mixture(name, {"is_scale_prob": True, "top_k": top_k, **NOT_SCALED}, **model_options)
    assert_same(model, to_sparse(model), name, tmp_path)


@pytest.mark.parametrize("options", [NOT_SCALED, {**NOT_SCALED, "is_scale_prob": True}], ids=str)
def test_switch_has_a_place_for_a_bias(options, tmp_path):
    model = mixture("t5-v1.0", options, bias=0.5)
    assert differences(model) == []
    assert_same(model, to_sparse(model), "t5-v1.0", tmp_path)


def test_a_bias_that_all_experts_share_says_nothing(tmp_path):
    model = mixture("llama", {})
    with torch.no_grad():
        for router in routers(model).values():
            router.bias.fill_(0.7)
    assert_same(model, to_sparse(model), "llama", tmp_path)


@pytest.mark.parametrize("name", ["t5-v1.0", "llama"])
def test_saturated_probabilities_are_1_and_nothing_is_dropped(name, tmp_path):
    """With all tokens at one expert, more of them than a Switch's usual capacity."""
    model = mixture(name, {}, **({} if name == "llama" else V1_0))
    with torch.no_grad():
        for router in routers(model).values():
            # logits near each other, whose probabilities are near 1 / 4
            router.weight.copy_(router.weight[0] * torch.tensor([1, 0.9, 0.8, 0.7])[:, None])
    batch = family_batch(name, rows=2, length=63)
    torch.testing.assert_close(logits_of(to_sparse(model), batch), logits_of(model, batch), atol=2e-5, rtol=1e-5)


def test_half_precision_and_tied_heads(tmp_path):
    model = mixture("t5-v1.0", {}).to(torch.bfloat16)
    for router in routers(model).values():  # stays in float32, and the export has one dtype
        router.weight.data.copy_(router.weight.bfloat16())
    again = reloaded(to_sparse(model), tmp_path / "half")
    assert again.dtype == torch.bfloat16
    batch = family_batch("t5-v1.0")
    torch.testing.assert_close(logits_of(again, batch), logits_of(model, batch), atol=0.1, rtol=0.02)
    for n, (is_tied, scales) in enumerate([(True, False), (False, True), (False, False)]):
        model = tiny_model("t5-v1.0", tie_word_embeddings=scales)
        if not is_tied:
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
        moved(mpoe.upcycle(model, mpoe.MPOEConfig(num_experts=4, layout="balanced", expert_noise=0.3)))
        for router in routers(model).values():
            router.bias.data.zero_()
        assert_same(model, to_sparse(model), "t5-v1.0", tmp_path / str(n))


def test_generation_is_the_same(tmp_path):
    for name in ("t5-v1.0", "llama"):
        model = mixture(name, {})
        again = reloaded(to_sparse(model), tmp_path / name)
        ids = family_batch(name)["input_ids"][1:]
        options = {"max_new_tokens": 12, "do_sample": False}
        assert torch.equal(again.generate(ids, **options), model.generate(ids, **options))


@pytest.mark.parametrize(
    ("name", "options", "bias", "reason"),
    [
        ("t5-v1.0", {}, 0.05, "add a bias after they have divided"),
        ("t5-v1.0", {"is_scale_prob": True}, 0.0, "divide a token by its size"),
        ("t5-v1.0", {"eval_capacity_factor": 4.0}, 0.0, "nothing is dropped"),
        ("llama", {}, 0.05, "those there have none"),
        ("llama", {"top_k": 2}, 0.0, "divide a token by its size"),
        ("qwen3", {"is_scale_prob": True}, 0.0, "divide a token by its size"),
    ],
)
def test_what_is_not_exact_is_refused_and_approximated_on_request(name, options, bias, reason, tmp_path):
    model = mixture(name, options, bias=bias)
    assert [reason in text for text in differences(model)] == [True]
    with pytest.raises(ValueError, match=reason):
        to_sparse(model)
    with pytest.raises(ValueError, match="needs to know the routers' inputs"):
        to_sparse(model, approximate=True)
    batch = family_batch(name)
    with measured_inputs(model) as inputs:
        logits_of(model, batch)
    assert all(measured.tokens > 0 for measured in inputs.values())
    again = reloaded(to_sparse(model, inputs, approximate=True), tmp_path)
    found = logit_difference(model, again, [batch])
    far = logit_difference(model, mpoe.merge(model), [batch])
    assert found.kl < far.kl


def test_measured_sizes_are_those_of_real_tokens():
    model, batch = mixture("llama", {}), family_batch("llama")
    seen = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
        for name, layer in mixtures(model).items()
    ]
    with measured_inputs(model) as inputs:
        logits_of(model, batch)
    for name, measured in inputs.items():
        x = seen[name][batch["attention_mask"].bool()].double()
        rms = x.square().mean(-1).sqrt()
        assert measured.tokens == batch["attention_mask"].sum()
        assert measured.rms == pytest.approx(rms.mean().item(), rel=1e-4)
        assert measured.scale == pytest.approx((1 / rms).mean().item(), rel=1e-4)
    for hook in hooks:
        hook.remove()
    logits_of(model, batch)
    assert next(iter(inputs.values())).tokens == batch["attention_mask"].sum(), "measured outside of the context"


@pytest.mark.parametrize(
    ("name", "options", "model_options", "message"),
    [
        ("t5-v1.1", {}, {}, "whose feed-forward networks are gated has no sparse format"),
        ("llama", {"layout": "extended"}, {}, "layout 'extended'"),
        ("gpt2", {}, {}, "GPT2LMHeadModel has no sparse format in Transformers (there are: T5"),
        ("t5-v1.0", {"top_k": 2}, {}, "sends a token to one expert, and this mixture to 2"),
        ("llama", {"is_scale_prob": True}, {}, "divides the experts' weights by their sum"),
        ("llama", {"top_k": 2, "second_policy_eval": "threshold"}, {}, "second_policy_eval is 'threshold'"),
        ("t5-v1.0", {"routing": "sequence", "stacks": ["encoder"]}, {}, "routed one by one"),
        ("llama", {"expert_bias": "expert"}, {}, "such a mixture cannot be merged"),
        ("llama", {}, {"mlp_bias": True}, "experts must have no biases"),
        ("llama", {}, {"attention_bias": True}, "bias has no place in MixtralForCausalLM"),
        ("llama", {"num_experts": 1}, {}, "this model has none"),
        ("qwen3", {}, {"use_sliding_window": True}, "slides the attention's window"),
    ],
)
def test_what_has_no_format_is_refused(name, options, model_options, message):
    model = tiny_model(name, **model_options)
    model = mpoe.upcycle(model, mpoe.MPOEConfig(**{"num_experts": 4, "layout": "balanced", **options}))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") and "router" not in parameter_name:
                parameter.fill_(0.1)
    with pytest.raises(ValueError, match=re.escape(message)):
        to_sparse(model)
    with pytest.raises(ValueError, match="this model has none"):
        to_sparse(tiny_model("llama"))
