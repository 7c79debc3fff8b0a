"""Causal language modelling: predict every token of a corpus from those before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.utils.data
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    default_data_collator,
)

from mpoe.training.arguments import FinetuneTrainingArguments
from mpoe.training.corpus import Corpus, Text, TokenizedText, bos_of, tokenize_text
from mpoe.training.data_arguments import CorpusArguments
from mpoe.training.objective import Metrics, TrainerParts
from mpoe.training.perplexity import block_and_stride, perplexity
from mpoe.training.trainer import IGNORED, step_loss, summed_cross_entropy

VALIDATION_SHARE = 0.05  # of a training text without a validation part


class CausalLM:
    """The objective of a language model that reads from left to right.

    Args:
        corpus: With a training part. Without a validation part, its last 5% are that; without a test part, none is
            reported.
        arguments: How the text is cut.
        say: Takes what a user should know of the data, a line each.

    Raises:
        ValueError: A corpus without a training part.
    """

    auto_class = AutoModelForCausalLM

    def __init__(self, corpus: Corpus, arguments: CorpusArguments, say: Callable[[str], None] = print) -> None:
        if corpus.train is None:
            raise ValueError(f"corpus must have a training part; {corpus.name} has {corpus.describe()}. See train_file")
        self.model_options: dict[str, Any] = {}
        self.corpus = corpus
        self.arguments = arguments
        self.say = say
        self.train, self.validation, self.test = corpus.train, corpus.validation, corpus.test
        if self.validation is None:
            self.train, self.validation = corpus.train.split_end(VALIDATION_SHARE)

    def prepare(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: FinetuneTrainingArguments
    ) -> TrainerParts:
        """See `Objective`.

        Raises:
            ValueError: A block longer than the model takes, or a text that is shorter than a block.
        """
        self.block_size, self.stride = block_and_stride(
            model, tokenizer, self.arguments.block_size, self.arguments.stride
        )
        self.bos = bos_of(tokenizer)

        def tokens_of(text: Text, max_tokens: int | None) -> TokenizedText:
            return tokenize_text(text, tokenizer, max_tokens, bool(args.disable_tqdm))

        def blocks_of(text: Text, tokenized: TokenizedText) -> Blocks:
            blocks = Blocks(tokenized, self.block_size, self.bos)
            if not len(blocks):
                raise ValueError(
                    f"a text must have a block of {self.block_size} tokens or more; {text.name} has "
                    f"{len(tokenized.tokens):,}. Give a smaller --block_size or more text"
                )
            return blocks

        assert self.validation is not None  # nosec B101  # for the type checker
        limit = self.arguments.max_eval_tokens
        train = blocks_of(self.train, tokens_of(self.train, None))
        self.tokenized = {"validation": tokens_of(self.validation, limit)}
        if self.test is not None:
            self.tokenized["test"] = tokens_of(self.test, limit)
        self.say(
            f"{len(train):,} training blocks of {self.block_size:,} tokens; the last {train.dropped:,} tokens, shorter "
            "than a block, are left out."
        )
        for split, text in self.tokenized.items():
            cut = "" if limit is None else f", at most {limit:,}, to a line's end"
            self.say(f"{split}: {len(text.tokens):,} tokens, {text.words:,} words{cut}.")
        return TrainerParts(
            train,
            blocks_of(self.validation, self.tokenized["validation"]),
            default_data_collator,
            step_loss(model, summed_cross_entropy(args.label_smoothing_factor), shift=True),
        )

    def evaluate(self, trainer: Trainer) -> Metrics:
        """See `Objective`; the metrics are those of `Perplexity`, and every process measures them alike."""
        model = cast(PreTrainedModel, trainer.model)
        return {
            self.corpus.name: {
                split: perplexity(
                    model, text, self.block_size, self.stride, trainer.args.per_device_eval_batch_size, self.bos,
                    f"Evaluating {split}", bool(trainer.args.disable_tqdm),
                ).metrics()
                for split, text in self.tokenized.items()
            }
        }  # fmt: skip


class Blocks(torch.utils.data.Dataset):
    """A text packed into rows of one length, without padding; what is left of it at the end is dropped.

    Args:
        text: As tokens.
        block_size: Tokens of a row, `bos` counted.
        bos: Begins every row; None is nothing.

    Attributes:
        dropped: Tokens at the end, count.
    """

    def __init__(self, text: TokenizedText, block_size: int, bos: int | None = None) -> None:
        length = block_size - (bos is not None)
        count = len(text.tokens) // length
        self.rows = text.tokens[: count * length].reshape(count, length)
        self.dropped = len(text.tokens) - self.rows.size
        self.bos = bos

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self.rows[index]).long()
        if self.bos is not None:
            ids = torch.nn.functional.pad(ids, (1, 0), value=self.bos)
        labels = ids.clone()
        labels[0] = IGNORED  # nothing predicts it, see `step_loss`
        return {"input_ids": ids, "labels": labels}
