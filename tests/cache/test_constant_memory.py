"""A long text, read in a process of its own: neither the cache nor the process grows."""

import subprocess
import sys
from pathlib import Path

import pytest

from ahn.memories import memory_names

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "constant_memory.py"


@pytest.mark.parametrize("memory", memory_names())
def test_cache_and_process_do_not_grow(memory: str) -> None:
    command = [sys.executable, str(SCRIPT), "--tiny", "--tokens", "20000", "--window", "256", "--memory", memory]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "constant once the window is full: yes" in done.stdout
