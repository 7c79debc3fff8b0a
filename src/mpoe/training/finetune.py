"""Fine-tune one model: train or resume, evaluate, save; what is learned is an `Objective`."""

from __future__ import annotations

import dataclasses
import pickle  # nosec B403  # for its error alone
import platform
import resource
import statistics
import sys
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import accelerate
import torch
import transformers
from accelerate.utils import DistributedType
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from mpoe.files import brief, fits, read_json
from mpoe.models import (
    ParameterCount,
    count_parameters,
    mixtures,
    mpo_experts,
    mpoe_config,
    reset_usage,
    router_statistics,
    routers,
    save_adapter,
    sharing_experts,
    shuffled_routing,
    sum_usage,
)
from mpoe.models.adapter_files import WEIGHTS_FILE
from mpoe.models.pickles import REASON, find_refused
from mpoe.nn import Accumulation, RouterStatistics
from mpoe.training.accumulation import AccumulationCallback
from mpoe.training.arguments import FinetuneTrainingArguments, TrainableArguments
from mpoe.training.checkpoint_files import CheckpointCallback, NothingLeft
from mpoe.training.gradient_mask import GradientMask, GradientMaskCallback
from mpoe.training.live import LiveLog
from mpoe.training.objective import Metrics, Objective
from mpoe.training.optimizer import TrainedPart, optimizer_for_mpos, trained_parts
from mpoe.training.run_folder import RunFolder
from mpoe.training.stop_signals import StopSignals
from mpoe.training.trainer import DeadExpertWarning, KeepGenerationConfig, StepTimer, build_trainer

ADAPTER_FOLDER = "adapter"

_T = TypeVar("_T")


@dataclass(frozen=True)
class FinetuneResult:
    """What a run found.

    Attributes:
        tasks: By task, then for each of validation, test and dev (the whole development set, if all of it was
            evaluated): the task's metrics, the cross-entropy in nats per row, and the number of rows. By corpus: see
            `mpoe.training.perplexity.Perplexity`.
        average: For validation and test, the mean over tasks of their first metric.
        train_loss: Mean training loss per target over all logged steps, those before an interruption and the
            routers' part included, nats; None if none was logged.
        steps: Optimizer steps, count.
        best_step: The step of the checkpoint that the model is; None without `load_best_model_at_end`.
        seconds_per_step: Median wall-clock seconds of a training step; None if every step was run before.
        tokens_per_second: Input tokens of training steps; None unless `include_num_input_tokens_seen` counts them.
        peak_memory: Largest memory of the process (on a GPU: of its tensors) since it started, bytes.
        parameters: Counts.
        trained: What trained, and at which rate.
        routers: How each layer's router spread the evaluated tokens.
        shuffled: As `tasks`, with the routing shuffled (see `mpoe.models.shuffled_routing`); None if not asked for.
        gradient_mask: Updates of central tensors that could have been discarded, and that were; None without a mask.
        adapter_bytes: Size of the adapter's weights; None if none was saved.
        versions: Of Python and the libraries.
    """

    tasks: dict[str, dict[str, dict[str, float]]]
    average: dict[str, float]
    train_loss: float | None
    steps: int
    best_step: int | None
    seconds_per_step: float | None
    tokens_per_second: float | None
    peak_memory: int
    parameters: ParameterCount
    trained: list[TrainedPart]
    routers: dict[str, RouterStatistics]
    shuffled: dict[str, dict[str, dict[str, float]]] | None
    gradient_mask: dict[str, int] | None
    adapter_bytes: int | None
    versions: dict[str, str]

    @classmethod
    def read(cls, file: Path) -> FinetuneResult:
        """What a finished run wrote.

        Args:
            file: Its results.json, the JSON of `dataclasses.asdict`.

        Raises:
            ValueError: It cannot be read; another version of mpoe wrote it, or something else.
        """
        try:
            return cls._from_dict(read_json(file))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{file.parent}: a {file.name} must be what this version of mpoe wrote; got one without its fields "
                f"({error}); run it anew in another folder"
            ) from error

    @classmethod
    def _from_dict(cls, values: dict[str, Any]) -> FinetuneResult:
        routers_of = values["routers"]
        if not isinstance(routers_of, dict):
            raise TypeError(f"routers is {brief(routers_of)}")
        parts = {
            "parameters": _typed(ParameterCount, values["parameters"]),
            "trained": [_typed(TrainedPart, part) for part in values["trained"]],
            "routers": {name: _typed(RouterStatistics, of_layer) for name, of_layer in routers_of.items()},
        }
        result = _typed(cls, {**values, **parts}, built=parts.keys())
        if result.gradient_mask is not None and result.gradient_mask.keys() != {"drawn", "discarded"}:
            raise TypeError(f"gradient_mask is {brief(result.gradient_mask)}")
        for name, splits in result.tasks.items():
            if not splits or not splits.keys() & {"validation", "test"} or not all(splits.values()):
                raise TypeError(f"tasks/{name} has no numbers")
        if len(result.tasks) > 1 and not {"validation", "test"} <= result.average.keys():
            raise TypeError("average is not of validation and test")
        return result


def _typed(kind: type[_T], values: Any, built: Collection[str] = ()) -> _T:
    """A dataclass of JSON values; those of `built` are no longer JSON."""
    if not isinstance(values, dict):
        raise TypeError(f"{kind.__name__} is {brief(values)}")
    for name, of_field in get_type_hints(kind).items():
        if name in values and name not in built and not fits(values[name], of_field):
            raise TypeError(f"{name} is {brief(values[name])}")
    return kind(**values)


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    args: FinetuneTrainingArguments,
    folder: RunFolder,
    trainable: TrainableArguments | None = None,
) -> FinetuneResult:
    """Train, evaluate on validation and test, and save the model, the tokenizer and the results.

    Args:
        model: Dense or a mixture, with its parameters frozen or not.
        tokenizer: The model's.
        objective: What is learned, with its data.
        args: The Trainer's arguments; `output_dir` is the folder's path.
        folder: Where everything is written, claimed here; its checkpoint, if any, is resumed.
        trainable: The rate of the MPOs and the gradient mask; None is neither.
    """
    if args.test_routing and not routers(model):
        raise ValueError("test_routing shuffles what routers decide; this model has none. Leave it out")
    if args.fsdp and accelerate.PartialState().distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ValueError(
            f"fsdp needs several processes with an accelerator each; got {args.world_size} on the {args.device.type}. "
            "Start them with torchrun or accelerate launch, or leave fsdp out"
        )
    parts = objective.prepare(model, tokenizer, args)
    timer = StepTimer()
    signals = StopSignals()
    callbacks: list[transformers.TrainerCallback] = [
        timer, DeadExpertWarning(), KeepGenerationConfig(), CheckpointCallback(), signals,
    ]  # fmt: skip
    optimizer = mask = None
    own = (None, None, 1.0) if trainable is None else trainable.own_rates()
    if own != (None, None, 1.0) or any(not experts.mixes_outputs for experts in sharing_experts(model).values()):
        optimizer = optimizer_for_mpos(model, args, *own)
    if trainable is not None and 0 < trainable.gradient_mask_prob < 1:
        if args.deepspeed:
            raise ValueError("gradient_mask_prob is for torch's optimizers; leave it out, or shard with fsdp instead")
        mask = GradientMask(model, trainable.gradient_mask_prob, trainable.gradient_mask_level, args.seed)
        callbacks.append(GradientMaskCallback(mask))
    accumulates = args.gradient_accumulation_steps > 1 and args.world_size == 1
    if accumulates and (accumulation := _accumulation(model)) is not None:
        callbacks.append(AccumulationCallback(accumulation))
    accelerate.PartialState().wait_for_everyone()  # every process has looked at the folder
    if args.process_index == 0:
        folder.claim()  # only now: wrong input so far has written nothing
    use_cache = getattr(model.config, "use_cache", None)
    # before DeepSpeed has taken them apart
    parameters = count_parameters(model)
    trained = trained_parts(model, args.learning_rate, None if trainable is None else trainable.mpo_lr)
    if args.deepspeed:
        _tell_deepspeed_of_routers(model)
    if args.fsdp:
        # T5's stacks have word embeddings of their own with the same weight. Accelerate shards the model's apart from
        # the rest, and finds that weight twice unless they are one module.
        model.set_input_embeddings(model.get_input_embeddings())
    with signals, folder.guard(args.process_index == 0):
        trainer = build_trainer(model, tokenizer, args, parts, callbacks, optimizer)
        LiveLog(mask).attach(trainer)
        done = _train(trainer, folder.checkpoint)
        if use_cache is not None:
            model.config.use_cache = use_cache  # the Trainer turns it off, and it would be saved so
        reset_usage(model)
        metrics = objective.evaluate(trainer)
        sum_usage(model)
        statistics_of_routers, shuffled = router_statistics(model), None
        if args.test_routing:
            with shuffled_routing(model, args.seed):
                shuffled = objective.evaluate(trainer)
        adapter_bytes = None
        if trainable is not None and trainable.freezing().tensor_learn and trainer.is_world_process_zero():
            adapter_bytes = _save_adapter(model, folder.path / ADAPTER_FOLDER)
        result = FinetuneResult(
            tasks=metrics,
            average=average(metrics),
            train_loss=mean_loss(trainer.state.log_history),
            steps=done.global_step,
            best_step=trainer.state.best_global_step if args.load_best_model_at_end else None,
            seconds_per_step=timer.median,
            tokens_per_second=timer.tokens_per_second,
            peak_memory=peak_memory(),
            parameters=parameters,
            trained=trained,
            routers=statistics_of_routers,
            shuffled=shuffled,
            gradient_mask=None if mask is None else {"drawn": mask.drawn, "discarded": mask.discarded},
            adapter_bytes=adapter_bytes,
            versions={
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
                "accelerate": accelerate.__version__,
            },
        )
        folder.save(trainer.save_model, dataclasses.asdict(result), args.process_index == 0)
    return result


def _tell_deepspeed_of_routers(model: PreTrainedModel) -> None:
    """ZeRO-3 gathers a module's weights for its backward when it sees the module's output, which has to be a tensor.

    A router's is not, so that its weights are to be gathered with the layer's. So is the weight by which a frozen
    router's balancing notices optimizer steps, because the layer reads it and not the module that has it.
    """
    import deepspeed  # pyright: ignore[reportMissingImports]  # who passes its config has it

    for layer in mixtures(model).values():
        if layer.router is None:
            continue
        watched = layer.watched_parameter()
        for parameter in (*layer.router.parameters(), *([] if watched is None else [watched])):
            deepspeed.zero.register_external_parameter(layer, parameter)


def _train(trainer: transformers.Trainer, checkpoint: Path | None) -> TrainOutput:
    """Train; on from a checkpoint, whose files are read as numbers and never as code."""
    try:
        return trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except NothingLeft:  # it died after its last checkpoint: what the Trainer does after that is left
        args, state = trainer.args, trainer.state
        if args.should_save and args.output_dir is not None:
            rotate_checkpoints(args.output_dir, args.save_total_limit, state.best_model_checkpoint)
        trainer.callback_handler.on_train_end(args, state, trainer.control)
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            trainer._load_best_model()
        return TrainOutput(state.global_step, 0.0, {})
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise
        raise ValueError(error.args[0]) from error  # it lists the metrics that there are
    except (pickle.UnpicklingError, EOFError) as error:
        if checkpoint is None:
            raise
        with safe_globals():  # the generators' numbers are NumPy's
            file = find_refused(checkpoint) or checkpoint
        raise ValueError(
            f"{file} must hold the optimizer's and the generators' numbers alone, as this run wrote them; {REASON}. "
            f"Delete this checkpoint (rm -r {checkpoint}), and the same command starts from what was before it"
        ) from error


def average(metrics: Metrics) -> dict[str, float]:
    """The mean over tasks of their first metric, for validation and test; a split that a task has not is left out.

    Args:
        metrics: Of an `Objective`.
    """
    splits = [split for split in ("validation", "test") if all(split in of_task for of_task in metrics.values())]
    return {split: statistics.fmean(next(iter(m[split].values())) for m in metrics.values()) for split in splits}


def peak_memory() -> int:
    """The largest memory of this process so far, bytes: its tensors' on a GPU, all of it on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte


def _accumulation(model: PreTrainedModel) -> Accumulation | None:
    """For a model whose matrices are multiplied out: they are, once a step."""
    config = mpoe_config(model)
    if config is None or not mpo_experts(model):
        return None
    return Accumulation(model, int(config.matrix_cache_gib * 2**30))


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
