"""What a request can be answered with instead of what it asked for, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from ahn.errors import AHNError, one_line

_LONGEST = 1000  # characters of a message, which may quote the request


class RequestError(AHNError):
    """A request that cannot be served: what is wrong with it, or with the server now.

    Args:
        message: What is wrong, and the remedy.
        status: Status of HTTP.
        param: The parameter that is wrong, if one is.
        code: A word for programs.

    Attributes:
        status: Status of HTTP.
        headers: Headers of the answer.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {"Retry-After": "1"} if status == 503 else {}

    def body(self) -> dict[str, Any]:
        """The answer in OpenAI's shape."""
        kinds = {401: "authentication_error", 404: "not_found_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": one_line(self)[:_LONGEST], "type": kind, "param": self.param, "code": self.code}}
