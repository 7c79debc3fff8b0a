"""Ctrl-C and SIGTERM during training: the step ends, a checkpoint is written, and the process stops."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from transformers import TrainerCallback


class Interrupted(KeyboardInterrupt):
    """Raised when a signal has been obeyed; its `args` are what it is made of.

    Args:
        number: The signal's.
        saved: The step of the checkpoint that was written for it; None if it stopped at once.
    """

    def __init__(self, number: int, saved: int | None = None) -> None:
        super().__init__(number, saved)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals(TrainerCallback):
    """Catches SIGINT, SIGTERM and SIGHUP in a `with` block, in the main thread; SIGHUP not under nohup.

    While the Trainer trains, the first one ends the run after the step that is under way, with a checkpoint; a second
    one stops at once, as the first does elsewhere in the block. Of several processes each may get its signal in another
    step: they agree at the end of every step, so that all of them save the same one.

    Raises:
        Interrupted: In the block.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._training = False
        self._before: dict[int, Any] = {}
        self._group: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._handle)
                for number in SIGNALS
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
            }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        self._training = True
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")  # on the CPU: a GPU's queue is not waited for

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer, after the callback that decides on checkpoints."""
        if self._group is not None:
            received = torch.tensor(self._received or 0)
            dist.all_reduce(received, dist.ReduceOp.MAX, group=self._group)
            self._received = int(received) or None
        if self._received is not None:
            control.should_save = control.should_log = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer once a checkpoint is written."""
        if self._received is not None:
            raise Interrupted(self._received, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        self._training = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._training or self._received is not None:
            raise Interrupted(number)
        self._received = number
        sys.stderr.write("\nStopping: this step ends and is saved; once more to stop at once.\n")
