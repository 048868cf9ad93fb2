"""Errors of evaluation."""

from ahn.errors import AHNError


class EvaluationError(AHNError, ValueError):
    """A benchmark, a record, or a package that evaluation needs is missing or bad; the message says the remedy."""


class MissingPackageError(EvaluationError):
    """A package that evaluation needs cannot be imported."""


class AnswerError(EvaluationError):
    """The answers of a record are not of the kind that its metric compares."""
