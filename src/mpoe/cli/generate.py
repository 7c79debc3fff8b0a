"""`mpoe generate`: a language model goes on with prompts, an encoder-decoder answers them; in a file or a terminal."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
    set_seed,
)

from mpoe.cli.flags import read_flags
from mpoe.cli.loading import kind_of, load_finished
from mpoe.cli.score import add_score_arguments, check_score_arguments, read_lines, read_references, score
from mpoe.files import write_bytes
from mpoe.printable import printable

# Only a draw knows them: without --do_sample the most probable token comes next, whatever they are.
_OF_SAMPLING = ("temperature", "top_k", "top_p")


def run(argv: Sequence[str]) -> None:
    """Generate as the arguments say; print the texts, or write them; score them if there is something to compare with.

    Args:
        argv: What follows `mpoe generate`.

    Raises:
        ValueError: Not a model's folder, a classifier, flags that contradict each other, a prompt that is too long, a
            file that cannot be read or written.
    """
    args = read_flags(_parser(), argv)
    _check(args)
    if kind_of(args.model) == "classification":
        raise ValueError(f"{args.model} answers with labels, it writes no text: mpoe predict {args.model} TEXT")
    prompts = args.prompt if args.prompts is None else read_lines(Path(args.prompts))
    if args.prompts is not None and not prompts:
        raise ValueError(f"{args.prompts} must hold a prompt a line; it is empty")
    references = None if args.reference is None else read_references(args)
    num_samples = args.num_samples or 1
    if references is not None and max(1, len(prompts)) * num_samples < 2:
        raise ValueError("scores need at least 2 samples; this makes 1: ask for more with --num_samples")
    asked_for_texts = prompts or args.num_samples or args.output or args.reference
    model, tokenizer = load_finished(args.model)
    set_seed(args.seed)
    if not asked_for_texts and sys.stdin.isatty():
        _converse(model, tokenizer, args)
        return
    prompts = prompts or [""]
    texts = _generate(model, tokenizer, prompts, args)
    if args.output is not None:
        pairs = zip([prompt for prompt in prompts for _ in range(num_samples)], texts, strict=True)
        _write(Path(args.output), pairs)
        print(printable(f"{len(texts):,} texts written to {args.output}"))
    elif not _streams(args, prompts):
        for text in texts:
            print(printable(_one_line(text), keep="\t"))
    if references is not None:
        origin = {"model": args.model, "generation": {**_settings(args), "stop_at_newline": args.stop_at_newline}}
        score(texts, references, args, origin)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpoe generate",
        description="Generate text from prompts; without any, from the beginning of a text, or in a terminal from "
        "prompts that you type. Only what is generated is printed, not the prompt.",
    )
    add = parser.add_argument
    add("model", help="folder of a causal or encoder-decoder model, dense or a mixture; an adapter's; a name on a hub")
    add("prompt", nargs="*", help="texts to go on from")
    add("--prompts", metavar="FILE", help="prompts, one a line; an empty line is the beginning of a text")
    add("--num_samples", type=int, help="texts a prompt (default: 1); several need --do_sample or as many --num_beams")
    add("--max_new_tokens", type=int, default=64, help="of a text (default: 64)")
    add("--stop_at_newline", action="store_true", help="a text ends before its first newline")
    add("--do_sample", action="store_true", help="draw the next token instead of taking the most probable one")
    add("--temperature", type=float, help="of the draw, > 0 (default: the model's own, else 1)")
    add("--top_k", type=int, help="draw from the k most probable; 0: from all (default: the model's own, else 50)")
    add("--top_p", type=float, help="draw from the most probable that sum to this (default: the model's own, else 1)")
    add("--num_beams", type=int, default=1, help="beam search (default: 1, none)")
    add("--repetition_penalty", type=float, help="> 0; above 1 avoids tokens that were there (default: the model's, 1)")
    add("--seed", type=int, default=42, help="for all draws (default: 42)")
    add("--batch_size", type=int, default=16, help="texts at a time (default: 16); other draws with another")
    add("--output", metavar="FILE", help="a text a line, newlines as spaces; .jsonl: objects of 'prompt' and 'text'")
    add_score_arguments(parser)
    return parser


def _check(args: argparse.Namespace) -> None:
    """One line about the first flag that contradicts another or is out of range."""
    if args.prompt and args.prompts is not None:
        raise ValueError("prompts come from the command line or from --prompts FILE; got both: leave one out")
    for name in ("num_samples", "max_new_tokens", "num_beams", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be >= 1; got {getattr(args, name)}")
    for name in ("temperature", "repetition_penalty"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < float("inf"):
            raise ValueError(f"--{name} must be > 0 and finite; got {getattr(args, name)}")
    if args.top_k is not None and args.top_k < 0:
        raise ValueError(f"--top_k must be >= 0; got {args.top_k}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise ValueError(f"--top_p must be > 0 and <= 1; got {args.top_p}")
    for name in _OF_SAMPLING:
        if getattr(args, name) is not None and not args.do_sample:
            raise ValueError(f"--{name} changes how tokens are drawn, so it needs --do_sample; add that")
    if not args.do_sample and (args.num_samples or 1) > args.num_beams:
        raise ValueError(
            f"--num_samples {args.num_samples} needs --do_sample, or --num_beams of at least as many (got "
            f"{args.num_beams}): the most probable text is one text"
        )
    for name in ("output", "metrics"):  # nobody should generate for an hour and then read this
        path = getattr(args, name)
        if path is not None and (Path(path).is_dir() or not Path(path).parent.is_dir()):
            raise ValueError(f"--{name} must be a file in a folder that is there; got {path}")
    check_score_arguments(args)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """For `model.generate`; what the user did not say is left to the model's own generation config."""
    names = ("max_new_tokens", "do_sample", "num_beams", "repetition_penalty", *_OF_SAMPLING)
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], args: argparse.Namespace
) -> list[str]:
    """The texts of all prompts, in order, those of one prompt together; streamed to a terminal if it is one text."""
    num_samples = args.num_samples or 1
    rows = [_tokens(model, tokenizer, prompt, args.max_new_tokens) for prompt in prompts]
    # Beams of one search differ from each other; draws are as many searches.
    returned = 1 if args.do_sample else num_samples
    rows = [row for row in rows for _ in range(num_samples // returned)]
    streamer = _Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if _streams(args, prompts) else None
    texts = []
    size = max(1, args.batch_size // returned)
    with tqdm(total=len(rows) * returned, desc="Generating", unit="text", disable=len(rows) <= size) as progress:
        for start in range(0, len(rows), size):
            batch = tokenizer.pad({"input_ids": rows[start : start + size]}, return_tensors="pt").to(model.device)
            stop = [_AtNewline(tokenizer)] if args.stop_at_newline else []
            generated = cast(Any, model).generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                num_return_sequences=returned,
                pad_token_id=tokenizer.pad_token_id,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList(stop),
                **_settings(args),
            )
            if not model.config.is_encoder_decoder:
                generated = generated[:, batch["input_ids"].shape[1] :]
            texts += tokenizer.batch_decode(generated, skip_special_tokens=True)
            progress.update(len(generated))
    return [re.split(r"[\r\n]", text, maxsplit=1)[0] for text in texts] if args.stop_at_newline else texts


def _tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int) -> list[int]:
    """A prompt's tokens; of an empty one the token that texts begin with, or the one that separates them."""
    tokens = cast(list[int], tokenizer(prompt).input_ids)
    if not tokens:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if start is None:
            raise ValueError("the tokenizer has no bos_token and no eos_token to begin a text with; give a prompt")
        tokens = [cast(int, start)]
    limit = getattr(model.config, "max_position_embeddings", None)
    # a prompt and what follows it share the positions of a decoder; an encoder has its own
    used = max(len(tokens), new_tokens) if model.config.is_encoder_decoder else len(tokens) + new_tokens
    if limit is not None and used > limit:
        raise ValueError(
            f"prompt and --max_new_tokens must fit into the model's {limit} positions; {prompt[:40]!r} has "
            f"{len(tokens)} tokens, --max_new_tokens is {new_tokens}: shorten one of them"
        )
    return tokens


class _Streamer(TextStreamer):
    """Shows a text while it is generated."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with every piece that no later token changes."""
        super().on_finalized_text(printable(text, keep="\n\t"), stream_end)


class _AtNewline(StoppingCriteria):
    """Ends a text at its first newline, which is cut off afterwards."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        last = self.tokenizer.batch_decode(input_ids[:, -1:])
        return torch.tensor(["\n" in text for text in last], device=input_ids.device)


def _streams(args: argparse.Namespace, prompts: Sequence[str]) -> bool:
    """Whether the text is shown while it is generated: one text, one search, somebody who watches."""
    return len(prompts) * (args.num_samples or 1) == 1 and args.num_beams == 1 and sys.stdout.isatty()


def _converse(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> None:
    """A prompt, its text, the next prompt, until end of file; no prompt knows of those before it."""
    print("Type a prompt; Ctrl-D ends.")
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        try:
            texts = _generate(model, tokenizer, [prompt], args)
        except ValueError as error:  # one prompt is too long: the next may not be
            print(f"error: {printable(str(error))}", file=sys.stderr)
            continue
        if not _streams(args, [prompt]):
            print(printable(texts[0], keep="\n\t"))


def _write(path: Path, pairs: Iterator[tuple[str, str]]) -> None:
    if path.suffix == ".jsonl":
        lines = [json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) for prompt, text in pairs]
    else:
        lines = [_one_line(text) for _, text in pairs]
    write_bytes(path, "".join(f"{line}\n" for line in lines).encode())


def _one_line(text: str) -> str:
    return re.sub(r"[\r\n]+", " ", text).strip()
