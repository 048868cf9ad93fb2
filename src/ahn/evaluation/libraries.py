"""The packages that some metrics need, imported when one of them is first used."""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from typing import Any

from ahn.evaluation.errors import MissingPackageError


def library(name: str, purpose: str) -> Any:
    """Imports a package of the extra `eval`.

    Args:
        name: Its name in an import.
        purpose: What needs it, for the message.

    Raises:
        MissingPackageError: It cannot be imported.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # these packages are old, and much that they do is deprecated
            return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        lacks = f" (which lacks {error.name})" if error.name not in (None, package) else ""
        raise MissingPackageError(
            f"{purpose} needs the package {package}{lacks}. Run: pip install 'ahn[eval]'"
        ) from None


@functools.cache
def jieba() -> Any:
    """The segmenter of Chinese text, without what it says about itself.

    Raises:
        MissingPackageError: It is not installed.
    """
    module = library("jieba", "scoring Chinese text")
    module.setLogLevel(logging.WARNING)
    return module


@functools.cache
def rouge() -> Any:
    """ROUGE-L as the package `rouge` computes it.

    Raises:
        MissingPackageError: It is not installed.
    """
    return library("rouge", "ROUGE-L").Rouge(metrics=["rouge-l"], stats=["f"])


@functools.cache
def rouge_lsum_scorer() -> Any:
    """ROUGE-Lsum as the package `rouge_score` computes it, without a stemmer.

    Raises:
        MissingPackageError: It is not installed.
    """
    return library("rouge_score.rouge_scorer", "ROUGE-Lsum").RougeScorer(["rougeLsum"], use_stemmer=False)
