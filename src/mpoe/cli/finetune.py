"""`mpoe finetune`: one model, its data, one command; interrupted, the same command resumes it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel, set_seed

from mpoe.cli.parsing import parse, without_defaults
from mpoe.config import MPOEConfig
from mpoe.models import component_modules, is_upcycled, mpoe_config, routers, set_compute
from mpoe.report import (
    PlainConsole,
    layers_of_stacks,
    metrics_table,
    parameter_table,
    router_table,
    trained_table,
)
from mpoe.training.arguments import (
    STACKS_FOR_LABELS,
    FinetuneTrainingArguments,
    MixtureArguments,
    ModelArguments,
    TrainableArguments,
)
from mpoe.training.classification import Classification
from mpoe.training.corpus import Corpus
from mpoe.training.data_arguments import (
    CAUSAL_LM,
    CLASSIFICATION,
    TEXT_TO_TEXT,
    CorpusArguments,
    DataArguments,
    check_flags,
)
from mpoe.training.finetune import ADAPTER_FOLDER, FinetuneResult, finetune
from mpoe.training.language_modeling import CausalLM
from mpoe.training.load import config_of_model, load_model, mixture_changes, whole_weights
from mpoe.training.objective import DEFAULTS, Objective
from mpoe.training.optimizer import trained_parts
from mpoe.training.run_folder import RESULTS_FILE, RunFolder
from mpoe.training.tasks import Task, TaskData, get_task, load_task
from mpoe.training.text_to_text import TextToText

# They change what is shown or where, not what is computed: not part of "the same command".
_NOT_OF_THE_RUN = {
    "output_dir", "disable_tqdm", "log_level", "report_to", "run_name",
    "per_device_train_batch_size", "gradient_accumulation_steps",
}  # fmt: skip
# Flags with the reference's names, and the fields of `MPOEConfig` that they set.
_FIELDS = {
    "linear_trunc": "max_bond_dim",
    "emb_trunc": "word_embed_bond_dim",
    "attention_trunc": "attention_bond_dim",
    "switch_dropout": "expert_dropout",
}


def run(argv: Sequence[str]) -> FinetuneResult:
    """Fine-tune as the arguments say, print the tables, and return the result.

    Args:
        argv: What follows `mpoe finetune`.

    Raises:
        ValueError: Wrong input.
    """
    types = (
        ModelArguments, MixtureArguments, TrainableArguments, DataArguments, CorpusArguments, FinetuneTrainingArguments,
    )  # fmt: skip
    description = "Fine-tune a model as a mixture of experts, on text-to-text tasks or another objective."
    arguments, given = parse("mpoe finetune", description, types, argv)
    model_args, mixture_args, trainable, data_args, corpus_args, args = arguments
    # a config file's null leaves a flag out
    asked = {name for name, value in given.items() if value is not None}
    check_flags(data_args, corpus_args, asked)
    _check_processes(args)
    for name, value in DEFAULTS[data_args.objective].items():
        if name not in asked:
            setattr(args, name, value)
    identity = {k: v for k, v in without_defaults(types, given).items() if k not in _NOT_OF_THE_RUN}
    # How the rows of a step are cut is not what is computed either, so that a run may move to more or fewer processes.
    identity["rows_a_step"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    console = PlainConsole(quiet=args.process_index > 0)
    folder = RunFolder.open(args.output_dir, identity)
    if folder.results is not None:
        console.print(f"Found a finished run of this command in {folder.path}: nothing to do. Its results:")
        result = FinetuneResult.read(folder.path / RESULTS_FILE)
    else:
        result = _finetune(model_args, mixture_args, trainable, data_args, corpus_args, args, folder, console, asked)
    _print_result(console, result, args.output_dir)
    return result


def _finetune(
    model_args: ModelArguments, mixture_args: MixtureArguments, trainable: TrainableArguments,
    data_args: DataArguments, corpus_args: CorpusArguments, args: FinetuneTrainingArguments, folder: RunFolder,
    console: PlainConsole, asked: Collection[str],
) -> FinetuneResult:  # fmt: skip
    tasks = _named_tasks(data_args)
    with_labels = data_args.objective == TEXT_TO_TEXT and any(task.kind != "text" for task in tasks.values())
    config = mixture_args.mpoe_config(model_args.num_experts, args.seed, STACKS_FOR_LABELS if with_labels else None)
    trainable.freezing()  # a wrong flag or name should not wait for data and weights
    config_of_model(model_args.model_name_or_path)
    if 0 < trainable.gradient_mask_prob < 1 and (config is None or not config.mpo_layers):
        raise ValueError("gradient_mask_prob is about the central tensors of MPOs; leave it out, or see --mpo_layers")
    objective = _objective(data_args, corpus_args, tasks, args.seed, console)
    set_seed(args.seed)
    console.print(f"Loading {model_args.model_name_or_path} ...")
    with whole_weights(args):
        model, tokenizer = load_model(model_args, config, trainable, objective.auto_class, objective.model_options)
    if getattr(model, "is_quantized", False):
        raise ValueError(
            f"model_name_or_path must be a model in floating point; the weights of {model_args.model_name_or_path} are "
            "quantised. Around a quantised base experts are trained in Python, as examples/quantized.py does"
        )
    _check_mixture_flags(model, config, asked)
    if folder.checkpoint is not None:
        console.print(f"Found an interrupted run of this command: resuming from {folder.checkpoint}")
    found = list(routers(model).values())
    components = ", ".join(component_modules(model))
    kind = f"MPOs without a mixture ({components})" if is_upcycled(model) else "dense"
    if found:
        experts = f"{found[0].num_experts} experts, {found[0].top_k} for a token"
        kind = f"{layers_of_stacks(model)} with {experts}; changed: {components}"
    console.print(f"{model_args.model_name_or_path}: {kind}.")
    console.print(trained_table(trained_parts(model, args.learning_rate, trainable.mpo_lr)))
    return finetune(model, tokenizer, objective, args, folder, trainable)


def _check_processes(args: FinetuneTrainingArguments) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and args.world_size == 1:  # each of them would train by itself, in the same folder
        raise ValueError(
            f"{started} processes were started, and must find an accelerator each; there is none that torch can use: "
            "add --use_cpu to train on the CPU, or start one process"
        )


def _objective(
    data_args: DataArguments, corpus_args: CorpusArguments, tasks: Mapping[str, Task], seed: int, console: PlainConsole
) -> Objective:
    """The objective with its rows, or with the places of its text."""
    if data_args.objective == CAUSAL_LM:
        corpus = Corpus.open(corpus_args)
        console.print(f"Text: {corpus.describe()}.")
        return CausalLM(corpus, corpus_args, console.print)
    data = {}
    for name, task in tasks.items():
        where = data_args.data_dir or (f"the hub ({task.hub})" if task.hub else "its files")
        console.print(f"Loading task {name} from {where} ...")
        data[name] = task, load_task(task, data_args.data_dir, seed, in_columns=data_args.objective == CLASSIFICATION)
        console.print(_rows_of(name, data[name][1], data_args))
    if data_args.objective == CLASSIFICATION:
        ((task, rows),) = data.values()
        return Classification(task, rows, data_args)
    return TextToText(data, data_args)


def _check_mixture_flags(model: PreTrainedModel, config: MPOEConfig | None, asked: Collection[str]) -> None:
    """Refuse flags that say something else than a model that had been upcycled before; `asked` are those given."""
    saved = mpoe_config(model)
    if saved is None or saved is config:
        return
    if config is None:
        raise ValueError("the model must be dense to be trained as a dense one; it has been upcycled before")
    how = {"compute", "matrix_cache_gib", "matrix_save_gib"} & set(asked)  # says nothing about what the model is
    for name in how:
        setattr(saved, name, getattr(config, name))
    set_compute(model, saved)
    # further training may have a seed of its own
    fields = {_FIELDS.get(flag, flag) for flag in asked} - {"seed", *how}
    names = [field.name for field in dataclasses.fields(config) if field.name in fields]
    if changes := mixture_changes(saved, config, names):
        raise ValueError(
            f"the model has been upcycled before and stays what it is ({changes}); leave these flags out, or start "
            "from its dense base"
        )


def _named_tasks(data_args: DataArguments) -> dict[str, Task]:
    """All tasks; their names in the arguments become the tasks' own."""
    named = [get_task(name) for name in data_args.tasks or ()]
    evaluated = named if data_args.eval_tasks is None else [get_task(name) for name in data_args.eval_tasks]
    data_args.tasks, data_args.eval_tasks = [task.name for task in named], [task.name for task in evaluated]
    for flag, names in (("tasks", data_args.tasks), ("eval_tasks", data_args.eval_tasks)):
        if len(set(names)) < len(names):
            raise ValueError(f"{flag} must name every task once; got {', '.join(names)}")
    return {task.name: task for task in (*named, *evaluated)}


def _rows_of(name: str, data: TaskData, data_args: DataArguments) -> str:
    counts = []
    for split, rows, limit in (
        ("training", data.train, data_args.n_train),
        ("validation", data.validation, data_args.n_val),
        ("test", data.test, data_args.n_test),
    ):
        taken = f"{limit:,} of " if 0 < limit < len(rows) else ""
        counts.append(f"{taken}{len(rows):,} {split}")
    origin = "; its development set is halved into validation and test" if data.dev_is_split else ""
    if data.dev is None:
        origin = "; without a development set, validation and test are a tenth of the training rows each"
    return f"Task {name}: {', '.join(counts)} rows{origin}."


def _print_result(console: PlainConsole, result: FinetuneResult, output_dir: str) -> None:
    console.print(parameter_table({output_dir: result.parameters}))
    if result.routers:
        console.print(router_table(result.routers))
    for name, metrics in result.tasks.items():
        unit = "token" if "tokens" in next(iter(metrics.values())) else "row"
        step = "" if result.best_step in (None, result.steps) else f"step {result.best_step:,}, the best of "
        title = f"{name} after {step}{result.steps:,} steps (cross-entropy: nats a {unit})"
        console.print(metrics_table(metrics, title))
    for name, metrics in (result.shuffled or {}).items():
        title = f"{name} with the routing shuffled: what this costs is what the routers do"
        console.print(metrics_table(metrics, title))
    if len(result.tasks) > 1:
        console.print(
            f"average of the tasks' first metrics: validation {result.average['validation']:.4f}, "
            f"test {result.average['test']:.4f}"
        )
    if result.gradient_mask is not None:
        drawn, discarded = result.gradient_mask["drawn"], result.gradient_mask["discarded"]
        console.print(f"gradient mask: {discarded:,} of {drawn:,} updates of central tensors discarded")
    pace = "" if result.seconds_per_step is None else f", {result.seconds_per_step:.2f} s a step"
    pace += "" if result.tokens_per_second is None else f", {result.tokens_per_second:,.0f} input tokens a second"
    loss = (
        "not logged"
        if result.train_loss is None
        else f"{result.train_loss:.4f} nats a target (a token of an answer, or a label)"
    )
    console.print(
        f"training loss {loss}{pace}, peak memory {result.peak_memory / 2**30:.1f} GiB; model, tokenizer and "
        f"results.json in {output_dir}"
    )
    if result.adapter_bytes is not None:
        full = sum(file.stat().st_size for file in Path(output_dir).glob("*.safetensors"))
        console.print(
            f"adapter in {Path(output_dir) / ADAPTER_FOLDER}: {result.adapter_bytes / 1e6:.1f} MB instead of the "
            f"model's {full / 1e6:.1f} MB"
        )
