"""Read the values of flags that are lists, JSON or the reference's own ways to say "none"."""

from __future__ import annotations

from mpoe.config import COMPONENTS
from mpoe.files import load_json

NO_TRUNCATION = 30000  # the reference's way to say "none"


def names(text: str | None) -> tuple[str, ...] | None:
    """Return the parts of a comma list; `None` if unset."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def components(name: str, text: str | None, nothing: str) -> tuple[str, ...] | None:
    """Return a comma list of components; `None` if unset.

    Args:
        name: The flag's.
        text: Its value.
        nothing: The word for an empty list.

    Raises:
        ValueError: An unknown component, or `nothing` beside others.
    """
    found = names(text)
    if found is None or nothing not in [component.lower() for component in found]:
        if found is not None and not set(found) <= set(COMPONENTS):
            raise ValueError(f"{name} must be {nothing} or a comma list of {', '.join(COMPONENTS)}; got {text!r}")
        return found
    if len(found) > 1:
        raise ValueError(f"{name} must be {nothing} alone or a comma list of {', '.join(COMPONENTS)}; got {text!r}")
    return ()


def bond(name: str, truncation: int) -> int | None:
    """Return the largest bond of a truncation; `None` if nothing is truncated.

    Args:
        name: The flag's.
        truncation: Its value, count; NO_TRUNCATION and above is none.

    Raises:
        ValueError: A value below 1.
    """
    if truncation < 1:
        raise ValueError(f"{name} must be an integer >= 1, {NO_TRUNCATION} for none; got {truncation}")
    return None if truncation >= NO_TRUNCATION else truncation


def integers(name: str, text: str | None) -> tuple[int, ...] | None:
    """Return the integers of a comma list; `None` if unset.

    Args:
        name: The flag's.
        text: Its value.

    Raises:
        ValueError: A part is no integer.
    """
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} must be a comma list of integers; got {text!r}") from None


def json_object(name: str, text: str | None) -> dict[str, object] | None:
    """Return a JSON object; `None` if unset.

    Args:
        name: The flag's.
        text: Its value.

    Raises:
        ValueError: Invalid JSON, or another value.
    """
    if text is None:
        return None
    try:
        value = load_json(text)
    except ValueError as error:
        raise ValueError(f"{name} must be a JSON object; got {text!r} ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object; got {text!r}")
    return value
