"""What is said where a package that a metric needs is not there."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

import ahn.evaluation
from ahn.evaluation import libraries
from ahn.evaluation.errors import EvaluationError
from ahn.evaluation.metrics import METRICS

REAL = importlib.import_module


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A place without the packages of the extra, as a fresh install is."""
    for function in (libraries.jieba, libraries.rouge, libraries.rouge_lsum_scorer):
        function.cache_clear()

    def missing(name: str) -> Any:
        package = name.split(".")[0]
        if package in ("jieba", "rouge", "rouge_score"):
            raise ModuleNotFoundError(f"No module named '{package}'", name=package)
        return REAL(name)

    monkeypatch.setattr(importlib, "import_module", missing)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("lveval.f1_zh", "scoring Chinese text needs the package jieba."),
        ("longbench.rouge_l", "ROUGE-L needs the package rouge."),
        ("infinitebench.longbook_sum_eng", "ROUGE-Lsum needs the package rouge_score."),
    ],
)
def test_a_missing_package_is_named(metric: str, says: str) -> None:
    with pytest.raises(EvaluationError) as raised:
        METRICS[metric].score("x", ["x"])
    assert str(raised.value) == f"{says} Run: pip install 'ahn[eval]'"


@pytest.mark.usefixtures("bare")
def test_the_others_need_none() -> None:
    assert METRICS["lveval.gated_f1_en"].score("x", ["x"], "x") == 1
    assert METRICS["infinitebench.longbook_qa_chn"].score("北京", ["北京"]) == 1


def test_a_broken_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'six'", name="six")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(EvaluationError, match=r"ROUGE needs the package rouge \(which lacks six\)"):
        libraries.library("rouge", "ROUGE")


def test_the_public_names_are_there_and_documented() -> None:
    assert len(ahn.evaluation.__all__) == 17
    for name in ahn.evaluation.__all__:
        value = getattr(ahn.evaluation, name)
        assert isinstance(value, dict) or value.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ahn.evaluation.nothing
