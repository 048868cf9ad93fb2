"""Scripts of `benchmarks/` as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def load_script(name: str) -> Any:
    """`benchmarks/<name>.py`, made anew."""
    known = f"benchmarks_{name}"
    spec = importlib.util.spec_from_file_location(known, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module
