"""Gradient accumulation in Transformers' Trainer with matrices multiplied out once per optimizer step."""

from __future__ import annotations

from typing import Any

from accelerate.state import GradientState
from transformers import TrainerCallback

from mpoe.nn.accumulation import Accumulation


class AccumulationCallback(TrainerCallback):
    """An `Accumulation` in Transformers' Trainer; it does nothing where `gradient_accumulation_steps` is 1.

    Gradients are on the parameters after the backward pass of a step's last micro-batch, before the Trainer clips them.
    A step that an epoch's end cuts short is a step like any other.

    Args:
        accumulation: Of the model that is trained.
    """

    def __init__(self, accumulation: Accumulation) -> None:
        self.accumulation = accumulation

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer; what a run left behind that ended in an exception is dropped, as its gradients are."""
        self.accumulation.clear()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer before the first micro-batch."""
        if args.gradient_accumulation_steps > 1:
            self.accumulation.begin(_is_last_micro_batch)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer after the optimizer's step, which refuses to run without all gradients."""
        self.accumulation.end()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer; a step that another callback stopped half way leaves its gradients, as any does."""
        self.accumulation.end()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        self.accumulation.clear()


def _is_last_micro_batch() -> bool:
    return GradientState().sync_gradients  # the Trainer sets it before every micro-batch
