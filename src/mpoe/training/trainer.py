"""The thin join to Transformers' Trainer: its loss with the routers' part, and two callbacks.

Nothing is subclassed. The Trainer takes a loss function; ours divides by all targets of an accumulated batch (most
models' own loss does not), so a step is the same however it is cut into micro-batches.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from mpoe.models import expert_shares, mpoe_config, reset_usage, routers, sum_usage, take_router_loss
from mpoe.models.difference import IGNORED
from mpoe.training.arguments import FinetuneTrainingArguments
from mpoe.training.objective import TrainerParts

DEAD_SHARE = 0.01
_ADVICE = {  # by balancing
    "bias": "A larger balancing_step",
    "loss": "A higher load_balancing_coef",
    "none": "balancing 'bias'",
}


def step_loss(
    model: PreTrainedModel, summed_loss: Callable[[Tensor, Tensor], Tensor], shift: bool = False
) -> Callable[[Any, Tensor, Tensor | int | None], Tensor]:
    """A `compute_loss_func` for the Trainer: the mean loss of a target, plus the routers' loss.

    Args:
        model: The model that is trained; a dense one has no routers' part.
        summed_loss: Of (logits, labels), the sum over those labels that are not IGNORED.
        shift: Whether logits predict the next label, as in a causal language model. The first label of every row must
            be IGNORED then: of some such models the Trainer counts it as a target, of others it does not.

    Returns:
        A function of (output, labels, num_items_in_batch). num_items_in_batch counts the targets of all micro-batches
        of the step; each contributes its share of both losses.
    """

    def loss(output: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if shift:  # the labels, which are smaller than the logits
            labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        num_targets = (labels != IGNORED).sum()
        total = summed_loss(output.logits, labels)
        num_items = num_targets if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        router_loss = take_router_loss(model)
        if router_loss is not None:
            total = total + router_loss.to(total.device) * num_targets
        return total / num_items.to(total.device).clamp(min=1)  # a step of padding only has no target, and no loss

    return loss


def summed_cross_entropy(label_smoothing: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """A `summed_loss` of `step_loss`: -log p of every target, nats.

    Args:
        label_smoothing: In [0, 1).
    """

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(), labels.flatten(),
            ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="sum",
        )  # fmt: skip

    return cross_entropy


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: FinetuneTrainingArguments,
    parts: TrainerParts,
    callbacks: Sequence[TrainerCallback] = (),
    optimizer: tuple[type, dict[str, Any]] | None = None,
) -> Trainer:
    """A Trainer for an objective.

    Args:
        model: Dense or a mixture.
        tokenizer: The model's.
        args: All of the Trainer's own.
        parts: From the objective.
        callbacks: More callbacks.
        optimizer: Class and options; None is the Trainer's own, as `args` say.
    """
    trainer = parts.trainer_class(
        model=model,
        args=args,
        train_dataset=parts.train,
        eval_dataset=parts.validation,
        processing_class=tokenizer,
        data_collator=parts.collator,
        compute_loss_func=parts.loss,
        compute_metrics=parts.metrics,
        callbacks=list(callbacks),
    )
    trainer.optimizer_cls_and_kwargs = optimizer  # an argument of Trainer that Seq2SeqTrainer does not pass on
    return trainer


@dataclass
class StepTimer(TrainerCallback):
    """Wall-clock seconds of every training step, evaluation and saving left out, and the input tokens of all."""

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    _started: float = 0.0
    _tokens_before: int = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer; a resumed run has the tokens of its checkpoint in `state`."""
        self._tokens_before = state.num_input_tokens_seen

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        self.seconds.append(time.perf_counter() - self._started)
        self.tokens = state.num_input_tokens_seen - self._tokens_before

    @property
    def tokens_per_second(self) -> float | None:
        """Input tokens a second of training steps; None if they were not counted (`include_num_input_tokens_seen`)."""
        return self.tokens / sum(self.seconds) if self.tokens else None

    @property
    def median(self) -> float | None:
        """Seconds a step; None if no step was run."""
        return statistics.median(self.seconds) if self.seconds else None


@dataclass
class KeepGenerationConfig(TrainerCallback):
    """Takes back what an evaluation writes into the model's generation config, and a run without one would not have."""

    config: GenerationConfig | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer, which has just fitted it to the tokenizer."""
        self.config = copy.deepcopy(getattr(kwargs["model"], "generation_config", None))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        if self.config is not None:
            kwargs["model"].generation_config = copy.deepcopy(self.config)


class DeadExpertWarning(TrainerCallback):
    """Warns at every evaluation and at the end of training when an expert got under 1% of its layer's tokens."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        reset_usage(kwargs["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer, before it evaluates."""
        model = kwargs["model"]
        sum_usage(model)
        dead = {
            name: [e for e, share in enumerate(shares) if share < DEAD_SHARE]
            for name, shares in expert_shares(model).items()
        }
        count = sum(len(experts) for experts in dead.values())
        if count and state.is_world_process_zero:
            total = sum(router.num_experts for router in routers(model).values())
            worst = max(dead, key=lambda name: len(dead[name]))
            config = mpoe_config(model)
            advice = _ADVICE[(config and config.balancing) or "none"]
            warnings.warn(
                f"{count} of {total} experts got under {DEAD_SHARE:.0%} of their layer's tokens in epoch "
                f"{state.epoch:.0f}, most in {worst}: {dead[worst]}. {advice}, or experts in other stacks or layers, "
                "would use them",
                stacklevel=2,
            )
        reset_usage(model)
