import copy

import peft
import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig, Trainer, TrainingArguments

import mpoe
from mpoe.models import memory_bytes, mpoe_config
from mpoe.nn import ExtendedExperts, MoEFeedForward
from tiny import logits_of

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
BATCH = {"input_ids": torch.arange(2, 20).view(2, 9)}


@pytest.fixture
def base(tmp_path):
    """A folder with a model in float32."""
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(base, is_quantized=True, dtype=torch.float32):
    quantization = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())} if is_quantized else {}
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **quantization)


def upcycled(base, dtype=torch.float32, **options):
    model = load(base, dtype=dtype)
    model.requires_grad_(False)
    return mpoe.upcycle(model, mpoe.MPOEConfig(num_experts=4, **options))


def train(model, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**BATCH, labels=BATCH["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_upcycling_keeps_the_function_and_the_quantised_weights(base, activation, dtype):
    dense = load(base, dtype=dtype)
    weights = {id(parameter) for name, parameter in dense.named_parameters() if ".mlp." in name}
    before = logits_of(dense, BATCH)
    model = mpoe.upcycle(dense, mpoe.MPOEConfig(num_experts=4, expert_activation=activation))
    assert torch.equal(logits_of(model, BATCH), before)
    experts = [module for module in model.modules() if isinstance(module, ExtendedExperts)]
    assert {id(module.base.weight) for module in experts} == weights
    assert len(weights) == 6
    assert {factor.dtype for module in experts for factor in module.auxiliary.values()} == {torch.float32}


def test_a_trained_adapter_goes_onto_a_fresh_base(base, tmp_path):
    model = upcycled(base)
    before = logits_of(model, BATCH)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("offsets" in name or "router" in name for name in names)
    losses = train(model)
    assert losses[-1] < losses[0]
    expected = logits_of(model, BATCH)
    assert not torch.equal(expected, before)
    mpoe.save_adapter(model, tmp_path / "adapter")
    for fresh in (load(base), upcycled(base)):
        mpoe.load_adapter(fresh, tmp_path / "adapter")
        assert torch.equal(logits_of(fresh, BATCH), expected)
        mpoe.set_adapter(fresh, None)
        assert torch.equal(logits_of(fresh, BATCH), before)
        mpoe.set_adapter(fresh, "default")
        assert torch.equal(logits_of(fresh, BATCH), expected)


def test_biases_of_the_base_stay_in_the_base(tmp_path):
    dense = LlamaForCausalLM(LlamaConfig(**SIZES, mlp_bias=True))
    for name, parameter in dense.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    dense.save_pretrained(tmp_path / "base")
    before = logits_of(load(tmp_path / "base"), BATCH)
    model = upcycled(tmp_path / "base")
    assert torch.equal(logits_of(model, BATCH), before)
    bias = model.model.layers[0].mlp.up.base.bias.clone()
    train(model)
    assert torch.equal(model.model.layers[0].mlp.up.base.bias, bias)
    mpoe.save_adapter(model, tmp_path / "adapter")
    fresh = mpoe.load_adapter(load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits_of(fresh, BATCH), logits_of(model, BATCH))


def test_an_adapter_of_a_quantised_base_is_refused_by_other_bases(base, tmp_path):
    mpoe.save_adapter(upcycled(base), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"wrong base.*load the base with dtype float32 and int8"):
        mpoe.load_adapter(load(base, is_quantized=False), tmp_path / "adapter")
    other = load(base)
    other.model.layers[0].self_attn.q_proj.weight.scale.mul_(2)
    with pytest.raises(ValueError, match=r"wrong base.*load the weights that it was trained with"):
        mpoe.load_adapter(other, tmp_path / "adapter")
    other = load(base)
    other.model.layers[1].mlp.up_proj.weight.qdata[0, 0] += 1
    with pytest.raises(ValueError, match=r"wrong base.*load the weights that it was trained with"):
        mpoe.load_adapter(other, tmp_path / "adapter")


def test_a_base_that_trains_has_no_adapter(base, tmp_path):
    model = upcycled(base)
    model.model.layers[0].mlp.up.base.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"that of model\.layers\.0\.mlp\.up requires a gradient"):
        mpoe.save_adapter(model, tmp_path / "adapter")


def test_a_base_that_was_saved_in_int8_is_the_same_one(base, tmp_path):
    model = upcycled(base)
    train(model)
    mpoe.save_adapter(model, tmp_path / "adapter")
    load(base).save_pretrained(tmp_path / "int8")
    fresh = mpoe.load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "int8"), tmp_path / "adapter")
    assert torch.equal(logits_of(fresh, BATCH), logits_of(model, BATCH))


class PackedLinear(torch.nn.Linear):
    """As bitsandbytes keeps 4 bits: two codes in a byte, a weight of another shape, scales beside it."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.detach().abs().max() / 7
        codes = (linear.weight.detach() / self.scale).round().to(torch.int16).flatten() + 8
        self.weight = torch.nn.Parameter((codes[::2] * 16 + codes[1::2]).to(torch.uint8)[:, None], requires_grad=False)

    def forward(self, input):
        codes = torch.cat([self.weight // 16, self.weight % 16], dim=1).float() - 8
        return torch.nn.functional.linear(input, (codes * self.scale).view(self.out_features, self.in_features))


def test_a_base_of_packed_weights_is_upcycled_and_trains(base, tmp_path):
    def packed():
        model = load(base, is_quantized=False).requires_grad_(False)
        for name, module in list(model.named_modules()):
            if ".mlp." in name and isinstance(module, torch.nn.Linear):
                model.set_submodule(name, PackedLinear(module))
        return model

    model = packed()
    before = logits_of(model, BATCH)
    mpoe.upcycle(model, mpoe.MPOEConfig(num_experts=4))
    assert torch.equal(logits_of(model, BATCH), before)
    losses = train(model)
    assert losses[-1] < losses[0]
    mpoe.save_adapter(model, tmp_path / "adapter")
    fresh = mpoe.load_adapter(packed(), tmp_path / "adapter")
    assert torch.equal(logits_of(fresh, BATCH), logits_of(model, BATCH))
    assert not torch.equal(logits_of(model, BATCH), before)


def test_transformers_marks_are_those_of_a_quantised_mixture(base, tmp_path):
    model = upcycled(base)
    assert mpoe_config(model).num_experts == 4
    with pytest.raises(ValueError, match=r"saved as an adapter.*mpoe\.save_adapter"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match=r"`\.half\(\)` is not supported"):
        model.half()
    assert torch.equal(logits_of(copy.deepcopy(model), BATCH), logits_of(model, BATCH))


def test_no_weight_is_kept_multiplied_out_from_forward_to_backward(base):
    model = upcycled(base)
    plain = [parameter for parameter in model.parameters() if not hasattr(parameter, "qdata")]
    own = {parameter.untyped_storage().data_ptr() for parameter in plain}
    kept = []

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tuple(sorted(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=torch.arange(2, 9)[None])
    assert len(kept) > 20
    assert not {(32, 32), (16, 32), (32, 64)} & set(kept)  # of the linear layers


def test_the_trainer_trains_it(base, tmp_path):
    model = upcycled(base)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(2, 64, (8, 9))]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, save_strategy="no", use_cpu=True,
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    moved = {name for name, parameter in model.named_parameters() if not same(parameter, before[name])}
    assert moved
    assert moved <= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("offsets" in name for name in moved)


def same(tensor, other):
    if hasattr(tensor, "qdata"):
        return torch.equal(tensor.qdata, other.qdata) and torch.equal(tensor.scale, other.scale)
    return torch.equal(tensor, other)


@pytest.mark.parametrize(
    "options",
    [{"layout": "balanced"}, {"layout": "balanced", "mpo_layers": ["attention"]}, {"mpo_layers": ()}],
    ids=str,
)
def test_experts_that_replace_a_quantised_weight_are_refused(base, options):
    model = load(base)
    before = logits_of(model, BATCH)
    with pytest.raises(ValueError, match=r"(up|q)_proj must be in floating point to become an MPO, and is quantised"):
        mpoe.upcycle(model, mpoe.MPOEConfig(num_experts=4, **options))
    assert torch.equal(logits_of(model, BATCH), before)
    assert not any(isinstance(module, MoEFeedForward) for module in model.modules())


# PEFT 0.21 asks Transformers 5.23 by a name that it has renamed
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def with_lora(base, is_quantized, way):
    """A base whose LoRA adapter has been trained, loaded in one of the ways that people use."""
    model = load(base, is_quantized)
    lora = peft.LoraConfig(r=2, target_modules=["up_proj", "down_proj", "q_proj"], lora_dropout=0.1)
    if way == "transformers":
        model.add_adapter(lora)
    else:
        model = peft.get_peft_model(model, lora).base_model.model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@PEFT_WARNS
@pytest.mark.parametrize("way", ["transformers", "peft"])
@pytest.mark.parametrize("is_quantized", [False, True])
def test_a_base_that_carries_lora_keeps_it(base, tmp_path, is_quantized, way):
    model = with_lora(base, is_quantized, way)
    assert not torch.equal(logits_of(model, BATCH), logits_of(load(base, is_quantized), BATCH))
    before = logits_of(model, BATCH)
    mpoe.upcycle(model, mpoe.MPOEConfig(num_experts=4))
    assert torch.equal(logits_of(model, BATCH), before)
    with pytest.raises(ValueError, match=r"is saved as an adapter.*use mpoe\.save_adapter\(model, folder\)"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    reason = r"is quantised: .*save_adapter" if is_quantized else r"plain linear layers.*save_adapter.*merge a LoRA"
    with pytest.raises(ValueError, match=reason):
        mpoe.merge(model)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora_A" in name and ".mlp." in name for name in names), "it goes on training"
    losses = train(model)
    assert losses[-1] < losses[0]
    mpoe.save_adapter(model, tmp_path / "adapter")
    fresh = mpoe.load_adapter(with_lora(base, is_quantized, way), tmp_path / "adapter").eval()
    assert torch.equal(logits_of(fresh, BATCH), logits_of(model, BATCH))
    with pytest.raises(ValueError, match="must be an adapter of this kind of model"):
        mpoe.load_adapter(load(base, is_quantized), tmp_path / "adapter")


@PEFT_WARNS
@pytest.mark.parametrize("layout", ["balanced", "whole"])
def test_lora_is_not_lost_where_matrices_are_replaced(base, layout):
    model = with_lora(base, False, "peft")
    before = logits_of(model, BATCH)
    options = {"mpo_layers": ()} if layout == "whole" else {"layout": layout}
    with pytest.raises(ValueError, match=r"mlp\.up_proj must be an nn\.Linear or Conv1D.*[Mm]erge a LoRA adapter"):
        mpoe.upcycle(model, mpoe.MPOEConfig(num_experts=4, **options))
    assert torch.equal(logits_of(model, BATCH), before)


def test_memory_counts_what_is_inside_of_quantised_tensors(base):
    linears = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 64 * 32)
    rows = 2 * (32 + 32 + 16 + 16 + 64 + 64 + 32)  # a scale in float32 and a zero point in int8 for each
    others = memory_bytes(load(base, is_quantized=False)) - 4 * linears
    assert memory_bytes(load(base)) == others + linears + 5 * rows
    tied = torch.nn.Linear(3, 3, bias=False)
    assert memory_bytes(torch.nn.ModuleList([tied, torch.nn.ModuleDict({"again": tied})])) == 36
