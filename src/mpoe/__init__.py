"""mpoe: any pre-trained Transformer as a parameter-efficient mixture of experts."""

from mpoe.config import MPOEConfig
from mpoe.models import from_pretrained, upcycle

__version__ = "0.1.0"

__all__ = ["MPOEConfig", "__version__", "from_pretrained", "upcycle"]
