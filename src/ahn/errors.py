"""Errors of the library: one root, a few kinds. Every message says what is wrong and what to do about it."""


def one_line(error: object) -> str:
    """An error's words, or a text, in one line."""
    return " ".join(str(error).split())


class AHNError(Exception):
    """Root of every error that this library raises on purpose."""


class ConfigError(AHNError, ValueError):
    """A setting has a value that cannot work."""


class ShapeError(AHNError, ValueError):
    """Tensors given to an operation do not fit together."""


class ModelError(AHNError):
    """A base model cannot be found, loaded, or given a memory."""


class CacheError(AHNError):
    """A cache is used in a way it cannot serve."""


class CheckpointError(AHNError):
    """An adapter, a published checkpoint or a saved cache cannot be read or does not fit the model."""


class OutputError(AHNError):
    """A file cannot be written where it was asked for."""
