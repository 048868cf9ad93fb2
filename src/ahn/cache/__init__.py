"""The cache of a model with a memory: exact tokens of fixed number, and the state that the others fell into."""

from ahn.cache.cache import HippocampalCache
from ahn.cache.layer import HippocampalLayer
from ahn.cache.window import Padding, Tokens, View

__all__ = ["HippocampalCache", "HippocampalLayer", "Padding", "Tokens", "View"]
