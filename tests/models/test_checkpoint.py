import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

import mpoe
from mpoe.models import load_tokenizer, mixtures
from tiny import V1_0, V1_1, logits_of, moved, tiny_batch, tiny_t5, tiny_tokenizer

LOAD = """
import sys, torch, mpoe
from transformers import AutoModelForSeq2SeqLM
folder = sys.argv[1]
batch, logits = torch.load(folder + "/expected.pt")
for load in (mpoe.from_pretrained, AutoModelForSeq2SeqLM.from_pretrained):
    with torch.no_grad():
        assert torch.equal(load(folder)(**batch).logits, logits), load
"""


def trained_model(version=V1_1, **options):
    """A mixture whose parameters have all moved."""
    return moved(mpoe.upcycle(tiny_t5(version), mpoe.MPOEConfig(num_experts=3, **options)))


@pytest.mark.parametrize(
    ("version", "options"),
    [
        (V1_1, {}),
        (V1_0, {}),
        (V1_1, {"moe_type": "none"}),
        (V1_1, {"expert_activation": "gelu", "frozen_router": True, "balancing": "none"}),
        (V1_1, {"layout": "balanced"}),
        (V1_1, {"layout": "balanced", "gauge": "sqrt", "max_bond_dim": 6, "stacks": ["encoder"]}),
        (V1_1, {"mpo_layers": ()}),
    ],
)
def test_a_fresh_process_loads_it_bitwise(tmp_path, version, options):
    model, batch = trained_model(version, **options), tiny_batch()
    model.save_pretrained(tmp_path)
    torch.save((batch, logits_of(model, batch)), tmp_path / "expected.pt")
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], check=True)


def test_shards_dtype_and_device_map(tmp_path):
    model, batch = trained_model(), tiny_batch()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    expected = logits_of(model, batch)
    assert torch.equal(logits_of(mpoe.from_pretrained(tmp_path, device_map={"": "cpu"}), batch), expected)


def test_bfloat16(tmp_path):
    """Of fresh experts: rounding sends some tokens to another expert, and where all are alike that changes nothing."""
    model, batch = mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(num_experts=3)), tiny_batch()
    model.save_pretrained(tmp_path)
    expected = logits_of(model, batch)
    low = mpoe.from_pretrained(tmp_path, dtype=torch.bfloat16)
    of_base = {n: p for n, p in low.named_parameters() if not n.endswith(("offsets_U", "offsets_V", "router.weight"))}
    assert {p.dtype for p in of_base.values()} == {torch.bfloat16}
    torch.testing.assert_close(logits_of(low, batch).float(), expected, rtol=0.1, atol=0.3)


def test_float16_keeps_t5s_down_projection_in_float32(tmp_path):
    """As Transformers does for the dense T5, which overflows in float16 there."""
    trained_model().save_pretrained(tmp_path)
    layer = next(iter(mixtures(mpoe.from_pretrained(tmp_path, dtype=torch.float16)).values()))
    assert layer.down.base.weight.dtype == torch.float32
    assert layer.up.base.weight.dtype == torch.float16
    assert layer.up.offsets_U.dtype == torch.float32
    assert layer(torch.randn(2, 32, dtype=torch.float16)).isfinite().all()
    trained_model(layout="balanced").save_pretrained(tmp_path / "balanced")
    layer = next(iter(mixtures(mpoe.from_pretrained(tmp_path / "balanced", dtype=torch.float16)).values()))
    assert layer.down.central.dtype == torch.float32
    assert layer.up.central.dtype == torch.float16


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, None])
def test_factors_and_routers_of_a_bfloat16_base_are_loaded_bit_for_bit(tmp_path, dtype):
    model, batch = moved(mpoe.upcycle(tiny_t5().bfloat16(), mpoe.MPOEConfig(num_experts=3))), tiny_batch()
    for layer in mixtures(model).values():
        layer.router.balancing.steps.copy_(torch.tensor([1001, -999, 3]))
        layer.router.balancing.pending.copy_(torch.tensor([7, 123457, 0]))
    model.save_pretrained(tmp_path)
    loaded = mpoe.from_pretrained(tmp_path, **({} if dtype is None else {"dtype": dtype}))
    theirs = model.state_dict()
    assert {t.dtype for t in theirs.values()} == {torch.bfloat16, torch.float32, torch.int64}
    assert loaded.state_dict().keys() == theirs.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))


def test_central_is_written_once(tmp_path):
    trained_model().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        central = [name for name in file.keys() if name.endswith("base.weight")]  # noqa: SIM118
    assert len(central) == 3 * 4
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "mpoe"
    assert mpoe.MPOEConfig.from_dict(written) == mpoe.MPOEConfig(num_experts=3)


@pytest.mark.parametrize("options", [{}, {"layout": "balanced", "expert_noise": 0.1}], ids=["extended", "balanced"])
def test_upcycling_while_loading_is_the_same_as_after(tmp_path, options):
    dense, batch = tiny_t5(), tiny_batch()
    dense.save_pretrained(tmp_path)
    config = mpoe.MPOEConfig(num_experts=3, seed=5, **options)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, quantization_config=config)
    upcycled = mpoe.upcycle(dense, config)
    assert torch.equal(logits_of(loaded, batch), logits_of(upcycled, batch))
    theirs = upcycled.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in loaded.state_dict().items())


def test_a_loaded_model_is_an_ordinary_model(tmp_path):
    """Transformers refuses casts of a model marked as quantized; and it must train with the routers' loss."""
    trained_model(balancing="loss").save_pretrained(tmp_path)
    model = mpoe.from_pretrained(tmp_path)
    assert not getattr(model, "is_quantized", False)
    model.double().float().train()
    batch = tiny_batch()
    clean = torch.nn.functional.cross_entropy(model(**batch).logits.flatten(0, 1), batch["labels"].flatten())
    assert model(**batch).loss > clean
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(mpoe.from_pretrained(tmp_path / "again"), batch), logits_of(model.eval(), batch))


def test_what_is_no_mixture_is_refused(tmp_path):
    tiny_t5().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="names no quant_method 'mpoe'"):
        mpoe.from_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"must be a folder with a config\.json"):
        mpoe.from_pretrained(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"keys of an MPOEConfig must be among .* got \['num_expert'\]"):
        mpoe.MPOEConfig.from_dict({"num_expert": 4})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "is missing"),
        (lambda tensors, name: tensors.update({f"{name}.x": tensors.pop("shared.weight")}), r"has no place in it"),
        (lambda tensors, name: tensors.update({name: tensors[name][:1].clone()}), r"has shape \(1, 32\) instead of"),
        (lambda tensors, name: tensors.update({name: tensors[name].int()}), r"has torch\.int32 numbers"),
    ],
)
def test_weights_that_are_not_the_models_are_named(change, message, tmp_path):
    """Transformers makes up what is missing and warns."""
    trained_model().save_pretrained(tmp_path)
    tensors, name = load_file(tmp_path / "model.safetensors"), "encoder.block.0.layer.1.DenseReluDense.router.weight"
    change(tensors, name)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{tmp_path} must be .*; {name}(\.x)? {message}"):
        mpoe.from_pretrained(tmp_path)


def test_a_config_that_is_no_object_is_refused(tmp_path):
    for text in ('"../.."', "[1]", "3", "null"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"{tmp_path} must be a folder with a config"):
            mpoe.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": "4"}, "StrictDataclassFieldValidationError"),
        ({"num_heads": -1}, "RuntimeError"),
        ({"architectures": ["T5"]}, "must name a model of Transformers"),
        ({"architectures": 2}, "must name a model of Transformers|StrictDataclassFieldValidationError"),  # of 5.17
        ({"architectures": [None]}, "must name a model of Transformers|StrictDataclassFieldValidationError"),
        ({"quantization_config": [1]}, "."),
        ({"dropout_rate": math.nan}, "must have a number as dropout_rate; got NaN"),
        ({"num_layers": 10**30}, r"must have num_layers of at most 10,000; got 1e\+30"),
    ],
)
def test_a_config_that_makes_no_sense_is_one_line_with_the_folder(change, message, tmp_path):
    trained_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        mpoe.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer.json", {"model": {"type": "WordLevel", "vocab": {"a": []}}}),
        ("tokenizer.json", {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}}),
        ("tokenizer_config.json", {"model_max_length": "many"}),
        ("tokenizer_config.json", {"eos_token": 3}),
    ],
)
def test_a_damaged_tokenizer_is_one_line_with_the_folder(file, change, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"{tmp_path} must be a folder with") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"layout": "balanced"}, {"mpo_layers": ()}], ids=["balanced", "whole"])
def test_a_model_that_0_1_saved_is_loaded(tmp_path, options):
    """Its config has the key auxiliary_sides and none of the newer ones."""
    model, batch = trained_model(balancing="loss", **options), tiny_batch()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    newer = {
        "expert_rank", "expert_scale", "expert_activation", "frozen_router", "balancing", "balancing_step"
    }  # fmt: skip
    old = {k: v for k, v in written["quantization_config"].items() if k not in newer} | {"moe_type": "switch"}
    old |= {"auxiliary_sides": "both", "layout": options.get("layout", "separable")}
    file.write_text(json.dumps({**written, "quantization_config": old}))
    assert torch.equal(logits_of(mpoe.from_pretrained(tmp_path), batch), logits_of(model, batch))
    old |= {"layout": "separable", "mpo_layers": ["mlp"]}
    file.write_text(json.dumps({**written, "quantization_config": old}))
    with pytest.raises(ValueError, match=r"layout 'separable' is retired.*mpoe 0\.1\.0 \(commit \w+\) is the last"):
        mpoe.from_pretrained(tmp_path)
