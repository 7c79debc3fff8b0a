"""Flags and config files through the same dataclasses: `mpoe COMMAND [config.yaml|json] [--flags]`, flags over file."""

from __future__ import annotations

import json
import sys
from argparse import SUPPRESS, Action, ArgumentError, HelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from transformers import HfArgumentParser

from mpoe.cli.flags import CONFIG_FILES, DESCRIBE, Described, check_flag_names, refuse_in_one_line
from mpoe.cli.help import SHOW_ALL, arrange
from mpoe.files import brief, load_json, load_yaml
from mpoe.printable import did_you_mean

# What the reference's commands and config files say otherwise, for HfArgumentParser's own names.
RENAMED = {
    "task": "tasks",
    "evaluation_strategy": "eval_strategy",
    "label_smoothing": "label_smoothing_factor",
    "eval_beams": "generation_num_beams",
}
# What they say that has no counterpart here, and why: it is accepted, and the reason is printed.
WITHOUT_EFFECT = {
    "overwrite_output_dir": "a finished run is never overwritten, an interrupted one is resumed",
    "do_test": "the test rows are always scored",
    "split_validation_test": "validation and test rows are always kept apart",
    "val_max_target_length": "answers may be as long as the longest target; generation_max_length is another limit",
    "test_max_target_length": "answers may be as long as the longest target; generation_max_length is another limit",
    "ignore_pad_token_for_loss": "padding never counts in the loss",  # nosec B105  # a flag's name
    "compute_time": "time, memory and parameters are always reported",
    "compute_memory": "time, memory and parameters are always reported",
    "print_num_parameters": "time, memory and parameters are always reported",
    "task_embedding_dim": "it is about the reference's adapters, which this method does not use",
    "non_linearity": "it is about the reference's adapters, which this method does not use",
}


def parse(
    prog: str, description: str, dataclasses: Sequence[type], argv: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Read a command's arguments.

    Args:
        prog: Shown in the help, "mpoe finetune".
        description: Shown in the help.
        dataclasses: Each field is a flag.
        argv: What follows the command; the first may be a config file.

    Returns:
        The dataclasses' instances, and what the user gave by flag: the config file's keys and the command line's flags,
        the values that are the defaults too.

    Raises:
        ValueError: An unknown flag or config key, a missing or wrong value, an unreadable config file.
    """
    parser = _parser(prog, description, dataclasses)
    describe = list(argv) == [DESCRIBE]
    arrange(parser, dataclasses, everything=describe or SHOW_ALL in argv)
    if describe:
        raise Described(parser)
    argv, path = _without_effect(_renamed_flags(argv)), None
    if argv and argv[0].endswith(CONFIG_FILES):
        path = Path(argv.pop(0))
        _set_defaults(parser, _without_nulls(dataclasses, _renamed_keys(_read_config(path))), path)
    check_flag_names(parser, argv)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        late = [word for word in unknown if word.endswith(CONFIG_FILES)]
        hint = f"; a config file comes first, before the flags: {late[0]}" if late else ""
        raise ValueError(f"unknown arguments {unknown}; {prog} --help lists the flags{hint}")
    values = vars(namespace)
    for action in parser._actions:  # without these a second pass sees flags and the config file's keys alone
        action.default = SUPPRESS
    given = vars(parser.parse_known_args(argv)[0])
    try:
        parsed = parser.parse_dict(values)
    except (
        TypeError,
        ValueError,
        OverflowError,
    ) as error:  # Transformers does not always name it
        if str(error).partition(" ")[0] in values:  # a message of ours, that says which flag
            raise ValueError(f"{path}: {error}" if path else str(error)) from error
        raise ValueError(f"{path or 'the flags'} must have values that go together; {error}") from error
    except ImportError as error:  # of a library that a flag is about
        raise ValueError(f"{path or 'the flags'} need a package that is not installed: {error}") from error
    return parsed, {name: value for name, value in values.items() if name in given}


def _parser(prog: str, description: str, dataclasses: Sequence[type]) -> HfArgumentParser:
    kinds: Any = dataclasses
    parser = HfArgumentParser(
        kinds, prog=prog, description=description, allow_abbrev=False, formatter_class=HelpFormatter
    )
    parser.usage = f"{prog} [CONFIG.yaml|CONFIG.json] [--FLAG VALUE ...]"
    refuse_in_one_line(parser)
    return parser


def name_first(argv: Sequence[str], flag: str) -> list[str]:
    """Arguments in which a first word that is neither a flag nor a config file is the value of a flag.

    Args:
        argv: What follows the command.
        flag: "--model".
    """
    has_name = bool(argv) and not argv[0].startswith("-") and not argv[0].endswith(CONFIG_FILES)
    return [flag, *argv] if has_name else list(argv)


def without_defaults(dataclasses: Sequence[type], given: dict[str, Any]) -> dict[str, Any]:
    """Of what the user gave, what makes a difference.

    Args:
        dataclasses: As in `parse`.
        given: As `parse` returns it.
    """
    parser = HfArgumentParser(dataclasses)  # pyright: ignore[reportArgumentType]
    return {name: value for name, value in given.items() if value != parser.get_default(name)}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = load_json(text) if path.suffix == ".json" else load_yaml(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a readable {path.suffix[1:]} file: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold flags and their values, as a mapping; got {type(values).__name__}")
    return values


def _renamed_flags(argv: Sequence[str]) -> list[str]:
    renamed = []
    for word in argv:
        name, equals, value = word.removeprefix("--").partition("=")
        known = word.startswith("--") and name in RENAMED
        renamed.append(f"--{RENAMED[name]}{equals}{value}" if known else word)
    return renamed


def _without_effect(argv: list[str]) -> list[str]:
    """Flags without the ones that say nothing here, nor their values."""
    kept: list[str] = []
    dropping = False
    for word in argv:
        name, equals, _ = word.removeprefix("--").partition("=")
        if word.startswith("--"):
            dropping = name in WITHOUT_EFFECT
            if dropping:
                _explain(name)
        if not dropping:
            kept.append(word)
        dropping = dropping and not equals
    return kept


def _renamed_keys(values: dict[str, Any]) -> dict[str, Any]:
    for name in filter(WITHOUT_EFFECT.__contains__, values):
        _explain(name)
    return {RENAMED.get(name, name): value for name, value in values.items() if name not in WITHOUT_EFFECT}


def _explain(name: str) -> None:
    print(f"note: {name} has no effect: {WITHOUT_EFFECT[name]}", file=sys.stderr)


def _set_defaults(parser: HfArgumentParser, values: dict[str, Any], path: Path) -> None:
    # the first of a name: a flag that is on by default has a second one, --no_FLAG
    actions = {action.dest: action for action in reversed(parser._actions)}
    unknown = sorted(str(key) for key in values if key not in actions)
    if unknown:
        named = ", ".join(f"{brief(key)}{did_you_mean(key, actions)}" for key in unknown[:3])
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(
            f"{path}: unknown config key {named}{more}; {parser.prog} --help lists the flags, which are the keys"
        )
    for name, value in values.items():
        try:
            parser.set_defaults(**{name: None if value is None else _as_flag(parser, actions[name], value)})
        except (ArgumentError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {name} must be what --{name} takes; got {brief(value)} ({error})") from error
        actions[name].required = False


def _as_flag(parser: HfArgumentParser, action: Action, value: Any) -> Any:
    """A config file's value, read as a flag's word is; argparse does so with strings only, and leaves choices aside."""

    def read(word: Any) -> Any:
        if isinstance(word, dict):  # a flag that takes JSON
            word = json.dumps(word, allow_nan=False)
        elif isinstance(word, list):  # a flag that takes a comma list
            word = ",".join(map(str, word))
        read_word = parser._get_value(action, str(word))
        parser._check_value(action, read_word)
        return read_word

    if action.nargs == "+":
        return [read(word) for word in (value if isinstance(value, list) else [value])]
    return read(value)


def _without_nulls(dataclasses: Sequence[type], values: dict[str, Any]) -> dict[str, Any]:
    """Without those of flags that cannot be None: a null leaves them out."""
    kinds = {name: kind for of_class in dataclasses for name, kind in get_type_hints(of_class).items()}
    return {
        name: value
        for name, value in values.items()
        if value is not None or name not in kinds or type(None) in get_args(kinds[name])
    }
