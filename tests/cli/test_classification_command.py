"""`mpoe finetune --objective classification` with a BERT: what it reports, learns and refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel, GPT2Config, GPT2Model

import mpoe
from mpoe.cli import finetune
from mpoe.cli.main import main
from mpoe.models import mixtures
from mpoe.training.tasks import TASKS, load_task
from tiny import assert_refused, tiny_tokenizer, write_cola, write_sentiment

pytestmark = pytest.mark.filterwarnings("ignore:.*experts got under 1%:UserWarning")
FLAGS = (
    "--objective classification --model_name_or_path model --task cola --data_dir data --output_dir run "
    "--num_experts 2 --use_cpu --max_steps 4 --save_steps 2 --per_device_train_batch_size 4 --disable_tqdm True"
).split()
QUICK = [*FLAGS, "--max_steps", "2", "--save_strategy", "no"]
DENSE = ["--moe_type", "none", "--mpo_layers", "nompo"]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def bert_tokenizer():
    """Marks pairs as BERT's does."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A </s>", pair="<unk> $A </s> $B:1 </s>:1", special_tokens=[("</s>", 1), ("<unk>", 2)]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


@pytest.fixture
def ground(tmp_path, monkeypatch):
    """A folder with a BERT and tasks, and the working directory of a test."""
    monkeypatch.chdir(tmp_path)
    BertModel(BertConfig(**SIZES, initializer_range=0.2)).save_pretrained("model")
    bert_tokenizer().save_pretrained("model")
    write_cola(write_sentiment(tmp_path / "data"))
    for name, header in (("MRPC", "Quality\t#1 String\t#2 String"), ("STS-B", "sentence1\tsentence2\tscore")):
        Path(f"data/{name}").mkdir()
        for file, rows in (("train", 24), ("dev", 12)):
            pairs = [("the film is great", "it was great" if i % 2 else "it was dull .", i % 2) for i in range(rows)]
            lines = [f"{c}\t{a}\t{b}" if name == "MRPC" else f"{a}\t{b}\t{4.0 * c}" for a, b, c in pairs]
            Path(f"data/{name}/{file}.tsv").write_text("\n".join([header, *lines]) + "\n")
    return tmp_path


def predictions(task):
    """Of the saved model, text by text, without padding: (logits, labels) of the whole development set."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained("run").eval(), bert_tokenizer()
    rows = load_task(TASKS[task], "data", 42, in_columns=True).dev
    with torch.no_grad():
        texts = ([row[name] for name in TASKS[task].columns] for row in rows)
        logits = [model(**tokenizer(*pair, return_tensors="pt")).logits[0].numpy() for pair in texts]
    return np.array(logits), np.array(rows["label"])


def test_what_is_reported_is_what_the_saved_model_says(ground):
    result = finetune.run([*QUICK, "--task", "mrpc", "--eval_strategy", "steps", "--eval_steps", "1"])
    splits = result.tasks["mrpc"]
    assert {split: metrics["rows"] for split, metrics in splits.items()} == {"validation": 6, "test": 6, "dev": 12}
    logits, labels = predictions("mrpc")
    assert splits["dev"]["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
    log_p = torch.tensor(logits).log_softmax(-1)[range(12), labels]
    assert splits["dev"]["cross_entropy"] == pytest.approx(-log_p.mean().item(), rel=1e-4)
    assert result.average["test"] == splits["test"]["accuracy"]
    model = mpoe.from_pretrained("run")
    assert len(mixtures(model)) == 2, "experts are in every layer"
    assert model.config.problem_type == "single_label_classification"


def test_scores_are_a_regression(ground):
    result = finetune.run([*QUICK, "--task", "stsb", "--learning_rate", "1e-2"])
    dev = result.tasks["stsb"]["dev"]
    assert list(dev) == ["pearson", "spearman", "mean_squared_error", "rows"]
    logits, scores = predictions("stsb")
    assert dev["mean_squared_error"] == pytest.approx(((logits[:, 0] - scores) ** 2).mean(), rel=1e-4)
    expected = np.corrcoef(logits[:, 0].clip(0, 5), scores)[0, 1]
    assert dev["pearson"] == pytest.approx(expected, abs=1e-4)


def test_it_learns_and_names_its_labels(ground):
    result = finetune.run(
        [*FLAGS, "--task", "sentiment", "--max_steps", "40", "--learning_rate", "3e-3", "--dropout", "0"]
    )
    assert result.tasks["sentiment"]["test"]["accuracy"] == 1.0
    assert AutoModelForSequenceClassification.from_pretrained("run").config.id2label == {0: "negative", 1: "positive"}


def test_the_head_trains_whatever_is_frozen(ground):
    for flags in ("--freeze_model", "--freeze_encoder", "--freeze_model_but_lm_head", "--freeze_embeds"):
        finetune.run([*QUICK, flags, "--output_dir", flags[2:], *([] if flags == "--freeze_model" else DENSE)])
        before = BertModel.from_pretrained("model").state_dict()
        after = AutoModelForSequenceClassification.from_pretrained(flags[2:]).state_dict()
        assert after["classifier.bias"].abs().max() > 0, "it starts at 0"
        moved = {name for name in before if not torch.equal(before[name], after.get(f"bert.{name}", before[name]))}
        frozen = "embeddings.word_embeddings" if flags == "--freeze_embeds" else ""
        assert not {name for name in moved if name.startswith(frozen)}
        assert bool(moved) == (flags == "--freeze_embeds")


def test_a_tokenizer_without_padding_pads_with_its_end_token(ground):
    """GPT-2's; its head reads the last token that is no padding."""
    sizes = {"vocab_size": 64, "n_positions": 128, "n_embd": 32, "n_layer": 1, "n_head": 4}
    GPT2Model(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).save_pretrained("model")
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.pad_token = None
    tokenizer.save_pretrained("model")
    assert AutoTokenizer.from_pretrained("model").pad_token is None
    finetune.run([*QUICK, *DENSE, "--dropout", "0"])
    config = json.loads(Path("run/config.json").read_text())
    assert config["pad_token_id"] == 1
    assert (config["resid_pdrop"], config["attn_pdrop"]) == (0, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "cola", "mrpc"], "tasks must be one with objective classification, whose head is that task's"),
        (["--eval_tasks", "cola"], "eval_tasks must be left out with objective classification"),
        (["--max_target_length", "8", "--temperature", "2"], "max_target_length, temperature must be left out"),
        (
            ["--block_size", "8"],
            "block_size must be left out with objective classification; or choose --objective caus",
        ),
        (["--task", "stsb", "--label_smoothing_factor", "0.1"], "label_smoothing_factor is about classes"),
        (["--task", "words.yaml"], "free text: choose --objective text-to-text"),
        (["--model_name_or_path", "three"], "must be a folder with a config.json and a complete Transformers model"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_nothing_written(ground, capsys, flags, message):
    Path("words.yaml").write_text("name: words\ntemplate: '{sentence}'\nmetrics: [bleu]\ntrain: words.csv\n")
    Path("words.csv").write_text("sentence,label\n" + "a film,good\n" * 20)
    AutoModelForSequenceClassification.from_config(BertConfig(**SIZES, num_labels=3)).save_pretrained("three")
    bert_tokenizer().save_pretrained("three")
    assert_refused(["finetune", *FLAGS, *flags], message, ground, capsys)


def test_a_finished_run_is_shown_again(ground, capsys):
    finetune.run(QUICK)
    assert main(["finetune", *QUICK]) == 0
    assert "Found a finished run of this command" in capsys.readouterr().out
