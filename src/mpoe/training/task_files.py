"""Files of rows: comma-separated (.csv), an object a line (.jsonl), or else in GLUE's layout (tabs)."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mpoe.files import load_json

SHOWN = 10  # names and lines that an error message lists
WIDEST = 100  # characters of each


def read_file(path: Path, task: str, columns: Sequence[str], header: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Read a file; no line is skipped.

    Args:
        path: Its suffix says what it is.
        task: Name of the task that needs it.
        columns: That a table must have. Rows of a .jsonl file are not looked into.
        header: The columns of a table that has no header; empty if there is one.

    Returns:
        Each row with its place, "path:line".

    Raises:
        ValueError: If the file cannot be read, has no rows, or a line is not as it must be.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig").rstrip("\r\n")
    except OSError as error:
        raise ValueError(f"task {task} needs the file {path}, which cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text; byte {error.start} is not. Convert the file") from error
    read = {".csv": _csv, ".jsonl": _jsonl}.get(path.suffix.lower(), _tsv)
    lines = read(path, text) if text.strip() else []
    rows = lines if read is _jsonl else _table(path, lines, columns, header)
    if not rows:
        raise ValueError(f"{path} must have rows; it has none. Put the task's whole file there")
    return [(f"{path}:{number}", row) for number, row in rows]


def shown(items: Iterable[object]) -> str:
    """Return a list for an error message, of one line and not too long.

    Args:
        items: What is listed, as text.
    """
    texts = [" ".join(str(item).split()) for item in items]
    texts = [text if len(text) <= WIDEST else f"{text[:WIDEST]}..." for text in texts]
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more or "nothing"


def _tsv(path: Path, text: str) -> list[tuple[int, Any]]:
    """Each line's number and columns; quotation marks are text."""
    # Not splitlines: it also cuts at characters that occur within a text, such as U+2028.
    return [(number, line.removesuffix("\r").split("\t")) for number, line in enumerate(text.split("\n"), start=1)]


def _csv(path: Path, text: str) -> list[tuple[int, Any]]:
    """Each row's first line's number, for a quoted text may have line breaks, and its columns."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines, number = [], 1
    try:
        for line in reader:
            lines.append((number, line))
            number = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}:{number}: the row must be comma-separated values; {error}. Correct the row"
        ) from error
    return lines


def _jsonl(path: Path, text: str) -> list[tuple[int, Any]]:
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            row = load_json(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: the line must be a JSON object; {error}. Correct the line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: the line must be a JSON object; got {type(row).__name__}. Correct it")
        lines.append((number, row))
    return lines


def _table(
    path: Path, lines: list[tuple[int, list[str]]], columns: Sequence[str], header: Sequence[str]
) -> list[tuple[int, dict[str, str]]]:
    if not header and lines:
        header, lines = lines[0][1], lines[1:]
    if not lines:
        return []
    if missing := [column for column in columns if column not in header]:
        raise ValueError(f"{path}:1: the header must have {shown(missing)}; got {shown(header)}. Correct the header")
    if odd := [(number, len(line)) for number, line in lines if len(line) != len(header)]:
        number, width = odd[0]
        more = f" (so also lines {shown(number for number, _ in odd[1:])})" if odd[1:] else ""
        separated = "comma-separated" if path.suffix.lower() == ".csv" else "tab-separated"
        raise ValueError(
            f"{path}:{number}: a line must have {len(header)} {separated} columns; got {width}{more}. "
            "Correct the file; no line is skipped silently"
        )
    index = {column: header.index(column) for column in columns}
    return [(number, {column: line[i] for column, i in index.items()}) for number, line in lines]
