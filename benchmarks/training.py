"""Training end to end, tokens a second: forward, backward, clipping and AdamW, over dense and beside its ceiling.

    python benchmarks/training.py [--short] [--models T5-small] [--ways extended]

T5-small gets 8 × 96 input and 8 × 32 target tokens a batch, SmolLM2-135M 4 × 128 tokens. Weights are random, which
changes nothing in speed. All weights train in all ways, those of the base under LoRA too. "Switch" is a mixture of 8
whole experts; with SmolLM2-135M it needs 11 GB and is left out.

The ceiling is the dense model's FLOPs in a step over the way's own, counted by PyTorch. The target is 0.93 of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from contenders import MODELS, model_contenders
from harness import DTYPES, Row, Samples, Target, compare, parse, parser, rows_over, write_results
from measures import flops

WAYS = {"T5-small": ("extended", "LoRA", "Switch"), "SmolLM2-135M": ("extended", "LoRA")}
OF_CEILING = 0.93
T5_ROWS, INPUTS, LABELS = 8, 96, 32
LLAMA_ROWS, LENGTH = 4, 128
CASE_S = 60.0  # a model's rounds stop after the one in which they have taken so long, seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    made = parser("Training end to end, tokens a second.")
    made.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    made.add_argument("--ways", nargs="+", help="only these and dense")
    args = parse(made, arguments)
    rows: list[Row] = []
    for name in args.models:
        wanted = [way for way in WAYS[name] if not args.ways or way in args.ways]
        models = model_contenders(name, args.size, wanted)
        steps = {way: training_step(model.to(args.device, DTYPES[args.dtype])) for way, model in models.items()}
        tokens = tokens_of(next(iter(models.values())))
        work = {way: flops(step) for way, step in steps.items()}
        seconds = compare(steps, args.repeats, warmup=1, budget_s=CASE_S)
        rates = {way: spent.map(lambda s, n=tokens: n / s) for way, spent in seconds.items()}
        rows += rows_with_ceiling(f"{name}, step of {tokens} tokens", rates, work)
    write_results("training", rows, args)


def rows_with_ceiling(case: str, rates: dict[str, Samples], work: dict[str, int]) -> list[Row]:
    """Return rows of tokens a second over dense, with targets and ceilings for what adds to every token's work.

    Args:
        case: See `Row`.
        rates: Tokens a second, by way.
        work: FLOPs, by way.
    """
    ceilings = {way: work["dense"] / work[way] for way in rates if way in ("extended", "LoRA")}
    targets = {}
    if "extended" in ceilings:
        targets["extended", "dense"] = Target(round(OF_CEILING * ceilings["extended"], 3), at_most=False)
    return [
        dataclasses.replace(row, note=f"ceiling {ceilings[row.way]:.3f}") if row.way in ceilings else row
        for row in rows_over(case, rates, targets, "tokens/s")
    ]


def training_step(model: PreTrainedModel) -> Callable[[], None]:
    """Return a function that trains a model on always the same batch, with a step of AdamW at the end.

    Args:
        model: Put into training mode.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch = _batch(model)
    model.train()

    def run() -> None:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def tokens_of(model: PreTrainedModel) -> int:
    """Tokens of a batch, count."""
    return T5_ROWS * (INPUTS + LABELS) if model.config.is_encoder_decoder else LLAMA_ROWS * LENGTH


def _batch(model: PreTrainedModel) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    is_t5 = model.config.is_encoder_decoder
    shape = (T5_ROWS, INPUTS + LABELS) if is_t5 else (LLAMA_ROWS, LENGTH)
    ids = torch.randint(2, model.config.vocab_size, shape, generator=draw).to(model.device)
    if is_t5:
        return {"input_ids": ids[:, :INPUTS], "labels": ids[:, INPUTS:].contiguous()}
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


if __name__ == "__main__":
    main()
