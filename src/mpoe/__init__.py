"""mpoe: any pre-trained Transformer as a parameter-efficient mixture of experts."""

from mpoe.config import MPOEConfig
from mpoe.models import active_adapter, from_pretrained, load_adapter, merge, save_adapter, set_adapter, upcycle

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
