"""Training of T5-small end to end, tokens a second: forward, backward, clipping, AdamW; dense, Switch, and ours.

    python benchmarks/training.py [--short] [--ways narrow balanced] [--accumulation 1 4]

Batches have 8 × 96 input and 8 × 32 target tokens, 1024 together. With accumulation n, an optimizer step follows n of
them, and balanced matrices are multiplied out once a step. Weights are random, which changes nothing in speed; experts
differ and tokens spread over all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from contenders import t5_models
from harness import DTYPES, Row, Target, compare, parse, parser, rows_over_dense, write_results
from mpoe.nn import Accumulation, MPOExperts

ROWS, INPUTS, LABELS = 8, 96, 32
TOKENS = ROWS * (INPUTS + LABELS)
TARGETS = {
    ("separable", "dense"): Target(0.75, at_most=False),
    ("narrow", "dense"): Target(0.85, at_most=False),
    ("ends of 64", "dense"): Target(0.9, at_most=False),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    made = parser("Training of T5-small, tokens a second.")
    made.add_argument("--ways", nargs="+", help="only these (and dense), by their names in the table")
    made.add_argument("--accumulation", nargs="+", type=int, help="batches per optimizer step, counts (1 and 4)")
    args = parse(made, arguments)
    models = {
        name: model.to(args.device, DTYPES[args.dtype]).train()
        for name, model in t5_models(args.size).items()
        if not args.ways or name in ("dense", *args.ways)
    }
    rows: list[Row] = []
    for batches in args.accumulation or ((1, 4) if args.size == "full" else (1,)):
        ways = {name: training_step(model, batches) for name, model in models.items()}
        seconds = compare(ways, args.repeats, warmup=1)
        case = f"training step of {batches} × {TOKENS} tokens"
        targets = TARGETS if batches == 1 and args.size != "tiny" else {}
        rates = {name: spent.map(lambda s, n=batches: n * TOKENS / s) for name, spent in seconds.items()}
        rows += [
            dataclasses.replace(row, note=f"{1 / seconds[row.way].median:.3g} steps/s")
            for row in rows_over_dense(case, rates, targets, "tokens/s")
        ]
    write_results("training", rows, args)


def training_step(model: PreTrainedModel, batches: int = 1) -> Callable[[], None]:
    """A function that trains a model on always the same batches, with one step of a fresh AdamW at the end.

    Args:
        model: In training mode.
        batches: Per optimizer step, count.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    data = [_batch(model) for _ in range(batches)]
    is_rebuilt = any(isinstance(module, MPOExperts) and not module.is_separable for module in model.modules())
    step = Accumulation(model).step if batches > 1 and is_rebuilt else contextlib.nullcontext

    def run() -> None:
        with step():
            for batch in data:
                (model(**batch).loss / batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def _batch(model: PreTrainedModel) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, model.config.vocab_size, (ROWS, INPUTS + LABELS), generator=draw).to(model.device)
    return {"input_ids": ids[:, :INPUTS], "labels": ids[:, INPUTS:].contiguous()}


if __name__ == "__main__":
    main()
