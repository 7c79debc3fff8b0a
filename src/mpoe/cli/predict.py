"""`mpoe predict`: a fine-tuned model answers texts given on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from mpoe.cli.parsing import raise_error
from mpoe.models import clear_load_errors, load_adapter, load_tokenizer
from mpoe.models.adapter import base_of_adapter, is_adapter
from mpoe.training.run_folder import RESULTS_FILE, RUN_FILE
from mpoe.training.tasks import get_task


def run(argv: Sequence[str]) -> None:
    """Print one answer a line.

    Args:
        argv: What follows `mpoe predict`.

    Raises:
        ValueError: Not a model's folder, an unknown task, or a task of several texts.
    """
    parser = argparse.ArgumentParser(
        prog="mpoe predict", description="Let a fine-tuned model answer: a line a text, the answer, a tab, the text."
    )
    parser.add_argument("model", help="folder that mpoe finetune wrote, or the adapter's folder in it")
    parser.add_argument("text", nargs="+", help="texts to answer")
    parser.add_argument("--task", help="put each text into this task's form; without it the text is used as it is")
    parser.error = raise_error
    args = parser.parse_args(argv)
    sources = args.text
    if args.task is not None:
        task = get_task(args.task)
        if len(task.columns) != 1:
            raise ValueError(
                f"task {task.name} takes several texts ({', '.join(task.columns)}); leave --task out and write the "
                f"source yourself, like {task.source(dict.fromkeys(task.columns, '...'))!r}"
            )
        sources = [task.source({task.columns[0]: text}) for text in args.text]
    model, tokenizer = _load(args.model)
    batch = tokenizer(sources, return_tensors="pt", padding=True)
    generated = cast(Any, model).generate(**batch, max_new_tokens=128)
    answers = tokenizer.batch_decode(generated, skip_special_tokens=True)
    for text, answer in zip(args.text, answers, strict=True):
        print(f"{answer}\t{text}")


def _load(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if (Path(path) / RUN_FILE).is_file() and not (Path(path) / RESULTS_FILE).is_file():
        raise ValueError(f"{path} must be a finished run; this one is not: repeat its command, which resumes it")
    base = base_of_adapter(path) if is_adapter(path) else path
    with clear_load_errors(base):
        model = AutoModelForSeq2SeqLM.from_pretrained(base)
    if is_adapter(path):
        load_adapter(model, path)
    return model.eval(), load_tokenizer(base)
