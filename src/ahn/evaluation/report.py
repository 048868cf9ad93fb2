"""What an evaluation found, with everything that is needed to measure it again: settings, versions, device."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ahn import __version__
from ahn._home import write_text
from ahn.evaluation.errors import EvaluationError

_KIND = "evaluation"
_PARTS = ("command", "settings", "results", "environment")


@dataclasses.dataclass
class EvaluationReport:
    """The outcome of one command of `ahn eval`.

    Attributes:
        command: Its name: "perplexity".
        settings: What was asked for, by name.
        results: What was measured, by name; values of plain types, numpy's numbers and arrays among them.
        environment: As `environment` gives it.
    """

    command: str
    settings: dict[str, Any]
    results: dict[str, Any]
    environment: dict[str, Any]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON in UTF-8, whole or not at all. Numbers that are not finite become null, which JSON lacks.

        Raises:
            OutputError: It cannot be written.
        """
        facts = {"kind": _KIND, **{part: getattr(self, part) for part in _PARTS}}
        write_text(path, json.dumps(plain(facts), indent=1, ensure_ascii=False) + "\n")


def read_report(path: str | os.PathLike[str]) -> EvaluationReport:
    """Reads what `EvaluationReport.write` wrote.

    Raises:
        EvaluationError: It cannot be read, or is no report.
    """
    try:
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read ({error.strerror}). Check the path.") from None
    except (ValueError, RecursionError):
        raise EvaluationError(f"{path} is no JSON. Give the report.json of an evaluation.") from None
    good = isinstance(facts, dict) and facts.get("kind") == _KIND and isinstance(facts.get("command"), str)
    if not good or not all(isinstance(facts.get(part), dict) for part in _PARTS[1:]):
        raise EvaluationError(f"{path} is no report of an evaluation. Give the report.json of one.")
    return EvaluationReport(**{part: facts[part] for part in _PARTS})


def environment(model: Any = None, seed: int | None = None) -> dict[str, Any]:
    """Where and with what something is measured; no path and no name of a machine.

    Args:
        model: The model that was used, for its device and dtype; torch is not imported without one.
        seed: Of the random numbers, where there were any.
    """
    facts: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "ahn": __version__,
        "python": platform.python_version(),
        **{package: version for package in ("torch", "transformers") if (version := package_version(package))},
        "device": _processor(),
    }
    if model is not None:
        import torch

        from ahn import native

        weights = model.get_input_embeddings().weight
        if weights.is_cuda:
            facts["device"] = torch.cuda.get_device_name(weights.device)
        facts |= {"dtype": str(weights.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
        if not weights.is_cuda:
            facts["kernels"] = "torch" if native.why_not() else "C"
    return facts if seed is None else {**facts, "seed": seed}


def package_version(package: str) -> str | None:
    """The version of a package, or `None` where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def plain(value: Any) -> Any:
    """A value as JSON knows it: lists for tuples and arrays, text for paths, `None` for numbers that are not finite.

    Args:
        value: Mappings, sequences, numbers of Python or numpy, texts and paths, in any depth.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _processor() -> str:
    """The processor's own name where the system tells it, else its kind."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return next(iter(names), "") or platform.processor() or platform.machine()
