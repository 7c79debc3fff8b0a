"""What all properties of `make fuzz` share: a case, mutations of bytes and JSON, and what a command must do."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import shutil
import signal
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpoe.cli.main import main
from tiny import files

SECONDS = 8  # after which a case hangs
JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"),
    "", " ", "0", "abc", "mlp", "\0", "\ud800", "é" * 40, "\n", "../..", [], [0], [[]], ["mlp"], [None, 1], {},
    {"a": 1}, {"0": []},
)  # fmt: skip


class Hang(BaseException):
    """A case took too long; no `except Exception` of a library swallows it."""


class Case:
    """One case: its random numbers, and what it tried, in words.

    Args:
        seed: Says everything about the case.
    """

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.tried = ""


@dataclass(frozen=True)
class Property:
    """Something that must hold.

    Attributes:
        name: In the table and for --property.
        prepare: Makes what all cases share in a folder of its own, the working directory, and returns what tries one.
        share: Of the time, relative to the others.
    """

    name: str
    prepare: Callable[[Path], Callable[[Case], None]]
    share: float = 1.0


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `Hang` in what takes longer.

    Args:
        seconds: By the wall clock.
    """

    def stop(*_: object) -> None:
        raise Hang(f"it took longer than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def mutated_bytes(case: Case, data: bytes) -> bytes:
    """Data with a few bytes changed, or a part cut out, doubled, zeroed or put in; the case says what.

    Args:
        case: It draws.
        data: Not empty.
    """
    draw, changed = case.random, bytearray(data)
    start = draw.randrange(len(data))
    length = min(draw.choice((1, 2, 8, 64, 1024)), len(data) - start)
    way = draw.choice(("flip", "flip", "set", "cut", "remove", "repeat", "zero", "insert", "empty"))
    if way == "flip":
        places = [draw.randrange(len(data)) for _ in range(draw.choice((1, 1, 1, 4)))]
        for place in places:
            changed[place] ^= 1 << draw.randrange(8)
        case.tried += f" flip a bit at {places}"
        return bytes(changed)
    part = {"set": draw.randbytes(length), "zero": bytes(length), "repeat": data[start : start + length] * 2}
    if way == "cut":
        del changed[start:]
    elif way == "empty":
        changed.clear()
    elif way == "insert":
        changed[start:start] = draw.randbytes(length)
    else:
        changed[start : start + length] = part.get(way, b"")
    case.tried += f" {way} {length} bytes at {start}"
    return bytes(changed)


def mutated_json(case: Case, value: Any, junk: Collection[Any] = JUNK) -> Any:
    """A JSON value with one of its parts replaced, deleted, renamed or doubled; the case says what.

    Args:
        case: It draws.
        value: Stays as it is.
        junk: What parts are replaced with.
    """
    draw, value = case.random, copy.deepcopy(value)
    places = list(_places(value, ""))
    if not places or draw.random() < 0.03:
        new = draw.choice(list(junk))
        case.tried += f" all := {new!r}"
        return new
    owner, key, name = draw.choice(places)
    way = draw.choice(("replace", "replace", "replace", "number", "delete", "rename", "type"))
    if way == "delete":
        del owner[key]
        case.tried += f" delete {name}"
    elif way == "rename" and isinstance(owner, dict):
        owner[f"{key}_"] = owner.pop(key)
        case.tried += f" rename {name}"
    else:
        old = owner[key]
        if way == "type":
            new = draw.choice((str(old), [old], {"a": old}, None))
        elif way == "number" and isinstance(old, int | float) and not isinstance(old, bool):
            new = draw.choice((-old, old + 1, old * 2, old / 2, old * 10**6, 0))
        else:
            new = copy.deepcopy(draw.choice(list(junk)))
        owner[key] = new
        case.tried += f" {name} := {new!r}"
    return value


def _places(value: Any, name: str) -> Iterator[tuple[Any, Any, str]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield value, key, f"{name}/{key}"
        yield from _places(part, f"{name}/{key}")


def mutated_json_file(case: Case, data: bytes) -> bytes:
    """A JSON file that is mutated as a value, as bytes, or nested deeply.

    Args:
        case: It draws.
        data: The file.
    """
    chance = case.random.random()
    if chance < 0.25:
        return mutated_bytes(case, data)
    if chance < 0.28:
        case.tried += " nested 100,000 deep"
        return b'{"a":' + b"[" * 100_000
    value = json.loads(data)
    for _ in range(case.random.choice((1, 1, 2))):
        value = mutated_json(case, value)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def fresh(source: Path, target: Path) -> Path:
    """A copy of a folder, in place of what was there.

    Args:
        source: The folder.
        target: Its copy.
    """
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(source, target)


def refusal_of(action: Callable[[], Any], *names: str) -> str | None:
    """Do something that works or raises a ValueError of one clear line; return that, or None if it worked.

    Args:
        action: What is done; any other error goes through.
        names: The message has one of them.
    """
    try:
        action()
    except UnicodeError:
        raise
    except ValueError as error:
        message = str(error)
    else:
        return None
    assert 0 < len(message.strip()) < 3000, f"not a clear message: {message[:200]!r} ({len(message)} long)"
    assert any(name in message for name in names), f"the message names none of {names}: {message[:300]}"
    return message


def run_command(argv: list[str], folder: Path, *names: str) -> tuple[int, str]:
    """Run `mpoe` here and now: it works, or prints one error that names the cause, and writes nothing.

    Args:
        argv: Command and arguments.
        folder: Where nothing may be written by a command that refuses.
        names: The error names one of them.

    Returns:
        The exit status, and what was printed.
    """
    before, out, err = files(folder), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(argv)
    assert status in (0, 2), f"exit status {status}"
    lines = [line for line in err.getvalue().splitlines() if line.startswith("error:")]
    assert "Traceback" not in err.getvalue(), err.getvalue()[-500:]
    assert len(lines) == (1 if status else 0), f"status {status} with the errors {lines}"
    if status:
        assert len(lines[0]) < 3000, f"an error of {len(lines[0])} characters: {lines[0][:200]}"
        assert any(name in lines[0] for name in names), f"the error names none of {names}: {lines[0][:300]}"
        written = {str(name) for name, data in files(folder).items() if before.get(name) != data}
        assert not written, f"refused, and yet it wrote {sorted(written)}"
    return status, out.getvalue()
