"""`mpoe predict`, with encoder-decoders and with classifiers."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

import mpoe
from mpoe.cli.main import main
from tiny import assert_refused, moved, tiny_t5, tiny_tokenizer

TEXTS = ["the film is great", "bad", "a dull and awful sentence", "not fun"]


def bert(folder, **options):
    """A classifier and its tokenizer in a folder."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        initializer_range=0.5, **options,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def logits_by_hand(model, *texts):
    """Of one text or pair, without padding."""
    tokens = tiny_tokenizer()(*texts, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=tokens["input_ids"]).logits[0]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_classifier_answers_with_its_label(capsys):
    labels = ["bad", "fair", "good"]
    model = bert("model", num_labels=3, id2label=dict(enumerate(labels)))
    assert main(["predict", "model", *TEXTS]) == 0
    expected = [labels[int(logits_by_hand(model, text).argmax())] for text in TEXTS]
    assert len(set(expected)) > 1
    assert capsys.readouterr().out.splitlines() == [f"{a}\t{t}" for a, t in zip(expected, TEXTS, strict=True)]


def test_a_pair_is_one_question(capsys):
    model = bert("model", num_labels=2, id2label={0: "no", 1: "yes"})
    assert main(["predict", "model", "--pair", *TEXTS]) == 0
    answers = [["no", "yes"][int(logits_by_hand(model, *TEXTS[i : i + 2]).argmax())] for i in (0, 2)]
    expected = [f"{answers[i]}\t{TEXTS[2 * i]}\t{TEXTS[2 * i + 1]}" for i in (0, 1)]
    assert capsys.readouterr().out.splitlines() == expected


def test_a_regression_answers_with_its_number(capsys):
    model = bert("model", num_labels=1, problem_type="regression")
    assert main(["predict", "model", *TEXTS]) == 0
    printed = [float(line.split("\t")[0]) for line in capsys.readouterr().out.splitlines()]
    assert printed == pytest.approx([float(logits_by_hand(model, text)) for text in TEXTS], rel=1e-3)


def test_a_decoder_classifies_padded_texts_by_their_last_token(capsys):
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, num_labels=1,
        eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    model = GPT2ForSequenceClassification(config).eval()
    model.save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    assert main(["predict", "model", *TEXTS]) == 0
    printed = [float(line.split("\t")[0]) for line in capsys.readouterr().out.splitlines()]
    assert printed == pytest.approx([float(logits_by_hand(model, text)) for text in TEXTS], rel=1e-3)


def test_an_encoder_decoder_mixture_answers_with_text(capsys):
    model = moved(mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(num_experts=2)))
    model.save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    assert main(["predict", "model", *TEXTS[:2]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[1] for line in lines] == TEXTS[:2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["classifier", "a", "--task", "cola"], "a classifier reads the text as it is"),
        (["classifier", "a", "b", "a", "--pair"], "their number must be even; got 3"),
        (["several", "a"], "this model gives several (multi_label_classification)"),
        (["t5", "a", "b", "--pair"], "--pair is for classifiers"),
        (["gpt2", "a"], "mpoe generate gpt2 TEXT"),
    ],
)
def test_flags_of_another_kind_of_model_are_refused(tmp_path, capsys, argv, message):
    bert("classifier")
    bert("several", problem_type="multi_label_classification")
    tiny_t5().save_pretrained("t5")
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained("gpt2")
    assert_refused(["predict", *argv], message, tmp_path, capsys)


def test_generate_points_to_predict(tmp_path, capsys):
    bert("classifier")
    assert_refused(["generate", "classifier", "a"], "mpoe predict classifier TEXT", tmp_path, capsys)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, capsys):
    """Instead of an index that the embedding has not."""
    bert("small")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    BertForSequenceClassification(BertConfig(vocab_size=8, **sizes)).save_pretrained("small")
    assert_refused(
        ["predict", "small", "the film is great"], "in small must be the model's, whose word", tmp_path, capsys
    )
