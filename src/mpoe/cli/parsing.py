"""Flags and config files through the same dataclasses: `mpoe COMMAND [config.yaml|json] [--flags]`, flags over file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser


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
        The dataclasses' instances, and what the user gave that is not the default, by flag.

    Raises:
        ValueError: An unknown flag or config key, a missing or wrong value, an unreadable config file.
    """
    parser = HfArgumentParser(dataclasses, prog=prog, description=description, allow_abbrev=False)  # pyright: ignore[reportArgumentType]
    parser.usage = f"{prog} [CONFIG.yaml|CONFIG.json] [--FLAG VALUE ...]"
    parser.error = _raise_error  # one line instead of a usage of a hundred flags
    argv = list(argv)
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        _set_defaults(parser, _read_config(Path(argv.pop(0))))
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(f"unknown arguments {unknown}; {prog} --help lists the flags")
    values = vars(namespace)
    built = HfArgumentParser(dataclasses)  # pyright: ignore[reportArgumentType]
    given = {name: value for name, value in values.items() if value != built.get_default(name)}
    return built.parse_dict(values), given


def _read_config(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} must be a readable {path.suffix[1:]} file: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold flags and their values, as a mapping; got {type(values).__name__}")
    return values


def _set_defaults(parser: HfArgumentParser, values: dict[str, Any]) -> None:
    actions = {action.dest: action for action in parser._actions}
    unknown = sorted(str(key) for key in values if key not in actions)
    if unknown:
        raise ValueError(f"unknown config keys {unknown}; {parser.prog} --help lists the flags, which are the keys")
    for name, value in values.items():
        # argparse reads strings as it reads flags ("1e-4"); a mapping is for a flag that takes JSON
        parser.set_defaults(**{name: json.dumps(value) if isinstance(value, dict) else value})
        actions[name].required = False


def _raise_error(message: str) -> NoReturn:
    raise ValueError(message)
