"""Settings of the server, each declared once: the options of `ahn serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ahn.config import setting


@dataclass(frozen=True)
class ServeSettings:
    """Where the server listens, whom it serves, and how much each may take."""

    host: str = setting("127.0.0.1", "Address to listen on; without a key only this machine's own.")
    port: int = setting(8000, "Port to listen on; 0 takes a free one.", least=0)
    api_key: str | None = setting(None, "Key that requests must bring; AHN_API_KEY does the same.", unset="none")
    max_sessions: int = setting(8, "Answers that are written together.", least=1)
    session_bytes: int = setting(2 * 10**9, "Bytes of memory for what was read before.", least=0)
    session_dir: Path | None = setting(None, "Folder that keeps what was read, also over a restart.", unset="none")
    disk_bytes: int = setting(20 * 10**9, "Bytes of its files, documents apart.", least=0)
    cors_origin: tuple[str, ...] = setting((), "Web site whose pages may ask; may be given several times.")
    max_queue: int = setting(64, "Requests that may wait for their turn.", least=1)
    max_body_bytes: int = setting(64 * 10**6, "Bytes of a request, of a document above all.", least=1)
    max_prompt_tokens: int = setting(1_000_000, "Tokens of a prompt or document.", least=1)
    max_seconds: int = setting(600, "Time that a request may take.", least=1)
    chunk: int = setting(512, "Tokens to read at a time while nobody is answered.", least=1)
    chunk_between_steps: int = setting(128, "The same while somebody is.", least=1)
