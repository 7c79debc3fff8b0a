"""`mpoe predict`: a fine-tuned model answers texts given on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mpoe.cli.flags import read_flags
from mpoe.cli.loading import check_tokens, kind_of, load_finished
from mpoe.printable import printable
from mpoe.training.tasks import get_task


def run(argv: Sequence[str]) -> None:
    """Print one answer a line.

    Args:
        argv: What follows `mpoe predict`.

    Raises:
        ValueError: Not a model's folder, a model that only goes on with a text, an unknown task, a task of several
            texts, or flags of another kind of model.
    """
    parser = argparse.ArgumentParser(
        prog="mpoe predict",
        description="Let a fine-tuned model answer, by text or by label: a line a text, the answer, a tab, the text.",
    )
    parser.add_argument("model", help="folder that mpoe finetune wrote, or the adapter's folder in it")
    parser.add_argument("text", nargs="+", help="texts to answer")
    parser.add_argument("--task", help="put each text into this task's form; without it the text is used as it is")
    parser.add_argument("--pair", action="store_true", help="classifiers: texts 1 and 2 are one question, and so on")
    args = read_flags(parser, argv)
    kind = kind_of(args.model)
    if kind == "causal":
        raise ValueError(f"{args.model} goes on with a text instead of answering it: mpoe generate {args.model} TEXT")
    if kind == "classification" and args.task is not None:
        raise ValueError(
            "--task is the form of a text-to-text task; a classifier reads the text as it is: leave it out"
        )
    if kind == "seq2seq" and args.pair:
        raise ValueError("--pair is for classifiers; a text-to-text model reads both texts in one: leave it out")
    if args.pair and len(args.text) % 2:
        raise ValueError(f"--pair takes the texts two by two, so their number must be even; got {len(args.text)}")
    answer = _labels if kind == "classification" else _texts
    questions = list(zip(*[iter(args.text)] * (2 if args.pair else 1), strict=True))
    sources = questions if args.task is None else [(_source(args.task, text),) for (text,) in questions]
    model, tokenizer = load_finished(args.model)
    for question, reply in zip(questions, answer(model, tokenizer, sources), strict=True):
        print("\t".join(map(printable, [reply, *question])))


def _source(name: str, text: str) -> str:
    task = get_task(name)
    if len(task.columns) != 1:
        raise ValueError(
            f"task {task.name} takes several texts ({', '.join(task.columns)}); leave --task out and write the "
            f"source yourself, like {task.source(dict.fromkeys(task.columns, '...'))!r}"
        )
    return task.source({task.columns[0]: text})


def _texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sources: Sequence[tuple[str, ...]]) -> list[str]:
    """An encoder-decoder's answers."""
    batch = tokenizer([text for (text,) in sources], return_tensors="pt", padding=True).to(model.device)
    check_tokens(model, int(batch["input_ids"].max()))
    generated = cast(Any, model).generate(**batch, max_new_tokens=128)
    return tokenizer.batch_decode(generated, skip_special_tokens=True)


def _labels(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sources: Sequence[tuple[str, ...]]
) -> list[str]:
    """A classifier's labels, or the numbers of one that is a regression; each source is a text or a pair."""
    config = model.config
    if config.problem_type == "multi_label_classification":
        raise ValueError("mpoe predict gives one label a text; this model gives several (multi_label_classification)")
    texts, *seconds = map(list, zip(*sources, strict=True))
    batch = tokenizer(texts, seconds[0] if seconds else None, return_tensors="pt", padding=True, truncation=True)
    check_tokens(model, int(batch["input_ids"].max()))
    with torch.inference_mode():
        logits = model(**batch.to(model.device)).logits
    if config.problem_type == "regression" or config.num_labels == 1:
        return [" ".join(f"{value:.4g}" for value in row) for row in logits.tolist()]
    return [(config.id2label or {})[best] for best in logits.argmax(-1).tolist()]
