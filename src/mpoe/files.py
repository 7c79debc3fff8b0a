"""Files that a user needs: written under a temporary name and renamed; read with an error that names them.

Also the text of such files as values, where every text that is none raises a ValueError.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import Repr
from typing import Any, get_args, get_origin

import yaml

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


def cache_dir() -> Path:
    """The folder for what can be had again: `$MPOE_CACHE`, else `$XDG_CACHE_HOME/mpoe`, else `~/.cache/mpoe`."""
    if folder := os.environ.get("MPOE_CACHE"):
        return Path(folder).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "mpoe"


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


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, beside `path`, that gets this name at the end; after an error or Ctrl-C it is deleted.

    Args:
        path: New, or an empty folder.

    Raises:
        ValueError: Something else is there, it cannot be written, or the disk is full.
    """
    check_new_folder(path)
    unfinished = path.parent / f".{path.name}.{os.getpid()}.part"
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        if path.is_dir():
            path.rmdir()
        unfinished.rename(path)
    except Exception as error:
        if is_full_disk(error, path.parent):
            raise ValueError(f"{path} must have room; its disk is full, and nothing was written. Make room") from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_new_folder(path: Path) -> None:
    """Refuse what `new_folder` would, before the work begins that is to be written there.

    Args:
        path: New, or an empty folder.

    Raises:
        ValueError: Something else is there, or it cannot be written.
    """
    try:
        is_free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    except OSError as error:
        raise ValueError(f"{path} must be a folder that can be written; {error.strerror}: name another") from error
    if not is_free or not path.name:
        raise ValueError(f"{path} must be new or an empty folder; there is something in it: name another")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path} must be a folder that can be written; {parent} is none: name another")


def is_full_disk(error: Exception, folder: Path) -> bool:
    """Whether an error is that of a full disk.

    Args:
        error: Of a library that was writing.
        folder: Where to.
    """
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors has the system's words; torch.save only says that it could not write
    return "No space left" in str(error) or (
        "inline_container" in str(error) and shutil.disk_usage(folder).free < 2**20
    )


def sha256_of(path: Path) -> str:
    """A file's sha256, in hexadecimal.

    Args:
        path: The file.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        value = load_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be the JSON file that mpoe wrote; it cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(value).__name__}")
    return value


def load_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Args:
        text: Bytes are UTF-8.

    Raises:
        ValueError: It is not JSON, is nested too deeply, or has half a character, which no file can hold.
    """
    text = text.decode() if isinstance(text, bytes) else text
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if "\\u" in text and not _is_unicode(value):
        raise ValueError("it has half of a surrogate pair, like \\ud800, which is no character")
    return value


def load_yaml(text: str) -> Any:
    """The value of a YAML text.

    Args:
        text: One document; no tag in it is executed.

    Raises:
        ValueError: It is not YAML, is nested too deeply, has a tag that does not fit, or half a character.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (LookupError, AttributeError, TypeError) as error:  # how PyYAML meets `!!bool maybe` or `!!timestamp x`
        raise ValueError(f"a value is not what its tag (!!) says: {error}") from error
    if "\\u" in text.lower() and not _is_unicode(value):
        raise ValueError("it has half of a surrogate pair, like \\ud800, which is no character")
    return value


def brief(value: object) -> str:
    """A value of a user's for an error message, which has to stay short whatever it is.

    Args:
        value: Anything.
    """
    return _SHORT.repr(value)


def fits(value: object, kind: Any) -> bool:
    """Whether a JSON value is of a type, for files that are read into dataclasses.

    Args:
        value: As `load_json` gives it.
        kind: str, int, float (which takes integers), None, a list, a dictionary or a union of these.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is list:
        return isinstance(value, list) and all(fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    if origin is not None:
        return any(fits(value, part) for part in parts)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, kind)


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    except (TypeError, ValueError, RecursionError):  # a YAML value that JSON cannot say; who reads it will look at it
        return True
    return True
