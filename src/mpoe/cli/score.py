"""`mpoe score`: BLEU and Self-BLEU of the sentences in a file; `mpoe generate` has the same flags for its own."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mpoe.cli.flags import read_flags
from mpoe.files import load_json, write_json
from mpoe.printable import printable
from mpoe.report import PlainConsole
from mpoe.training.text_metrics import TextScores, score_samples

_SIZES = {"reference_size": 1000, "self_bleu_size": 500}


def run(argv: Sequence[str]) -> None:
    """Print the scores.

    Args:
        argv: What follows `mpoe score`.

    Raises:
        ValueError: A file that cannot be read or written, too few sentences, wrong flags.
    """
    parser = argparse.ArgumentParser(
        prog="mpoe score",
        description="BLEU of generated sentences against a corpus, and Self-BLEU, how much they repeat each other.",
    )
    parser.add_argument("samples", help="generated sentences, one a line; or .jsonl, with one in each object's 'text'")
    parser.add_argument("--seed", type=int, default=42, help="for the draws (default: 42)")
    add_score_arguments(parser)
    args = read_flags(parser, argv)
    if args.reference is None:
        raise ValueError("the sentences are compared with those of a corpus: name its file with --reference FILE")
    check_score_arguments(args)
    samples = _read_samples(Path(args.samples))
    score(samples, read_references(args), args, {"samples_file": args.samples})


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags about scores, of which `--reference` asks for them.

    Args:
        parser: Has `--seed` already.
    """
    parser.add_argument("--reference", metavar="FILE", help="sentences of a corpus, one a line: print BLEU, Self-BLEU")
    parser.add_argument(
        "--reference_size",
        type=int,
        help=f"references to draw with the seed (default: {_SIZES['reference_size']}); all, if there are fewer",
    )
    parser.add_argument(
        "--self_bleu_size",
        type=int,
        help=f"samples to draw for Self-BLEU (default: {_SIZES['self_bleu_size']}); all, if there are fewer",
    )
    parser.add_argument("--metrics", metavar="FILE.json", help="write the scores there too")


def check_score_arguments(args: argparse.Namespace) -> None:
    """Refuse flags that say nothing, and fill in the sizes.

    Args:
        args: Parsed; changed in place.

    Raises:
        ValueError: Flags about scores without `--reference`, sizes out of range, another file than JSON.
    """
    given = [f"--{name}" for name in (*_SIZES, "metrics") if getattr(args, name) is not None]
    if args.reference is None and given:
        raise ValueError(f"{given[0]} is about scores, which --reference FILE asks for; name one or leave it out")
    if args.metrics is not None and not args.metrics.endswith(".json"):
        raise ValueError(f"--metrics must be a .json file; got {args.metrics}")
    for (name, size), least in zip(_SIZES.items(), (1, 2), strict=True):
        setattr(args, name, size if getattr(args, name) is None else getattr(args, name))
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be >= {least}; got {getattr(args, name)}")


def read_references(args: argparse.Namespace) -> list[str]:
    """The sentences of `--reference`; blank lines are none.

    Args:
        args: Parsed.

    Raises:
        ValueError: A file that cannot be read, or without a sentence.
    """
    references = [line for line in read_lines(Path(args.reference)) if line.strip()]
    if not references:
        raise ValueError(f"{args.reference} must hold a sentence a line; it holds none")
    return references


def score(
    samples: Sequence[str], references: Sequence[str], args: argparse.Namespace, origin: Mapping[str, Any]
) -> None:
    """Print the table, and write `--metrics`.

    Args:
        samples: Generated sentences, at least 2.
        references: From `read_references`.
        args: Checked.
        origin: Where the samples come from, JSON-ready, for the file.

    Raises:
        ValueError: Too few samples, a file that cannot be written.
    """
    scores = score_samples(samples, references, args.reference_size, args.self_bleu_size, args.seed)
    PlainConsole().print(_score_table(scores))
    if args.metrics is not None:
        write_json(Path(args.metrics), {**scores.to_dict(), "reference_file": args.reference, **origin})
        print(printable(f"written to {args.metrics}"))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, empty ones too.

    Args:
        path: The file; UTF-8.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a readable text file (UTF-8); {error}") from error
    # not splitlines, which also cuts at characters that a sentence may hold, such as U+2028
    return text.removesuffix("\n").split("\n") if text else []


def _read_samples(path: Path) -> list[str]:
    lines = read_lines(path)
    if path.suffix != ".jsonl":
        return lines
    samples = []
    for number, line in enumerate(lines, start=1):
        try:
            samples.append(load_json(line)["text"].strip())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}:{number}: a line must be a JSON object with a sentence as its 'text'; got {line[:60]!r}"
            ) from error
    return samples


def _score_table(scores: TextScores) -> Table:
    empty = f", {scores.empty_samples:,} of them empty and scored 0" if scores.empty_samples else ""
    table = Table(title=f"Scores of {scores.samples:,} samples{empty}", title_justify="left")
    table.add_column("metric")
    table.add_column("per cent", justify="right")
    table.add_column("mean over")
    against = f"{scores.samples:,} samples, each against {scores.references:,} references"
    table.add_row("BLEU-2", f"{scores.bleu_2:.2f}", against)
    table.add_row("BLEU-4", f"{scores.bleu_4:.2f}", against)
    others = f"{scores.self_bleu_samples:,} samples, each against the others"
    table.add_row("Self-BLEU-2", f"{scores.self_bleu_2:.2f}", others)
    how = scores.to_dict()
    table.caption = (
        f"seed {scores.seed}, smoothing {how['smoothing']}, tokens split at {how['tokenization']}; "
        "a low Self-BLEU is variety"
    )
    return table
