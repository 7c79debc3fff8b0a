"""What may be loaded for use, by its config, and what is refused before weights are read."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    T5EncoderModel,
)

import mpoe
from mpoe.cli.loading import kind_of, load_finished
from mpoe.models import mixtures
from tiny import tiny_t5, tiny_tokenizer

GPT2 = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
BERT = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (tiny_t5, "seq2seq"),
        (lambda: mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(num_experts=2)), "seq2seq"),
        (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), "causal"),
        (lambda: mpoe.upcycle(GPT2LMHeadModel(GPT2Config(**GPT2)), mpoe.MPOEConfig(num_experts=2)), "causal"),
        (lambda: GPT2ForSequenceClassification(GPT2Config(**GPT2, pad_token_id=0)), "classification"),
        (lambda: BertForSequenceClassification(BertConfig(**BERT)), "classification"),
    ],
)
def test_the_config_says_the_kind_and_the_class(build, kind):
    model = build()
    model.save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    assert kind_of("model") == kind
    loaded, tokenizer = load_finished("model")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert len(mixtures(loaded)) == len(mixtures(model))
    assert tokenizer.padding_side == ("left" if kind == "causal" else "right")
    theirs = model.state_dict()
    assert all(torch.equal(value.cpu(), theirs[name]) for name, value in loaded.state_dict().items())


def test_a_tokenizer_without_padding_gets_a_token_for_it():
    GPT2LMHeadModel(GPT2Config(**GPT2)).save_pretrained("model")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained("model")
    model, tokenizer = load_finished("model")
    assert tokenizer.pad_token == "</s>"
    assert model.config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize(
    ("build", "architecture"),
    [
        (lambda: T5EncoderModel(tiny_t5().config), "T5EncoderModel"),
        (lambda: BertForMaskedLM(BertConfig(**BERT)), "BertForMaskedLM"),
    ],
)
def test_a_model_that_neither_writes_nor_classifies_is_refused(build, architecture):
    build().save_pretrained("model")
    with pytest.raises(ValueError, match=rf"the architectures in its config are \['{architecture}"):
        load_finished("model")


def test_architectures_that_are_no_list_are_refused(tmp_path):
    tiny_t5().save_pretrained("model")
    file = tmp_path / "model" / "config.json"
    for architectures in (3, {"a": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration", []):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": architectures}))
        with pytest.raises(ValueError, match=r"^model must "):
            kind_of("model")


def test_an_unfinished_run_is_refused(tmp_path):
    tiny_t5().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    (tmp_path / "model" / "run.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="model must be a finished run"):
        kind_of("model")
    (tmp_path / "model" / "results.json").write_text(json.dumps({}))
    assert kind_of("model") == "seq2seq"


def test_no_model_no_tokenizer(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty must be a folder with a config.json"):
        kind_of("empty")
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"runs/two must be a folder with a config.json; there is no such folder"):
        kind_of("runs/two")  # and not of the owner "runs" on a hub
    tiny_t5().save_pretrained("model")
    with pytest.raises(ValueError, match="model must hold its model's tokenizer"):
        load_finished("model")


def test_a_classifiers_adapter_is_loaded_onto_a_base_that_is_none():
    """As `--objective classification --tensor_learn` makes one, of a model that has been pre-trained otherwise."""
    BertForMaskedLM(BertConfig(**BERT)).save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    labels = {0: "bad", 1: "fair", 2: "good"}
    model = BertForSequenceClassification.from_pretrained("base", num_labels=3, id2label=labels).requires_grad_(False)
    mpoe.upcycle(model, mpoe.MPOEConfig(num_experts=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "offsets" in name or name.startswith(("classifier", "bert.pooler")):
                parameter.requires_grad_(True).normal_()
    mpoe.save_adapter(model, "adapter")
    assert kind_of("adapter") == "classification"
    loaded, _ = load_finished("adapter")
    assert type(loaded) is BertForSequenceClassification
    assert loaded.config.id2label == labels
    inputs = {"input_ids": torch.randint(3, 64, (2, 7))}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits.cpu(), model.eval()(**inputs).logits)
    Path("base").rename("elsewhere")
    with pytest.raises(ValueError, match="the base of the adapter in adapter must be there; base must be a folder"):
        kind_of("adapter")
