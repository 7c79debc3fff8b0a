"""Generation with T5-small, tokens a second: greedy, batch 1 and 32; dense, Switch, and ours in every layout.

    python benchmarks/decode.py [--short] [--ways narrow Switch] [--batch 1 32]

32 input tokens a row; as many new ones as `--new` says, of which the end-of-sequence token is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from contenders import t5_models
from harness import DTYPES, Row, compare, parse, parser, rows_over_dense, write_results

INPUTS = 32


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    made = parser("Generation with T5-small, tokens a second.")
    made.add_argument("--ways", nargs="+", help="only these (and dense), by their names in the table")
    made.add_argument("--batch", nargs="+", type=int, default=(1, 32), help="rows, counts")
    made.add_argument("--new", type=int, help="tokens to generate in a row, count (32; short: 8)")
    args = parse(made, arguments)
    args.new = args.new or {"full": 32, "short": 8, "tiny": 2}[args.size]
    models = {
        name: model.to(args.device, DTYPES[args.dtype]).eval()
        for name, model in t5_models(args.size).items()
        if not args.ways or name in ("dense", *args.ways)
    }
    rows: list[Row] = []
    for batch in args.batch:
        ways = {name: generation(model, batch, args.new) for name, model in models.items()}
        seconds = compare(ways, args.repeats, warmup=1)
        rates = {name: spent.map(lambda s, n=batch: n * args.new / s) for name, spent in seconds.items()}
        rows += rows_over_dense(f"generation, batch {batch}, {args.new} new tokens", rates, {}, "tokens/s")
    write_results("decode", rows, args)


def generation(model: PreTrainedModel, batch: int, new: int) -> Callable[[], object]:
    """A function that generates for always the same input.

    Args:
        model: In evaluation mode; its config knows no end of sequence.
        batch: Rows, count.
        new: Tokens to generate in a row, count.
    """
    ids = torch.randint(2, model.config.vocab_size, (batch, INPUTS), device=model.device)
    options = {"max_new_tokens": new, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    return lambda: model.generate(ids, **options)  # pyright: ignore[reportCallIssue]


if __name__ == "__main__":
    main()
