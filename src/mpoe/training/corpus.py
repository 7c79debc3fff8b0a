"""A corpus: text of files or of the hub, by its lines, as token ids, with the words that it is of."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from mpoe.printable import printable
from mpoe.training.data_arguments import CorpusArguments

PIECE = 2**16  # characters that are tokenised in one go
SPLITS = ("train", "validation", "test")
_FILES = {"train": ("train.txt",), "validation": ("valid.txt", "validation.txt", "dev.txt"), "test": ("test.txt",)}


@dataclass(frozen=True)
class Text:
    """Lines that can be read again and again, each with its newline, as they stand.

    Attributes:
        name: Where they are, for messages.
        lines: Reads them.
    """

    name: str
    lines: Callable[[], Iterator[str]]

    def split_end(self, share: float) -> tuple[Text, Text]:
        """The text without its end, and the end, which begins with a line.

        Args:
            share: Of the characters, that the end has at least, in (0, 1).

        Raises:
            ValueError: No line ends before that.
        """
        rest = (1 - share) * sum(map(len, self.lines()))
        ends = itertools.accumulate(len(line) for line in self.lines())
        count = sum(1 for _ in itertools.takewhile(lambda end: end <= rest, ends))
        if not count:
            raise ValueError(
                f"a text without a validation part must have lines, to give its last ones; {self.name} has not enough. "
                "Name --validation_file"
            )
        first, last = f"{self.name} without its last {share:.0%}", f"the last {share:.0%} of {self.name}"
        return (
            Text(first, lambda: itertools.islice(self.lines(), count)),
            Text(last, lambda: itertools.islice(self.lines(), count, None)),
        )


@dataclass(frozen=True)
class Corpus:
    """The parts of a corpus.

    Attributes:
        name: For the tables.
        train: To train on; None if there is none, as are the others.
        validation: To choose by.
        test: To report.
    """

    name: str
    train: Text | None = None
    validation: Text | None = None
    test: Text | None = None

    @classmethod
    def open(cls, arguments: CorpusArguments) -> Corpus:
        """Find the parts; files are not read yet.

        Args:
            arguments: Where they are. A corpus of one file is training text.

        Raises:
            ValueError: A file or dataset that is not there, or a dataset without the column.
        """
        files = {split: getattr(arguments, f"{split}_file") for split in SPLITS}
        named = {split: _file(Path(path)) for split, path in files.items() if path is not None}
        if arguments.corpus is None:
            return cls(Path(next(path for path in files.values() if path is not None)).stem, **named)
        path = Path(arguments.corpus)
        if path.is_file():
            return cls(path.stem, **{"train": _file(path), **named})
        if path.is_dir():
            found = {split: next(filter(Path.is_file, map(path.joinpath, _FILES[split])), None) for split in SPLITS}
            if not any(found.values()) and not named:
                raise ValueError(f"corpus must be a folder with train.txt, valid.txt or test.txt; {path} has none")
            return cls(path.resolve().name, **{**{s: _file(p) for s, p in found.items() if p is not None}, **named})
        return cls(arguments.corpus, **{**_from_hub(arguments), **named})

    def describe(self) -> str:
        """One line of where the parts are."""
        parts = {split: getattr(self, split) for split in SPLITS}
        return ", ".join(f"{split} {part.name}" for split, part in parts.items() if part is not None)


@dataclass(frozen=True)
class TokenizedText:
    """A text as tokens.

    Attributes:
        tokens: Ids without special tokens, shape (N,).
        words: What stands between white space, and one end of line a line, as WikiText counts, count.
    """

    tokens: NDArray[np.int32]
    words: int


def tokenize_text(
    text: Text, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None, disable_tqdm: bool = False
) -> TokenizedText:
    """Tokenise a text as it stands, in pieces that end at line ends, so that little of it is in memory.

    Pieces meet where no run of white space is cut: tokenizers that cut at words (GPT-2's, BERT's) give the tokens that
    they give for the text in one go. One that marks the beginning of a text (SentencePiece) does so in every piece.

    Args:
        text: Any length.
        tokenizer: Adds no special tokens.
        max_tokens: The text is cut at the end of the last line that ends within these; None is all of it.
        disable_tqdm: No progress bar.

    Raises:
        ValueError: `max_tokens` are less than the first line's.
    """

    def encode(lines: list[str]) -> list[int]:
        return cast(Any, tokenizer)("".join(lines), add_special_tokens=False, verbose=False)["input_ids"]

    parts, words, count = [np.empty(0, dtype=np.int32)], 0, 0
    with tqdm(desc=f"Tokenizing {printable(text.name)}", unit=" tokens", disable=disable_tqdm) as bar:
        for lines in _pieces(text.lines()):
            ids = encode(lines)
            is_last = max_tokens is not None and count + len(ids) > max_tokens
            if max_tokens is not None and is_last:
                room = max_tokens - count
                kept = bisect.bisect_right(range(len(lines) + 1), room, key=lambda k: len(encode(lines[:k]))) - 1
                lines = lines[:kept]
                ids = encode(lines)
            parts.append(np.array(ids, dtype=np.int32))
            words += sum(len(line.split()) + 1 for line in lines)
            count += len(ids)
            bar.update(len(ids))
            if is_last:
                break
    if max_tokens is not None and count == 0:
        raise ValueError(f"max_eval_tokens must hold the first line of {text.name}; got {max_tokens}. Give more")
    return TokenizedText(np.concatenate(parts), words)


def bos_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer by itself begins a text with (LLaMA's and Gemma's do), or None.

    Args:
        tokenizer: The model's.
    """
    bos = cast(Any, tokenizer).bos_token_id
    return bos if bos is not None and cast(Any, tokenizer)("a")["input_ids"][:1] == [bos] else None


def _pieces(lines: Iterator[str]) -> Iterator[list[str]]:
    piece, length = [], 0
    for line in lines:
        # GPT-2 takes a run of white space as one token up to the last space or newline before a word.
        if length >= PIECE and re.search(r"\S\n\S|\n \S", piece[-1][-2:] + line[:2]):
            yield piece
            piece, length = [], 0
        piece.append(line)
        length += len(line)
    if piece:
        yield piece


def _file(path: Path) -> Text:
    if not path.is_file():
        raise ValueError(f"a text must be a file; there is no {path}. Correct the name")

    def lines() -> Iterator[str]:
        try:
            with path.open(encoding="utf-8", newline="\n") as file:  # no other character ends a line
                yield from file
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} must be UTF-8 text; {error.reason} at {error.start}. Convert the file") from error

    return Text(str(path), lines)


def _from_hub(arguments: CorpusArguments) -> dict[str, Text]:
    name, column = cast(str, arguments.corpus), arguments.text_column
    dataset = f"{name} ({arguments.corpus_config})" if arguments.corpus_config else name
    if name.startswith((".", "/", "~")) or name.endswith(".txt") or name.count("/") > 1:
        raise ValueError(f"corpus must be a text file, a folder or a dataset on the hub; there is no {name}")
    try:
        # the newest revision, as the user names none; datasets execute no script since version 4
        parts = cast(Any, datasets.load_dataset(name, arguments.corpus_config))  # nosec B615
    except Exception as error:  # the hub's client raises the errors of half a dozen libraries
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"corpus must be a text file, a folder or a dataset on the hub; {dataset} could not be loaded from there: "
            f"{reason}. Correct --corpus and --corpus_config"
        ) from error
    texts = {split: _column(f"{split} of {dataset}", parts[split], column) for split in SPLITS if split in parts}
    if not texts:
        raise ValueError(f"corpus must have a split of {', '.join(SPLITS)}; {dataset} has {', '.join(parts)}")
    return texts


def _column(name: str, rows: Any, column: str) -> Text:
    if column not in rows.column_names:
        raise ValueError(f"text_column must be a column of {name}: {', '.join(rows.column_names)}; got {column}")

    def lines() -> Iterator[str]:
        for row in rows:
            text = row[column] if row[column].endswith("\n") else row[column] + "\n"
            yield from re.findall(r"[^\n]*\n", text)

    return Text(name, lines)
