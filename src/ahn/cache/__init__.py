"""The cache of a model with a memory: exact tokens of fixed number, and the state that the others fell into."""

from ahn.cache.cache import HippocampalCache
from ahn.cache.layer import HippocampalLayer

__all__ = ["HippocampalCache", "HippocampalLayer"]
