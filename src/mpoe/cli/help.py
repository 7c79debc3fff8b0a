"""`mpoe COMMAND --help` of commands with many flags: by subject, ours first, those that Transformers brings last."""

from __future__ import annotations

import dataclasses
from argparse import SUPPRESS, Action, ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any

from transformers.hf_argparser import string_to_bool

SHOW_ALL = "--help_all"

# Of the hundred and more that Transformers brings, those that a fine-tuning run is likely to say; the others are shown
# by --help_all.
COMMON = (
    "max_steps", "gradient_accumulation_steps", "optim", "weight_decay", "max_grad_norm", "lr_scheduler_type", "bf16",
    "fp16", "activation_checkpointing", "gradient_checkpointing", "torch_compile", "label_smoothing_factor",
    "eval_steps", "save_strategy", "load_best_model_at_end", "metric_for_best_model", "report_to", "run_name", "seed",
    "use_cpu", "dataloader_num_workers", "generation_max_length", "generation_num_beams", "fsdp", "deepspeed",
)  # fmt: skip

# What a mixture's flags are about, where there are too many for one heading.
SUBJECTS = {
    "layout extended": ("expert_rank", "expert_scale", "expert_activation"),
    "layout balanced": (
        "linear_trunc", "emb_trunc", "attention_trunc", "num_sites", "max_auxiliary_bond", "site_dims", "gauge",
        "share_central", "offset_scale", "expert_noise", "expert_bias",
    ),
    "routers": (
        "moe_type", "top_k", "routing", "frozen_router", "balancing", "balancing_step", "load_balancing_coef",
        "router_z_loss_coef", "router_jitter",
    ),
    "routers of balanced and whole experts": (
        "is_scale_prob", "router_gradient", "capacity_factor", "eval_capacity_factor", "second_policy_train",
        "second_policy_eval", "second_threshold",
    ),
    "speed and memory of layout balanced": ("compute", "matrix_cache_gib", "matrix_save_gib"),
}  # fmt: skip

MANY = 8  # choices that are not listed in the help, but by the error message about a wrong one

_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT", string_to_bool: "true|false"}


def arrange(parser: ArgumentParser, dataclasses: Sequence[type], everything: bool) -> None:
    """Put the flags of dataclasses into groups, each spelt once; what the parser reads stays the same.

    Args:
        parser: `HfArgumentParser`'s, of these dataclasses; changed in place.
        dataclasses: A class attribute `_argument_group_name` is a group's title, as Transformers has it.
        everything: Whether Transformers' own flags are all shown.
    """
    foreign = {name for kind in dataclasses for name in _inherited(kind)}
    _spell(parser._actions)
    for title, names in reversed(SUBJECTS.items()):  # each right after where its flags were
        if any(action.dest in names for action in parser._actions):
            group = parser.add_argument_group(title)
            after = _move(parser, group, lambda action, names=names: action.dest in names)
            parser._action_groups.remove(group)
            parser._action_groups.insert(parser._action_groups.index(after) + 1, group)
    if not foreign:
        return
    common = parser.add_argument_group(f"from Transformers, the common ones ({SHOW_ALL} shows all {len(foreign)})")
    rest = parser.add_argument_group("from Transformers, the others" if everything else None)
    _move(parser, common, lambda action: action.dest in foreign and action.dest in COMMON)
    _move(parser, rest, lambda action: action.dest in foreign and action.dest not in COMMON)
    if not everything:
        for action in rest._group_actions:
            action.help = SUPPRESS
    parser.add_argument(SHOW_ALL, action="help", help="show this help with all flags from Transformers, and exit")


def _inherited(kind: type) -> list[str]:
    """The fields of a dataclass of ours that a library's class defines and ours does not define anew."""
    own = [base for base in kind.__mro__ if not base.__module__.startswith("transformers")]
    ours = {name for base in own for name in vars(base).get("__annotations__", ())}
    library = any(base.__module__.startswith("transformers") for base in kind.__mro__)
    return [field.name for field in dataclasses.fields(kind) if field.name not in ours] if library else []


def _spell(actions: Sequence[Action]) -> None:
    on = {action.dest: action for action in reversed(actions)}  # the first of a name
    for action in actions:
        if isinstance(action.const, bool) and not action.const and on[action.dest] is not action:  # --no_FLAG
            on[action.dest].help = f"{on[action.dest].help} {action.option_strings[0]} is false."
            action.help = SUPPRESS
    for action in actions:
        # `--num-experts` is read as well as `--num_experts`, and need not be said at each
        spelt = {option.replace("-", "_"): option for option in reversed(action.option_strings)}
        action.option_strings = [option for option in action.option_strings if option in spelt.values()]
        if action.metavar is None and action.choices is None and action.nargs != 0:
            action.metavar = _METAVARS.get(action.type, "VALUE")
        if action.choices is not None:
            named = [str(choice) for choice in action.choices if choice != ""]  # empty is another word for none
            action.metavar = "NAME" if len(named) > MANY else f"{{{','.join(named)}}}"
        says_default = action.help is not None and action.help != SUPPRESS and "%(default)" not in action.help
        if says_default and action.nargs != 0 and action.default not in (None, SUPPRESS, ""):
            action.help = f"{action.help} (default: %(default)s)"


def _move(parser: ArgumentParser, group: Any, belongs: Callable[[Action], bool]) -> Any:
    """Move actions into a group, and return the last group that had any."""
    source = None
    for other in parser._action_groups:
        moving = [action for action in other._group_actions if belongs(action)]
        for action in moving if other is not group else ():
            source = other
            other._group_actions.remove(action)
            group._group_actions.append(action)
    return source
