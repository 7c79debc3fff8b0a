import copy
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5ForQuestionAnswering,
    T5ForSequenceClassification,
    T5ForTokenClassification,
)

import mpoe
from mpoe.models import FAMILIES, count_parameters, mixtures
from mpoe.models.upcycle import swap_modules
from mpoe.mpo import decompose
from mpoe.nn import MPOEmbedding, MPOLinear, MPOTiedHead
from tiny import V1_0, V1_1, logits_of, moved, tiny_batch, tiny_t5

# Older versions of Transformers know the second name only.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    if hasattr(T5EncoderModel, name)
)
V = 61  # prime: the table is padded
ALL = ("word_embed", "mlp", "attention")
VERSIONS = pytest.mark.parametrize("version", [V1_0, V1_1], ids=["v1.0", "v1.1"])
COMBINATIONS = [
    (("word_embed",), "none"),
    (("attention",), "none"),
    (ALL, "none"),
    (ALL, "switch"),
    (("attention", "word_embed"), "moe"),
    (("mlp", "word_embed"), "switch"),
]
LOAD = """
import sys, torch, mpoe
from transformers import AutoModelForSeq2SeqLM
for folder in sys.argv[1:]:
    batch, logits = torch.load(folder + "/expected.pt")
    for load in (mpoe.from_pretrained, AutoModelForSeq2SeqLM.from_pretrained):
        model, info = load(folder, output_loading_info=True)
        assert not any(info.values()), (folder, info)
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, logits), (folder, load)
"""


def dense_t5(version=V1_1, **options):
    return tiny_t5(version, vocab_size=V, **options)


def batch_of(**sizes):
    return tiny_batch(vocab_size=V, **sizes)


def config_of(mpo_layers=ALL, **options):
    return mpoe.MPOEConfig(**{"num_experts": 3, "layout": "balanced", "mpo_layers": mpo_layers, **options})


def trained_model(version=V1_1, **options):
    """A model whose parameters have all moved."""
    model = mpoe.upcycle(dense_t5(version), config_of(**options))
    return moved(model)


def names_of(model, kind):
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def logits_and_loading(kind, folder, batch):
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        return model(**batch)[0], info


@pytest.mark.parametrize("gauge", ["identity", "central", "sqrt"])
@pytest.mark.parametrize(("mpo_layers", "moe_type"), COMBINATIONS)
@VERSIONS
def test_the_function_is_preserved(version, gauge, mpo_layers, moe_type):
    dense, batch = dense_t5(version), batch_of()
    model = mpoe.upcycle(copy.deepcopy(dense), config_of(mpo_layers, gauge=gauge, moe_type=moe_type))
    is_untied = "word_embed" in mpo_layers and version is V1_1
    assert len(names_of(model, MPOLinear)) == 4 * 6 * ("attention" in mpo_layers) + is_untied
    assert names_of(model, MPOEmbedding) == ["shared"] * ("word_embed" in mpo_layers)
    assert len(mixtures(model)) == 4 * (moe_type != "none")
    assert (logits_of(model, batch) - logits_of(dense, batch)).abs().max() <= 1e-4
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(*(m.generate(**inputs, max_new_tokens=12) for m in (dense, model)))


def test_a_fresh_process_loads_them_bitwise_and_misses_nothing(tmp_path):
    folders = []
    for n, version in enumerate((V1_0, V1_1)):
        for mpo_layers, moe_type in COMBINATIONS:
            folders.append(tmp_path / f"{n}-{moe_type}-{'-'.join(mpo_layers)}")
            model, batch = trained_model(version, mpo_layers=mpo_layers, moe_type=moe_type), batch_of()
            model.save_pretrained(folders[-1])
            torch.save((batch, logits_of(model, batch)), folders[-1] / "expected.pt")
    subprocess.run([sys.executable, "-c", LOAD, *map(str, folders)], check=True)


@VERSIONS
def test_each_tensor_is_stored_once(tmp_path, version):
    model = trained_model(version)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert set(stored) == {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    assert not any("embed_tokens" in name for name in stored)
    assert any("lm_head" in name for name in stored) == (version is V1_1)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["tied_head"] == (version is V1_0)


@VERSIONS
def test_the_users_of_the_table_are_one_module(version):
    """Of the model and of its copy, whatever Transformers ties in between."""
    model, batch = trained_model(version), batch_of()
    for other in (model, copy.deepcopy(model)):
        other.tie_weights()
        assert other.get_input_embeddings() is other.encoder.embed_tokens is other.decoder.embed_tokens is other.shared
        assert isinstance(other.get_output_embeddings(), MPOTiedHead if version is V1_0 else MPOLinear)
        assert version is V1_1 or other.lm_head.embedding is other.shared
        assert other is model or other.shared is not model.shared
        assert torch.equal(logits_of(other, batch), logits_of(model, batch))
    with torch.no_grad():
        model.shared.experts.central.zero_()
    assert not torch.equal(logits_of(other, batch), logits_of(model, batch))


@VERSIONS
def test_gradients_reach_everything_under_gradient_checkpointing_too(version):
    model, batch = mpoe.upcycle(dense_t5(version), config_of(num_experts=2)).train(), batch_of(rows=8)
    gradients = []
    for enable in (False, True):
        if enable:
            getattr(model, CHECKPOINTING)({"use_reentrant": False})
            model.enable_input_require_grads()
        model.zero_grad()
        model(**batch).loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@VERSIONS
def test_upcycling_while_loading_is_the_same_as_after(tmp_path, version):
    dense, batch, config = dense_t5(version), batch_of(), config_of(expert_noise=0.1)
    dense.save_pretrained(tmp_path / "dense")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert torch.equal(logits_of(loaded, batch), logits_of(mpoe.upcycle(dense, config), batch))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(mpoe.from_pretrained(tmp_path / "again"), batch), logits_of(loaded, batch))


@VERSIONS
def test_bfloat16(tmp_path, version):
    """Without noise, as in `test_checkpoint`: rounding sends some tokens to another expert, and all are alike."""
    model, batch = mpoe.upcycle(dense_t5(version), config_of()), batch_of()
    model.save_pretrained(tmp_path)
    low = mpoe.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for name, p in low.named_parameters() if ".router." not in name} == {torch.bfloat16}
    torch.testing.assert_close(logits_of(low, batch).float(), logits_of(model, batch), rtol=0.1, atol=0.3)
    low.train()(**batch).loss.backward()
    assert all(p.grad.dtype == p.dtype for p in low.parameters())


def test_truncation_is_each_components_own():
    dense = dense_t5(V1_0)
    q, table = dense.encoder.block[1].layer[0].SelfAttention.q.weight.detach(), dense.shared.weight.detach()
    model = mpoe.upcycle(copy.deepcopy(dense), config_of(attention_bond_dim=5, word_embed_bond_dim=7))
    for experts, matrix, bond in (
        (model.encoder.block[1].layer[0].SelfAttention.q.experts, q, 5),
        (model.shared.experts, table, 7),
    ):
        assert max(experts.expert(0).bond_dims) == bond
        torch.testing.assert_close(experts.expert_matrix(0), decompose(matrix, experts.dims, bond).to_matrix())
    up = next(iter(mixtures(model).values())).up
    wi = dense.encoder.block[0].layer[1].DenseReluDense.wi.weight
    torch.testing.assert_close(up.expert_matrix(2), wi)


def test_stacks_and_layers_choose_the_attention_too():
    config = config_of(("attention",), moe_type="none", stacks=["decoder"], layers=[1])
    assert names_of(mpoe.upcycle(dense_t5(), config), MPOLinear) == [
        f"decoder.block.1.layer.{n}.{name}.{matrix}"
        for n, name in enumerate(("SelfAttention", "EncDecAttention"))
        for matrix in "qkvo"
    ]
    with pytest.raises(ValueError, match=r"layers must be among the model's 0\.\.1; got \[7\]"):
        mpoe.upcycle(dense_t5(), config_of(("attention",), moe_type="none", layers=[7]))


@VERSIONS
def test_parameter_counts(version):
    """On the meta device and on the real model; the auxiliaries of layers without experts are counted once."""
    dense = dense_t5(version)
    model = mpoe.upcycle(copy.deepcopy(dense), config_of())
    count = count_parameters(model)
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.dense == sum(p.numel() for p in dense.parameters())
    plain = count_parameters(mpoe.upcycle(copy.deepcopy(dense), config_of(moe_type="none")))
    assert (plain.router, plain.active, plain.whole_experts) == (0, plain.total, plain.dense)
    with torch.device("meta"):
        empty = T5ForConditionalGeneration(dense.config)
        if version is V1_1:
            empty.lm_head.weight = nn.Parameter(torch.empty_like(empty.lm_head.weight))
        swap_modules(empty, config_of())
    assert count_parameters(empty) == count


def test_frozen_weights_stay_frozen():
    dense = dense_t5(V1_0).requires_grad_(False)
    model = mpoe.upcycle(dense, config_of(moe_type="none"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "DenseReluDense" in name and "offsets" in name}
    model.get_output_embeddings().requires_grad_(True)
    assert all(p.requires_grad for p in model.shared.parameters())


@pytest.mark.parametrize(
    "kind",
    [T5EncoderModel, T5ForTokenClassification, T5ForSequenceClassification, T5ForQuestionAnswering],
    ids=lambda kind: kind.__name__,
)
def test_models_without_a_language_model_head(tmp_path, kind):
    model = kind(T5Config.from_dict(dense_t5().config.to_dict())).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    inputs = {"input_ids": torch.cat([torch.randint(2, V, (2, 6)), torch.ones(2, 1, dtype=torch.long)], dim=1)}
    with torch.no_grad():
        before = model(**inputs)[0]
        after = mpoe.upcycle(model, config_of())(**inputs)[0]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert model.config.quantization_config.tied_head is None
    model.save_pretrained(tmp_path)
    again, info = logits_and_loading(kind, tmp_path, inputs)
    assert torch.equal(again, after)
    assert not any(info.values())


def test_an_encoder_is_loaded_out_of_a_whole_model(tmp_path):
    model, input_ids = trained_model(V1_0), batch_of()["input_ids"]
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.encoder(input_ids)[0]
    hidden, info = logits_and_loading(T5EncoderModel, tmp_path, {"input_ids": input_ids})
    assert torch.equal(hidden, expected)
    assert not info["missing_keys"]


def test_a_resized_vocabulary_is_dense_business():
    dense = dense_t5(V1_0)
    dense.resize_token_embeddings(70, mean_resizing=False)
    batch = batch_of()
    model = mpoe.upcycle(copy.deepcopy(dense), config_of())
    assert model.shared.num_embeddings == 70
    assert (logits_of(model, batch) - logits_of(dense, batch)).abs().max() <= 1e-4
    with pytest.raises(
        AttributeError, match=r"must be dense to have a weight that can be resized.*before mpoe\.upcycle"
    ):
        model.resize_token_embeddings(80)
    assert torch.equal(logits_of(model, batch), logits_of(mpoe.upcycle(dense, config_of()), batch))


@pytest.mark.parametrize("component", ["attention", "word_embed"])
def test_a_component_that_the_family_has_no_row_for_is_refused(monkeypatch, component):
    monkeypatch.setitem(
        FAMILIES, "t5", dataclasses.replace(FAMILIES["t5"], **{component: () if component == "attention" else None})
    )
    mpoe.upcycle(dense_t5(), config_of(("mlp",)))
    with pytest.raises(ValueError, match=rf"known of a t5 model; its {component} is not"):
        mpoe.upcycle(dense_t5(), config_of((component,)))


def with_odd_head(model):
    model.lm_head = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, V))


def with_biased_tied_head(model):
    model.lm_head.bias = nn.Parameter(torch.zeros(V))


def with_two_tables(model):
    model.encoder.embed_tokens.weight = nn.Parameter(torch.randn(V, 32))


def with_largest_norm(model):
    model.shared.max_norm = 1.0


def with_odd_attention(model):
    model.encoder.block[0].layer[0].SelfAttention.q = nn.Identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            with_odd_head,
            "lm_head must be an nn.Linear or Conv1D to become an MPO; it is a torch.nn.modules.container.Sequential",
        ),
        (with_biased_tied_head, "must have no bias to become an MPO; lm_head has one"),
        (with_two_tables, "encoder.embed_tokens must look words up in the table of shared"),
        (with_largest_norm, "shared must be an nn.Embedding without max_norm"),
        (
            with_odd_attention,
            "SelfAttention.q must be an nn.Linear or Conv1D to become an MPO; it is a torch.nn.modules.linear.Identity",
        ),
    ],
)
def test_unknown_forms_are_refused_before_anything_changes(change, message):
    model = dense_t5(V1_0)
    change(model)
    modules = list(model.modules())
    with pytest.raises(ValueError, match=message):
        mpoe.upcycle(model, config_of())
    assert list(model.modules()) == modules


def test_a_tied_head_that_the_model_has_not_is_refused():
    with pytest.raises(ValueError, match="tied_head must be None or as the model has it, False; got True"):
        mpoe.upcycle(dense_t5(V1_1), config_of(tied_head=True))
    with pytest.raises(ValueError, match="tied_head must be True, False or None; got 'yes'"):
        config_of(tied_head="yes")
