"""`make balancing`: the loads of the experts in four training loops, before and after 300 steps.

    make balancing

A tiny LLaMA's router starts with nearly all tokens at two of its eight experts, which have two experts each: a balanced
expert has a load of 0.125, and the worst is 0.5. The default balancing has to get every load below 0.2 in Transformers'
Trainer, TRL's SFTTrainer, a plain loop and under gradient accumulation, at the Trainer's default rate. The loss moves
no more than the rate lets the router move, so it has a larger one; TRL computes its loss outside of the model, so that
the balancing loss is not used there, and one warning has to say so.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console
from rich.table import Table

from balancing import LOOPS, skewed_llama, spread

STEPS = 300
HIGHEST = 0.2
WITH_LOSS = {"learning_rate": 1e-2}
UNUSED = "the load-balancing loss of a training forward was not used"


def main() -> None:
    """Train everything; the exit status is 1 if a load is too high or a warning is missing."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(title=f"Load and gate mass of each expert after {STEPS} steps", title_justify="left")
    for column in ("balancing", "loop", "load", "gate mass", "highest"):
        table.add_column(column)
    start = spread(skewed_llama())
    table.add_row("", "before", _numbers(start.share), _numbers(start.gate_mass), f"{max(start.share):.3f}")
    good = sorted(start.share)[-2] > 0.4
    cases = [("bias", loop, {}) for loop in LOOPS] + [("loss", loop, WITH_LOSS) for loop in ("Trainer", "plain loop")]
    for balancing, loop, options in cases:
        console.print(f"{balancing}, {loop} ...")
        model = skewed_llama(balancing=balancing)
        with tempfile.TemporaryDirectory() as folder:
            LOOPS[loop](model, Path(folder), STEPS, **options)
        end = spread(model)
        passed = max(end.share) < HIGHEST
        good &= passed
        highest = f"{max(end.share):.3f}" if passed else f"WRONG: {max(end.share):.3f}"
        table.add_row(balancing, loop, _numbers(end.share), _numbers(end.gate_mass), highest)
    count = _warnings_of_sft()
    good &= count == 1
    console.print(table)
    console.print(f"warnings that the loss is not used, loss, SFTTrainer: {count}{'' if count == 1 else ', WRONG'}")
    sys.exit(0 if good else 1)


def _warnings_of_sft() -> int:
    with warnings.catch_warnings(record=True) as caught, tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("default")
        LOOPS["SFTTrainer"](skewed_llama(balancing="loss"), Path(folder), 10)
    return sum(str(warning.message).startswith(UNUSED) for warning in caught)


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


if __name__ == "__main__":
    main()
