"""Names and texts of others in tables and messages: shown letter by letter, whatever they hold."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from mpoe.printable import printable

TITLE = "table.title"  # Rich's style of a title that is a string


def plain(text: str, style: str = "") -> Text:
    """A cell or a title in which nothing is markup, on any console.

    Args:
        text: Any.
        style: Of all of it; TITLE for a title.
    """
    return Text(printable(text), style)


class PlainConsole(Console):
    """A console that takes every string as it is: no markup, no emoji codes, no control characters.

    Args:
        options: Rich's own.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Called by Rich for every string: what is printed, cells, titles."""
        return super().render_str(printable(text, keep="\n\t"), **options)
