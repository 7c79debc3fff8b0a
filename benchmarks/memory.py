"""Peak resident memory of a whole process that trains T5-small: dense, Switch-8, and ours.

    python benchmarks/memory.py [--short]

Every number is a fresh process of its own, which imports, builds the model, trains some steps as training.py does
(1024 tokens, AdamW) and reports the most memory that it has had resident. "imports alone" is a process that stops
before it builds a model: what all of them spend on Python, PyTorch and Transformers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from contenders import SMALL, TINY, mixture, t5, t5_mixtures
from harness import DTYPES, Samples, Target, parse, parser, process_peak, rows_over_dense, run_child, write_results
from training import training_step

WAYS = ("imports alone", "dense", "Switch", "separable", "narrow", "ends of 64", "balanced")
TARGETS = {("ends of 64", "dense"): Target(1.15)}
STEPS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write; or be the process that is measured."""
    made = parser("Peak resident memory of training T5-small.")
    made.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    made.add_argument("--train", choices=WAYS, help=argparse.SUPPRESS)  # the process that is measured
    made.set_defaults(repeats=0, malloc="default")  # what is kept would count as the ways' own
    args = parse(made, arguments)
    if args.train:
        train(args)
        return
    flags = ["--threads", str(args.threads), "--device", args.device, "--dtype", args.dtype, "--seed", str(args.seed)]
    flags += ["--tiny"] if args.size == "tiny" else []
    repeats = {"full": 3, "short": 1, "tiny": 1}[args.size]
    peaks: dict[str, list[float]] = {way: [] for way in dict.fromkeys(("dense", *args.ways))}
    for _ in range(repeats):
        for way, found in peaks.items():
            found.append(float(run_child(__file__, "--train", way, *flags)["peak_bytes"]))
    samples = {way: Samples(tuple(found)) for way, found in peaks.items()}
    targets = {} if args.size == "tiny" else TARGETS
    write_results("memory", rows_over_dense("training T5-small, peak resident", samples, targets, "GiB"), args)


def train(args: argparse.Namespace) -> None:
    """Train one model and print this process's peak as JSON."""
    if args.train != "imports alone":
        model = t5(TINY if args.size == "tiny" else SMALL)
        if args.train != "dense":
            model = mixture(model, **t5_mixtures()[args.train])
        step = training_step(model.to(args.device, DTYPES[args.dtype]).train())
        for _ in range(STEPS):
            step()
    print(json.dumps({"peak_bytes": process_peak()}))


if __name__ == "__main__":
    main()
