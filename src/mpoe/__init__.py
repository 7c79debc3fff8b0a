"""mpoe: any pre-trained Transformer as a parameter-efficient mixture of experts."""

import logging
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpoe.config import MPOEConfig
    from mpoe.models import (
        active_adapter,
        from_pretrained,
        load_adapter,
        merge,
        save_adapter,
        set_adapter,
        upcycle,
    )

__version__ = "0.2.0.dev0"

__all__ = [
    "MPOEConfig",
    "__version__",
    "active_adapter",
    "from_pretrained",
    "load_adapter",
    "merge",
    "save_adapter",
    "set_adapter",
    "upcycle",
]


def import_names() -> None:
    """Import the names of `__all__` and what is behind them; Transformers knows then what a saved mixture is."""
    # Transformers imports torchao wherever it is installed, and torchao then logs which of its optional kernels do not
    # fit: four lines in front of whatever a command has to say, about nothing that it uses.
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    from mpoe import config, models

    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    for name in set(__all__) - {"__version__"}:
        globals()[name] = getattr(config if name == "MPOEConfig" else models, name)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_names()
    return globals()[name]


# Only the command, which imports the names where it needs them, does without: `mpoe --help` is to be there at once.
if "mpoe_command" not in sys.modules:
    import_names()
