"""Texts of others, made fit for a terminal, a Markdown table and an error message."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Control characters move the cursor, change colours and retitle windows. Characters that turn the direction of writing
# make a text look like another one; halves of surrogates, as of file names that are no UTF-8, cannot be printed at all.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# What begins code, emphasis, a link, HTML or the next cell.
_MARKDOWN = re.compile(r"[\\`*\[\]<>&|]")


def printable(text: str, keep: str = "") -> str:
    r"""The text with control characters spelt as in Python, "\x1b"; nothing in it acts on a terminal.

    Args:
        text: Any.
        keep: Control characters that stay as they are, such as "\n".
    """
    return _CONTROL.sub(lambda found: found[0] if found[0] in keep else repr(found[0])[1:-1], text)


def markdown(text: str) -> str:
    """The text as it is to be seen, for a cell of a Markdown table.

    Args:
        text: Any.
    """
    return _MARKDOWN.sub(lambda found: f"&#{ord(found[0])};", printable(text))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest name as a question that follows the word in a message, ": did you mean ...?"; "" if none is near.

    Args:
        word: What a user typed.
        known: What there is.
    """
    import difflib

    near = difflib.get_close_matches(word, list(known), n=1)
    return f": did you mean {near[0]}?" if near else ""
