"""The thin join to `transformers.Seq2SeqTrainer`: its loss with the routers' part, its evaluation, two callbacks.

Nothing is subclassed. The Trainer takes a loss function; ours divides by all target tokens of an accumulated batch
(T5's own loss does not), so a step is the same however it is cut into micro-batches.
"""

from __future__ import annotations

import functools
import operator
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    TrainerCallback,
)

from mpoe.models import expert_shares, reset_usage, routers, take_router_loss
from mpoe.training.arguments import FinetuneTrainingArguments
from mpoe.training.metrics import compute_metrics
from mpoe.training.sampler import TaskMixture
from mpoe.training.tasks import Task

IGNORED = -100  # label of padding, as everywhere in Transformers
DEAD_SHARE = 0.01


def sequence_loss(
    model: PreTrainedModel, label_smoothing: float = 0.0
) -> Callable[[Any, Tensor, Tensor | int | None], Tensor]:
    """A `compute_loss_func` for the Trainer: cross-entropy per target token, plus the routers' loss.

    Args:
        model: The model that is trained; a dense one has no routers' part.
        label_smoothing: In [0, 1).

    Returns:
        A function of (output, labels, num_items_in_batch). num_items_in_batch counts the target tokens of all
        micro-batches of the step; each contributes its share of both losses.
    """

    def loss(output: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        num_targets = (labels != IGNORED).sum()
        total = torch.nn.functional.cross_entropy(
            output.logits.flatten(0, 1).float(), labels.flatten(),
            ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="sum",
        )  # fmt: skip
        num_items = num_targets if num_items_in_batch is None else num_items_in_batch
        router_loss = take_router_loss(model)
        if router_loss is not None:
            total = total + router_loss.to(total.device) * num_targets
        return total / num_items

    return loss


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: FinetuneTrainingArguments,
    train: Dataset | TaskMixture | None,
    validation: Sequence[tuple[Task, Dataset]],
    callbacks: Sequence[TrainerCallback] = (),
    optimizer: tuple[type, dict[str, Any]] | None = None,
) -> Seq2SeqTrainer:
    """A Seq2SeqTrainer for text-to-text tasks, whose metrics are those of the tasks and their average.

    Args:
        model: Dense or a mixture.
        tokenizer: The model's.
        args: All of the Trainer's own.
        train: Tokenised rows, see `tokenize`.
        validation: Tokenised rows of every task that `eval_strategy` evaluates on.
        callbacks: More callbacks.
        optimizer: Class and options; None is the Trainer's own, as `args` say.
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

    trainer = Seq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=train,  # pyright: ignore[reportArgumentType]
        eval_dataset=concatenate_datasets([rows for _, rows in validation]) if validation else None,  # pyright: ignore[reportArgumentType]
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=IGNORED),
        compute_loss_func=sequence_loss(model, args.label_smoothing_factor),
        compute_metrics=metrics,
        callbacks=list(callbacks),
    )
    trainer.optimizer_cls_and_kwargs = optimizer  # an argument of Trainer that Seq2SeqTrainer does not pass on
    return trainer


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
def evaluate(trainer: Seq2SeqTrainer, rows: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
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

    def gathered(tokens_or_nll: Tensor) -> NDArray[Any]:
        padded = trainer.accelerator.pad_across_processes(tokens_or_nll, dim=1, pad_index=IGNORED)
        return cast(Tensor, trainer.accelerator.gather_for_metrics(padded)).cpu().numpy()

    parts = []
    batches = trainer.get_test_dataloader(rows)  # pyright: ignore[reportArgumentType]
    for batch in tqdm(batches, desc=f"Evaluating {task.name}", disable=args.disable_tqdm):
        batch = trainer._prepare_inputs(batch)
        inputs = {"attention_mask": batch["attention_mask"]}
        inputs["encoder_outputs"] = model.get_encoder()(input_ids=batch["input_ids"], **inputs)
        logits = model(**inputs, labels=batch["labels"]).logits.float().transpose(1, 2)
        nll = torch.nn.functional.cross_entropy(logits, batch["labels"], ignore_index=IGNORED, reduction="none")
        generated = model.generate(**inputs, **options)
        parts.append(
            Evaluation(
                parse(task, tokenizer, gathered(generated)),
                parse(task, tokenizer, gathered(batch["labels"])),
                gathered(nll.sum(dim=1, keepdim=True))[:, 0].astype(np.float64),
            )
        )
    return functools.reduce(operator.add, parts)


@dataclass
class StepTimer(TrainerCallback):
    """Wall-clock seconds of every training step, evaluation and saving left out."""

    seconds: list[float] = field(default_factory=list)
    _started: float = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        self.seconds.append(time.perf_counter() - self._started)

    @property
    def median(self) -> float | None:
        """Seconds a step; None if no step was run."""
        return statistics.median(self.seconds) if self.seconds else None


class DeadExpertWarning(TrainerCallback):
    """Warns at every evaluation and at the end of training when an expert got under 1% of its layer's tokens."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        reset_usage(kwargs["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer, before it evaluates."""
        model = kwargs["model"]
        dead = {
            name: [e for e, share in enumerate(shares) if share < DEAD_SHARE]
            for name, shares in expert_shares(model).items()
        }
        count = sum(len(experts) for experts in dead.values())
        if count:
            total = sum(router.num_experts for router in routers(model).values())
            worst = max(dead, key=lambda name: len(dead[name]))
            warnings.warn(
                f"{count} of {total} experts got under {DEAD_SHARE:.0%} of their layer's tokens in epoch "
                f"{state.epoch:.0f}, most in {worst}: {dead[worst]}. A higher load_balancing_coef, or experts in other "
                "stacks or layers, would use them",
                stacklevel=2,
            )
        reset_usage(model)
