"""`ahn serve`: a server with OpenAI's protocol and a page, whose sessions never grow."""

from __future__ import annotations

import dataclasses
import importlib.util
import ipaddress
import logging
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ahn.cli.loading import AnchoredModel, ModelChoice
from ahn.cli.options import from_fields
from ahn.cli.terminal import UsageError, log, notes
from ahn.config import same_setting
from ahn.serving.settings import ServeSettings

if TYPE_CHECKING:
    from ahn.cli.loading import Loaded

EXAMPLES = """Examples:

ahn serve  [dim]# smollm2-135m, page and API at http://127.0.0.1:8000[/dim]

ahn serve ./my-model --adapter ./my-memory --window 4096 --session-dir sessions

AHN_API_KEY=secret ahn serve smollm2-135m --host 0.0.0.0 --port 80
"""
_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "multipart")


@dataclass(frozen=True)
class ServedModel(AnchoredModel):
    """Which model is served, and what its sessions keep exactly."""

    model: str = same_setting(ModelChoice, "model", argument=True, metavar="MODEL")
    adapter: str | None = same_setting(ModelChoice, "adapter", alias="memory")


@from_fields
def command(settings: ServeSettings, source: ServedModel) -> None:
    """Serve a model: OpenAI's API under /v1, and a page to read with at /."""
    settings = _with_key(settings)
    _check_libraries()
    listening = _listen(settings.host, settings.port)
    from ahn.cli import loading

    loading.seed(0)  # an untrained memory goes on from what it read before a restart
    loaded = loading.load(source)
    anchors = loaded.anchors(source.anchors)
    address = f"http://{_in_address(settings.host)}:{listening.getsockname()[1]}"
    log(f"{loaded.name} at {address}, its API at {address}/v1; Ctrl-C ends it", console=notes())
    log(f"It reads with {loaded.reads_with(anchors)}.", console=notes())
    if settings.api_key is None:
        log("Without a key only this machine can ask: set AHN_API_KEY to serve others.", "dim", console=notes())
    _serve(loaded, settings, anchors, listening)


def _serve(loaded: Loaded, settings: ServeSettings, anchors: int, listening: socket.socket) -> None:
    """Serves until Ctrl-C or a signal to stop; answers that were begun are finished."""
    import uvicorn

    import ahn
    from ahn.serving.app import make_app
    from ahn.serving.service import make_service

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("ahn.serving").setLevel(logging.INFO)
    model: Any = loaded.model.eval()
    with ahn.mode(model, "ahn", anchors=anchors):
        app = make_app(make_service(loaded.name, model, loaded.tokenizer, settings))
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=30)
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


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before a model is loaded for nothing."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot listen on {host} port {port} ({error}). Choose another --host or --port.") from None


def _in_address(host: str) -> str:
    return f"[{host}]" if ":" in host else host
