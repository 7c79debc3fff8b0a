"""`mpoe perplexity`: how well a language model predicts a text, as it is or as the mixture that it would become."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from transformers import AutoModelForCausalLM, set_seed

from mpoe.cli.parsing import name_first, parse
from mpoe.files import write_json
from mpoe.models import is_upcycled, upcycle
from mpoe.report import PlainConsole, metrics_table
from mpoe.training.arguments import MixtureArguments, ModelArguments
from mpoe.training.corpus import Corpus, bos_of, tokenize_text
from mpoe.training.data_arguments import CorpusArguments
from mpoe.training.load import load_model
from mpoe.training.perplexity import block_and_stride, perplexity


@dataclass
class PerplexityArguments:
    """Which model, and how it is run."""

    _argument_group_name: ClassVar[str] = "model, and how it is run"

    model_name_or_path: str = field(metadata={"help": "Folder with a causal language model, or a name on the hub."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Folder or hub name of the tokenizer; the model's own if left out."}
    )
    num_experts: int = field(
        default=8,
        metadata={"help": "With this or another flag of a mixture, the model becomes one first; else it stays."},
    )
    batch_size: int = field(default=8, metadata={"help": "Windows that go through the model at once."})
    device: str = field(default="cpu", metadata={"help": "Where it runs: cpu, cuda, cuda:1, mps."})
    seed: int = field(default=42, metadata={"help": "Of the routers and the noise of a mixture."})
    output: str | None = field(default=None, metadata={"help": "File for the numbers, .json."})

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1; got {self.batch_size}")
        if self.output is not None and not self.output.endswith(".json"):
            raise ValueError(f"output must be a .json file; got {self.output}")


def run(argv: Sequence[str]) -> dict[str, float]:
    """Print the perplexity of a text, and return the numbers.

    Args:
        argv: What follows `mpoe perplexity`: the model's folder or name, then flags.

    Raises:
        ValueError: Wrong input.
    """
    types = (PerplexityArguments, MixtureArguments, CorpusArguments)
    (arguments, mixture_args, corpus_args), given = parse(
        "mpoe perplexity MODEL", __doc__ or "", types, name_first(argv, "--model_name_or_path")
    )
    if corpus_args.corpus is None and corpus_args.test_file is None:
        raise ValueError("corpus must be given, or test_file: the text that is predicted")
    for flag in ("train_file", "validation_file"):
        if flag in given:
            raise ValueError(f"{flag} must be left out: mpoe perplexity predicts the text of test_file or corpus")
    mixture_flags = {field.name for field in dataclasses.fields(MixtureArguments)} | {"num_experts"}
    asked = sorted(mixture_flags & {name for name, value in given.items() if value is not None})
    config = mixture_args.mpoe_config(arguments.num_experts, arguments.seed) if asked else None
    _check_device(arguments.device)
    corpus = Corpus.open(corpus_args)
    text = corpus.test or corpus.validation or corpus.train
    assert text is not None  # nosec B101  # for the type checker: checked above
    console = PlainConsole()
    set_seed(arguments.seed)
    console.print(f"Loading {arguments.model_name_or_path} ...")
    model, tokenizer = load_model(
        ModelArguments(arguments.model_name_or_path, arguments.tokenizer_name),
        None, auto_class=AutoModelForCausalLM,
    )  # fmt: skip
    if config is not None:
        if is_upcycled(model):
            raise ValueError(f"the model has been upcycled before and stays what it is; leave {', '.join(asked)} out")
        upcycle(model, config)
    model.to(arguments.device)
    block_size, stride = block_and_stride(model, tokenizer, corpus_args.block_size, corpus_args.stride)
    tokens = tokenize_text(text, tokenizer, corpus_args.max_eval_tokens)
    metrics = perplexity(model, tokens, block_size, stride, arguments.batch_size, bos_of(tokenizer)).metrics()
    cut = "" if corpus_args.max_eval_tokens is None else ", its beginning, cut at a line's end"
    title = f"{text.name}{cut}: windows of {block_size:,} tokens every {stride:,} (cross-entropy: nats a token)"
    console.print(metrics_table({"model" if config is None else "mixture": metrics}, title, rows=""))
    if arguments.output is not None:
        how = {"model": arguments.model_name_or_path, "text": text.name, "block_size": block_size, "stride": stride}
        write_json(Path(arguments.output), {**how, **metrics})
        console.print(f"written to {arguments.output}")
    return metrics


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # of a name, a build and a machine without it
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that torch has here, such as cpu; got {name}: {reason}") from error
