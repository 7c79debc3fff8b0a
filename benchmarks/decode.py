"""Greedy decoding with a cache of keys and values, tokens a second, batch 1 and 32, over dense and beside its ceiling.

    python benchmarks/decode.py [--short] [--models T5-small] [--ways extended] [--batch 1 32]

Timed are the steps of one token a row after an input of 32 tokens, without what `generate` adds. "Switch" is a mixture
of 8 whole experts.

The ceiling is the dense model's FLOPs of a step over the way's own. With one row, a step reads each weight and each
element of the cache once, for one multiplication and addition, so the ratio of the bytes is the same. The target is
0.93 of the ceiling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from contenders import MODELS, model_contenders
from harness import DTYPES, Row, compare, parse, parser, write_results
from measures import flops
from training import rows_with_ceiling

WAYS = ("extended", "LoRA", "Switch")
INPUTS = 32
CASE_S = 30.0  # a case stops after the round in which it has taken so long, seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    made = parser("Decoding, tokens a second.")
    made.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    made.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="only these and dense")
    made.add_argument("--batch", nargs="+", type=int, default=(1, 32), help="rows, counts")
    made.add_argument("--new", type=int, help="tokens to decode in a row, count (16; short: 8)")
    args = parse(made, arguments)
    args.new = args.new or {"full": 16, "short": 8, "tiny": 2}[args.size]
    rows: list[Row] = []
    for name in args.models:
        models = model_contenders(name, args.size, args.ways)
        placed = {way: model.to(args.device, DTYPES[args.dtype]) for way, model in models.items()}
        for batch in args.batch:
            ways = {way: decoding(model, batch, args.new) for way, model in placed.items()}
            work = {way: flops(run) for way, run in ways.items()}
            seconds = compare(ways, args.repeats, warmup=1, budget_s=CASE_S)
            rates = {way: spent.map(lambda s, n=batch: n * args.new / s) for way, spent in seconds.items()}
            rows += rows_with_ceiling(f"{name}, batch {batch}, {args.new} steps", rates, work)
    write_results("decode", rows, args)


@torch.no_grad()
def decoding(model: Any, batch: int, new: int) -> Callable[[], Tensor]:
    """Return a function that decodes after always the same input, and returns the tokens, (batch, new).

    Args:
        model: A T5 or a causal language model; put into evaluation mode.
        batch: Rows, count.
        new: Tokens to decode in a row, count.
    """
    model.eval()
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, model.config.vocab_size, (batch, INPUTS), generator=draw).to(model.device)
    if model.config.is_encoder_decoder:
        start = torch.full((batch, 1), model.config.decoder_start_token_id, device=model.device)
        cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
        given = {"encoder_outputs": model.encoder(ids)}
        name = "decoder_input_ids"
    else:
        start, cache, given, name = ids, DynamicCache(), {}, "input_ids"

    def step(token: Tensor) -> Tensor:
        return model(**given, **{name: token}, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(dim=-1)

    first = step(start)

    @torch.no_grad()
    def run() -> Tensor:
        tokens = [first]
        for _ in range(new):
            tokens.append(step(tokens[-1]))
        cache.crop(-new)
        return torch.cat(tokens[1:], dim=1)

    return run


if __name__ == "__main__":
    main()
