"""What training logs of a mixture while it trains: to whatever `report_to` names, and to a file in the run's folder.

The file has one JSON object a line, in the order of the steps: a line with "loss" for every logging step, one with
"eval_loss" or other metrics for every evaluation. What a clock has measured is left out, so that a run that was killed
and resumed has the same file as an unbroken one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from mpoe.files import load_json, write_bytes
from mpoe.models import mixtures
from mpoe.nn import RouterUsage, divergence
from mpoe.training.gradient_mask import GradientMask
from mpoe.training.run_folder import LOG_FILE

_OF_THE_CLOCK = ("_runtime", "_per_second")


class LiveLog(TrainerCallback):
    """Logs what the routers and experts of every layer have done in training since the last logging step.

    Between logging steps nothing is read from the device. Counting begins with training. What
    `mpoe.models.router_statistics` counts and `reset_usage` resets is left as it is, and what evaluations route is not
    logged.

    Args:
        mask: The gradient mask whose counts are logged; None is none.
    """

    def __init__(self, mask: GradientMask | None = None) -> None:
        self._mask = mask
        self._is_training = False
        self._pending: dict[str, RouterUsage] = {}  # by layer, taken since the last log

    def attach(self, trainer: Trainer) -> None:
        """Become a callback of a Trainer, before those that report, and after the one that prints.

        Callbacks get one dictionary of logs, one after the other. What this one adds reaches TensorBoard and the like,
        and would be hundreds of numbers on the screen.

        Args:
            trainer: One that has not trained yet.
        """
        callbacks = trainer.callback_handler.callbacks  # the first one decides what is logged and when
        printers = [callback for callback in callbacks if isinstance(callback, PrinterCallback | ProgressCallback)]
        for callback in printers:
            callbacks.remove(callback)
        callbacks[1:1] = [*printers, self]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer; of a resumed run, lines after the checkpoint's step are cut."""
        self._is_training = True
        self._pending.clear()
        for layer in mixtures(kwargs["model"]).values():
            if layer.usage is None:
                layer.reset_usage()
        if state.is_world_process_zero:
            cut_log(Path(args.output_dir), state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer, after the callback that decides on evaluations."""
        if control.should_evaluate:
            self._take(kwargs["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer, before others start counting anew and before it evaluates."""
        self._take(kwargs["model"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer; what it has routed is no training."""
        if self._is_training:
            self._take(kwargs["model"], count=False)

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        """Called by the Trainer; as `on_evaluate`."""
        self.on_evaluate(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer, in every process."""
        logs, entry = kwargs["logs"], {"step": state.global_step}
        if not self._is_training or not ("loss" in logs or any(name.startswith("eval_") for name in logs)):
            return  # its summary at the end, and what is evaluated after it
        entry |= {name: value for name, value in logs.items() if not name.endswith(_OF_THE_CLOCK)}
        if "loss" in logs:
            entry |= self._since_last_log(kwargs["model"])
            logs.update(flat(entry))
        if state.is_world_process_zero:
            _append(Path(args.output_dir) / LOG_FILE, entry)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        self._is_training = False

    def _take(self, model: nn.Module, count: bool = True) -> None:
        """Take what every layer has routed since the last time; without synchronisation."""
        for name, layer in mixtures(model).items():
            taken = layer.take_usage()
            if taken is not None and count:
                self._pending[name] = self._pending[name].plus(taken) if name in self._pending else taken

    def _since_last_log(self, model: nn.Module) -> dict[str, Any]:
        """What is logged of the mixture, JSON-ready; all processes have to call it."""
        self._take(model)
        pending, self._pending = self._pending, {}
        layers = mixtures(model)
        # a sharded tensor is nowhere whole
        is_whole = PartialState().distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        found: dict[str, dict[str, Any]] = {}
        for name, usage in pending.items():
            if dist.is_available() and dist.is_initialized():
                usage.sum_over_processes()
            if int(usage.tokens):
                statistics = usage.statistics()
                values: dict[str, Any] = {
                    "share": [_short(share) for share in statistics.share],
                    "gate_mass": [_short(mass) for mass in statistics.gate_mass],
                    "balance_loss": usage.mean_balance_loss(),
                    "entropy": statistics.entropy,
                    "dropped_fraction": statistics.dropped_fraction,
                    "divergence": float(divergence(layers[name])) if is_whole else None,
                }
                found[name] = {
                    key: _short(value) if isinstance(value, float) else value
                    for key, value in values.items()
                    if value is not None
                }
        entry: dict[str, Any] = {"layers": found} if found else {}
        if self._mask is not None:
            entry["mask"] = {"drawn": self._mask.drawn, "discarded": self._mask.discarded}
        return entry


def flat(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a mixture as names and scalars, for TensorBoard and the like.

    Args:
        entry: A line of the file.

    Returns:
        "router/entropy", "router/balance_loss", "router/dropped_fraction", "experts/divergence",
        "experts/largest_share" and "experts/smallest_share" as means over layers; the same of each layer with
        "/LAYER" behind it, "experts/share/LAYER/EXPERT" and "experts/gate_mass/LAYER/EXPERT"; "mask/drawn" and
        "mask/discarded", counts since the beginning. A balance loss is there only if one is trained with.
    """
    names = {"balance_loss": "router", "entropy": "router", "dropped_fraction": "router", "divergence": "experts"}
    means: dict[str, list[float]] = {}
    numbers: dict[str, float] = {}
    for name, values in entry.get("layers", {}).items():
        shown = short_name(name)
        share = values["share"]
        of_layer = {f"{names[key]}/{key}": value for key, value in values.items() if key in names}
        of_layer |= {"experts/largest_share": max(share), "experts/smallest_share": min(share)}
        for key, value in of_layer.items():
            means.setdefault(key, []).append(value)
            numbers[f"{key}/{shown}"] = value
        for key in ("share", "gate_mass"):
            numbers |= {f"experts/{key}/{shown}/{e}": value for e, value in enumerate(values.get(key, []))}
    numbers = {key: math.fsum(values) / len(values) for key, values in means.items()} | numbers
    return numbers | {f"mask/{key}": value for key, value in entry.get("mask", {}).items()}


def short_name(layer: str) -> str:
    """A layer's name without its module's own, which is the same in every layer of a model.

    Args:
        layer: As in `mpoe.models.mixtures`.
    """
    return layer.rpartition(".")[0] or layer


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's file; what follows a line that is damaged is left out, and so is one that is being written.

    Args:
        folder: The run's; without such a file there are no lines.
    """
    file = folder / LOG_FILE
    return [entry for _, entry in _lines(file.read_bytes())] if file.is_file() else []


def cut_log(folder: Path, step: int) -> None:
    """Leave out what a run has logged after a step, because it goes on from there and will log it again.

    Args:
        folder: The run's; made if it is not there.
        step: Count of optimizer steps; 0 is the beginning.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOG_FILE
    if file.is_file():
        before = file.read_bytes()
        kept = b"".join(line for line, entry in _lines(before) if step and entry["step"] <= step)
        if kept != before:
            write_bytes(file, kept)


def _lines(data: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    found = []
    for line in data.splitlines(keepends=True):
        try:
            entry = load_json(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            break
        found.append((line, entry))
    return found


def _append(file: Path, entry: Mapping[str, Any]) -> None:
    line = json.dumps({key: _finite(value) for key, value in entry.items()}) + "\n"
    with file.open("ab") as data:
        data.write(line.encode())
        data.flush()
        os.fsync(data.fileno())  # before a checkpoint of the same step says that it is there


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN; an evaluation's tensors and NumPy's numbers are no JSON either."""
    if isinstance(value, dict):
        return {key: _finite(of_key) for key, of_key in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, str | int) or value is None:
        return value
    return float(value) if math.isfinite(value) else None


def _short(value: float) -> float:
    """Six digits: more are noise, and the file has hundreds of numbers a line."""
    return float(f"{value:.6g}")
