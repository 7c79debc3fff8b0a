"""Values of Transformers' training arguments that it takes without a look: refused before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

# With others a run fails in its middle, or trains wrongly.
_RIGHT: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "per_device_train_batch_size": (">= 1", lambda value: value >= 1),
    "per_device_eval_batch_size": (">= 1", lambda value: value >= 1),
    "gradient_accumulation_steps": (">= 1", lambda value: value >= 1),
    "dataloader_num_workers": (">= 0", lambda value: value >= 0),
    "generation_num_beams": (">= 1", lambda value: value >= 1),
    "label_smoothing_factor": ("in [0, 1]", lambda value: 0 <= value <= 1),
    "learning_rate": (">= 0", lambda value: value >= 0),
    "max_grad_norm": (">= 0; 0 is no clipping", lambda value: value >= 0),
    "save_steps": ("> 0", lambda value: value > 0),
    "lr_scheduler_kwargs": ('a JSON object, such as {"num_cycles": 2}', lambda value: isinstance(value, dict)),
    "optim_args": ("key=value, and commas between several", lambda value: value.count("=") == value.count(",") + 1),
}


def check_packages(args: TrainingArguments) -> None:
    """Refuse what needs a package that is not there; before Transformers looks, which does not say so as clearly.

    Args:
        args: As the flags gave them.

    Raises:
        ValueError: DeepSpeed is asked for and not installed.
    """
    if args.deepspeed is not None and find_spec("deepspeed") is None:
        raise ValueError("deepspeed needs the package of that name: pip install deepspeed; or leave the flag out")


def check_values(args: TrainingArguments) -> None:
    """Refuse values out of range, integrations that are not there, and another way to resume than a run's own.

    Args:
        args: As Transformers has filled them in.

    Raises:
        ValueError: As above, with the flag's name.
    """
    if args.resume_from_checkpoint is not None:
        raise ValueError(
            "resume_from_checkpoint must be left out: a run is resumed by its own command, from its last checkpoint; "
            "--load_experiment FOLDER starts from the weights of another run or of a checkpoint"
        )
    for name, (must, is_right) in _RIGHT.items():
        if (value := getattr(args, name, None)) is not None and not is_right(value):
            raise ValueError(f"{name} must be {must}; got {value!r}")
    if args.num_train_epochs <= 0 and args.max_steps <= 0:
        raise ValueError(f"num_train_epochs must be > 0, or max_steps; got {args.num_train_epochs}")
    there = get_available_reporting_integrations()
    for name in args.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to must be none, all or of {', '.join(INTEGRATION_TO_CALLBACK)}; got {name!r}")
        if name not in there and name != "flyte":  # which that list leaves out
            raise ValueError(f"report_to {name} needs its package, which is not installed: install it, or leave it out")
