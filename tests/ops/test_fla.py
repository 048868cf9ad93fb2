"""fla's token-by-token kernels on the CPU, by triton's interpreter: scale, layout, state and gates are what we say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or find_spec("fla") is None,
    reason="needs triton and fla: pip install 'ahn[triton]', or run `make fla`",
)


def test_the_recurrent_kernels_are_the_loop() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "worker_fla.py")],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 18
    assert {case: error for case, error in errors.items() if not error < 2e-6} == {}
