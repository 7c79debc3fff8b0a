"""Text-to-text tasks: the model writes the answer, one model for several tasks."""

from __future__ import annotations

import functools
import operator
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Trainer,
)

from mpoe.training.arguments import FinetuneTrainingArguments
from mpoe.training.data_arguments import DataArguments
from mpoe.training.metrics import compute_metrics
from mpoe.training.objective import Metrics, TrainerParts
from mpoe.training.sampler import TaskMixture
from mpoe.training.task_data import limited
from mpoe.training.tasks import Task, TaskData
from mpoe.training.trainer import IGNORED, step_loss, summed_cross_entropy


class TextToText:
    """The objective of tasks whose answers are generated.

    Args:
        data: The rows of every task that `data_args` name, by the task's name.
        data_args: Which tasks are trained and evaluated, and how much of them.
    """

    auto_class = AutoModelForSeq2SeqLM

    def __init__(self, data: Mapping[str, tuple[Task, TaskData]], data_args: DataArguments) -> None:
        self.model_options: dict[str, Any] = {}
        self.data = data
        self.data_args = data_args
        self.trained = list(data_args.tasks or ())
        self.evaluated = [data[name] for name in data_args.eval_tasks or self.trained]

    def prepare(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: FinetuneTrainingArguments
    ) -> TrainerParts:
        """See `Objective`; `generation_max_length`, unless given, becomes that of the longest target.

        Raises:
            ValueError: Several tasks and a sampling strategy, which temperature sampling is not.
        """
        limits = self.data_args

        def rows_of(rows: Dataset, limit: int) -> Dataset:
            rows = limited(rows, limit, args.seed)
            return tokenize(rows, tokenizer, limits.max_source_length, limits.max_target_length)

        train = {name: rows_of(self.data[name][1].train, limits.n_train) for name in self.trained}
        self.validation = [(task, rows_of(rows.validation, limits.n_val)) for task, rows in self.evaluated]
        self.test = [(task, rows_of(rows.test, limits.n_test)) for task, rows in self.evaluated]
        if args.generation_max_length is None:  # the longest target, and the decoder's start token
            tokenised = (*train.values(), *(rows for _, rows in self.validation))
            args.generation_max_length = 1 + max(len(labels) for rows in tokenised for labels in rows["labels"])
        train_rows = _training_set(train, args, limits.temperature)
        return trainer_parts(model, tokenizer, args, train_rows, self.validation)

    def evaluate(self, trainer: Trainer) -> Metrics:
        """See `Objective`; dev is the whole development set, if all of it was evaluated."""
        tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
        found: Metrics = {}
        for (task, data), (_, validation), (_, test) in zip(self.evaluated, self.validation, self.test, strict=True):
            on_validation = evaluate(trainer, validation, task, tokenizer)
            on_test = evaluate(trainer, test, task, tokenizer)
            found[task.name] = {"validation": on_validation.metrics(task), "test": on_test.metrics(task)}
            on_dev = on_validation + on_test if data.dev_is_split else on_test
            if data.dev is not None and len(on_dev.targets) == len(data.dev):
                found[task.name]["dev"] = on_dev.metrics(task)
        return found


def trainer_parts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: FinetuneTrainingArguments,
    train: Dataset | TaskMixture | None,
    validation: Sequence[tuple[Task, Dataset]],
) -> TrainerParts:
    """What text-to-text tasks put into a Trainer, whose metrics are those of the tasks and their average.

    Args:
        model: Dense or a mixture.
        tokenizer: The model's.
        args: The Trainer's.
        train: Tokenised rows, see `tokenize`.
        validation: Tokenised rows of every task that `eval_strategy` evaluates on.
    """

    def metrics(prediction: Any) -> dict[str, float]:
        scores, headline, first = {}, [], 0  # the rows of all tasks come one task behind the other
        for task, rows in validation:
            places = slice(first, first + len(rows))
            predicted, targets = prediction.predictions[places], prediction.label_ids[places]
            of_task = compute_metrics(task.metrics, parse(task, tokenizer, predicted), parse(task, tokenizer, targets))
            headline.append(of_task[task.metrics[0]])
            scores[task.name], first = of_task, places.stop
        average = statistics.fmean(headline)
        if len(validation) == 1:
            return {**scores[validation[0][0].name], "average_metrics": average}
        named = {f"{name}_{metric}": value for name, of_task in scores.items() for metric, value in of_task.items()}
        return {**named, "average_metrics": average}

    return TrainerParts(
        train,
        concatenate_datasets([rows for _, rows in validation]) if validation else None,
        DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=IGNORED),
        step_loss(model, summed_cross_entropy(args.label_smoothing_factor)),
        metrics,
        Seq2SeqTrainer,
    )


def tokenize(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_source_length: int, max_target_length: int = 128
) -> Dataset:
    """Rows of `source` and `target` text as input_ids, attention_mask and labels.

    Args:
        rows: Text.
        tokenizer: The model's.
        max_source_length: Tokens; longer inputs are cut.
        max_target_length: Tokens; longer targets are cut.
    """

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer(batch["source"], max_length=max_source_length, truncation=True)
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "labels": tokenizer(text_target=batch["target"], max_length=max_target_length, truncation=True)[
                "input_ids"
            ],
        }

    return rows.map(encode, batched=True, remove_columns=rows.column_names, desc="Tokenizing")


def parse(task: Task, tokenizer: PreTrainedTokenizerBase, tokens: NDArray[np.int64]) -> NDArray[Any]:
    """What the model wrote, or should have written, as class indices, scores or texts.

    Args:
        task: Knows the label texts.
        tokenizer: The model's.
        tokens: Token ids, padded with -100 or the padding token, shape (N, length).
    """
    tokens = np.where(tokens == IGNORED, cast(int, tokenizer.pad_token_id), tokens)
    return np.array([task.parse(text) for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)])


@dataclass
class Evaluation:
    """Predictions on one split, row by row.

    Attributes:
        predictions: Class indices, scores or texts, as generated, shape (N,).
        targets: The right ones, shape (N,).
        target_nll: -log p(target text), nats per row, shape (N,).
    """

    predictions: NDArray[Any]
    targets: NDArray[Any]
    target_nll: NDArray[np.float64]

    def metrics(self, task: Task) -> dict[str, float]:
        """The task's metrics, the cross-entropy in nats per row, and the number of rows."""
        scores = compute_metrics(task.metrics, self.predictions, self.targets)
        return {**scores, "cross_entropy": float(self.target_nll.mean()), "rows": len(self.targets)}

    def __add__(self, other: Evaluation) -> Evaluation:
        """Both splits as one."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Evaluation(*(np.concatenate(pair) for pair in pairs))


@torch.no_grad()
def evaluate(trainer: Trainer, rows: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
    """Generate an answer to every row, and score the right one; both from one pass through the encoder.

    Args:
        trainer: From `build_trainer`.
        rows: Tokenised rows.
        task: Parses the answers.
        tokenizer: The model's.

    Returns:
        Evaluation, in an order of its own.
    """
    # Rows of like length go together: on sentences that halves the padding and the time.
    rows = rows.select(np.argsort([-len(ids) for ids in rows["input_ids"]], kind="stable"))
    model = cast(Any, trainer.model).eval()
    args = cast(FinetuneTrainingArguments, trainer.args)
    options = {"max_length": args.generation_max_length, "num_beams": args.generation_num_beams}
    options = {name: value for name, value in options.items() if value is not None}
    is_sharded = isinstance(trainer.model, FSDPModule)
    if is_sharded:
        options["synced_gpus"] = True  # a process whose answers are finished takes part in gathering for the others

    def gathered(tokens_or_nll: Tensor) -> NDArray[Any]:
        padded = trainer.accelerator.pad_across_processes(tokens_or_nll, dim=1, pad_index=IGNORED)
        return cast(Tensor, trainer.accelerator.gather_for_metrics(padded)).cpu().numpy()

    parts = []
    batches = trainer.get_test_dataloader(rows)  # pyright: ignore[reportArgumentType]
    for batch in tqdm(batches, desc=f"Evaluating {task.name}", disable=args.disable_tqdm or args.process_index > 0):
        batch = trainer._prepare_inputs(batch)
        inputs = {"attention_mask": batch["attention_mask"]}
        if is_sharded:
            model.unshard()  # what only a call of the whole model would gather
        with trainer.accelerator.autocast():  # in the precision of training, which the encoder alone knows nothing of
            inputs["encoder_outputs"] = model.get_encoder()(input_ids=batch["input_ids"], **inputs)
            logits = model(**inputs, labels=batch["labels"]).logits.float().transpose(1, 2)
            generated = model.generate(**inputs, **options)
        nll = torch.nn.functional.cross_entropy(logits, batch["labels"], ignore_index=IGNORED, reduction="none")
        parts.append(
            Evaluation(
                parse(task, tokenizer, gathered(generated)),
                parse(task, tokenizer, gathered(batch["labels"])),
                gathered(nll.sum(dim=1, keepdim=True))[:, 0].astype(np.float64),
            )
        )
    return functools.reduce(operator.add, parts)


def _training_set(train: Mapping[str, Any], args: FinetuneTrainingArguments, temperature: float) -> Any:
    if len(train) == 1:
        return next(iter(train.values()))
    if args.train_sampling_strategy != "random":
        raise ValueError(
            f"several tasks are drawn by temperature; leave train_sampling_strategy out, got "
            f"{args.train_sampling_strategy!r}"
        )
    args.train_sampling_strategy = "sequential"  # the order is the mixture's own
    rows_a_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    return TaskMixture(train, rows_a_step, temperature, args.seed)
