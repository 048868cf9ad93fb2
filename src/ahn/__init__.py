"""A fixed-size long-term memory for any pretrained decoder language model."""

from ahn.attachment import mode
from ahn.cache import HippocampalCache
from ahn.config import AHNConfig
from ahn.errors import AHNError
from ahn.surgery import attach, attached, detach

__version__ = "0.1.0"

__all__ = ["AHNConfig", "AHNError", "HippocampalCache", "__version__", "attach", "attached", "detach", "mode"]
