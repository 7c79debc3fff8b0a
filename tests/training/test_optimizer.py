"""What trains and how fast."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import mpoe
from mpoe.models import sharing_experts
from mpoe.training.arguments import FinetuneTrainingArguments
from mpoe.training.optimizer import Freezing, optimizer_for_mpos, trained_parts
from mpoe.training.text_to_text import trainer_parts
from mpoe.training.trainer import build_trainer
from tiny import V1_0, tiny_t5, tiny_tokenizer

MLP = ".DenseReluDense."
LAYOUTS = ("extended", "balanced")
CENTRAL = (".central", ".base.weight")


def make_model(version=V1_0, **options):
    return mpoe.upcycle(tiny_t5(version), mpoe.MPOEConfig(num_experts=3, **options))


def trained(freezing, model=None):
    model = model or make_model()
    freezing.apply(model)
    return {name for name, p in model.named_parameters() if p.requires_grad}, set(dict(model.named_parameters()))


@pytest.mark.parametrize(
    ("freezing", "trains"),
    [
        (Freezing(), lambda name: True),
        (Freezing(freeze_model=True), lambda name: MLP in name),
        (Freezing(freeze_encoder=True), lambda name: not name.startswith(("encoder", "shared"))),
        (Freezing(freeze_embeds=True), lambda name: name != "shared.weight"),
        (Freezing(freeze_model_but_lm_head=True), lambda name: name == "shared.weight"),  # tied in T5 v1.0
        (
            Freezing(freeze_model=True, unfreeze_layer_norms=True, tensor_learn=True),
            lambda name: (MLP in name and not name.endswith(CENTRAL)) or "layer_norm" in name,
        ),
        (Freezing(freeze_encoder=True, unfreeze_lm_head=True), lambda name: not name.startswith("encoder")),
        (Freezing(tensor_learn=True), lambda name: not name.endswith(CENTRAL)),
        (Freezing(update_mpo_layer=()), lambda name: MLP not in name),
        (Freezing(update_mpo_layer=("mlp",)), lambda name: True),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_freezing(freezing, trains, layout):
    found, names = trained(freezing, make_model(layout=layout))
    assert any(name.endswith(CENTRAL) for name in names)
    assert found == {name for name in names if trains(name)}
    assert found


@pytest.mark.parametrize(
    ("layout", "sites", "frozen"),
    [
        ("extended", (2,), "offsets_V"),
        ("extended", (0,), "offsets_U"),
        ("balanced", (0, 1, 4), "offsets.2"),
        ("balanced", (3,), ("offsets.0", "offsets.1", "offsets.3")),
    ],
)
def test_sites_are_chosen(layout, sites, frozen):
    found, names = trained(Freezing(train_AT_index=sites), make_model(layout=layout))
    assert found == {name for name in names if not name.endswith(frozen)}
    assert found < names


def test_components_are_told_apart():
    model = make_model(layout="balanced", mpo_layers=("word_embed", "mlp", "attention"))
    found, names = trained(Freezing(update_mpo_layer=("attention",)), model)
    frozen = names - found
    assert all("shared" in name or MLP in name for name in frozen)
    assert any("SelfAttention.q" in name for name in found)
    assert any("shared" in name for name in frozen)
    assert any(MLP in name for name in frozen)


@pytest.mark.parametrize(
    ("freezing", "layout", "message"),
    [
        (Freezing(train_AT_index=(1,)), "extended", r"must name auxiliary sites, of \[0, 2\]; got \[1\]"),
        (Freezing(train_AT_index=(2,)), "balanced", r"must name auxiliary sites, of \[0, 1, 3, 4\]; got \[2\]"),
        (Freezing(freeze_model=True, update_mpo_layer=()), "extended", "something must be left to train"),
    ],
)
def test_what_makes_no_sense_is_said(freezing, layout, message):
    with pytest.raises(ValueError, match=message):
        freezing.apply(make_model(layout=layout))


def test_flags_about_mpos_need_mpos():
    for flag, value in (("tensor_learn", True), ("train_AT_index", (0,))):
        with pytest.raises(ValueError, match=f"{flag} is about MPOs; the model has none"):
            Freezing(**{flag: value}).apply(tiny_t5())


@pytest.mark.parametrize(
    ("layout", "mpo_layers", "in_router"), [("extended", ("mlp",), 32), ("balanced", ("mlp", "attention"), 33)]
)
def test_the_table_counts_every_parameter_once(layout, mpo_layers, in_router):
    model = make_model(layout=layout, mpo_layers=mpo_layers)
    Freezing(tensor_learn=True, freeze_embeds=True).apply(model)
    parts = {part.name: part for part in trained_parts(model, 1e-3, 1e-4)}
    assert sum(part.total for part in parts.values()) == sum(p.numel() for p in model.parameters())
    assert sum(part.trained for part in parts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    experts = sharing_experts(model).values()
    assert parts["central tensors"].trained == 0
    assert parts["central tensors"].total == sum(e.central.numel() for e in experts)
    assert parts["auxiliary tensors"].trained == sum(o.numel() for e in experts for o in e.auxiliary.values())
    assert parts["auxiliary tensors"].learning_rate == 1e-4
    assert parts["routers"].learning_rate == 1e-3
    assert parts["routers"].total == 4 * 3 * in_router


def test_the_rate_of_the_experts_is_not_that_of_the_bases_matrices():
    parts = {part.name: part.learning_rate for part in trained_parts(make_model(), 1e-3, 1e-4)}
    assert (parts["auxiliary tensors"], parts["central tensors"]) == (1e-4, 1e-3)
    parts = {part.name: part.learning_rate for part in trained_parts(make_model(layout="balanced"), 1e-3, 1e-4)}
    assert (parts["auxiliary tensors"], parts["central tensors"]) == (1e-4, 1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mpos_have_a_rate_of_their_own_in_the_trainers_optimizer(tmp_path, layout):
    model = make_model(layout=layout)
    args = FinetuneTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, learning_rate=1e-3, weight_decay=0.1, eval_strategy="no"
    )
    parts = trainer_parts(model, tiny_tokenizer(), args, None, [])
    plain = build_trainer(model, tiny_tokenizer(), args, parts).create_optimizer()
    ratio = 4.0 if layout == "extended" else 1.0
    options = optimizer_for_mpos(model, args, 1e-5, None, ratio)
    optimizer = build_trainer(model, tiny_tokenizer(), args, parts, optimizer=options).create_optimizer()
    assert type(optimizer) is type(plain)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {"offsets_U": 1e-5, "offsets_V": 4e-5, "central": 1e-5, **{str(n): 1e-5 for n in range(4)}}  # offsets.0
    expected = {id(p): group["weight_decay"] for group in plain.param_groups for p in group["params"]}
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert found == {
        names[key]: (rates.get(names[key].split(".")[-1], 1e-3), 0.0 if "offsets_" in names[key] else decay)
        for key, decay in expected.items()
    }
    assert set(expected.values()) == {0.0, 0.1}
    assert {k: v for k, v in optimizer.defaults.items() if k != "lr"} == {
        k: v for k, v in plain.defaults.items() if k != "lr"
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_auxiliary_tensors_have_a_decay_of_their_own(tmp_path, layout):
    model = make_model(layout=layout)
    args = FinetuneTrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        learning_rate=0.5,
        weight_decay=0.0,
        eval_strategy="no",
        optim="adamw_torch",
    )
    parts = trainer_parts(model, tiny_tokenizer(), args, None, [])
    options = optimizer_for_mpos(model, args, None, 0.1)
    optimizer = build_trainer(model, tiny_tokenizer(), args, parts, optimizer=options).create_optimizer()
    for experts in sharing_experts(model).values():
        for tensor in experts.auxiliary.values():
            torch.nn.init.zeros_(tensor)
    torch.nn.init.ones_(next(iter(experts.auxiliary.values())))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert len(changed) == 1
    (name,) = changed
    torch.testing.assert_close(model.get_parameter(name), torch.full_like(before[name], 1 - 0.5 * 0.1))


def test_a_wrong_rate_is_said(tmp_path):
    args = FinetuneTrainingArguments(output_dir=str(tmp_path), use_cpu=True, eval_strategy="no")
    with pytest.raises(ValueError, match="mpo_lr must be > 0; got 0"):
        optimizer_for_mpos(make_model(), args, 0.0, None)
    with pytest.raises(ValueError, match="the model has none"):
        optimizer_for_mpos(tiny_t5(), args, 1e-3, None)
    with pytest.raises(ValueError, match="auxiliary_weight_decay must be >= 0; got -1"):
        optimizer_for_mpos(make_model(), args, None, -1.0)
    with pytest.raises(ValueError, match="output_lr_ratio must be > 0; got 0"):
        optimizer_for_mpos(make_model(), args, None, None, 0.0)
    with pytest.raises(ValueError, match="output_lr_ratio is for layout 'extended'; the model has another"):
        optimizer_for_mpos(make_model(layout="balanced"), args, None, None, 2.0)


SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=64, tie_word_embeddings=False)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=64)),
}


@pytest.mark.parametrize(
    ("family", "freezing", "trains"),
    [
        ("gpt2", Freezing(freeze_embeds=True), lambda name: ".wte." not in name and ".wpe." not in name),
        ("gpt2", Freezing(freeze_model_but_lm_head=True), lambda name: name == "transformer.wte.weight"),  # tied
        ("gpt2", Freezing(freeze_model_but_lm_head=True, unfreeze_layer_norms=True),
         lambda name: "ln_" in name or "wte" in name),
        ("llama", Freezing(freeze_embeds=True),
         lambda name: name not in ("model.embed_tokens.weight", "lm_head.weight")),
        ("llama", Freezing(freeze_embeds=True, unfreeze_lm_head=True),
         lambda name: name != "model.embed_tokens.weight"),
        ("llama", Freezing(freeze_model_but_lm_head=True, unfreeze_layer_norms=True),
         lambda name: name == "lm_head.weight" or "norm" in name),
        ("bert", Freezing(freeze_encoder=True), lambda name: name.startswith("classifier")),
        ("bert", Freezing(freeze_model_but_lm_head=True), lambda name: name.startswith("classifier")),
        ("bert", Freezing(freeze_embeds=True), lambda name: "_embeddings.weight" not in name),
    ],
    ids=str,
)  # fmt: skip
def test_freezing_in_other_families(family, freezing, trains):
    found, names = trained(freezing, OTHERS[family]())
    assert found == {name for name in names if trains(name)}
    assert found < names


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoder_has_no_encoder_to_freeze(family):
    with pytest.raises(ValueError, match=f"freeze_encoder is about an encoder; a {family} model has none"):
        Freezing(freeze_encoder=True).apply(OTHERS[family]())


@pytest.mark.parametrize(
    ("family", "embeddings_and_head"),
    [("gpt2", 64 * 32 + 16 * 32), ("llama", 2 * 64 * 32), ("bert", (64 + 512 + 2) * 32 + 2 * 33)],
)
def test_the_table_of_other_families(family, embeddings_and_head):
    model = OTHERS[family]()
    parts = {part.name: part for part in trained_parts(model, 1e-3, None)}
    assert parts["embeddings and head"].total == embeddings_and_head
    assert parts["layer norms"].total == sum(
        p.numel() for n, p in model.named_parameters() if "norm" in n.lower() or "ln_" in n
    )
    assert sum(part.total for part in parts.values()) == sum(p.numel() for p in model.parameters())
