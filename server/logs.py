"""What log lines look like, and the request that they belong to."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

_request_id: ContextVar[str] = ContextVar("request_id", default="")


@contextmanager
def request(request_id: str) -> Iterator[None]:
    """Lines that are logged within, in tasks and threads begun within too, carry this id."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


def configure(level: str, form: Literal["human", "json"]) -> None:
    """Log to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(Json() if form == "json" else Human())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    if level == "info":  # it counts changes of files; what they mean, we say ourselves
        logging.getLogger("watchfiles").setLevel(logging.WARNING)


def fields(**values: Any) -> dict[str, Any]:
    """The `extra` of a line: values beside its message."""
    return {"fields": values}


class Human(logging.Formatter):
    """`time level logger: message key=value ... request_id=...`, and tracebacks below it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        pairs = (f" {key}={_plain(value)}" for key, value in _fields(record).items())
        return super().formatMessage(record) + "".join(pairs)


class Json(logging.Formatter):
    """One object a line: time (ISO 8601, UTC), level, logger, message, what else is known."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    found = dict(getattr(record, "fields", {}))
    if request_id := _request_id.get():
        found["request_id"] = request_id
    return found


def _plain(value: Any) -> str:
    """A number or word as it is, text that would look like more than one value in quotes."""
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text if text.isprintable() and " " not in text and text else json.dumps(text)
