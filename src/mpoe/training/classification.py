"""Classification: a task's answers are chosen by a head on the model, as BERT is fine-tuned."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from mpoe.training.arguments import FinetuneTrainingArguments
from mpoe.training.data_arguments import DataArguments
from mpoe.training.metrics import SCALE, compute_metrics
from mpoe.training.objective import Metrics, TrainerParts
from mpoe.training.task_data import limited
from mpoe.training.tasks import Task, TaskData
from mpoe.training.trainer import step_loss, summed_cross_entropy


class Classification:
    """The objective of one task, whose answers are classes or scores.

    Args:
        task: Of any kind but text.
        data: Its rows, in columns (see `load_task`).
        data_args: How many rows are taken, and how long they may be.

    Raises:
        ValueError: A task whose answers are free text.
    """

    auto_class = AutoModelForSequenceClassification

    def __init__(self, task: Task, data: TaskData, data_args: DataArguments) -> None:
        if task.kind == "text":
            raise ValueError(
                f"a task must have classes or scores to be learned by classification; the answers of {task.name} are "
                "free text: choose --objective text-to-text"
            )
        self.task = task
        self.data = data
        self.data_args = data_args
        self.model_options = _head(task)

    def prepare(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: FinetuneTrainingArguments
    ) -> TrainerParts:
        """See `Objective`; a tokenizer without padding (GPT-2's) pads with its end token, and the model is told.

        Raises:
            ValueError: Label smoothing of scores, or a tokenizer that can pad with nothing.
        """
        if self.task.kind == "score" and args.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor is about classes; task {self.task.name} has scores. Leave it out")
        pad_with_end_token(model, tokenizer)
        limits, data = self.data_args, self.data

        def rows_of(rows: Dataset, limit: int) -> Dataset:
            return tokenize(limited(rows, limit, args.seed), self.task, tokenizer, limits.max_source_length)

        train = rows_of(data.train, limits.n_train)
        self.rows = {
            "validation": rows_of(data.validation, limits.n_val),
            "test": rows_of(data.test, limits.n_test),
        }
        return trainer_parts(model, tokenizer, args, self.task, train, self.rows["validation"])

    def evaluate(self, trainer: Trainer) -> Metrics:
        """See `Objective`; dev is the whole development set, if all of it was evaluated."""
        logits: dict[str, NDArray[np.floating]] = {}
        targets: dict[str, NDArray[Any]] = {}
        for split, rows in self.rows.items():
            # Rows of like length go together: less padding.
            rows = rows.select(np.argsort([-len(ids) for ids in rows["input_ids"]], kind="stable"))
            prediction = trainer.predict(rows)  # pyright: ignore[reportArgumentType]
            logits[split] = _logits(prediction.predictions)
            targets[split] = cast(NDArray[Any], prediction.label_ids)
        on_dev = ["validation", "test"] if self.data.dev_is_split else ["test"]
        dev = self.data.dev
        if dev is not None and sum(len(targets[split]) for split in on_dev) == len(dev):
            logits["dev"] = np.concatenate([logits[split] for split in on_dev])
            targets["dev"] = np.concatenate([targets[split] for split in on_dev])
        return {self.task.name: {split: _measure(self.task, logits[split], targets[split]) for split in logits}}


def tokenize(rows: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Rows in columns as input_ids, attention_mask and labels.

    Args:
        rows: One text is read as it is and two as a pair; more of them in the task's template.
        task: Names the columns.
        tokenizer: The model's.
        max_length: Tokens of a row, both texts of a pair and special tokens counted; the longer text is cut.
    """

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [batch[name] for name in task.columns]
        if len(texts) > 2:
            named = (dict(zip(task.columns, row, strict=True)) for row in zip(*texts, strict=True))
            texts = [[task.source(row) for row in named]]
        encoded = cast(Any, tokenizer)(*texts, max_length=max_length, truncation=True)
        return {**encoded, "labels": batch["label"]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names, desc="Tokenizing")


def trainer_parts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: FinetuneTrainingArguments, task: Task,
    train: Dataset | None, validation: Dataset | None,
) -> TrainerParts:  # fmt: skip
    """What a task puts into a Trainer.

    Args:
        model: Dense or a mixture, with a head for the task.
        tokenizer: The model's; it pads.
        args: The Trainer's.
        task: Classes or scores.
        train: Tokenised rows, see `tokenize`.
        validation: The same, for `eval_strategy`.
    """

    def metrics(prediction: Any) -> dict[str, float]:
        of_task = score(task, _logits(prediction.predictions), prediction.label_ids)
        return {**of_task, "average_metrics": of_task[task.metrics[0]]}

    summed_loss = _squared_error if task.kind == "score" else summed_cross_entropy(args.label_smoothing_factor)
    collator = DataCollatorWithPadding(tokenizer)
    return TrainerParts(train, validation, collator, step_loss(model, summed_loss), metrics)


def score(task: Task, logits: NDArray[np.floating], targets: NDArray[Any]) -> dict[str, float]:
    """The task's metrics: of the most probable class, or of the number, clipped to the scale.

    Args:
        task: Classes or scores.
        logits: Of the head, shape (N, classes), or (N, 1) for scores.
        targets: Class indices or scores, shape (N,).
    """
    predicted = np.clip(logits[:, 0], *SCALE) if task.kind == "score" else logits.argmax(axis=1)
    return compute_metrics(task.metrics, predicted, targets)


def pad_with_end_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a padding token its end token for that, and tell the model's config.

    Args:
        model: A head that reads the last token finds it by the padding token.
        tokenizer: Changed in place.

    Raises:
        ValueError: It has no end token either.
    """
    given = cast(Any, tokenizer)
    if given.pad_token is None:
        if given.eos_token is None:
            raise ValueError("a tokenizer must have a padding token or an end token; this one has neither. Give it one")
        given.pad_token = given.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = given.pad_token_id


def _head(task: Task) -> dict[str, Any]:
    if task.kind == "score":
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "num_labels": len(task.labels),
        "id2label": dict(enumerate(task.labels)),
        "label2id": {label: i for i, label in enumerate(task.labels)},
        "problem_type": "single_label_classification",
    }


def _squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.mse_loss(logits[:, 0].float(), labels.float(), reduction="sum")


def _logits(predictions: Any) -> NDArray[np.floating]:
    """Some models put more than their logits into the output."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


def _measure(task: Task, logits: NDArray[np.floating], targets: NDArray[Any]) -> dict[str, float]:
    """The task's metrics, the cross-entropy in nats a row or the mean squared error, and the number of rows."""
    name, summed = "cross_entropy", summed_cross_entropy()
    if task.kind == "score":
        name, summed = "mean_squared_error", _squared_error
    loss = summed(torch.from_numpy(logits), torch.from_numpy(targets)).item() / len(targets)
    return {**score(task, logits, targets), name: loss, "rows": len(targets)}
