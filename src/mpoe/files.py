"""Files that a user needs: written under a temporary name and renamed; read with an error that names them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that appears under its name only when it is complete.

    Args:
        path: The file.
        data: All of it.
    """
    unfinished = path.with_name(path.name + ".part")
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or, after a loss of power, the name may be there without the data
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON, as `write_bytes` does.

    Args:
        path: The file.
        value: JSON-ready.
    """
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def is_file_name(name: object, deep: bool = False) -> bool:
    """Whether something that a file says is the name of a file below a folder, and leads to no other place.

    Args:
        name: What the file says.
        deep: Whether it may be in a folder there.
    """
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        return False
    parts = name.split("/")
    return (deep or len(parts) == 1) and not {"", ".", ".."} & set(parts)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that this library wrote.

    Args:
        path: The file.

    Raises:
        ValueError: It cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be the JSON file that mpoe wrote; it cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(value).__name__}")
    return value
