"""What users write: task files, run configs, rows of data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

import mpoe.cli.finetune
from fuzzing.cases import JUNK, Case, Property, mutated_bytes, mutated_json, refusal_of, run_command
from mpoe.training.arguments import FinetuneTrainingArguments, MixtureArguments, ModelArguments, TrainableArguments
from mpoe.training.data_arguments import CorpusArguments, DataArguments
from mpoe.training.task_data import load_task
from mpoe.training.tasks import get_task
from tiny import tiny_t5, tiny_tokenizer, write_sentiment

TASK = {
    "name": "films", "template": "films title: {title} text: {text}", "label": "verdict", "labels": ["good", "bad"],
    "kind": "classes", "metrics": ["accuracy", "f1"], "train": "rows.tsv", "dev": "rows.csv",
}  # fmt: skip
SCORED = {"name": "s", "template": "{title}", "label": "stars", "kind": "score", "metrics": ["pearson"]}
YAML_JUNK = (
    "!!timestamp x", "!!int ''", "!!int x", "!!float ''", "!!bool maybe", "!!binary é", "!!python/object:os.system x",
    "!!set {a: 1}", "!!omap [1]", "!!str [1]", "{[1]: 2}", "{{a: 1}: 2}", "? [1]\n: 2", "=", "<<: 1", "&a [*a]", "*b",
    "2020-99-99", "2020-01-01", "1:60:60", "0x", "0b", ".inf", "-.nan", "1" * 5000, "@x", "`x", "%x", "\t", "- a\n-b",
    "'", '"', '"\\x"', '"\\uD800"', "|\n x", "[" * 3000, "- " * 3000, "{a: " * 3000, "--- a\n--- b", "\x00", "\ufffe",
    "~", "no",
)  # fmt: skip
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
ROWS = [
    {"title": f"film {i}", "text": "it was great" if i % 2 else "awful , dull", "verdict": ("good", "bad")[i % 2],
     "stars": str(i % 6)}
    for i in range(12)
]  # fmt: skip
STOPPED = "stopped before the model is loaded"


def _write_rows(folder: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    columns = list(ROWS[0])
    for suffix, between in ((".tsv", "\t"), (".csv", ",")):
        quote = '"{}"' if suffix == ".csv" else "{}"
        lines = [between.join(columns), *(between.join(quote.format(row[c]) for c in columns) for row in rows)]
        (folder / f"rows{suffix}").write_text("\n".join(lines) + "\n")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _document(case: Case, values: dict[str, Any]) -> bytes:
    """A YAML document, mutated as a value or as text."""
    draw = case.random
    chance = draw.random()
    if chance < 0.3:
        return mutated_bytes(case, yaml.safe_dump(values).encode())
    if chance < 0.6:
        key, junk = draw.choice([*values, "more"]), draw.choice((*YAML_JUNK, "bomb"))
        case.tried += f" {key}: {junk[:80]!r}"
        left = yaml.safe_dump({name: value for name, value in values.items() if name != key})
        text = f"{left}{key}: {junk}\n" if junk != "bomb" else f"{BOMB}{left}{key}: [*i]\n"
        return (text if draw.random() < 0.8 else junk).encode()
    changed = mutated_json(case, values)
    if isinstance(changed, dict) and draw.random() < 0.3:
        changed = mutated_json(case, changed)
    return yaml.safe_dump(changed).encode("utf-8", "surrogatepass")


def _task_files(folder: Path) -> Any:
    _write_rows(folder)
    file = folder / "task.yaml"

    def attempt(case: Case) -> None:
        base = dict(case.random.choice((TASK, {**SCORED, "train": "rows.jsonl"})))
        if case.random.random() < 0.1:
            base["template"] = case.random.choice(
                ("{", "{}", "{0}", "{a.b}", "{title!r}", "{title:x}", "{{}}", "{verdict}")
            )
        file.write_bytes(_document(case, base))

        def read() -> None:
            task = get_task(str(file))
            data = load_task(task, None, 0) if not task.hub else None
            assert data is None or all(isinstance(row["source"], str) for row in data.train)

        refusal_of(read, "task.yaml", "rows.")

    return attempt


def _data_files(folder: Path) -> Any:
    _write_rows(folder)
    originals = {path.suffix: path.read_bytes() for path in folder.glob("rows.*")}
    odd = (b'"', b"\0", b"\xff", b"\r", b"\n", b"\t", b",", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\n\n", b'""', b"\x1a")

    def attempt(case: Case) -> None:
        draw = case.random
        suffix = draw.choice(sorted(originals))
        scored = draw.random() < 0.3
        values = {**(SCORED if scored else TASK), "train": f"rows{suffix}"}
        values.pop("dev", None)
        (folder / "task.yaml").write_text(yaml.safe_dump(values))
        data = originals[suffix]
        case.tried = f"rows{suffix}{' scored' if scored else ''}:"
        way = draw.random()
        if way < 0.4:
            data = mutated_bytes(case, data)
        elif way < 0.7 or suffix != ".jsonl":
            place, what = draw.randrange(len(data)), draw.choice((*odd, b"x" * 200_000))
            data = data[:place] + what + data[place + draw.choice((0, 1)) :]
            case.tried += f" {what[:20]!r} at {place}"
        else:
            rows = [json.loads(line) for line in data.splitlines()]
            number = draw.randrange(len(rows))
            rows[number] = mutated_json(case, rows[number])
            case.tried += f" in row {number}"
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
            if draw.random() < 0.05:
                data += b'{"title": ' + b"[" * 100_000 + b"\n"
                case.tried += " and one nested 100,000 deep"
        (folder / f"rows{suffix}").write_bytes(data)

        def read() -> None:
            rows = load_task(get_task(str(folder / "task.yaml")), None, 0)
            texts = [row["source"] for part in (rows.train, rows.validation, rows.test) for row in part]
            assert all(isinstance(text, str) for text in texts)

        message = refusal_of(read, f"rows{suffix}", "must have 3 training rows")
        line_is_known = message is None or "must be UTF-8" in message or "must have" in message
        assert line_is_known or f"rows{suffix}:" in message, f"the error names no line: {message[:300]}"

    return attempt


def _run_configs(folder: Path) -> Any:
    tiny_t5(num_layers=1).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    write_sentiment(folder / "data")
    base = {
        "model_name_or_path": "model", "tasks": ["sentiment"], "data_dir": "data", "output_dir": "run", "use_cpu": True,
        "num_experts": 2, "learning_rate": 1e-3, "max_steps": 4, "mpo_layers": ["mlp"], "layout": "balanced",
    }  # fmt: skip
    types = (ModelArguments, MixtureArguments, TrainableArguments, DataArguments, CorpusArguments)
    ours = [field.name for kind in types for field in dataclasses.fields(kind)]
    trainers = [
        "learning_rate", "weight_decay", "num_train_epochs", "max_steps", "per_device_train_batch_size", "save_steps",
        "gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "logging_steps", "eval_strategy", "seed",
        "save_strategy", "save_total_limit", "optim", "load_best_model_at_end", "metric_for_best_model", "adam_beta1",
        "generation_max_length", "generation_num_beams", "label_smoothing_factor", "max_grad_norm", "eval_steps",
        "data_seed", "dataloader_num_workers", "lr_scheduler_kwargs", "optim_args", "report_to", "test_routing",
    ]  # fmt: skip
    assert set(trainers) <= {field.name for field in dataclasses.fields(FinetuneTrainingArguments)}
    words = (
        "classification",
        "causal-lm",
        "text-to-text",
        "mlp,word_embed",
        "nompo",
        "1e-4",
        "5",
        "[",
        "{}",
        "{",
        "cola",
    )
    junk = (*JUNK, *words, ["sentiment", "sentiment"], ["cola", "sst2"], {"16x8": [[1], [2]]})

    def stop(*_: Any, **__: Any) -> None:
        raise ValueError(STOPPED)

    def attempt(case: Case) -> None:
        draw, values = case.random, dict(base)
        for name in draw.sample([*ours, *trainers], draw.choice((0, 1, 1, 2))):
            values[name] = draw.choice(junk)
            case.tried += f" {name} := {values[name]!r}"
        file = folder / draw.choice(("run.yaml", "run.json"))
        if len(values) > len(base) or case.tried:
            data = (json.dumps(values) if file.suffix == ".json" else yaml.safe_dump(values)).encode(
                "utf-8", "surrogatepass"
            )
        elif file.suffix == ".json":
            data = mutated_bytes(case, json.dumps(values).encode())
        else:
            data = _document(case, values)
        file.write_bytes(data)
        before = mpoe.cli.finetune.load_model
        mpoe.cli.finetune.load_model = stop
        try:
            named = (file.name, STOPPED, *ours, *trainers, "output_dir", "task", "config", "argument", "unknown")
            status, _ = run_command(["finetune", str(file)], folder, *named)
            assert status == 2
        finally:
            mpoe.cli.finetune.load_model = before

    return attempt


PROPERTIES = (
    Property("task files", _task_files),
    Property("data files", _data_files),
    Property("run configs", _run_configs, 1.5),
)
