"""What a classification task puts into the Trainer: the model's own loss, and rows as the tokenizer makes them."""

import datasets
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from mpoe.training.arguments import FinetuneTrainingArguments
from mpoe.training.classification import tokenize, trainer_parts
from mpoe.training.tasks import TASKS
from tiny import tiny_tokenizer


@pytest.mark.parametrize("name", ["mnli", "stsb"])
def test_the_loss_is_the_models_own_with_the_padding_masked(name, tmp_path):
    task, tokenizer = TASKS[name], tiny_tokenizer()
    is_score = task.kind == "score"
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_labels=1 if is_score else 3, problem_type="regression" if is_score else "single_label_classification",
        )
    ).eval()  # fmt: skip
    texts = [["the film", "it was great fun"], ["a film is good .", "not"], ["dull", "very dull one"]]
    columns = {column: [row[i] for row in texts] for i, column in enumerate(task.columns)}
    rows = datasets.Dataset.from_dict({**columns, "label": [0.4, 5.0, 2.5] if is_score else [2, 0, 1]})
    tokenized = tokenize(rows, task, tokenizer, 128)
    args = FinetuneTrainingArguments(output_dir=str(tmp_path), use_cpu=True, eval_strategy="no")
    parts = trainer_parts(model, tokenizer, args, task, tokenized, None)
    batch = parts.collator([dict(row) for row in tokenized])
    labels = batch.pop("labels")
    found = parts.loss(model(**batch), labels)
    alone = []
    for (first, second), label in zip(texts, rows["label"], strict=True):
        encoded = tokenizer(first, second, return_tensors="pt")
        alone.append(model(**encoded, labels=torch.tensor([label])).loss.item())
    assert found.item() == pytest.approx(sum(alone) / 3, rel=1e-5)
    assert (
        tokenize(rows, task, tokenizer, 3)["input_ids"][1]
        == tokenizer(*texts[1], max_length=3, truncation=True)["input_ids"]
    )
