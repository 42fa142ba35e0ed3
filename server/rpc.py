"""What every RPC method has in common: request id, deadline, errors that leave as status codes."""

from __future__ import annotations

import functools
import itertools
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_status import rpc_status

from kasa_runtime.errors import InvalidRequest, KasaError
from server.status import DeadlineExpired, to_status

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
_num_calls = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an RPC method. `request_id` is the client's own, or one made up for it;
    `arrival_s` is on the clock of `time.monotonic`."""

    context: Any
    request_id: str
    arrival_s: float

    @property
    def unique_id(self) -> str:
        """Made from the request id: proxies retry with the same one while the first try runs."""
        return f"{self.request_id}/{next(_num_calls)}"

    @property
    def deadline_s(self) -> float | None:
        """When the call's deadline passes, on the clock of `time.monotonic`. None: it has none."""
        remaining_s = self.context.time_remaining()
        return None if remaining_s is None else time.monotonic() + remaining_s


Method = Callable[[Any, Any, Call], Awaitable[Any]]


def rpc(method: Method) -> Callable[[Any, Any, Any], Awaitable[Any]]:
    """Decorator of RPC methods `(self, request, call)`. Streams are written to `call.context`."""

    @functools.wraps(method)
    async def handle(self: Any, request: Any, context: Any) -> Any:
        arrival_s = time.monotonic()
        request_id = uuid.uuid4().hex
        try:
            request_id = _request_id(context) or request_id
            metadata = ((REQUEST_ID, request_id),)
            context.set_trailing_metadata(metadata)
            await context.send_initial_metadata(metadata)
            return await method(self, request, Call(context, request_id, arrival_s))
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            if not isinstance(error, (KasaError, DeadlineExpired)):
                logger.exception("%s failed, request %s", method.__name__, request_id)
            await _abort(context, error, request_id)

    return handle


def _request_id(context: Any) -> str:
    """The client's request id, or "". Raises InvalidRequest."""
    given = dict(context.invocation_metadata() or ()).get(REQUEST_ID, "")
    if given and not re.fullmatch(r"[!-~]{1,128}", given):
        raise InvalidRequest(REQUEST_ID, "must be 1 to 128 printable ASCII characters")
    return str(given)


async def _abort(context: Any, error: Exception, request_id: str) -> None:
    status = rpc_status.to_status(to_status(error))
    metadata = (*status.trailing_metadata, (REQUEST_ID, request_id))
    await context.abort(status.code, status.details, metadata)
