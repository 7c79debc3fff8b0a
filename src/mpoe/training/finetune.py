"""Fine-tune one model on text-to-text tasks: load, train or resume, evaluate, save."""

from __future__ import annotations

import dataclasses
import platform
import resource
import statistics
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
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
    component_modules,
    count_parameters,
    from_pretrained,
    is_upcycled,
    load_tokenizer,
    mpo_experts,
    mpoe_config,
    reset_usage,
    router_statistics,
    save_adapter,
    upcycle,
)
from mpoe.models.adapter import WEIGHTS_FILE
from mpoe.nn import Accumulation, RouterStatistics
from mpoe.training.accumulation import AccumulationCallback
from mpoe.training.arguments import DataArguments, FinetuneTrainingArguments, ModelArguments, TrainableArguments
from mpoe.training.gradient_mask import GradientMask, GradientMaskCallback
from mpoe.training.optimizer import TrainedPart, optimizer_with_mpo_rate, trained_parts
from mpoe.training.run_folder import RunFolder
from mpoe.training.sampler import TaskMixture
from mpoe.training.tasks import Task, TaskData
from mpoe.training.trainer import DeadExpertWarning, StepTimer, build_trainer, evaluate, tokenize

ADAPTER_FOLDER = "adapter"
# Of a mixture's config, what its weights mean. A type says no more than its top_k, and sites are seen in the weights.
_FUNCTION = ("num_experts", "top_k", "layout", "gauge", "is_scale_prob", "expert_bias", "router_input_norm")


@dataclass(frozen=True)
class FinetuneResult:
    """What a run found.

    Attributes:
        tasks: By task, then for each of validation, test and dev (the whole development set, if all of it was
            evaluated): the task's metrics, the cross-entropy in nats per row, and the number of rows.
        average: For validation and test, the mean over tasks of their first metric.
        train_loss: Mean training loss per target token over all logged steps, those before an interruption and the
            routers' part included, nats; None if none was logged.
        steps: Optimizer steps, count.
        seconds_per_step: Median wall-clock seconds of a training step; None if every step was run before.
        peak_memory: Largest memory of the process (on a GPU: of its tensors) since it started, bytes.
        parameters: Counts.
        trained: What trained, and at which rate.
        routers: How each layer's router spread the evaluated tokens.
        gradient_mask: Updates of central tensors that could have been discarded, and that were; None without a mask.
        adapter_bytes: Size of the adapter's weights; None if none was saved.
        versions: Of Python and the libraries.
    """

    tasks: dict[str, dict[str, dict[str, float]]]
    average: dict[str, float]
    train_loss: float | None
    steps: int
    seconds_per_step: float | None
    peak_memory: int
    parameters: ParameterCount
    trained: list[TrainedPart]
    routers: dict[str, RouterStatistics]
    gradient_mask: dict[str, int] | None
    adapter_bytes: int | None
    versions: dict[str, str]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FinetuneResult:
        """The inverse of `dataclasses.asdict`, for a results.json.

        Args:
            values: What the file holds.

        Raises:
            ValueError: Another version of mpoe wrote it, or something else.
        """
        try:
            return cls(
                **{
                    **values,
                    "parameters": ParameterCount(**values["parameters"]),
                    "trained": [TrainedPart(**part) for part in values["trained"]],
                    "routers": {name: RouterStatistics(**router) for name, router in values["routers"].items()},
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"a results.json must be what this version of mpoe wrote; got one without its fields ({error}); run it "
                "anew in another folder"
            ) from error


def load_model(
    arguments: ModelArguments, config: MPOEConfig | None, trainable: TrainableArguments | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, and upcycle it if that is asked for and it is dense.

    Args:
        arguments: Which model, and what is loaded over it.
        config: What it becomes; None leaves it as it is.
        trainable: What of it trains; None is all.

    Raises:
        ValueError: A folder that holds no model, or a name that no reachable hub has; a flag that does not fit it.
    """
    path = arguments.model_name_or_path
    components = arguments.components_to_load()
    freezing = None if trainable is None else trainable.freezing()
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"model_name_or_path must be a folder with a config.json; {path} has none")
    overrides = {} if arguments.dropout is None else {"dropout_rate": arguments.dropout}
    with clear_load_errors(path):
        model = AutoModelForSeq2SeqLM.from_pretrained(path, **overrides)
    tokenizer = load_tokenizer(arguments.tokenizer_name or path)
    if config is not None and not is_upcycled(model):
        upcycle(model, config)
    if arguments.load_experiment is not None:
        load_experiment(model, arguments.load_experiment, components)
    if freezing is not None:
        freezing.apply(model)
    return model, tokenizer


@torch.no_grad()
def load_experiment(model: PreTrainedModel, path: str, components: Sequence[str] | None = None) -> None:
    """Take weights from an upcycled model of the same shapes.

    Args:
        model: Gets them.
        path: Folder of a saved model, or a checkpoint of a run.
        components: Of `mpoe.config.COMPONENTS`: only their MPOs, experts and routers; None is the whole model.

    Raises:
        ValueError: A folder without such a model, a component that the two have not in the same modules, or other
            shapes.
    """
    source = from_pretrained(path)
    here, there = mpoe_config(model), mpoe_config(source)
    if here is not None and there is not None and (changes := mixture_changes(there, here, _FUNCTION)):
        raise ValueError(f"the mixture in {path} must be one of these flags ({changes}); repeat those it has")
    for target, other in [(model, source)] if components is None else _pairs(model, source, path, components):
        try:
            target.load_state_dict(other.state_dict())
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"the model in {path} must have the same layers, experts and site dimensions; {reason}. Repeat the "
                "flags that it was made with"
            ) from error


def mixture_changes(there: MPOEConfig, now: MPOEConfig, names: Iterable[str]) -> str:
    """What of a saved mixture is otherwise now, for an error message; empty if nothing.

    Args:
        there: The saved mixture's.
        now: What is asked for.
        names: The fields of `MPOEConfig` that count; a `top_k` is the number that it comes to, given or the type's own.
    """
    saved, asked = (dataclasses.replace(config, top_k=config.experts_per_token) for config in (there, now))
    return saved.changes_to(asked, names)


def _pairs(
    model: PreTrainedModel, source: PreTrainedModel, path: str, components: Sequence[str]
) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    """The modules of these components and their namesakes in the source."""
    pairs = []
    for component in components:
        here, there = (component_modules(m).get(component, {}) for m in (model, source))
        if not here or here.keys() != there.keys():
            raise ValueError(
                f"load_layer names {component}, so the model and {path} must have its MPOs, experts or routers in the "
                f"same modules; both have them in {_some(here.keys() & there.keys())}, only the model in "
                f"{_some(here.keys() - there.keys())}, only {path} in {_some(there.keys() - here.keys())}. Repeat the "
                f"--mpo_layers, --stacks and --layers that it was made with, or leave {component} out of --load_layer"
            )
        pairs += [(module, there[name]) for name, module in here.items()]
    return pairs


def _some(names: Collection[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(sorted(names)[:shown]) + more if names else "none"


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, tuple[Task, TaskData]],
    args: FinetuneTrainingArguments,
    folder: RunFolder,
    data_args: DataArguments,
    trainable: TrainableArguments | None = None,
) -> FinetuneResult:
    """Train, evaluate on validation and test, and save the model, the tokenizer and the results.

    Args:
        model: Dense or a mixture, with its parameters frozen or not.
        tokenizer: The model's.
        data: The rows of every task that `data_args` name, by the task's name.
        args: The Trainer's arguments; `output_dir` is the folder's path.
        folder: Where everything is written, claimed here; its checkpoint, if any, is resumed.
        data_args: Which tasks are trained and evaluated, and how much of them.
        trainable: The rate of the MPOs and the gradient mask; None is neither.
    """

    def rows_of(rows: Any, limit: int) -> Any:
        rows = rows.shuffle(seed=args.seed).select(range(limit)) if 0 < limit < len(rows) else rows
        return tokenize(rows, tokenizer, data_args.max_source_length, data_args.max_target_length)

    train = {name: rows_of(data[name][1].train, data_args.n_train) for name in data_args.tasks}
    eval_tasks = [data[name] for name in data_args.eval_tasks or data_args.tasks]
    validation = {task.name: rows_of(rows.validation, data_args.n_val) for task, rows in eval_tasks}
    test = {task.name: rows_of(rows.test, data_args.n_test) for task, rows in eval_tasks}
    if args.generation_max_length is None:  # the longest target, and the decoder's start token
        targets = [labels for rows in (*train.values(), *validation.values()) for labels in rows["labels"]]
        args.generation_max_length = 1 + max(map(len, targets))

    timer = StepTimer()
    callbacks: list[transformers.TrainerCallback] = [timer, DeadExpertWarning()]
    optimizer = mask = None
    if trainable is not None and trainable.mpo_lr is not None:
        optimizer = optimizer_with_mpo_rate(model, args, trainable.mpo_lr)
    if trainable is not None and 0 < trainable.gradient_mask_prob < 1:
        mask = GradientMask(model, trainable.gradient_mask_prob, trainable.gradient_mask_level, args.seed)
        callbacks.append(GradientMaskCallback(mask))
    if args.gradient_accumulation_steps > 1 and (accumulation := _accumulation(model)) is not None:
        callbacks.append(AccumulationCallback(accumulation))
    train_rows = _training_set(train, args, data_args.temperature)
    folder.claim()  # only now: wrong input so far has written nothing
    use_cache = model.config.use_cache
    trainer = build_trainer(
        model, tokenizer, args, train_rows, [(task, validation[task.name]) for task, _ in eval_tasks], callbacks,
        optimizer,
    )  # fmt: skip
    done = trainer.train(resume_from_checkpoint=folder.checkpoint and str(folder.checkpoint))
    model.config.use_cache = use_cache  # the Trainer turns it off, and it would be saved so

    reset_usage(model)
    metrics = {}
    for task, rows in eval_tasks:
        on_validation = evaluate(trainer, validation[task.name], task, tokenizer)
        on_test = evaluate(trainer, test[task.name], task, tokenizer)
        metrics[task.name] = {"validation": on_validation.metrics(task), "test": on_test.metrics(task)}
        on_dev = on_validation + on_test if rows.dev_is_split else on_test
        if len(on_dev.targets) == len(rows.dev):
            metrics[task.name]["dev"] = on_dev.metrics(task)
    adapter_bytes = None
    if trainable is not None and trainable.freezing().tensor_learn and trainer.is_world_process_zero():
        adapter_bytes = _save_adapter(model, folder.path / ADAPTER_FOLDER)
    result = FinetuneResult(
        tasks=metrics,
        average={
            split: statistics.fmean(metrics[task.name][split][task.metrics[0]] for task, _ in eval_tasks)
            for split in ("validation", "test")
        },
        train_loss=mean_loss(trainer.state.log_history),
        steps=done.global_step,
        seconds_per_step=timer.median,
        peak_memory=peak_memory(),
        parameters=count_parameters(model),
        trained=trained_parts(model, args.learning_rate, None if trainable is None else trainable.mpo_lr),
        routers=router_statistics(model),
        gradient_mask=None if mask is None else {"drawn": mask.drawn, "discarded": mask.discarded},
        adapter_bytes=adapter_bytes,
        versions={
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
    )
    folder.save(trainer.save_model, dataclasses.asdict(result))
    return result


def peak_memory() -> int:
    """The largest memory of this process so far, bytes: its tensors' on a GPU, all of it on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte


def _accumulation(model: PreTrainedModel) -> Accumulation | None:
    """For a model whose matrices are multiplied out: they are, once a step."""
    config = mpoe_config(model)
    if config is None or all(experts.is_separable for experts in mpo_experts(model).values()):
        return None
    return Accumulation(model, int(config.matrix_cache_gib * 2**30))


def _training_set(train: Mapping[str, Any], args: FinetuneTrainingArguments, temperature: float) -> Any:
    if len(train) == 1:
        return next(iter(train.values()))
    if args.train_sampling_strategy != "random":
        raise ValueError(
            f"several tasks are drawn by temperature; leave train_sampling_strategy out, got "
            f"{args.train_sampling_strategy!r}"
        )
    args.train_sampling_strategy = "sequential"  # the order is the mixture's own
    return TaskMixture(train, args.train_batch_size * args.world_size, temperature, args.seed)


def _save_adapter(model: PreTrainedModel, folder: Path) -> int | None:
    try:
        return (save_adapter(model, folder) / WEIGHTS_FILE).stat().st_size
    except ValueError as error:  # the whole model is saved whatever happens here
        warnings.warn(f"no adapter was saved: {error}", stacklevel=2)
        return None


def mean_loss(log_history: list[dict[str, Any]]) -> float | None:
    """The mean over steps of the losses that the Trainer logged.

    Its own `training_loss` leaves out what was before an interruption, but divides by all steps.

    Args:
        log_history: `trainer.state.log_history`, which a checkpoint keeps; a loss is the mean since the one before it.
    """
    logged = [(entry["step"], float(entry["loss"])) for entry in log_history if "loss" in entry]
    steps = [step - before for (step, _), before in zip(logged, [0, *(step for step, _ in logged)], strict=False)]
    return sum(n * loss for n, (_, loss) in zip(steps, logged, strict=True)) / sum(steps) if logged else None
