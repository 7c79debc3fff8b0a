"""Perplexity by sliding windows: every token is predicted once, from a context of a known least length."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mpoe.training.corpus import TokenizedText

LARGEST_BLOCK = 1024  # tokens, unless told


@dataclass(frozen=True)
class Perplexity:
    """How well a text is predicted.

    Attributes:
        nll: -log p of all its tokens, nats.
        tokens: Those predicted, count. Without a token that begins the text, its first one is not.
        words: In the text, count; see `TokenizedText`.
    """

    nll: float
    tokens: int
    words: int

    def metrics(self) -> dict[str, float]:
        """Perplexity of a token and of a word, cross-entropy in nats a token, and the counts."""
        return {
            "perplexity": _exp(self.nll / self.tokens),
            "word_perplexity": _exp(self.nll / self.words),
            "cross_entropy": self.nll / self.tokens,
            "tokens": self.tokens,
            "words": self.words,
        }


@dataclass(frozen=True)
class Window:
    """A part of a text that goes through the model in one go.

    Attributes:
        start: First token, from 0.
        scored: First token that is predicted; those before it are context.
        end: One behind the last token.
    """

    start: int
    scored: int
    end: int

    @property
    def shape(self) -> tuple[int, int]:
        """Windows of one shape make a batch: the tokens, and those of them that are context."""
        return self.end - self.start, self.scored - self.start


def windows(num_tokens: int, length: int, stride: int, first: int) -> Iterator[Window]:
    """Windows that predict every token from `first` on exactly once.

    Args:
        num_tokens: Of the text, count, > first.
        length: Tokens of a window; the last may be shorter.
        stride: Tokens from one window to the next, 1 to length.
        first: 0, or 1 where the first token has nothing to be predicted from.
    """
    window = Window(0, first, min(length, num_tokens))
    yield window
    while window.end < num_tokens:
        start = window.start + stride
        window = Window(start, window.end, min(start + length, num_tokens))
        yield window


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, text: TokenizedText, block_size: int, stride: int, batch_size: int,
    bos: int | None = None, desc: str = "Evaluating", disable_tqdm: bool = False,
) -> Perplexity:  # fmt: skip
    """Predict a text.

    Args:
        model: A causal language model, dense or a mixture; it is put into evaluation mode.
        text: Two tokens or more, one with `bos`.
        block_size: Tokens of a window, `bos` counted.
        stride: Tokens from one window to the next, below block_size. Every token is predicted from at least
            block_size - stride tokens, but for those of the first window.
        batch_size: Windows, count.
        bos: Begins every window; None is nothing.
        desc: Beside the progress bar.
        disable_tqdm: No progress bar.

    Raises:
        ValueError: A stride that is not below block_size, or a text too short.

    Source: Baevski and Auli, Adaptive Input Representations (ICLR 2019), §5.4, on the context of the first tokens.
    """
    if not 1 <= stride < block_size:
        raise ValueError(f"stride must be in 1..{block_size - 1}, below block_size = {block_size}; got {stride}")
    prefix = torch.tensor([] if bos is None else [bos], dtype=torch.int64)
    first = 1 - len(prefix)
    if len(text.tokens) <= first:
        raise ValueError(f"a text must have {first + 1} tokens or more; got {len(text.tokens)}")
    device = next(model.parameters()).device
    model.eval()
    nll, tokens = 0.0, torch.from_numpy(text.tokens).long()
    with tqdm(desc=desc, total=len(tokens) - first, unit=" tokens", disable=disable_tqdm) as bar:
        of_one_shape = itertools.groupby(
            windows(len(tokens), block_size - len(prefix), stride, first), key=lambda window: window.shape
        )
        for (length, context), group in of_one_shape:
            for batch in _batches(group, batch_size):
                ids = torch.stack([torch.cat([prefix, tokens[w.start : w.end]]) for w in batch]).to(device)
                scored = len(prefix) + context
                logits = cast(Any, model)(input_ids=ids, use_cache=False).logits[:, scored - 1 : -1].float()
                nll += torch.nn.functional.cross_entropy(
                    logits.transpose(1, 2), ids[:, scored:], reduction="sum"
                ).item()  # fmt: skip
                bar.update(len(batch) * (length - context))
    return Perplexity(nll, len(tokens) - first, text.words)


def block_and_stride(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, block_size: int | None, stride: int | None
) -> tuple[int, int]:
    """How a text is cut, where that is not said.

    Args:
        model: Knows how many positions it has.
        tokenizer: Knows the longest text.
        block_size: Tokens; None is as many as both take, and at most 1024.
        stride: Tokens; None is half a block.

    Raises:
        ValueError: A block longer than the model takes, or a stride that is not below it.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    block = min(LARGEST_BLOCK, positions, tokenizer.model_max_length) if block_size is None else block_size
    if block > positions:
        raise ValueError(f"block_size must be at most the model's {positions} positions; got {block}")
    step = block // 2 if stride is None else stride
    if step >= block:
        raise ValueError(f"stride must be below block_size = {block}; got {step}")
    return block, step


def _batches(windows: Iterator[Window], size: int) -> Iterator[list[Window]]:
    while batch := list(itertools.islice(windows, size)):
        yield batch


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < math.log(sys.float_info.max) else math.inf
