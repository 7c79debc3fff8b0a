"""mpoe: any pre-trained Transformer as a parameter-efficient mixture of experts."""

import logging

# Transformers imports torchao wherever it is installed, and torchao then logs which of its optional kernels do not fit:
# four lines in front of whatever a command has to say, about nothing that it uses.
_levels = {logging.getLogger(name): logging.getLogger(name).level for name in ("torchao", "torch.utils._pytree")}
for _logger in _levels:
    _logger.setLevel(logging.ERROR)

from mpoe.config import MPOEConfig  # noqa: E402
from mpoe.models import (  # noqa: E402
    active_adapter,
    from_pretrained,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    upcycle,
)

for _logger, _level in _levels.items():
    _logger.setLevel(_level)

__version__ = "0.1.0"

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
