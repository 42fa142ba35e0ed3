"""What every RPC method has in common: who calls, request id, deadline, errors that leave as status
codes, a line in the log."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_status import rpc_status

from kasa_runtime.errors import InvalidRequest, KasaError
from kasa_runtime.tokens import ANYONE, Caller
from server import logs
from server.access import client_of, told_to
from server.status import DeadlineExpired, to_status

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
_num_calls = itertools.count(1)


@dataclass(slots=True)
class Call:
    """One call of an RPC method. `request_id` is the client's own, or one made up for it; `client`
    is whose limits it counts against; `facts` are for its line in the log; `arrival_s` is on the
    clock of `time.monotonic`."""

    context: Any
    method: str
    metadata: dict[str, Any]
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    caller: Caller = ANYONE
    client: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    begun: bool = False
    arrival_s: float = field(default_factory=time.monotonic)

    async def begin(self) -> None:
        """Send the initial metadata if that was not done. Until then gRPC takes the call for one
        that did nothing yet, so that clients may retry it."""
        if not self.begun:
            self.begun = True
            await self.context.send_initial_metadata(((REQUEST_ID, self.request_id),))

    async def write(self, message: Any) -> None:
        """Send a message of a stream."""
        await self.begin()
        await self.context.write(message)

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
    """Decorator of RPC methods `(self, request, call)`. Streams are written to `call`; `self.gate`
    says who may call."""

    @functools.wraps(method)
    async def handle(self: Any, request: Any, context: Any) -> Any:
        call = Call(context, method.__name__, dict(context.invocation_metadata() or ()))
        wrong_id = _take_request_id(call)
        with logs.request(call.request_id), _logged(call):
            try:
                if wrong_id is not None:
                    raise wrong_id
                return await _admitted(method, self, request, call)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                if not isinstance(error, (KasaError, DeadlineExpired)):
                    logger.exception("%s failed, request %s", call.method, call.request_id)
                await _abort(call, error)

    return handle


async def _admitted(method: Method, service: Any, request: Any, call: Call) -> Any:
    call.context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
    call.caller = service.gate.caller(call.metadata)
    call.client = client_of(call.caller, call.context.peer())
    with service.gate.stream(call.client):
        response = await method(service, request, call)
        await call.begin()
        return response


def _take_request_id(call: Call) -> InvalidRequest | None:
    """Use the client's request id, if it has one; what is wrong with it, if something is."""
    given = call.metadata.get(REQUEST_ID, "")
    if given and not re.fullmatch(r"[!-~]{1,128}", given):
        return InvalidRequest(REQUEST_ID, "must be 1 to 128 printable ASCII characters")
    call.request_id = given or call.request_id
    return None


async def _abort(call: Call, error: Exception) -> None:
    status = rpc_status.to_status(to_status(told_to(call.caller, error)))
    call.facts |= {"code": status.code.name, "error": status.details}
    metadata = (*status.trailing_metadata, (REQUEST_ID, call.request_id))
    await call.context.abort(status.code, status.details, metadata)


@contextmanager
def _logged(call: Call) -> Iterator[None]:
    """A line at the end of the call: what, whose, how it ended, how long it took."""
    try:
        yield
    except asyncio.CancelledError:
        call.facts["code"] = grpc.StatusCode.CANCELLED.name
        raise
    finally:
        _log(call)


def _log(call: Call) -> None:
    if logger.isEnabledFor(logging.INFO):
        facts = {"code": "OK", **call.facts}
        facts |= {"client": call.client, "total_s": time.monotonic() - call.arrival_s}
        logger.info("%s", call.method, extra=logs.fields(**facts))
