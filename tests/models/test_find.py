"""Models that no row describes: a user's few lines do, and without them an error shows what there is."""

import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CohereConfig,
    CohereForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)

import mpoe
from mpoe.models import mixtures
from tiny import logits_of, moved

SIZES = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GATED = {"path": "layers.*.mlp", "up": "up_proj", "gate": "gate_proj", "down": "down_proj", "activation": "act_fn"}
IN_THE_LAYER = {
    "path": "layers.*", "up": "fc1", "down": "fc2", "activation": "activation_fn", "dropout": "activation_dropout",
    "at": "fc1",
}  # fmt: skip


def cohere():
    config = CohereConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **SIZES
    )
    return CohereForCausalLM(config).eval()


def xglm():
    """Matrices in the layer itself, like BART's."""
    return XGLMForCausalLM(XGLMConfig(d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, **SIZES)).eval()


def config_of(feed_forward, **options):
    return mpoe.MPOEConfig(num_experts=3, feed_forward=feed_forward, **options)


@pytest.mark.parametrize(("make", "names"), [(cohere, GATED), (xglm, IN_THE_LAYER)])
def test_a_described_model_is_upcycled_saved_and_loaded(make, names, tmp_path):
    dense, batch = make(), {"input_ids": torch.randint(3, 64, (2, 7))}
    mixture = mpoe.upcycle(copy.deepcopy(dense), config_of(names))
    assert len(mixtures(mixture)) == 2
    assert (logits_of(mixture, batch) - logits_of(dense, batch)).abs().max() <= 1e-5
    moved(mixture).save_pretrained(tmp_path)
    assert torch.equal(logits_of(mpoe.from_pretrained(tmp_path), batch), logits_of(mixture, batch))
    assert type(mpoe.merge(mixture)) is type(dense)


def test_an_unknown_model_is_refused_and_its_candidates_are_named():
    with pytest.raises(ValueError, match=r"got 'cohere'.*'model\.layers\.\*\.mlp' \(CohereMLP: gate_proj 64x32"):
        mpoe.upcycle(cohere())
    with pytest.raises(ValueError, match=r"got 'xglm'.*'model\.layers\.\*' \(XGLMDecoderLayer: fc1 64x32, fc2 32x64\)"):
        mpoe.upcycle(xglm())


@pytest.mark.parametrize(
    ("feed_forward", "message"),
    [
        ({"path": "layers.*.mlp"}, "must have the keys"),
        ({**GATED, "bias": "b"}, "may have"),
        ({**GATED, "up": 3}, r"feed_forward\['up'\] must be of type str; got 3"),
        ({**GATED, "is_fused": "yes"}, r"feed_forward\['is_fused'\] must be of type bool"),
        ({**GATED, "stack": "middle"}, "must be 'encoder' or 'decoder'"),
        ({**GATED, "path": "layers.mlp"}, "must have a star"),
        (
            {k: v for k, v in GATED.items() if k != "gate"},
            r"every matrix of model\.layers\.0\.mlp.*leaves out gate_proj",
        ),
        ({**GATED, "up": "wi"}, r"networks layers\.\*\.mlp with wi, .*none\..*CohereMLP"),
    ],
)
def test_a_wrong_description_is_refused(feed_forward, message):
    with pytest.raises(ValueError, match=message):
        mpoe.upcycle(cohere(), config_of(feed_forward))


def bert(**options):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(**sizes, **options, vocab_size=64)).eval()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.bias.normal_()
    return model


@pytest.mark.parametrize(("kind", "rows"), [("base", 1), ("shared", 1), ("expert", 3)])
def test_biases_are_shared_or_one_each(kind, rows):
    dense = bert()
    bias = dense.bert.encoder.layer[0].output.dense.bias.detach().clone()
    (layer,) = mixtures(
        mpoe.upcycle(dense, mpoe.MPOEConfig(num_experts=3, layout="balanced", expert_bias=kind))
    ).values()
    assert torch.equal(layer.down.bias, bias.expand(rows, -1))


def test_biases_are_not_left_out_and_chunks_are_refused():
    with pytest.raises(ValueError, match=r"got 'none', and intermediate\.dense has one"):
        mpoe.upcycle(bert(), mpoe.MPOEConfig(layout="balanced", expert_bias="none"))
    with pytest.raises(ValueError, match=r"chunk_size_feed_forward must be 0.*got 4"):
        mpoe.upcycle(bert(chunk_size_feed_forward=4))
