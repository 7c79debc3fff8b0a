"""Text-to-text tasks, one row of `TASKS` each, and their rows as source and target text.

Sources and targets of GLUE are written as in T5's and Hyperformer's single-task runs: the task's name, then each text
behind the name of its field; the label's index as text.
"""

import math
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from mpoe.training.metrics import SCALE

HUB = "nyu-mll/glue"
VALIDATION_ROWS = 1000  # that a large task gives from its training rows, at most a tenth of them
SHOWN = 10  # folders and lines that an error message lists

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """What is asked, what may be answered, and where the rows are.

    Attributes:
        name: The name on the command line; for GLUE the configuration on the hub too.
        folder: Folder of the task in a `--data_dir`.
        template: The source text, with the names of a row's texts in braces.
        metrics: Keys of `mpoe.training.metrics.METRICS`, the headline metric first.
        labels: Target texts by class index; empty for a regression to a score in 0..5.
        is_small: Whether the development set is halved into validation and test. A larger task gives training rows for
            validation, and its development set is the test set.
        on_hub: Whether the hub has it, in the dataset `nyu-mll/glue`.
        hub_dev: The development split's name on the hub.
        dev_file: The development file's name.
        file_columns: A file's names of the columns, where they are not the row's.
        file_labels: A file's names of the labels, by class index; empty for "0", "1", ...
        file_header: The columns of a file that has no header; empty if there is one.
    """

    name: str
    folder: str
    template: str
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ("0", "1")
    is_small: bool = False
    on_hub: bool = True
    hub_dev: str = "validation"
    dev_file: str = "dev.tsv"
    file_columns: Mapping[str, str] = field(default_factory=dict)
    file_labels: tuple[str, ...] = ()
    file_header: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of a row's texts, as in `template`."""
        return tuple(name for _, name, _, _ in string.Formatter().parse(self.template) if name)

    def source(self, row: Mapping[str, Any]) -> str:
        """Return what the model reads.

        Args:
            row: The texts by the names in `columns`; more keys do no harm.
        """
        return self.template.format(**{name: row[name].strip() for name in self.columns})

    def target(self, row: Mapping[str, Any]) -> str:
        """Return what the model shall write.

        Args:
            row: Its "label" is a class index, or a score, which is rounded to the nearest 0.2 as T5 does.

        Raises:
            ValueError: If the label is no class of the task, as in the hub's unlabelled test rows.
        """
        label = row["label"]
        if not self.labels:
            return f"{round(label * 5) / 5:.1f}"
        if label not in range(len(self.labels)):
            raise ValueError(f"a label of task {self.name} must be in 0..{len(self.labels) - 1}; got {label}")
        return self.labels[label]

    def parse(self, text: str) -> int | float:
        """Return what a text answers, as the metrics take it.

        Args:
            text: What the model wrote; white space around it does not count.

        Returns:
            The class index, -1 if the text is no label; for a regression the score, nan if it is no number in 0..5.
        """
        text = text.strip()
        if self.labels:
            return self.labels.index(text) if text in self.labels else -1
        return _score(text)


@dataclass(frozen=True)
class TaskData:
    """A task's rows, each with a `source` and a `target` text.

    Attributes:
        train: To train on.
        validation: To choose by.
        test: To report.
        dev: The whole development set: what the GLUE tables of other papers report.
        dev_is_split: Whether validation and test are the halves of dev; otherwise test is dev.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    dev: datasets.Dataset
    dev_is_split: bool


_ENTAILMENT = ("entailment", "not_entailment")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "cola", "CoLA", "cola sentence: {sentence}", ("matthews", "accuracy"), is_small=True,
            file_header=("source", "label", "star", "sentence"),
        ),
        Task("sst2", "SST-2", "sst2 sentence: {sentence}", ("accuracy",)),
        Task(
            "mrpc", "MRPC", "mrpc sentence1: {sentence1} sentence2: {sentence2}", ("accuracy", "f1"), is_small=True,
            file_columns={"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
        ),
        Task(
            "qqp", "QQP", "qqp question1: {question1} question2: {question2}", ("accuracy", "f1"),
            file_columns={"label": "is_duplicate"},
        ),
        Task(
            "stsb", "STS-B", "stsb sentence1: {sentence1} sentence2: {sentence2}", ("pearson", "spearman"), labels=(),
            is_small=True, file_columns={"label": "score"},
        ),
        Task(
            "mnli", "MNLI", "mnli premise: {premise} hypothesis: {hypothesis}", ("accuracy",), labels=("0", "1", "2"),
            hub_dev="validation_matched", dev_file="dev_matched.tsv",
            file_columns={"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
            file_labels=("entailment", "neutral", "contradiction"),
        ),
        Task(
            "qnli", "QNLI", "qnli question: {question} sentence: {sentence}", ("accuracy",), file_labels=_ENTAILMENT
        ),
        Task(
            "rte", "RTE", "rte sentence1: {sentence1} sentence2: {sentence2}", ("accuracy",), is_small=True,
            file_labels=_ENTAILMENT,
        ),
        Task("wnli", "WNLI", "wnli sentence1: {sentence1} sentence2: {sentence2}", ("accuracy",), is_small=True),
        Task(
            # Worded as FLAN words it: of fifteen prompts the one that a FLAN-T5 answers best without fine-tuning.
            "sentiment", "sentiment", "sentiment sentence: {sentence}",
            ("accuracy",), labels=("negative", "positive"), on_hub=False,
        ),
    )
}  # fmt: skip


def get_task(name: str) -> Task:
    """Return a task by its name, in any case.

    Args:
        name: A key of `TASKS`.

    Raises:
        ValueError: If there is no such task.
    """
    if name.lower() not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {name!r}")
    return TASKS[name.lower()]


def load_task(task: Task, data_dir: str | None, seed: int) -> TaskData:
    """Read a task's rows and split them as the paper does.

    Args:
        task: From `get_task`.
        data_dir: A folder in GLUE's layout that has the task's folder, or this folder itself; None is the hub.
        seed: Of the split, >= 0.

    Returns:
        The splits. A small task's development set is halved into validation and test. Of a larger one, 1000 training
        rows, or a tenth of them where that is less (but one at least), are validation.

    Raises:
        ValueError: If a file is not there or is not as it must be, with its name and the line, or the hub fails.
    """
    train, dev = _from_hub(task) if data_dir is None else _from_folder(task, Path(data_dir))
    divided, name = (dev, "development") if task.is_small else (train, "training")
    if len(divided) < 2:
        raise ValueError(f"task {task.name} must have 2 {name} rows or more, to split them; got {len(divided)}")
    if task.is_small:
        validation, test = _split(dev, len(dev) // 2, seed)
    else:
        validation, train = _split(train, max(1, min(VALIDATION_ROWS, len(train) // 10)), seed)
        test = dev
    splits = (_as_text(task, rows) for rows in (train, validation, test, dev))
    return TaskData(*splits, dev_is_split=task.is_small)


def _split(rows: Rows, count: int, seed: int) -> tuple[Rows, Rows]:
    """Draw `count` rows; both parts stay in the file's order."""
    drawn = set(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())
    return [row for i, row in enumerate(rows) if i in drawn], [row for i, row in enumerate(rows) if i not in drawn]


def _as_text(task: Task, rows: Rows) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"source": [task.source(row) for row in rows], "target": [task.target(row) for row in rows]}
    )


def _from_hub(task: Task) -> tuple[Rows, Rows]:
    if not task.on_hub:
        raise ValueError(f"task {task.name} is not on the hub: name the folder that has {task.folder}/ with --data_dir")
    try:
        train, dev = datasets.load_dataset(HUB, task.name, split=["train", task.hub_dev])
    except Exception as error:  # the hub's client raises the errors of half a dozen libraries
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the dataset {HUB} ({task.name}) could not be loaded from the hub: {reason}. "
            f"Name a folder with {task.folder}/train.tsv and {task.folder}/{task.dev_file} with --data_dir"
        ) from error
    return list(train), list(dev)


def _from_folder(task: Task, data_dir: Path) -> tuple[Rows, Rows]:
    if not data_dir.is_dir():
        raise ValueError(f"data_dir must be a folder; {data_dir} is none. Correct --data_dir")
    folder = data_dir / task.folder
    if not folder.is_dir():
        folder = data_dir
        if not (folder / "train.tsv").is_file():
            there = sorted(path.name for path in data_dir.iterdir())
            raise ValueError(
                f"data_dir must hold the folder {task.folder} of task {task.name}; {data_dir} holds {_shown(there)}. "
                "Correct --data_dir or the task"
            )
    return _read_tsv(folder / "train.tsv", task), _read_tsv(folder / task.dev_file, task)


def _read_tsv(path: Path, task: Task) -> Rows:
    """Read a file in GLUE's layout: tabs divide columns, quotation marks are text, no line is skipped."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"task {task.name} needs the file {path}, which cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text; byte {error.start} is not. Convert the file") from error
    # Not splitlines: it also cuts at characters that occur within a text, such as U+2028.
    lines = [line.removesuffix("\r").split("\t") for line in text.rstrip("\r\n").split("\n")]
    header = list(task.file_header) or lines[0]
    first = 0 if task.file_header else 1
    if not text.strip() or len(lines) == first:
        raise ValueError(f"{path} must have rows; it has none. Put the task's whole file there")
    fields = {name: task.file_columns.get(name, name) for name in (*task.columns, "label")}
    if missing := [column for column in fields.values() if column not in header]:
        raise ValueError(f"{path}:1: the header must have {_shown(missing)}; got {_shown(header)}. Correct the header")
    numbered = list(enumerate(lines[first:], start=first + 1))
    if odd := [(number, len(line)) for number, line in numbered if len(line) != len(header)]:
        number, width = odd[0]
        more = f" (so also lines {_shown(number for number, _ in odd[1:])})" if odd[1:] else ""
        raise ValueError(
            f"{path}:{number}: a line must have {len(header)} tab-separated columns; got {width}{more}. "
            "Correct the file; no line is skipped silently"
        )
    index = {name: header.index(column) for name, column in fields.items()}
    rows = []
    for number, line in numbered:
        row: dict[str, Any] = {name: line[i] for name, i in index.items()}
        row["label"] = _file_label(task, row["label"], f"{path}:{number}")
        rows.append(row)
    return rows


def _file_label(task: Task, text: str, place: str) -> int | float:
    if task.labels:
        words = task.file_labels or tuple(str(i) for i in range(len(task.labels)))
        if text not in words:
            raise ValueError(f"{place}: the label must be one of {', '.join(words)}; got {text!r}. Correct the line")
        return words.index(text)
    score = _score(text)
    if math.isnan(score):
        raise ValueError(f"{place}: the score must be a number from 0 to 5; got {text!r}. Correct the line")
    return score


def _score(text: str) -> float:
    """Return the number in 0..5 that a text is, or nan."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    low, high = SCALE
    return value if low <= value <= high else math.nan


def _shown(items: Iterable[object]) -> str:
    texts = [str(item) for item in items]
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more or "nothing"
