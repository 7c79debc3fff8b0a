"""Measure a model that somebody has: on a task's test rows, or on a text; the same numbers that fine-tuning writes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mpoe.training.arguments import FinetuneTrainingArguments
from mpoe.training.classification import Classification
from mpoe.training.corpus import TokenizedText, bos_of
from mpoe.training.data_arguments import DataArguments
from mpoe.training.objective import Objective
from mpoe.training.perplexity import block_and_stride, perplexity
from mpoe.training.tasks import Task, TaskData
from mpoe.training.text_to_text import TextToText
from mpoe.training.trainer import build_trainer


@dataclass(frozen=True)
class TaskYardstick:
    """A task's test rows, for models that write or choose its answers.

    Args:
        task: What is asked.
        rows: The task's; in columns for a classifier.
        is_classifier: Whether the model chooses its answers with a head, and does not write them.
        data_args: How many rows; `tasks` are this one's name.
        batch_size: Rows that go through the model at once.
        seed: Of the rows that are drawn.
    """

    task: Task
    rows: TaskData
    is_classifier: bool
    data_args: DataArguments
    batch_size: int
    seed: int = 0

    def metrics(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
        """The task's metrics, the cross-entropy in nats a row and the number of rows, of the test rows."""
        objective = self._objective()
        with tempfile.TemporaryDirectory() as folder:
            args = self._arguments(folder)
            trainer = build_trainer(model, tokenizer, args, objective.prepare(model, tokenizer, args))
            return objective.evaluate(trainer)[self.task.name]["test"]

    @torch.no_grad()
    def run_training_rows(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int) -> None:
        """Training rows through a model in evaluation mode, for what hooks see of it.

        Args:
            model: Any of the kind.
            tokenizer: The model's.
            tokens: Of inputs, count; the batch that reaches it is the last.
        """
        objective, taken = self._objective(), 0
        with tempfile.TemporaryDirectory() as folder:
            parts = objective.prepare(model, tokenizer, self._arguments(folder))
        model.eval()
        with tqdm(desc="Calibrating", total=tokens, unit=" tokens") as bar:
            for start in range(0, len(parts.train), self.batch_size):
                rows = parts.train.select(range(start, min(start + self.batch_size, len(parts.train))))
                batch = parts.collator(list(rows))
                model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
                count = int(batch["attention_mask"].sum())
                taken += count
                bar.update(count)
                if taken >= tokens:
                    return

    def _objective(self) -> Objective:
        if self.is_classifier:
            return Classification(self.task, self.rows, self.data_args)
        return TextToText({self.task.name: (self.task, self.rows)}, self.data_args)

    def _arguments(self, folder: str) -> FinetuneTrainingArguments:
        return FinetuneTrainingArguments(
            output_dir=folder, per_device_eval_batch_size=self.batch_size, report_to="none", seed=self.seed,
            use_cpu=not torch.accelerator.is_available(),
        )  # fmt: skip


@dataclass(frozen=True)
class TextYardstick:
    """A text, for causal language models.

    Args:
        text: Its tokens.
        batch_size: Windows that go through the model at once.
        block_size: Tokens of a window; None is as in `block_and_stride`.
        stride: Tokens from one window to the next; None is as there.
    """

    text: TokenizedText
    batch_size: int
    block_size: int | None = None
    stride: int | None = None

    def metrics(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
        """See `mpoe.training.perplexity.Perplexity`."""
        block, stride = block_and_stride(model, tokenizer, self.block_size, self.stride)
        return perplexity(model, self.text, block, stride, self.batch_size, bos_of(tokenizer)).metrics()
