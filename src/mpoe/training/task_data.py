"""What a text-to-text task is, and its rows: from files or the hub, split, and written as source and target text."""

import logging
import math
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np

from mpoe.files import brief
from mpoe.training.metrics import SCALE
from mpoe.training.task_files import read_file, shown

VALIDATION_ROWS = 1000  # that a large task gives from its training rows, at most a tenth of them

Kind = Literal["classes", "score", "text"]
Rows = list[dict[str, Any]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What is asked, what may be answered, and where the rows are.

    Attributes:
        name: The name on the command line.
        folder: Folder of the task in a `--data_dir`.
        template: The source text, with the names of a row's texts in braces.
        metrics: Keys of `mpoe.training.metrics.METRICS`, the headline metric first.
        labels: Target texts by class index; empty unless the kind is "classes".
        kind: Whether a label is one of several classes, a score in 0..5, or free text.
        is_small: Whether the development set is halved into validation and test. A larger task gives training rows for
            validation, and its development set is the test set.
        hub: The dataset on the hub; empty if it is not there.
        hub_config: The dataset's configuration; None if it has but one.
        hub_dev: The split on the hub that is the development set: the test split where that has labels. None leaves it
            to be drawn from the training rows.
        hub_columns: The hub's names of the columns, where they are not the row's; "a.b.0" is item 0 of b in a.
        hub_labels: The hub's names of the labels, by class index; empty for 0, 1, ...
        hub_is_script: Whether the hub has but a loading script, which the library `datasets` refuses since version 4.
        train_file: The training file's name.
        dev_file: The development file's name. None leaves it to be drawn from the training rows.
        file_columns: A file's names of the columns, where they are not the row's.
        file_labels: A file's names of the labels, by class index; empty for "0", "1", ...
        file_header: The columns of a file that has no header; empty if there is one.
        no_label: The label of rows that have none: they are left out, and counted in the log. Empty if none may be.
        described_in: The YAML file that the task is from, where file names are relative to its folder; None for a row
            of `mpoe.training.tasks.TASKS`.
    """

    name: str
    folder: str
    template: str
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ("0", "1")
    kind: Kind = "classes"
    is_small: bool = False
    hub: str = ""
    hub_config: str | None = None
    hub_dev: str | None = "validation"
    hub_columns: Mapping[str, str] = field(default_factory=dict)
    hub_labels: tuple[str, ...] = ()
    hub_is_script: bool = False
    train_file: str = "train.tsv"
    dev_file: str | None = "dev.tsv"
    file_columns: Mapping[str, str] = field(default_factory=dict)
    file_labels: tuple[str, ...] = ()
    file_header: tuple[str, ...] = ()
    no_label: str = ""
    described_in: Path | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of a row's texts, as in `template`."""
        return tuple(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(self.template) if name))

    def source(self, row: Mapping[str, Any]) -> str:
        """Return what the model reads.

        Args:
            row: The texts by the names in `columns`; more keys do no harm.
        """
        # Not str.format: a template of the user's must not reach into the texts' attributes.
        parts = string.Formatter().parse(self.template)
        return "".join(literal + (row[name].strip() if name else "") for literal, name, _, _ in parts)

    def target(self, row: Mapping[str, Any]) -> str:
        """Return what the model shall write.

        Args:
            row: Its "label" is a class index; or a score, which is rounded to the nearest 0.2 as T5 does; or the text.

        Raises:
            ValueError: If the label is no class of the task, as in the hub's unlabelled test rows.
        """
        label = row["label"]
        if self.kind == "text":
            return label.strip()
        if self.kind == "score":
            return f"{round(label * 5) / 5:.1f}"
        if label not in range(len(self.labels)):
            raise ValueError(f"a label of task {self.name} must be in 0..{len(self.labels) - 1}; got {label}")
        return self.labels[label]

    def parse(self, text: str) -> int | float | str:
        """Return what a text answers, as the metrics take it.

        Args:
            text: What the model wrote; white space around it does not count.

        Returns:
            The class index, -1 if the text is no label; or the score, nan if it is no number in 0..5; or the text.
        """
        text = text.strip()
        if self.kind == "text":
            return text
        if self.kind == "score":
            return _score(text)
        return self.labels.index(text) if text in self.labels else -1


@dataclass(frozen=True)
class TaskData:
    """A task's rows: each a `source` and a `target` text, or else as `load_task` says.

    Attributes:
        train: To train on.
        validation: To choose by.
        test: To report.
        dev: The whole development set: what the GLUE tables of other papers report; None if there is none.
        dev_is_split: Whether validation and test are the halves of dev; otherwise test is dev, or there is none.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    dev: datasets.Dataset | None
    dev_is_split: bool


def load_task(task: Task, data_dir: str | None, seed: int, in_columns: bool = False) -> TaskData:
    """Read a task's rows and split them as the paper does.

    Args:
        task: From `get_task`.
        data_dir: A folder in GLUE's layout that has the task's folder, or this folder itself; None is the hub. For a
            task that a YAML file describes: where the files are that are not beside it.
        seed: Of the split, >= 0.
        in_columns: The rows are to have a column for each text, `task.columns`, and `label`, a class index, score or
            text, instead of source and target.

    Returns:
        The splits. A small task's development set is halved into validation and test. Of a larger one, 1000 training
        rows, or a tenth of them where that is less (but one at least), are validation. A task without a development set
        gives a tenth of its training rows as validation and as many as test.

    Raises:
        ValueError: If a file is not there or is not as it must be, with its name and the line, or the hub fails.
    """
    if data_dir is not None and not Path(data_dir).is_dir():
        raise ValueError(f"data_dir must be a folder; {data_dir} is none. Correct --data_dir")
    folder = None if data_dir is None else Path(data_dir)
    if task.described_in is not None and not task.hub:
        train, dev = _from_described_files(task, task.described_in, folder)
    else:
        train, dev = _from_hub(task) if folder is None else _from_folder(task, folder)
    is_split = task.is_small and dev is not None
    if dev is None:
        _require_rows(task, train, 3, "training")
        drawn, train = _split(train, 2 * max(1, len(train) // 10), seed)
        validation, test = _split(drawn, len(drawn) // 2, seed)
    elif is_split:
        _require_rows(task, dev, 2, "development")
        validation, test = _split(dev, len(dev) // 2, seed)
    else:
        _require_rows(task, train, 2, "training")
        validation, train = _split(train, max(1, min(VALIDATION_ROWS, len(train) // 10)), seed)
        test = dev
    form = _as_columns if in_columns else _as_text
    whole = None if dev is None else form(task, dev)
    return TaskData(*(form(task, rows) for rows in (train, validation, test)), dev=whole, dev_is_split=is_split)


def limited(rows: datasets.Dataset, limit: int, seed: int) -> datasets.Dataset:
    """At most so many rows.

    Args:
        rows: Of a split.
        limit: Count; -1 is all of them.
        seed: Of the draw.
    """
    return rows.shuffle(seed=seed).select(range(limit)) if 0 < limit < len(rows) else rows


def _require_rows(task: Task, rows: Rows, least: int, name: str) -> None:
    if len(rows) < least:
        raise ValueError(f"task {task.name} must have {least} {name} rows or more, to split them; got {len(rows)}")


def _split(rows: Rows, count: int, seed: int) -> tuple[Rows, Rows]:
    """Draw `count` rows; both parts stay in the file's order."""
    drawn = set(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())
    return [row for i, row in enumerate(rows) if i in drawn], [row for i, row in enumerate(rows) if i not in drawn]


def _as_text(task: Task, rows: Rows) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"source": [task.source(row) for row in rows], "target": [task.target(row) for row in rows]}
    )


def _as_columns(task: Task, rows: Rows) -> datasets.Dataset:
    texts = {name: [row[name].strip() for row in rows] for name in task.columns}
    return datasets.Dataset.from_dict({**texts, "label": [row["label"] for row in rows]})


def _from_hub(task: Task) -> tuple[Rows, Rows | None]:
    if not task.hub:
        raise ValueError(f"task {task.name} is not on the hub: name the folder that has {task.folder}/ with --data_dir")
    dataset = f"{task.hub} ({task.hub_config})" if task.hub_config else task.hub
    splits = ["train"] if task.hub_dev is None else ["train", task.hub_dev]
    try:
        # the newest revision; datasets execute no script since version 4
        parts = datasets.load_dataset(task.hub, task.hub_config, split=splits)  # nosec B615
    except Exception as error:  # the hub's client raises the errors of half a dozen libraries
        script = "It is a loading script there, which datasets refuses since version 4. " if task.hub_is_script else ""
        advice = (
            f"Name a folder with {task.folder}/{task.train_file} and {task.folder}/{task.dev_file} with --data_dir"
            if task.described_in is None
            else f"Correct hub, config and dev in {task.described_in}"
        )
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"the dataset {dataset} could not be loaded from the hub: {reason}. {script}{advice}"
        ) from error
    rows = []
    for split, part in zip(splits, parts, strict=True):
        numbered = ((f"{dataset}, row {i} of {split}", raw) for i, raw in enumerate(_with_label_names(task, part)))
        rows.append(_rows(task, numbered, task.hub_columns, task.hub_labels))
    return rows[0], None if task.hub_dev is None else rows[1]


def _with_label_names(task: Task, part: Any) -> Iterator[dict[str, Any]]:
    """The hub's rows; where the task names labels as the hub does, but the column has their indices, the names."""
    column = task.hub_columns.get("label", "label")
    feature = part.features.get(column)
    if not task.hub_labels or not isinstance(feature, datasets.ClassLabel):
        yield from part
        return
    names = dict(enumerate(feature.names))
    for raw in part:
        yield {**raw, column: names.get(raw[column], raw[column])}


def _from_folder(task: Task, data_dir: Path) -> tuple[Rows, Rows]:
    if task.described_in is not None:
        raise ValueError(
            f"task {task.name} reads {task.hub} from the hub, as {task.described_in} says; drop --data_dir"
        )
    assert task.dev_file is not None  # only a YAML file may leave it out  # nosec B101
    folder = data_dir / task.folder
    if not folder.is_dir():
        folder = data_dir
        if not (folder / task.train_file).is_file():
            there = sorted(path.name for path in data_dir.iterdir())
            raise ValueError(
                f"data_dir must hold the folder {task.folder} of task {task.name}; {data_dir} holds {shown(there)}. "
                "Correct --data_dir or the task"
            )
    return _from_file(folder / task.train_file, task), _from_file(folder / task.dev_file, task)


def _from_described_files(task: Task, described_in: Path, data_dir: Path | None) -> tuple[Rows, Rows | None]:
    def read(name: str) -> Rows:
        places = [folder / name for folder in (described_in.parent, data_dir) if folder is not None]
        for place in places:
            if place.is_file():
                return _from_file(place, task)
        raise ValueError(
            f"task {task.name} needs the file {name}, but there is no {' and no '.join(str(p) for p in places)}. "
            f"Correct {described_in}{' or name the folder with --data_dir' if data_dir is None else ''}"
        )

    return read(task.train_file), None if task.dev_file is None else read(task.dev_file)


def _from_file(path: Path, task: Task) -> Rows:
    columns = [task.file_columns.get(name, name) for name in (*task.columns, "label")]
    return _rows(task, read_file(path, task.name, columns, task.file_header), task.file_columns, task.file_labels)


def _rows(
    task: Task, raws: Iterable[tuple[str, Mapping[str, Any]]], columns: Mapping[str, str], words: tuple[str, ...]
) -> Rows:
    """The rows, each from its place and the columns there, under the task's own names and with the label's meaning."""
    names = {name: columns.get(name, name) for name in (*task.columns, "label")}
    words = words or tuple(str(i) for i in range(len(task.labels)))
    rows, left_out = [], 0
    for place, raw in raws:
        row = {name: _value(raw, column, place) for name, column in names.items()}
        label = row.pop("label")
        if odd := [names[name] for name, value in row.items() if not isinstance(value, str)]:
            raise ValueError(
                f"{place}: column {odd[0]} must be text; got {brief(_value(raw, odd[0], place))}. Correct the row"
            )
        if task.no_label and str(label) == task.no_label:
            left_out += 1
        else:
            rows.append({**row, "label": _label(task, words, label, place)})
    if left_out:
        total = len(rows) + left_out
        logger.warning("task %s: %d of %d rows have no label and are left out", task.name, left_out, total)
    return rows


def _value(raw: Mapping[str, Any], column: str, place: str) -> Any:
    if column in raw:
        return raw[column]
    value: Any = raw
    try:
        for key in column.split("."):
            value = value[int(key)] if isinstance(value, list) else value[key]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{place}: the row must have {column}; got {shown(raw)}. Correct the row") from error
    return value


def _label(task: Task, words: tuple[str, ...], value: Any, place: str) -> int | float | str:
    text = str(value).strip()
    if task.kind == "text":
        if not isinstance(value, str):
            raise ValueError(f"{place}: the label must be text; got {brief(value)}. Correct the row")
        return text
    if task.kind == "score":
        score = _score(text)
        if math.isnan(score):
            raise ValueError(f"{place}: the score must be a number from 0 to 5; got {brief(text)}. Correct the row")
        return score
    if text not in words:
        raise ValueError(f"{place}: the label must be one of {', '.join(words)}; got {brief(text)}. Correct the row")
    return words.index(text)


def _score(text: str) -> float:
    """Return the number in 0..5 that a text is, or nan."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    low, high = SCALE
    return value if low <= value <= high else math.nan
