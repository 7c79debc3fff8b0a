"""Text-to-text tasks: one row of `TASKS` each, or a few lines of a user's YAML file.

Sources and targets are written as in T5's and Hyperformer's single-task runs: the task's name, then each text behind
the name of its field; the label's index as text. A task of several choices shows them in the source and answers with
the index of one. Translations are asked for in words.

The development set, which is halved for a small task and else is the test set, is the hub's test split where that has
labels, and its validation split where not.
"""

import re
import string
from pathlib import Path
from typing import Any

from mpoe.files import brief, load_yaml
from mpoe.printable import did_you_mean
from mpoe.training.metrics import METRICS
from mpoe.training.task_data import Kind, Task, TaskData, load_task

__all__ = ["TASKS", "Task", "TaskData", "get_task", "load_task"]

_GLUE, _SUPER_GLUE = "nyu-mll/glue", "aps/super_glue"
_WMT16, _WMT14, _IWSLT = "wmt/wmt16", "wmt/wmt14", "IWSLT/iwslt2017"
_ACCURACY = ("accuracy",)
_ENTAILMENT = ("entailment", "not_entailment")
_THREE, _FOUR, _FIVE = ("0", "1", "2"), ("0", "1", "2", "3"), ("0", "1", "2", "3", "4")
_LANGUAGES = {
    "cs": "Czech", "en": "English", "fi": "Finnish", "hi": "Hindi", "nl": "Dutch", "ro": "Romanian",
}  # fmt: skip


def _translation(name: str, source: str, target: str, hub: str, hub_config: str, hub_is_script: bool = False) -> Task:
    return Task(
        name, name, f"Translate {_LANGUAGES[source]} to {_LANGUAGES[target]} {{text}}", ("bleu",), labels=(),
        kind="text", hub=hub, hub_config=hub_config, hub_dev="test", hub_is_script=hub_is_script,
        hub_columns={"text": f"translation.{source}", "label": f"translation.{target}"},
    )  # fmt: skip


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "cola", "CoLA", "cola sentence: {sentence}", ("matthews", "accuracy"), is_small=True,
            hub=_GLUE, hub_config="cola", file_header=("source", "label", "star", "sentence"),
        ),
        Task("sst2", "SST-2", "sst2 sentence: {sentence}", _ACCURACY, hub=_GLUE, hub_config="sst2"),
        Task(
            "mrpc", "MRPC", "mrpc sentence1: {sentence1} sentence2: {sentence2}", ("accuracy", "f1"), is_small=True,
            hub=_GLUE, hub_config="mrpc",
            file_columns={"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
        ),
        Task(
            "qqp", "QQP", "qqp question1: {question1} question2: {question2}", ("accuracy", "f1"),
            hub=_GLUE, hub_config="qqp", file_columns={"label": "is_duplicate"},
        ),
        Task(
            "stsb", "STS-B", "stsb sentence1: {sentence1} sentence2: {sentence2}", ("pearson", "spearman"), labels=(),
            kind="score", is_small=True, hub=_GLUE, hub_config="stsb", file_columns={"label": "score"},
        ),
        Task(
            "mnli", "MNLI", "mnli premise: {premise} hypothesis: {hypothesis}", _ACCURACY, labels=_THREE,
            hub=_GLUE, hub_config="mnli", hub_dev="validation_matched", dev_file="dev_matched.tsv",
            file_columns={"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
            file_labels=("entailment", "neutral", "contradiction"),
        ),
        Task(
            "qnli", "QNLI", "qnli question: {question} sentence: {sentence}", _ACCURACY,
            hub=_GLUE, hub_config="qnli", file_labels=_ENTAILMENT,
        ),
        Task(
            "rte", "RTE", "rte sentence1: {sentence1} sentence2: {sentence2}", _ACCURACY, is_small=True,
            hub=_GLUE, hub_config="rte", file_labels=_ENTAILMENT,
        ),
        Task(
            "wnli", "WNLI", "wnli sentence1: {sentence1} sentence2: {sentence2}", _ACCURACY, is_small=True,
            hub=_GLUE, hub_config="wnli",
        ),
        Task(
            # Worded as FLAN words it: of fifteen prompts the one that a FLAN-T5 answers best without fine-tuning.
            "sentiment", "sentiment", "sentiment sentence: {sentence}",
            _ACCURACY, labels=("negative", "positive"),
        ),
        Task("imdb", "imdb", "imdb {text}", _ACCURACY, is_small=True, hub="stanfordnlp/imdb", hub_dev="test"),
        Task(
            "yelp_polarity", "yelp_polarity", "yelp_polarity sentence: {text}", _ACCURACY,
            hub="fancyzhx/yelp_polarity", hub_dev="test",
        ),
        Task(
            "trec", "trec", "trec sentence: {text}", _ACCURACY, labels=(*_FIVE, "5"), is_small=True,
            hub="CogComp/trec", hub_dev="test", hub_columns={"label": "coarse_label"}, hub_is_script=True,
        ),
        Task(
            "paws", "paws", "paws sentence1: {sentence1} sentence2: {sentence2}", _ACCURACY,
            hub="google-research-datasets/paws", hub_config="labeled_final", hub_dev="test",
        ),
        Task(
            "sick", "sick", "sick premise: {premise} hypothesis: {hypothesis}", _ACCURACY, labels=_THREE, is_small=True,
            hub="RobZamp/sick", hub_dev="test", hub_columns={"premise": "sentence_A", "hypothesis": "sentence_B"},
            hub_is_script=True,
        ),
        Task(
            "scitail", "scitail", "scitail sentence1: {sentence1} sentence2: {sentence2}", _ACCURACY,
            hub="allenai/scitail", hub_config="snli_format", hub_dev="test",
            hub_columns={"label": "gold_label"}, hub_labels=("entailment", "neutral"),
        ),
        Task(
            # The annotators of 785 training and 176 test rows did not agree.
            "snli", "snli", "snli premise: {premise} hypothesis: {hypothesis}", _ACCURACY, labels=_THREE,
            hub="stanfordnlp/snli", hub_dev="test", no_label="-1",
        ),
        Task(
            "boolq", "boolq", "boolq question: {question} passage: {passage}", _ACCURACY, is_small=True,
            hub=_SUPER_GLUE, hub_config="boolq",
        ),
        Task(
            "cb", "cb", "cb premise: {premise} hypothesis: {hypothesis}", _ACCURACY, labels=_THREE, is_small=True,
            hub=_SUPER_GLUE, hub_config="cb",
        ),
        Task(
            "superglue-rte", "superglue-rte", "superglue-rte premise: {premise} hypothesis: {hypothesis}", _ACCURACY,
            is_small=True, hub=_SUPER_GLUE, hub_config="rte",
        ),
        Task(
            "commonsense_qa", "commonsense_qa",
            "commonsense_qa question: {question} A: {A} B: {B} C: {C} D: {D} E: {E}", _ACCURACY, labels=_FIVE,
            is_small=True, hub="tau/commonsense_qa", hub_labels=("A", "B", "C", "D", "E"),
            hub_columns={"label": "answerKey"} | {letter: f"choices.text.{i}" for i, letter in enumerate("ABCDE")},
        ),
        Task(
            "social_i_qa", "social_i_qa",
            "social_i_qa question: {question} context: {context} "
            "answerA: {answerA} answerB: {answerB} answerC: {answerC}", _ACCURACY, labels=_THREE,
            hub="allenai/social_i_qa", hub_labels=("1", "2", "3"), hub_is_script=True,
        ),
        Task(
            "cosmos_qa", "cosmos_qa",
            "cosmos_qa question: {question} context: {context} "
            "answer0: {answer0} answer1: {answer1} answer2: {answer2} answer3: {answer3}", _ACCURACY, labels=_FOUR,
            hub="allenai/cosmos_qa", hub_is_script=True,
        ),
        Task(
            "winogrande", "winogrande", "winogrande sentence: {sentence} option1: {option1} option2: {option2}",
            _ACCURACY, labels=("1", "2"), hub="allenai/winogrande", hub_config="winogrande_l",
            hub_columns={"label": "answer"}, hub_labels=("1", "2"), file_labels=("1", "2"),
        ),
        Task(
            "hellaswag", "hellaswag",
            "hellaswag ctx: {ctx} ending0: {ending0} ending1: {ending1} ending2: {ending2} ending3: {ending3}",
            _ACCURACY, labels=_FOUR, hub="Rowan/hellaswag",
            hub_columns={f"ending{i}": f"endings.{i}" for i in range(4)},
        ),
        _translation("wmt16-en-ro", "en", "ro", _WMT16, "ro-en"),
        _translation("wmt16-ro-en", "ro", "en", _WMT16, "ro-en"),
        _translation("wmt16-en-cs", "en", "cs", _WMT16, "cs-en"),
        _translation("wmt16-en-fi", "en", "fi", _WMT16, "fi-en"),
        _translation("wmt14-hi-en", "en", "hi", _WMT14, "hi-en"),  # into Hindi, as in Hyperformer
        _translation("iwslt2017-en-nl", "en", "nl", _IWSLT, "iwslt2017-en-nl", hub_is_script=True),
        _translation("iwslt2017-ro-nl", "ro", "nl", _IWSLT, "iwslt2017-ro-nl", hub_is_script=True),
    )
}  # fmt: skip

_METRICS_OF_KIND = {"classes": ("accuracy", "f1", "matthews"), "score": ("pearson", "spearman"), "text": ("bleu",)}
_SUFFIXES = (".csv", ".tsv", ".jsonl")
_KEYS = ("name", "template", "labels", "label", "kind", "metrics", "train", "dev", "hub", "config")


def get_task(name: str) -> Task:
    """Return a task by its name, in any case, or by the YAML file that describes it.

    Such a file has the keys

    - `name`: letters, digits, and any of "_.-";
    - `template`: the source text, with columns' names in braces;
    - `label`: the column of the right answer, "label" if left out;
    - `labels`: the answers, texts as they stand in that column;
    - `kind`: `score` if the answers are numbers from 0 to 5; else left out: with `labels` they are classes, without
      them free text;
    - `metrics`: names of `mpoe.training.metrics.METRICS` that fit the answers, the headline metric first;
    - `train` and `dev`: files beside the YAML file, of csv, tsv (quotation marks are text) or jsonl (an object a line).
      Without `dev`, a tenth of the training rows each are validation and test; with it, `dev` is the test set, and a
      tenth of the training rows, at most 1000, is validation;
    - `hub`, in the place of `train`: a dataset on the hub, with `config` its configuration and `dev` its split.

    Args:
        name: A key of `TASKS`, or a path that ends in .yaml or .yml.

    Raises:
        ValueError: If there is no such task, or the file does not describe one.
    """
    if name.lower().endswith((".yaml", ".yml")):
        return _described_task(Path(name))
    if name.lower() not in TASKS:
        known = f"{', '.join(TASKS)}, or a .yaml file that describes one"
        beside = [f"{name}{suffix}" for suffix in (".yaml", ".yml") if Path(f"{name}{suffix}").is_file()]
        near = f": did you mean {beside[0]}?" if beside else did_you_mean(name, TASKS)
        raise ValueError(f"task {name!r} is not known{f'{near} It' if near else '; it'} must be one of {known}")
    return TASKS[name.lower()]


def _described_task(path: Path) -> Task:
    values = _read_yaml(path)
    for key in ("name", "template", "label", "kind", "train", "dev", "hub", "config"):
        if key in values and not (isinstance(values[key], str) and values[key].strip()):
            raise ValueError(f"{path}: {key} must be text; got {brief(values[key])}. Correct {key}, or quote it")
    for key in ("name", "template", "metrics"):
        if key not in values:
            of = f", of {', '.join(METRICS)}" if key == "metrics" else ""
            raise ValueError(f"{path}: {key} must be given; got {', '.join(values) or 'no keys'}. Add {key}{of}")
    if not re.fullmatch(r"[\w.-]+", values["name"]):
        raise ValueError(f"{path}: name must be of letters, digits and _.- only; got {values['name']!r}. Correct name")
    label = values.get("label", "label")
    _check_template(path, values["template"], label)
    labels = _distinct_texts(path, "labels", values["labels"], least=2) if "labels" in values else ()
    kind = _kind(path, values.get("kind"), labels)
    metrics = _distinct_texts(path, "metrics", values["metrics"], least=1)
    _check_metrics(path, metrics, kind, labels)
    _check_places(path, values)
    return Task(
        values["name"], values["name"], values["template"], metrics, labels=labels, kind=kind,
        hub=values.get("hub", ""), hub_config=values.get("config"), hub_dev=values.get("dev"),
        hub_columns={"label": label}, hub_labels=labels,
        train_file=values.get("train", ""), dev_file=values.get("dev"),
        file_columns={"label": label}, file_labels=labels, described_in=path,
    )  # fmt: skip


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ValueError(f"{path} must be a readable YAML file that describes a task: {reason}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values that describe a task; got {type(values).__name__}")
    if unknown := [str(key) for key in values if key not in _KEYS]:
        near = did_you_mean(unknown[0], _KEYS) or "."
        raise ValueError(
            f"{path}: keys must be among {', '.join(_KEYS)}; got {', '.join(unknown)}{near} Correct the key"
        )
    return values


def _check_template(path: Path, template: str, label: str) -> None:
    try:
        fields = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"{path}: template must have balanced braces; got {template!r}: {error}") from error
    if not fields:
        raise ValueError(f"{path}: template must have a column's name in braces; got {template!r}. Add one")
    for name, form, conversion in fields:
        if not name or form or conversion or set(name) & set(".[]{}"):
            raise ValueError(
                f"{path}: template must have nothing but columns' names in braces; got {template!r}. "
                "Write {column}, or {{ and }} for braces of the text"
            )
        if name in ("label", label):
            raise ValueError(f"{path}: template must not show the answer; got {{{name}}}. Take it out of the template")


def _distinct_texts(path: Path, key: str, value: Any, least: int) -> tuple[str, ...]:
    texts = value if isinstance(value, list) and all(isinstance(text, str) for text in value) else []
    stripped = tuple(text.strip() for text in texts)
    if len(stripped) < least or len(set(stripped)) < len(stripped) or "" in stripped:
        raise ValueError(
            f"{path}: {key} must be a list of {least} or more different texts; got {brief(value)}. "
            f"Correct {key}; numbers, yes, no, on and off need quotation marks"
        )
    return stripped


def _kind(path: Path, given: str | None, labels: tuple[str, ...]) -> Kind:
    fitting: tuple[Kind, ...] = ("classes",) if labels else ("text", "score")
    for kind in fitting:
        if given in (None, kind):
            return kind
    has = "with" if labels else "without"
    raise ValueError(f"{path}: kind must be {' or '.join(fitting)} {has} labels; got {given!r}. Correct kind or labels")


def _check_metrics(path: Path, metrics: tuple[str, ...], kind: Kind, labels: tuple[str, ...]) -> None:
    fitting = [name for name in METRICS if name in _METRICS_OF_KIND[kind] and (name != "f1" or len(labels) == 2)]
    if odd := [name for name in metrics if name not in fitting]:
        of = f"{len(labels)} classes" if labels else f"answers of kind {kind}"
        raise ValueError(
            f"{path}: metrics of {of} must be among {', '.join(fitting)}; got {', '.join(odd)}. "
            "Correct metrics, labels or kind"
        )


def _check_places(path: Path, values: dict[str, Any]) -> None:
    if ("train" in values) == ("hub" in values):
        got = "both" if "train" in values else "neither"
        raise ValueError(f"{path}: must give either train, a file, or hub, a dataset; got {got}. Leave one")
    if "hub" not in values and "config" in values:
        raise ValueError(f"{path}: config must come with hub; got {values['config']!r} without it. Take config out")
    for key in ("train", "dev"):
        if "hub" not in values and key in values and Path(values[key]).suffix.lower() not in _SUFFIXES:
            raise ValueError(f"{path}: {key} must be a file in {', '.join(_SUFFIXES)}; got {values[key]!r}. Convert it")
