"""One suite over all families: what upcycling promises holds for every row of `mpoe.models.families`."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch

import mpoe
from mpoe.models import FAMILIES, count_parameters, mixtures, reset_usage, router_statistics
from tiny import enable_checkpointing, logits_of, moved
from tiny_families import (
    ENCODER_DECODERS,
    FAMILY_NAMES,
    GENERATIVE,
    TEXT,
    family_batch,
    tiny_model,
)

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HERE.parent)}
LAYOUTS = pytest.mark.parametrize("layout", ["extended", "balanced"])
ROUTERS = pytest.mark.parametrize("moe_type", ["switch", "moe"])
FAMILY = pytest.mark.parametrize("name", FAMILY_NAMES)


def mixture_of(dense, **options):
    return mpoe.upcycle(copy.deepcopy(dense), mpoe.MPOEConfig(**{"num_experts": 3, **options}))


def trained_mixture(name, **options):
    """Experts that differ, routers that care."""
    if options.get("layout") == "balanced":
        options = {"expert_noise": 0.1, **options}
    return moved(mixture_of(tiny_model(name), **options))


def test_a_dropout_may_be_a_whole_number():
    mixture_of(tiny_model("gpt2", resid_pdrop=0))


def test_every_row_is_here():
    assert {name.partition("-v1")[0] for name in FAMILY_NAMES} == FAMILIES.keys()


@ROUTERS
@LAYOUTS
@FAMILY
def test_the_function_is_preserved(name, layout, moe_type):
    dense, batch = tiny_model(name), family_batch(name)
    mixture = mixture_of(dense, layout=layout, moe_type=moe_type)
    assert len(mixtures(mixture)) == (4 if name in ENCODER_DECODERS else 2)
    assert (logits_of(mixture, batch) - logits_of(dense, batch)).abs().max() <= 1e-4
    assert count_parameters(mixture).dense == sum(p.numel() for p in dense.parameters())
    if name in GENERATIVE:
        inputs = {key: batch[key].flip(1) for key in ("input_ids", "attention_mask")}  # padding at the left
        texts = [model.generate(**inputs, max_new_tokens=8, do_sample=False) for model in (dense, mixture)]
        assert torch.equal(*texts)


@FAMILY
def test_a_dense_class_finds_no_feed_forward_weight_in_a_mixture(name):
    """A load without mpoe must not look like the dense model."""
    dense = tiny_model(name)
    mixture = mixture_of(dense)
    inside = {id(p) for layer in mixtures(mixture).values() for p in layer.parameters()}
    own = {n for n, p in dense.named_parameters()} - {n for n, p in mixture.named_parameters() if id(p) not in inside}
    matrices = sum(2 if layer.gate is None else 3 for layer in mixtures(mixture).values())
    assert len([n for n in own if dense.get_parameter(n).ndim == 2]) == matrices
    missing = dense.load_state_dict(mixture.state_dict(), strict=False).missing_keys
    assert own <= set(missing)


@pytest.mark.parametrize("mpo_layers", [("attention",), ("word_embed",), ("mlp", "attention", "word_embed")])
@FAMILY
def test_other_components_preserve_it_too(name, mpo_layers):
    dense, batch = tiny_model(name), family_batch(name)
    has_no_row = FAMILIES[name.partition("-v1")[0]].word_embed is None
    if "word_embed" in mpo_layers and has_no_row:
        with pytest.raises(ValueError, match="its word_embed is not"):
            mixture_of(dense, layout="balanced", mpo_layers=mpo_layers)
        return
    mixture = mixture_of(dense, layout="balanced", mpo_layers=mpo_layers, num_experts=1)
    assert (logits_of(mixture, batch) - logits_of(dense, batch)).abs().max() <= 1e-4


@ROUTERS
@LAYOUTS
@FAMILY
def test_every_parameter_that_should_have_a_gradient_has_one(name, layout, moe_type):
    dense, batch = tiny_model(name).train(), family_batch(name, 8, 20)
    mixture = mixture_of(dense, layout=layout, moe_type=moe_type).train()
    for model in (dense, mixture):
        model(**batch).loss.backward()
    without = {n for n, p in dense.named_parameters() if p.grad is None}
    assert {n for n, p in mixture.named_parameters() if p.grad is None} == without
    assert not any(n.startswith(place) for n in without for place in mixtures(mixture))


LOAD = """
import sys
from pathlib import Path
import torch, transformers, mpoe
transformers.logging.set_verbosity_error()
for folder in sorted(Path(sys.argv[1]).iterdir()):
    batch, logits = torch.load(folder / "expected.pt")
    with torch.no_grad():
        print(folder.name, torch.equal(mpoe.from_pretrained(folder)(**batch).logits, logits))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Whether a fresh process finds the logits of what was saved; one process for all."""
    root = tmp_path_factory.mktemp("families")
    for name in FAMILY_NAMES:
        for layout in ("extended", "balanced"):
            torch.manual_seed(0)
            options = {} if layout == "extended" else {"expert_bias": "expert"}
            model, batch = trained_mixture(name, layout=layout, **options), family_batch(name)
            model.save_pretrained(root / f"{name}.{layout}")
            torch.save((batch, logits_of(model, batch)), root / f"{name}.{layout}" / "expected.pt")
    done = subprocess.run([sys.executable, "-c", LOAD, str(root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


@LAYOUTS
@FAMILY
def test_a_fresh_process_loads_it_bitwise(loaded, name, layout):
    assert loaded[f"{name}.{layout}"] == "True"


@ROUTERS
@pytest.mark.parametrize("name", GENERATIVE)
def test_generation_with_cache_is_generation_without(name, moe_type):
    model, batch = trained_mixture(name, moe_type=moe_type), family_batch(name)
    batch = {key: batch[key].flip(1) for key in ("input_ids", "attention_mask")}  # padding at the left
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(**batch, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)


COMPILE = """
import sys
import torch, transformers, mpoe
transformers.logging.set_verbosity_error()
from mpoe.models import mixtures
from test_families import FAMILY_NAMES, trained_mixture
for name in FAMILY_NAMES:
    for layout, options in (("extended", {}), ("balanced", {"capacity_factor": 1.0})):
        torch._dynamo.reset()
        torch.manual_seed(0)
        layer = next(iter(mixtures(trained_mixture(name, layout=layout, **options)).values())).train()
        layer.token_mask = torch.rand(2, 7) > 0.2
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(2, 7, 32, requires_grad=True)
        leaves = [x, *layer.parameters()]
        runs = [(y, *torch.autograd.grad(y.square().sum(), leaves)) for y in (layer(x), compiled(x))]
        torch.testing.assert_close(*runs, rtol=1e-3, atol=1e-3)
        print(f"{name}.{layout}")
"""


@pytest.fixture(scope="module")
def compiled():
    """The families whose layer is one graph and the same function; one process for all.

    Of its own, because the type checker that the tests hang in would break the graph.
    """
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=HERE, env=ENVIRONMENT, capture_output=True, text=True)
    return done.stdout.split(), done.stderr[-3000:]


@LAYOUTS
@FAMILY
def test_the_experts_compile_without_graph_breaks(compiled, name, layout):
    done, error = compiled
    assert f"{name}.{layout}" in done, error


@FAMILY
def test_bfloat16_and_autocast(name):
    """Of fresh experts: rounding sends some tokens to another one, and where all are alike that changes nothing."""
    dense, batch = tiny_model(name), family_batch(name)
    mixture = mixture_of(dense)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, under_autocast = logits_of(dense, batch), logits_of(mixture, batch)
    torch.testing.assert_close(under_autocast, expected, rtol=0.1, atol=0.3)
    low = copy.deepcopy(dense).bfloat16()
    low_batch = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
    converted = mixture_of(low)
    new = {n for n, p in converted.named_parameters() if p.dtype == torch.float32}
    assert new == {
        n for n, _ in converted.named_parameters() if n.endswith(("offsets_U", "offsets_V", "router.weight"))
    }
    assert {p.dtype for n, p in converted.named_parameters() if n not in new} == {torch.bfloat16}
    torch.testing.assert_close(logits_of(converted, low_batch), logits_of(low, low_batch), rtol=0.1, atol=0.3)
    converted.train()(**low_batch).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in converted.parameters())


@pytest.mark.parametrize("options", [{}, {"layout": "balanced", "capacity_factor": 0.5}], ids=["extended", "balanced"])
@FAMILY
def test_gradient_checkpointing_changes_no_gradient(name, options):
    """With little room, so that padding and what is dropped must be decided twice alike."""
    model, batch = trained_mixture(name, **options).train(), family_batch(name, 6, 12)
    gradients = []
    for is_checkpointed in (False, True):
        model.zero_grad()
        if is_checkpointed:
            enable_checkpointing(model, use_reentrant=False)
        model(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for n, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][n], gradient, rtol=1e-4, atol=1e-5, msg=n)


@ROUTERS
@LAYOUTS
@pytest.mark.parametrize("name", TEXT)
def test_padding_takes_no_capacity_and_counts_in_no_loss(name, layout, moe_type):
    """More padding changes neither what real tokens get nor the routers' losses nor the shares."""
    options = {"layout": layout, "balancing": "loss", "load_balancing_coef": 1.0, "router_z_loss_coef": 1.0}
    if layout == "balanced":
        options |= {"capacity_factor": 0.6, "eval_capacity_factor": 0.6}
    model, batch = trained_mixture(name, moe_type=moe_type, **options), family_batch(name, 4, 10)
    padded = {
        key: torch.nn.functional.pad(value, (0, 6), value=-100 if key == "labels" else 0) if value.ndim == 2 else value
        for key, value in batch.items()
    }
    found = []
    for b in (batch, padded):
        reset_usage(model)
        with torch.no_grad():
            evaluated, trained = model.eval()(**b), model.train()(**b)
        found.append((evaluated.logits, trained.loss - evaluated.loss, router_statistics(model)))
    (logits, loss, usage), (padded_logits, padded_loss, padded_usage) = found
    if logits.ndim == 3:
        real = batch["labels"] != -100
        logits, padded_logits = logits[real], padded_logits[:, : logits.shape[1]][real]
    torch.testing.assert_close(padded_logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(padded_loss, loss, rtol=1e-4, atol=1e-4)
    for layer, statistics in usage.items():
        assert padded_usage[layer].share == pytest.approx(statistics.share)
        assert padded_usage[layer].entropy == pytest.approx(statistics.entropy, rel=1e-4)
        assert padded_usage[layer].dropped_fraction == pytest.approx(statistics.dropped_fraction)
        assert padded_usage[layer].gate_mass == pytest.approx(statistics.gate_mass, rel=1e-4)
        assert (statistics.dropped_fraction > 0) == (layout == "balanced")


ATTENTION = {
    "t5-v1.0": ["q", "v"], "t5-v1.1": ["q", "v"], "mt5": ["q", "v"],
    "gpt2": ["c_attn"], "gpt_neox": ["query_key_value"],
    "phi3": ["qkv_proj"], "deberta-v2": ["query_proj", "value_proj"], "distilbert": ["q_lin", "v_lin"],
    "bert": ["query", "value"], "roberta": ["query", "value"], "xlm-roberta": ["query", "value"],
    "electra": ["query", "value"],
}  # fmt: skip


@FAMILY
# PEFT 0.21 asks Transformers 5.23 by a name that it has renamed
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")  # of T5 v1.1: never
def test_lora_on_top(name):
    mixture, batch = trained_mixture(name), family_batch(name)
    before = logits_of(mixture, batch)
    targets = ATTENTION.get(name, ["q_proj", "v_proj"])
    options = {"fan_in_fan_out": name == "gpt2", "target_modules": targets, "init_lora_weights": True}
    model = peft.get_peft_model(mixture, peft.LoraConfig(r=2, **options))
    assert torch.equal(logits_of(model, batch), before)
    model.train()(**batch).loss.backward()
    with_gradient = [n for n, p in model.named_parameters() if p.grad is not None]
    assert with_gradient
    assert all("lora_" in n for n in with_gradient)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.normal_(std=0.2)
    changed = logits_of(model.eval(), batch)
    assert not torch.allclose(changed, before, atol=1e-3)
    torch.testing.assert_close(logits_of(model.merge_and_unload(), batch), changed, rtol=1e-3, atol=1e-3)


@FAMILY
def test_a_merged_expert_is_the_mixture_that_sends_everything_to_it(name):
    model, batch = trained_mixture(name, layout="balanced"), family_batch(name)
    before = logits_of(model, batch)
    dense = mpoe.merge(model, expert=1)
    assert type(dense) is type(model)
    assert not mixtures(dense)
    with torch.no_grad():
        for layer in mixtures(model).values():
            layer.router.bias.copy_(torch.tensor([0.0, 100.0, 0.0]))
    torch.testing.assert_close(logits_of(dense, batch), logits_of(model, batch), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits_of(dense, batch), before, atol=1e-3)


@FAMILY
def test_merged_extended_experts_are_the_mixture_whose_gates_are_all_alike(name):
    model, batch = trained_mixture(name, top_k=3), family_batch(name)
    dense = mpoe.merge(model)
    assert type(dense) is type(model)
    assert not mixtures(dense)
    with torch.no_grad():
        for layer in mixtures(model).values():
            layer.router.weight.zero_()
    torch.testing.assert_close(logits_of(dense, batch), logits_of(model, batch), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits_of(dense, batch), logits_of(tiny_model(name), batch), atol=1e-2)


@LAYOUTS
@FAMILY
def test_the_mean_of_equal_experts_is_the_dense_model(name, layout, tmp_path):
    dense, batch = tiny_model(name), family_batch(name)
    components = ("mlp",)
    if layout == "balanced":
        has_no_row = FAMILIES[name.partition("-v1")[0]].word_embed is None
        components = ("mlp", "attention") if has_no_row else mpoe.config.COMPONENTS
    merged = mpoe.merge(mixture_of(dense, layout=layout, mpo_layers=components))
    torch.testing.assert_close(logits_of(merged, batch), logits_of(dense, batch), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in dense.parameters())
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits_of(type(dense).from_pretrained(tmp_path), batch), logits_of(merged, batch))
