"""Flags of a command, read with errors that say what to do; for commands that take no config file. No torch."""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import NoReturn

from mpoe.cli.commands import COMMANDS
from mpoe.printable import did_you_mean

CONFIG_FILES = (".yaml", ".yml", ".json")
DESCRIBE = "--describe-flags"
"""Alone, it asks a command for its parser; `mpoe.cli.complete` does."""


class Described(Exception):  # noqa: N818  # no error: an answer
    """What a command's parser knows, for whoever asked for it with `DESCRIBE`."""

    def __init__(self, parser: ArgumentParser) -> None:
        super().__init__(parser.prog)
        self.parser = parser


def read_flags(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Read the arguments of a command that takes no config file.

    Args:
        parser: The command's.
        argv: What follows the command.

    Raises:
        ValueError: An unknown flag, a missing or wrong value.
    """
    if list(argv) == [DESCRIBE]:
        raise Described(parser)
    parser.allow_abbrev = False
    refuse_in_one_line(parser)
    check_flag_names(parser, argv)
    return parser.parse_args(argv)


def check_flag_names(parser: ArgumentParser, argv: Sequence[str]) -> None:
    """Refuse a flag that the parser does not know, with the nearest that it knows.

    argparse would name what is missing first, and a mistyped flag is often what is missing.

    Args:
        parser: Has all flags.
        argv: What follows the command.

    Raises:
        ValueError: An unknown flag.
    """
    flags = parser._option_string_actions
    for word in argv:
        if word == "--":  # what follows are texts
            return
        name = word.partition("=")[0]
        if re.fullmatch(r"--[\w-]+", name) and name not in flags:
            shown = [flag for action in parser._actions for flag in action.option_strings]
            near = did_you_mean(name, shown) or ";"
            raise ValueError(f"unknown flag {name}{near} {parser.prog} --help lists the flags")


def refuse_in_one_line(parser: ArgumentParser) -> None:
    """Let a parser raise its errors instead of printing a usage and exiting; with an example if a word is missing.

    Args:
        parser: A command's; its `prog` begins with "mpoe COMMAND".
    """
    command = COMMANDS.get("".join(parser.prog.split()[1:2]))

    def error(message: str) -> NoReturn:
        if command is not None and "are required" in message:
            message = f"{message}; for example: {command.example}"
        raise ValueError(message)

    parser.error = error
