"""What values the fields of `MPOEConfig` may have. Knows no torch."""

from __future__ import annotations

import math
import re
import reprlib


def require(holds: object, name: str, must: str, value: object) -> None:
    """Raise `ValueError` with the field, what it must be and what it is, unless a condition holds."""
    if not holds:
        raise ValueError(f"{name} must be {must}; got {reprlib.repr(value)}")


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def is_count(value: object) -> bool:
    """Whether a value is an integer >= 1."""
    return is_index(value) and value != 0


def is_index(value: object) -> bool:
    """Whether a value is an integer >= 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def are_site_dims(value: object) -> bool:
    """None, or pairs of lists of counts by shape; whether they fit their matrices is seen there."""
    if value is None:
        return True
    return isinstance(value, dict) and all(
        isinstance(shape, str) and re.fullmatch(r"([^:]+:)?\d+x\d+", shape) and is_pair(pair)
        for shape, pair in value.items()
    )


def are_matrices(value: object) -> bool:
    """None, or site dimensions and one bond between any two sites, by name."""
    if value is None:
        return True
    return isinstance(value, dict) and all(
        isinstance(name, str)
        and isinstance(own, dict)
        and own.keys() == {"site_dims", "bonds"}
        and is_pair(own["site_dims"])
        and isinstance(own["bonds"], list | tuple)
        and all(map(is_count, own["bonds"]))
        and len(own["bonds"]) == len(own["site_dims"][0]) - 1
        for name, own in value.items()
    )


def is_pair(value: object) -> bool:
    """Output dimensions and input dimensions."""
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(side, list | tuple) and all(map(is_count, side)) for side in value)
    )
