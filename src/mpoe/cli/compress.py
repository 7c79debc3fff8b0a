"""`mpoe compress`: a model with fewer parameters, its matrices truncated MPOs; what it lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from mpoe.cli.loading import Kind, kind_of, load_finished
from mpoe.cli.parsing import name_first, parse
from mpoe.files import check_new_folder, new_folder, write_json
from mpoe.models import count_parameters, is_upcycled
from mpoe.models.compress import Compressed, compress, input_moments
from mpoe.report import PlainConsole
from mpoe.report.compression import CompressionRow, compression_table, most_lost_table
from mpoe.training.corpus import Corpus, Text, tokenize_text
from mpoe.training.data_arguments import CorpusArguments, DataArguments
from mpoe.training.measure import TaskYardstick, TextYardstick
from mpoe.training.tasks import get_task, load_task

OF_THE_TASK = "task"  # as calibration data: the training rows of --task
REPORT_FILE = "compression.json"
NAMES = {"low_rank": "SVD (low_rank)", "balanced": "MPO (balanced)"}


@dataclass
class CompressArguments:
    """Which model, how small, and on what it is measured."""

    model: str = field(metadata={"help": "Folder of a dense model, a mixture or a finished run, or a name on the hub."})
    budget: float = field(metadata={"help": "Parameters of the result as a share of the model's, in (0, 1]."})
    output_dir: str = field(metadata={"aliases": ["-o"], "help": "Folder for the result; new or empty."})
    mpo_layers: str = field(
        default="mlp,attention",
        metadata={"help": "Dense models: comma list of what is compressed, word_embed, mlp, attention."},
    )
    layout: Literal["low_rank", "balanced"] = field(
        default="low_rank",
        metadata={"help": "Dense models: how matrices are cut into sites; low_rank is the plain SVD."},
    )
    expert_budget: float | None = field(
        default=None,
        metadata={"help": "Mixtures: parameters of all auxiliary tensors as a share of those there are, in (0, 1]."},
    )
    calibration_data: str | None = field(
        default=None,
        metadata={
            "help": "Keep the outputs of the matrices, not the matrices: on a text file, or on the training rows of "
            f"--task with the word {OF_THE_TASK}."
        },
    )
    calibration_tokens: int = field(default=16384, metadata={"help": "Tokens of it that are taken."})
    test_file: str | None = field(
        default=None, metadata={"help": "Language models: a text whose perplexity is measured before and after."}
    )
    max_eval_tokens: int | None = field(default=None, metadata={"help": "Of that text, the beginning: so many tokens."})
    tasks: str | None = field(
        default=None,
        metadata={
            "aliases": ["--task"],
            "help": "Other models: the task whose test rows are measured before and after; a name, or a YAML file.",
        },
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder with the task's rows; the hub if left out."})
    n_test: int = field(default=-1, metadata={"help": "Test rows at most, drawn by the seed; -1: all."})
    batch_size: int = field(default=8, metadata={"help": "Rows or windows that go through the model at once."})
    compare_svd: bool = field(default=True, metadata={"help": "Measure the SVD of the same budget too."})
    seed: int = field(default=42, metadata={"help": "Of the split of the task's rows: that of the run."})

    def __post_init__(self) -> None:
        for name in ("calibration_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")
        if self.test_file is not None and self.tasks is not None:
            raise ValueError("test_file is for language models, task for those that answer; leave one of them out")
        if self.calibration_data == OF_THE_TASK and self.tasks is None:
            raise ValueError("calibration_data says task, so --task must be given; or name a text file")


def run(argv: Sequence[str]) -> None:
    """Compress, save, print the tables.

    Args:
        argv: What follows `mpoe compress`: the model's folder or name, then flags.

    Raises:
        ValueError: Wrong input.
    """
    (args,), _ = parse("mpoe compress MODEL", __doc__ or "", [CompressArguments], name_first(argv, "--model"))
    check_new_folder(Path(args.output_dir))
    kind = kind_of(args.model)
    _check_kind(args, kind)
    console = PlainConsole()
    set_seed(args.seed)
    task = None if args.tasks is None else _task_yardstick(args, args.tasks, kind)
    texts = {file: _text(file) for file in (args.test_file, args.calibration_data) if file not in (None, OF_THE_TASK)}
    console.print(f"Loading {args.model} ...")
    model, tokenizer = load_finished(args.model)
    yardstick = task
    if args.test_file is not None:
        text = tokenize_text(texts[args.test_file], tokenizer, args.max_eval_tokens)
        yardstick = TextYardstick(text, args.batch_size)
    components = tuple(part.strip() for part in args.mpo_layers.split(",") if part.strip())
    moments = _moments(args, model, tokenizer, task, texts, components)
    shrink = partial(compress, model, args.budget, components, expert_budget=args.expert_budget, moments=moments)
    found = {args.layout: shrink((args.layout,))}
    with new_folder(Path(args.output_dir)) as folder:
        found[args.layout].model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    console.print(f"Model and tokenizer are in {args.output_dir}.")
    if args.compare_svd and not is_upcycled(model) and args.layout != "low_rank":
        found["low_rank"] = shrink(("low_rank",))
    rows = [_row("before", model, None, yardstick, tokenizer)]
    for layout, compressed in found.items():
        name = "after" if is_upcycled(model) else NAMES[layout]
        rows.append(_row(name, compressed.model, compressed, yardstick, tokenizer))
    of_what = "matrices" if moments is None else "outputs on the calibration data"
    title = f"{args.model} at {args.budget:g} of its parameters; relative error of the {of_what}, root mean square"
    console.print(compression_table(rows, title))
    console.print(most_lost_table(found[args.layout].matrices))
    if yardstick is None:
        console.print("What these errors do to answers is not known: --task or --test_file measures it.")
    report = {"budget": args.budget, "rows": [vars(row) for row in rows]}
    write_json(Path(args.output_dir) / REPORT_FILE, report)
    console.print(f"The numbers are in {Path(args.output_dir) / REPORT_FILE}; mpoe finetune goes on with the model.")


def _check_kind(args: CompressArguments, kind: Kind) -> None:
    """Refuse a measure that the model cannot be measured by."""
    if kind == "causal" and args.tasks is not None:
        raise ValueError(f"task must be left out: {args.model} goes on with texts; measure it with --test_file")
    if kind != "causal" and args.test_file is not None:
        raise ValueError(f"test_file must be left out: {args.model} answers; measure it with --task and --data_dir")
    if kind != "causal" and args.calibration_data not in (None, OF_THE_TASK):
        raise ValueError(
            f"calibration_data must be the word {OF_THE_TASK} for {args.model}, whose inputs have a task's form; got "
            f"{args.calibration_data}"
        )


def _task_yardstick(args: CompressArguments, name: str, kind: Kind) -> TaskYardstick:
    task, is_classifier = get_task(name), kind == "classification"
    rows = load_task(task, args.data_dir, args.seed, in_columns=is_classifier)
    data_args = DataArguments([task.name], data_dir=args.data_dir, n_val=1, n_test=args.n_test)
    return TaskYardstick(task, rows, is_classifier, data_args, args.batch_size, args.seed)


def _text(file: str) -> Text:
    text = Corpus.open(CorpusArguments(test_file=file)).test
    assert text is not None  # nosec B101  # for the type checker: it was just named
    return text


def _moments(
    args: CompressArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    task: TaskYardstick | None, texts: Mapping[str, Text], components: tuple[str, ...],
) -> dict[str, Tensor] | None:  # fmt: skip
    """The second moments of the matrices' inputs on the calibration data; None if there is none."""
    if args.calibration_data is None:
        return None
    with input_moments(model, components) as moments:
        if args.calibration_data == OF_THE_TASK and task is not None:
            task.run_training_rows(model, tokenizer, args.calibration_tokens)
        else:
            text = tokenize_text(texts[args.calibration_data], tokenizer, args.calibration_tokens)
            TextYardstick(text, args.batch_size).metrics(model, tokenizer)
    return moments


def _row(
    name: str, model: PreTrainedModel, compressed: Compressed | None, yardstick: TaskYardstick | TextYardstick | None,
    tokenizer: PreTrainedTokenizerBase,
) -> CompressionRow:  # fmt: skip
    count = count_parameters(model)
    errors = (None, None) if compressed is None else (compressed.predicted, compressed.error)
    metrics = {} if yardstick is None else yardstick.metrics(model, tokenizer)
    return CompressionRow(name, count.total, count.auxiliary, *errors, metrics)
