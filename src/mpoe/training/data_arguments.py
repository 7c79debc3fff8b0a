"""The command line's arguments about what is learned and from which data, and which of them go together."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

TEXT_TO_TEXT, CAUSAL_LM, CLASSIFICATION = "text-to-text", "causal-lm", "classification"


@dataclass
class DataArguments:
    """Which objective, which tasks, and where their data are."""

    _argument_group_name: ClassVar[str] = "task"

    tasks: list[str] | None = field(
        default=None,
        metadata={
            "aliases": ["--task"],
            "help": "One task or several: cola, sst2, mrpc, qqp, stsb, mnli, ... (a wrong name lists all), or "
            "YAML files that describe tasks of your own.",
        },
    )
    objective: Literal["text-to-text", "causal-lm", "classification"] = field(
        default=TEXT_TO_TEXT,
        metadata={
            "help": "What is learned: text-to-text writes a task's answers (T5), classification chooses them with a "
            "head of its own (BERT), causal-lm predicts the next token of a corpus (GPT-2, LLaMA)."
        },
    )
    eval_tasks: list[str] | None = field(
        default=None, metadata={"help": "Tasks to evaluate on; those that are trained if left out."}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with the tasks' folders in GLUE layout; the hub if left out."}
    )
    max_source_length: int = field(
        default=128, metadata={"help": "Tokens of an input (of a pair: of both texts) at most; longer ones are cut."}
    )
    max_target_length: int = field(default=128, metadata={"help": "Tokens of a target at most; longer ones are cut."})
    n_train: int = field(default=-1, metadata={"help": "Training rows of a task at most, drawn by the seed; -1: all."})
    n_val: int = field(default=-1, metadata={"help": "Validation rows of a task at most, drawn by the seed; -1: all."})
    n_test: int = field(default=-1, metadata={"help": "Test rows of a task at most, drawn by the seed; -1: all."})
    temperature: float = field(
        default=10.0,
        metadata={"help": "Several tasks: a batch is drawn from a task of n rows in proportion to n ** (1 / this)."},
    )

    def __post_init__(self) -> None:
        for name in ("max_source_length", "max_target_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")
        for name in ("n_train", "n_val", "n_test"):
            if getattr(self, name) < 1 and getattr(self, name) != -1:
                raise ValueError(f"{name} must be >= 1, or -1 for all; got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0; got {self.temperature}")


@dataclass
class CorpusArguments:
    """Which text a language model learns or is measured on, and how it is cut."""

    _argument_group_name: ClassVar[str] = "text of a language model"

    corpus: str | None = field(
        default=None,
        metadata={
            "help": "causal-lm: a text file; a folder with train.txt, valid.txt (or validation.txt, dev.txt) and "
            "test.txt; or a dataset on the hub. Without a validation part, the last 5%% of the training text are it."
        },
    )
    corpus_config: str | None = field(
        default=None,
        metadata={"help": "Configuration of a corpus on the hub: wikitext-2-raw-v1 of Salesforce/wikitext."},
    )
    text_column: str = field(default="text", metadata={"help": "Column of a hub corpus that has the text."})
    train_file: str | None = field(default=None, metadata={"help": "Text file to train on; instead of the corpus's."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Text file for validation; instead of the corpus's."}
    )
    test_file: str | None = field(default=None, metadata={"help": "Text file to test on; instead of the corpus's."})
    block_size: int | None = field(
        default=None,
        metadata={"help": "Tokens of a block or window; if left out, what the model takes, and at most 1024."},
    )
    stride: int | None = field(
        default=None,
        metadata={
            "help": "Tokens from one evaluation window to the next: each token is predicted from at least block_size - "
            "stride tokens; half a block if left out."
        },
    )
    max_eval_tokens: int | None = field(
        default=None,
        metadata={"help": "Evaluate on the beginning of a text: at most these tokens, cut at a line's end."},
    )

    def __post_init__(self) -> None:
        for name, least in (("block_size", 2), ("stride", 1), ("max_eval_tokens", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be >= {least}; got {value}")


_TASK_FLAGS = {field.name for field in fields(DataArguments)} - {"objective"}
_CORPUS_FLAGS = {field.name for field in fields(CorpusArguments)}
_GENERATION_FLAGS = {
    "predict_with_generate", "generation_max_length", "generation_num_beams", "generation_config", "sortish_sampler",
}  # fmt: skip
_SENSELESS = {
    TEXT_TO_TEXT: _CORPUS_FLAGS,
    CLASSIFICATION: _CORPUS_FLAGS | _GENERATION_FLAGS | {"eval_tasks", "max_target_length", "temperature"},
    CAUSAL_LM: _TASK_FLAGS | _GENERATION_FLAGS,
}


def check_flags(data: DataArguments, corpus: CorpusArguments, given: Collection[str]) -> None:
    """Refuse flags that say nothing about the objective, and a command without data.

    Args:
        data: Which objective, and its tasks.
        corpus: Its text.
        given: Names of the flags that the user gave.

    Raises:
        ValueError: As above, with the flags' names.
    """
    if senseless := sorted(_SENSELESS[data.objective] & set(given)):
        fitting = [name for name in _SENSELESS if not _SENSELESS[name] & set(senseless)]
        advice = f"; or choose --objective {' or '.join(fitting)}" if fitting else ""
        raise ValueError(f"{', '.join(senseless)} must be left out with objective {data.objective}{advice}")
    if data.objective == CAUSAL_LM:
        if corpus.corpus is None and corpus.train_file is None:
            raise ValueError("corpus must be given with objective causal-lm, or train_file: a text to train on")
    elif not data.tasks:
        raise ValueError(f"tasks must be given with objective {data.objective}; mpoe.training.tasks has their names")
    elif data.objective == CLASSIFICATION and len(data.tasks) > 1:
        raise ValueError(
            f"tasks must be one with objective classification, whose head is that task's; got {', '.join(data.tasks)}. "
            "Run them one by one"
        )
