"""`mpoe finetune`: one model, one task, one command; interrupted, the same command resumes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from transformers import set_seed

from mpoe.cli.parsing import parse
from mpoe.models import mixtures
from mpoe.report import metrics_table, parameter_table, usage_table
from mpoe.training.arguments import (
    STACKS_FOR_LABELS,
    DataArguments,
    FinetuneTrainingArguments,
    MixtureArguments,
    ModelArguments,
)
from mpoe.training.finetune import FinetuneResult, finetune, load_model
from mpoe.training.run_folder import RunFolder
from mpoe.training.tasks import get_task, load_task

# They change what is shown or where, not what is computed: not part of "the same command".
_NOT_OF_THE_RUN = {"output_dir", "disable_tqdm", "log_level", "report_to", "run_name", "resume_from_checkpoint"}


def run(argv: Sequence[str]) -> FinetuneResult:
    """Fine-tune as the arguments say, print the tables, and return the result.

    Args:
        argv: What follows `mpoe finetune`.

    Raises:
        ValueError: Wrong input.
    """
    types = (ModelArguments, MixtureArguments, DataArguments, FinetuneTrainingArguments)
    description = "Fine-tune a model on a text-to-text task, as a mixture of experts."
    (model_args, mixture_args, data_args, args), given = parse("mpoe finetune", description, types, argv)
    return run_with(model_args, mixture_args, data_args, args, given)


def run_with(
    model_args: ModelArguments,
    mixture_args: MixtureArguments,
    data_args: DataArguments,
    args: FinetuneTrainingArguments,
    given: dict[str, Any],
) -> FinetuneResult:
    """The same with parsed arguments.

    Args:
        model_args: Which model.
        mixture_args: What it becomes.
        data_args: Which task.
        args: How it is trained.
        given: What identifies the run: the same again resumes it.
    """
    console = Console()
    config = mixture_args.mpoe_config(model_args.num_experts, args.seed, STACKS_FOR_LABELS)
    task = get_task(data_args.task)
    data = load_task(task, data_args.data_dir, args.seed)
    identity = {k: v for k, v in given.items() if k not in _NOT_OF_THE_RUN}
    found = RunFolder.find(args.output_dir, identity)
    if found is not None and found.results is not None:
        console.print(f"Found a finished run of this command in {found.path}: nothing to do. Its results:")
        result = FinetuneResult.from_dict(found.results)
    else:
        set_seed(args.seed)
        model, tokenizer = load_model(model_args, config)
        folder = RunFolder.claim(args.output_dir, identity)  # only now: wrong input so far has written nothing
        if folder.checkpoint is not None:
            console.print(f"Found an interrupted run of this command: resuming from {folder.checkpoint}")
        kind = (
            f"{len(mixtures(model))} feed-forward layers with {model_args.num_experts} experts" if config else "dense"
        )
        rows = f"{len(data.train):,} training, {len(data.validation):,} validation, {len(data.test):,} test"
        console.print(f"{model_args.model_name_or_path}: {kind}. Task {task.name}: {rows} rows.")
        result = finetune(model, tokenizer, task, data, args, folder, data_args.max_source_length, data_args.n_train)
    console.print(parameter_table({args.output_dir: result.parameters}))
    if result.expert_shares:
        console.print(usage_table(result.expert_shares))
    console.print(metrics_table(result.metrics, title=f"{task.name} after {result.steps:,} steps"))
    pace = "" if result.seconds_per_step is None else f", {result.seconds_per_step:.2f} s a step"
    loss = "not logged" if result.train_loss is None else f"{result.train_loss:.4f}"
    console.print(f"training loss {loss}{pace}; model, tokenizer and results.json in {args.output_dir}")
    return result
