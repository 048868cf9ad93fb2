"""What the server counts and times, for `/metrics`."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The counts of one server.

    Attributes:
        read: Tokens read.
        written: Tokens written.
        requests: Requests by path and status.
        step_seconds: Time of a step of all answers.
        first_token_seconds: Time from a request to the end of its reading.
    """

    def __init__(self) -> None:
        self._registry: Any = CollectorRegistry()
        self.read = Counter("ahn_tokens_read", "Tokens read.", registry=self._registry)
        self.written = Counter("ahn_tokens_written", "Tokens written.", registry=self._registry)
        self.requests = Counter("ahn_requests", "Requests.", ["path", "status"], registry=self._registry)
        self.step_seconds = Histogram(
            "ahn_step_seconds", "Time of a step of all answers.", buckets=_SECONDS, registry=self._registry
        )
        self.first_token_seconds = Histogram(
            "ahn_first_token_seconds", "Time from a request to its first token.", buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip

    def gauge(self, name: str, text: str, value: Any) -> None:
        """Adds a number that is asked for when somebody looks.

        Args:
            name: Its name.
            text: What it is.
            value: A function that gives it.
        """
        Gauge(name, text, registry=self._registry).set_function(value)

    def page(self) -> bytes:
        """All of them in the format of Prometheus."""
        page: bytes = generate_latest(self._registry)
        return page
