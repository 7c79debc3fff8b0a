"""torch, Transformers and datasets, imported when a command needs them, and told to be quiet."""

from __future__ import annotations

import logging
import sys
import warnings

from mpoe.printable import printable


def import_libraries() -> None:
    """Leave the screen to our own tables, the progress bars and what a user can act on."""
    import mpoe

    mpoe.import_names()
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what comes of them is our error line
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.showwarning = lambda message, category, *_: print(
        printable(f"warning: {message}", keep="\n\t"), file=sys.stderr
    )
