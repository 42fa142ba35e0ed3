"""What every call of a client has, over gRPC and over HTTP: an id, a caller, a line in the log."""

from __future__ import annotations

import itertools
import logging
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kasa_runtime.errors import InvalidRequest
from kasa_runtime.tokens import ANYONE, Caller
from server import logs

REQUEST_ID = "x-request-id"
_num_calls = itertools.count(1)


@dataclass(slots=True, kw_only=True)
class Call:
    """One call. `metadata` are its headers, with keys in lower case; `request_id` is the client's
    own, or one made up for it; `client` is whose limits it counts against; `facts` are for its line
    in the log; `arrival_s` is on the clock of `time.monotonic`."""

    method: str
    metadata: Mapping[str, Any]
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    caller: Caller = ANYONE
    client: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    arrival_s: float = field(default_factory=time.monotonic)

    @property
    def unique_id(self) -> str:
        """Made from the request id: proxies retry with the same one while the first try runs."""
        return f"{self.request_id}/{next(_num_calls)}"

    @property
    def deadline_s(self) -> float | None:
        """When the call's deadline passes, on the clock of `time.monotonic`. None: it has none."""
        return None

    def take_request_id(self) -> InvalidRequest | None:
        """Use the client's request id, if it has one; what is wrong with it, if something is."""
        given = self.metadata.get(REQUEST_ID, "")
        if given and not re.fullmatch(r"[!-~]{1,128}", given):
            return InvalidRequest(REQUEST_ID, "must be 1 to 128 printable ASCII characters")
        self.request_id = given or self.request_id
        return None

    def add(self, facts: Mapping[str, Any]) -> None:
        """Facts of one generation of this call. Numbers add up."""
        for name, value in facts.items():
            known = self.facts.get(name)
            self.facts[name] = value if not isinstance(known, int) else known + value

    def log(self, logger: logging.Logger) -> None:
        """A line at the end of the call: what, whose, how it ended, how long it took."""
        if logger.isEnabledFor(logging.INFO):
            facts = {"code": "OK", **self.facts}
            facts |= {"client": self.client, "total_s": time.monotonic() - self.arrival_s}
            logger.info("%s", self.method, extra=logs.fields(**facts))
