"""`ahn serve`: a server with OpenAI's protocol and a page, whose sessions never grow."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import ipaddress
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahn.cli.loading import AnchoredModel, ModelChoice
from ahn.cli.options import from_fields
from ahn.cli.terminal import UsageError, log, megabytes, notes
from ahn.config import SinkPositions, same_setting
from ahn.errors import AHNError
from ahn.serving.settings import ServeSettings

if TYPE_CHECKING:
    from ahn.cli.loading import Loaded
    from ahn.serving.service import Service

EXAMPLES = """Examples:

ahn serve  [dim]# smollm2-135m, page and API at http://127.0.0.1:8000[/dim]

ahn serve ./my-model --adapter ./my-memory --window 4096 --session-dir sessions

AHN_API_KEY=secret ahn serve smollm2-135m --host 0.0.0.0 --port 80
"""
_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "pypdf", "selectolax")


@dataclass(frozen=True)
class ServedModel(AnchoredModel):
    """Which model is served, and what its sessions keep exactly."""

    model: str = same_setting(ModelChoice, "model", argument=True, metavar="MODEL")
    adapter: str | None = same_setting(ModelChoice, "adapter", alias="memory")
    # A session has no end, and absolute positions carry no further than the base model was trained.
    sink_positions: SinkPositions = same_setting(ModelChoice, "sink_positions", default="bounded", unset=None)


@from_fields
def command(settings: ServeSettings, source: ServedModel) -> None:
    """Serve a model: OpenAI's API under /v1, and a page to read with at /."""
    settings = _with_key(settings)
    _check_libraries()
    _check_folder(settings.session_dir)
    listening = _listen(settings.host, settings.port)
    from ahn.cli import loading

    loading.seed(0)  # an untrained memory goes on from what it read before a restart
    loaded = loading.load(source)
    anchors = loaded.anchors(source.anchors)
    address = f"http://{_in_address(settings.host)}:{listening.getsockname()[1]}"
    with _service(loaded, settings, anchors) as service:
        _introduce(loaded, settings, anchors, address)
        _serve(service, listening)


def _introduce(loaded: Loaded, settings: ServeSettings, anchors: int, address: str) -> None:
    """Tells where the server is, how it reads, and what it promises."""
    from ahn.cost import cost_model

    config = loaded.config
    each = ""
    with contextlib.suppress(AHNError):  # of a model that is not built from its config
        costs = cost_model(loaded.model.config, config).with_run(anchors=anchors)
        each = f" in {megabytes(costs.cache_bytes(config.memory, 10**6))} MB each, whatever they have read"
    where = "in memory" if settings.session_dir is None else f"in memory, all of it in {settings.session_dir}"
    lines = [
        f"{loaded.name}: page at {address}/, API at {address}/v1; Ctrl-C ends it",
        f"It reads with a window of {config.window:,} tokens, {config.sinks:,} {config.sink_positions} sinks, "
        f"{loaded.reads_with(anchors)}.",
        f"It writes up to {settings.max_sessions:,} answers together{each}.",
        f"Of what was read before it keeps {megabytes(settings.session_bytes)} MB {where}.",
    ]
    for line in lines:
        log(line, console=notes())
    if settings.api_key is None:
        log("Without a key only this machine can ask: set AHN_API_KEY to serve others.", "dim", console=notes())


@contextlib.contextmanager
def _service(loaded: Loaded, settings: ServeSettings, anchors: int) -> Iterator[Service]:
    """What serves a model, inside the block."""
    import ahn
    from ahn.serving.service import make_service

    model: Any = loaded.model.eval()
    with ahn.mode(model, "ahn", anchors=anchors):
        yield make_service(loaded.name, model, loaded.tokenizer, settings)


def _serve(service: Service, listening: socket.socket) -> None:
    """Serves until Ctrl-C or a signal to stop; answers that were begun are finished."""
    import uvicorn

    from ahn.serving.app import make_app

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("ahn.serving").setLevel(logging.INFO)
    config = uvicorn.Config(make_app(service), log_level="warning", access_log=False, timeout_graceful_shutdown=30)
    uvicorn.Server(config).run(sockets=[listening])


def _with_key(settings: ServeSettings) -> ServeSettings:
    """The settings with the key of the environment, if they bring none; an address open to others needs one."""
    key = settings.api_key or os.environ.get("AHN_API_KEY") or None
    if key is None and not _is_local(settings.host):
        raise UsageError(f"--host {settings.host} is open to others. Set AHN_API_KEY, or leave --host out.")
    return dataclasses.replace(settings, api_key=key)


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_libraries() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f'{missing[0]} is missing. Install the server with pip install "ahn[serve]".')


def _check_folder(folder: Path | None) -> None:
    """Checks that sessions can be kept where they should be."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--session-dir {folder} cannot be written ({error.strerror}). Name another folder.") from None


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before a model is loaded for nothing."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot listen on {host} port {port} ({error}). Choose another --host or --port.") from None


def _in_address(host: str) -> str:
    return f"[{host}]" if ":" in host else host
