"""The files of a run's folder: what it was asked, what came of it, its checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzzing.cases import Case, Property, fresh, mutated_bytes, mutated_json_file, refusal_of, run_command
from mpoe.cli.main import main
from mpoe.training.checkpoint_files import CHECKSUMS_FILE, LAST_FILE, seal
from mpoe.training.run_folder import RESULTS_FILE, RUN_FILE, RunFolder
from tiny import FLAGS, tiny_t5, tiny_tokenizer, write_sentiment


def _make_run(folder: Path) -> None:
    """`run`, finished, and `cut`, the same without its results."""
    tiny_t5(num_layers=1).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    write_sentiment(folder / "data")
    assert main(["finetune", *FLAGS]) == 0
    shutil.copytree("run", "cut")
    (folder / "cut" / RESULTS_FILE).unlink()
    for checkpoint in (folder / "cut").glob("checkpoint-*"):
        for file in checkpoint.iterdir():  # the others are large, and their checksums are what counts
            if file.name not in (LAST_FILE, "config.json", "rng_state.pth"):
                file.unlink()
        seal(checkpoint)


def _run_folders(folder: Path) -> Callable[[Case], None]:
    _make_run(folder)
    arguments = json.loads((folder / "run" / RUN_FILE).read_text())
    last = max(folder.glob("cut/checkpoint-*"), key=lambda path: int(path.name[11:])).name
    files = (
        RUN_FILE,
        f"{last}/{CHECKSUMS_FILE}",
        f"{last}/{LAST_FILE}",
        f"{last}/rng_state.pth",
        f"{last}/config.json",
    )

    def attempt(case: Case) -> None:
        draw = case.random
        source = draw.choice(("run", "cut", "cut"))
        fresh(folder / source, folder / "bad")
        name = draw.choice((RUN_FILE, RESULTS_FILE) if source == "run" else files)
        file = folder / "bad" / name
        case.tried = f"{source}, {name}:"
        before = file.read_bytes()
        file.write_bytes((mutated_json_file if file.suffix == ".json" else mutated_bytes)(case, before))
        is_sealed = source == "run" or draw.random() < 0.7
        if not is_sealed:
            (folder / "bad" / last / CHECKSUMS_FILE).unlink()
            case.tried += " (not sealed)"
        opened: list[RunFolder] = []
        refusal_of(lambda: opened.append(RunFolder.open("bad", arguments)), "bad")
        if opened and source == "cut" and is_sealed and name not in (RUN_FILE, f"{last}/{CHECKSUMS_FILE}"):
            checkpoint = opened[0].checkpoint
            assert checkpoint is None or checkpoint.name != last or file.read_bytes() == before, "it is damaged"
        if draw.random() < 0.1:  # the command too
            flags = [word if word != "run" else "bad" for word in FLAGS]
            if source == "run":
                run_command(["finetune", *flags], folder, "bad")

    return attempt


def _compared(folder: Path) -> Callable[[Case], None]:
    _make_run(folder)
    scores: dict[str, Any] = {"bleu_2": 1.0, "bleu_4": 0.5, "self_bleu_2": 2.0}
    (folder / "run" / "scores.json").write_text(json.dumps(scores))
    (folder / "bad").mkdir()
    sources = {name: (folder / "run" / name).read_bytes() for name in (RESULTS_FILE, "scores.json")}

    def attempt(case: Case) -> None:
        draw = case.random
        for name, data in sources.items():
            (folder / "bad" / name).write_bytes(data)
        name = draw.choice((RESULTS_FILE, RESULTS_FILE, "scores.json"))
        case.tried = f"{name}:"
        (folder / "bad" / name).write_bytes(mutated_json_file(case, sources[name]))
        output = draw.choice(("table.md", "table.csv", "table.json"))
        (folder / output).unlink(missing_ok=True)
        run_command(["compare", "run", "bad", "-o", output], folder, "bad")

    return attempt


PROPERTIES = (Property("run folders", _run_folders), Property("mpoe compare", _compared, 0.8))
