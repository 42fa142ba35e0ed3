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
from kasa_runtime.tokens import ANYONE, Caller
from server.access import client_of, told_to
from server.status import DeadlineExpired, to_status

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
_num_calls = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an RPC method. `request_id` is the client's own, or one made up for it; `client`
    is whose limits it counts against."""

    context: Any
    request_id: str
    caller: Caller
    client: str

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
    """Decorator of RPC methods `(self, request, call)`. Streams are written to `call.context`;
    `self.gate` says who may call."""

    @functools.wraps(method)
    async def handle(self: Any, request: Any, context: Any) -> Any:
        request_id, caller = uuid.uuid4().hex, ANYONE
        metadata = dict(context.invocation_metadata() or ())
        try:
            request_id = _request_id(metadata) or request_id
            ours = ((REQUEST_ID, request_id),)
            context.set_trailing_metadata(ours)
            caller = self.gate.caller(metadata)
            client = client_of(caller, context.peer())
            with self.gate.stream(client):
                await context.send_initial_metadata(ours)
                return await method(self, request, Call(context, request_id, caller, client))
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            if not isinstance(error, (KasaError, DeadlineExpired)):
                logger.exception("%s failed, request %s", method.__name__, request_id)
            await _abort(context, told_to(caller, error), request_id)

    return handle


def _request_id(metadata: dict[str, Any]) -> str:
    """The client's request id, or "". Raises InvalidRequest."""
    given = metadata.get(REQUEST_ID, "")
    if given and not re.fullmatch(r"[!-~]{1,128}", given):
        raise InvalidRequest(REQUEST_ID, "must be 1 to 128 printable ASCII characters")
    return str(given)


async def _abort(context: Any, error: Exception, request_id: str) -> None:
    status = rpc_status.to_status(to_status(error))
    metadata = (*status.trailing_metadata, (REQUEST_ID, request_id))
    await context.abort(status.code, status.details, metadata)
