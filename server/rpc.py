"""What every RPC method has in common: who calls, request id, deadline, errors that leave as status
codes, a line in the log."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_status import rpc_status

from kasa_runtime.errors import KasaError
from server import logs
from server.access import client_of, told_to
from server.call import REQUEST_ID, Call
from server.status import DeadlineExpired, to_status

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class RpcCall(Call):
    """One call of an RPC method."""

    context: Any
    begun: bool = False

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
    def deadline_s(self) -> float | None:
        remaining_s = self.context.time_remaining()
        return None if remaining_s is None else time.monotonic() + remaining_s


Method = Callable[[Any, Any, RpcCall], Awaitable[Any]]


def rpc(method: Method) -> Callable[[Any, Any, Any], Awaitable[Any]]:
    """Decorator of RPC methods `(self, request, call)`. Streams are written to `call`; `self.gate`
    says who may call."""

    @functools.wraps(method)
    async def handle(self: Any, request: Any, context: Any) -> Any:
        metadata = dict(context.invocation_metadata() or ())
        call = RpcCall(method=method.__name__, metadata=metadata, context=context)
        wrong_id = call.take_request_id()
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


async def _admitted(method: Method, service: Any, request: Any, call: RpcCall) -> Any:
    call.context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
    call.caller = service.gate.caller(call.metadata)
    call.client = client_of(call.caller, call.context.peer())
    with service.gate.stream(call.client):
        response = await method(service, request, call)
        await call.begin()
        return response


async def _abort(call: RpcCall, error: Exception) -> None:
    status = rpc_status.to_status(to_status(told_to(call.caller, error)))
    call.facts |= {"code": status.code.name, "error": status.details}
    metadata = (*status.trailing_metadata, (REQUEST_ID, call.request_id))
    await call.context.abort(status.code, status.details, metadata)


@contextmanager
def _logged(call: RpcCall) -> Iterator[None]:
    """A line at the end of the call."""
    try:
        yield
    except asyncio.CancelledError:
        call.facts["code"] = grpc.StatusCode.CANCELLED.name
        raise
    finally:
        call.log(logger)
