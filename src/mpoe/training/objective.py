"""What an objective is: all in which learning to write answers, to choose them and to predict text differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from mpoe.training.arguments import FinetuneTrainingArguments
from mpoe.training.data_arguments import CAUSAL_LM, CLASSIFICATION, TEXT_TO_TEXT

Metrics = dict[str, dict[str, dict[str, float]]]
"""By task or corpus, then by split: validation, test, dev. The first metric is the headline; the last are counts."""

# Of the training arguments, where T5's are not fit: a rate for models without T5's scale of weights, and batches whose
# logits (tokens times vocabulary) fit in memory.
DEFAULTS: dict[str, dict[str, Any]] = {
    TEXT_TO_TEXT: {},
    CLASSIFICATION: {"learning_rate": 5e-5},
    CAUSAL_LM: {"learning_rate": 5e-5, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8},
}


@dataclass(frozen=True)
class TrainerParts:
    """What an objective puts into the Trainer.

    Attributes:
        train: Training rows; None for a Trainer that only evaluates.
        validation: Rows that `eval_strategy` evaluates on; None if there are none.
        collator: Makes a batch of rows.
        loss: A `compute_loss_func`, from `mpoe.training.trainer.step_loss`.
        metrics: A `compute_metrics`; None leaves the loss alone.
        trainer_class: Seq2SeqTrainer where answers are generated.
    """

    train: Any
    validation: Any
    collator: Callable[[list[Any]], dict[str, Any]]
    loss: Callable[..., Any]
    metrics: Callable[[Any], dict[str, float]] | None = None
    trainer_class: type[Trainer] = Trainer


class Objective(Protocol):
    """What is learned, from which data, and how it is measured; `mpoe.training.finetune.finetune` does the rest.

    Attributes:
        auto_class: Transformers' Auto class that loads the model.
        model_options: What its `from_pretrained` is told about the model's head.
    """

    auto_class: Any
    model_options: dict[str, Any]

    def prepare(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: FinetuneTrainingArguments
    ) -> TrainerParts:
        """Tokenise everything, and find what is wrong with it; nothing is written yet.

        Args:
            model: The one that will train.
            tokenizer: The model's.
            args: The Trainer's; what depends on the data is set.
        """
        ...

    def evaluate(self, trainer: Trainer) -> Metrics:
        """Measure the model on all splits.

        Args:
            trainer: After training, with what `prepare` returned.
        """
        ...
