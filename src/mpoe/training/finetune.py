"""Fine-tune one model on one text-to-text task: load, train or resume, evaluate, save."""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from mpoe.config import MPOEConfig
from mpoe.models import (
    ParameterCount,
    clear_load_errors,
    count_parameters,
    expert_shares,
    load_tokenizer,
    mixtures,
    reset_usage,
    upcycle,
)
from mpoe.training.arguments import FinetuneTrainingArguments, ModelArguments
from mpoe.training.run_folder import RunFolder
from mpoe.training.tasks import Task, TaskData
from mpoe.training.trainer import DeadExpertWarning, StepTimer, build_trainer, evaluate, tokenize


@dataclass(frozen=True)
class FinetuneResult:
    """What a run found.

    Attributes:
        task: Name of the task.
        metrics: For each of validation, test and dev (the whole development set): the task's metrics, the cross-entropy
            in nats per row, and the number of rows.
        train_loss: Mean training loss per target token over all logged steps, those before an interruption and the
            routers' part included, nats; None if none was logged.
        steps: Optimizer steps, count.
        seconds_per_step: Median wall-clock seconds of a training step; None if every step was run before.
        parameters: Counts.
        expert_shares: Share of the evaluated tokens that each expert of each layer got.
        versions: Of Python and the libraries.
    """

    task: str
    metrics: dict[str, dict[str, float]]
    train_loss: float | None
    steps: int
    seconds_per_step: float | None
    parameters: ParameterCount
    expert_shares: dict[str, list[float]]
    versions: dict[str, str]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FinetuneResult:
        """The inverse of `dataclasses.asdict`, for a results.json."""
        return cls(**{**values, "parameters": ParameterCount(**values["parameters"])})


def load_model(arguments: ModelArguments, config: MPOEConfig | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, and upcycle it if it is to be a mixture and is dense.

    Args:
        arguments: Which model, and what of it is frozen.
        config: The mixture that it becomes; None leaves it as it is.

    Raises:
        ValueError: A folder that holds no model, or a name that no reachable hub has.
    """
    path = arguments.model_name_or_path
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"model_name_or_path must be a folder with a config.json; {path} has none")
    overrides = {} if arguments.dropout is None else {"dropout_rate": arguments.dropout}
    with clear_load_errors(path):
        model = AutoModelForSeq2SeqLM.from_pretrained(path, **overrides)
    tokenizer = load_tokenizer(path)
    if config is not None and not mixtures(model):
        upcycle(model, config)
    if arguments.freeze_embeds:
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            embedding.requires_grad_(False)
    return model, tokenizer


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    data: TaskData,
    args: FinetuneTrainingArguments,
    folder: RunFolder,
    max_source_length: int = 128,
    n_train: int | None = None,
) -> FinetuneResult:
    """Train, evaluate on validation and test, and save the model, the tokenizer and the results.

    Args:
        model: Dense or a mixture.
        tokenizer: The model's.
        task: From `mpoe.training.tasks`.
        data: Its rows.
        args: The Trainer's arguments; `output_dir` is the folder's path.
        folder: Where everything is written; its checkpoint, if any, is resumed.
        max_source_length: Tokens of an input at most.
        n_train: Train on this many rows only.
    """
    rows = data.train
    if n_train is not None and n_train < len(rows):
        rows = rows.shuffle(seed=args.seed).select(range(n_train))
    train, validation, test = (tokenize(r, tokenizer, max_source_length) for r in (rows, data.validation, data.test))
    if args.generation_max_length is None:  # the longest label, and the decoder's start token
        args.generation_max_length = 1 + max(len(labels) for labels in train["labels"])
    timer = StepTimer()
    callbacks = [timer, DeadExpertWarning()]
    trainer = build_trainer(model, tokenizer, task, args, train, validation, callbacks)
    trained = trainer.train(resume_from_checkpoint=folder.checkpoint and str(folder.checkpoint))

    reset_usage(model)
    on_validation = evaluate(trainer, validation, task, tokenizer)
    on_test = evaluate(trainer, test, task, tokenizer)
    result = FinetuneResult(
        task=task.name,
        metrics={
            "validation": on_validation.metrics(task),
            "test": on_test.metrics(task),
            "dev": (on_validation + on_test if data.dev_is_split else on_test).metrics(task),
        },
        train_loss=mean_loss(trainer.state.log_history),
        steps=trained.global_step,
        seconds_per_step=timer.median,
        parameters=count_parameters(model),
        expert_shares=expert_shares(model),
        versions={
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
    )
    folder.save(trainer.save_model, dataclasses.asdict(result))
    return result


def mean_loss(log_history: list[dict[str, Any]]) -> float | None:
    """The mean over steps of the losses that the Trainer logged.

    Its own `training_loss` leaves out what was before an interruption, but divides by all steps.

    Args:
        log_history: `trainer.state.log_history`, which a checkpoint keeps; a loss is the mean since the one before it.
    """
    logged = [(entry["step"], float(entry["loss"])) for entry in log_history if "loss" in entry]
    steps = [step - before for (step, _), before in zip(logged, [0, *(step for step, _ in logged)], strict=False)]
    return sum(n * loss for n, (_, loss) in zip(steps, logged, strict=True)) / sum(steps) if logged else None
