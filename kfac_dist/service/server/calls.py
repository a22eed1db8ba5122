"""From the bytes of a call to a function and back: who asks, for how long, and what went wrong.

A method is a row: type of the request, role, function. Functions of single answers are
synchronous and run in a thread; streams are asynchronous iterators.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_status import rpc_status

from kfac_dist.errors import (
    KfacDistError,
    NotAllowedError,
    NotAuthenticatedError,
    TimedOutError,
    UsageError,
)
from kfac_dist.service.access.caller import Caller
from kfac_dist.service.access.limits import ServerLimits, StreamCounter
from kfac_dist.service.job_records import Role
from kfac_dist.service.wire.status import to_status

_log = logging.getLogger(__name__)

_MAX_DETAILS_BYTES = 4000  # other clients' limit for all metadata is 8 KiB
_RECHECK_SECONDS = 30.0

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:  # the stubs alone know type arguments
    Interceptor = grpc.aio.ServerInterceptor


Authenticate = Callable[[str], Caller]
"""Tells who holds a token; synchronous, raises NotAuthenticatedError."""


@dataclass(frozen=True, kw_only=True)
class Unary:
    """A method with one answer. Without a role, the function checks the bearer token itself."""

    request: type[Message]
    role: Role | None
    function: Callable[[Any, Any], Message]
    """Of the request and the Caller, or the bearer token where there is no role."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A method with a stream of answers."""

    request: type[Message]
    role: Role
    function: Callable[[Any], AsyncIterator[Message]]


class Gate:
    """Lets calls through to their functions."""

    def __init__(self, authenticate: Authenticate, limits: ServerLimits) -> None:
        self._authenticate = authenticate
        self._limits = limits
        self._streams = StreamCounter(limits.streams_a_user)

    def handlers(
        self, service: str, methods: Mapping[str, Unary | Stream]
    ) -> grpc.GenericRpcHandler[Any, Any]:
        """Return what a server is given to serve `methods`, by their names."""
        made = {
            name: self._stream(name, method)
            if isinstance(method, Stream)
            else self._unary(name, method)
            for name, method in methods.items()
        }
        return grpc.method_handlers_generic_handler(service, made)

    async def caller(self, context: Context) -> Caller:
        """Return who asks.

        Raises:
            NotAuthenticatedError: there is no token, or none that is known.
        """
        token = bearer_token(context)
        return await asyncio.to_thread(self._authenticate, token)

    def _unary(self, name: str, method: Unary) -> grpc.RpcMethodHandler[Any, Any]:
        async def answer(data: bytes, context: Context) -> Message:
            who: Caller | str = bearer_token(context)
            if method.role is not None:
                who = await self.caller(context)
                who.require(method.role, name)
            request = parse(method.request, data)
            return await asyncio.to_thread(method.function, request, who)

        async def handle(data: bytes, context: Context) -> Message:
            try:
                async with asyncio.timeout(self._seconds_left(context)):
                    return await answer(data, context)
            except TimeoutError:
                await _fail(context, TimedOutError(f"{name} took too long"))
            except Exception as error:  # noqa: BLE001 - told to the caller, and logged
                await _fail(context, error)

        return grpc.unary_unary_rpc_method_handler(handle, None, _serialize)

    def _stream(self, name: str, method: Stream) -> grpc.RpcMethodHandler[Any, Any]:
        async def answers(data: bytes, context: Context) -> AsyncIterator[Message]:
            caller = await self.caller(context)
            caller.require(method.role, name)
            request = parse(method.request, data)
            loop = asyncio.get_running_loop()
            checked = loop.time()
            with self._streams.one_more(caller.name):
                # A stream may be quiet for long: this tells its client that it is open.
                await context.send_initial_metadata(())
                async for message in method.function(request):
                    if loop.time() - checked > _RECHECK_SECONDS:  # it may have been revoked
                        await self.caller(context)
                        checked = loop.time()
                    yield message

        async def handle(data: bytes, context: Context) -> AsyncIterator[Message]:
            try:
                async for message in answers(data, context):
                    yield message
            except Exception as error:  # noqa: BLE001 - told to the caller, and logged
                await _fail(context, error)

        return grpc.unary_stream_rpc_method_handler(handle, None, _serialize)

    def _seconds_left(self, context: Context) -> float:
        left = context.time_remaining()
        most = self._limits.call_seconds
        return most if left is None else min(left, most)


class TokenForReflection(Interceptor):
    """Asks for a token where a service is not one of ours: whoever has none sees no interface."""

    def __init__(self, gate: Gate, prefix: str) -> None:
        self._gate = gate
        self._prefix = prefix

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Put the check before the streams of the service with the prefix."""
        handler = await continuation(details)
        if not details.method.startswith(self._prefix) or handler is None:
            return handler
        inner: Any = handler.stream_stream

        async def checked(requests: Any, context: Context) -> AsyncIterator[Any]:
            try:
                await self._gate.caller(context)
            except KfacDistError as error:
                await _fail(context, error)
            async for response in inner(requests, context):
                yield response

        return grpc.stream_stream_rpc_method_handler(
            checked,
            handler.request_deserializer,
            handler.response_serializer,
        )


def bearer_token(context: Context) -> str:
    """Return the token of a call.

    Raises:
        NotAuthenticatedError: there is none.
    """
    for key, value in context.invocation_metadata() or ():
        if key == "authorization" and isinstance(value, str):
            scheme, _, token = value.partition(" ")
            if scheme.lower() == "bearer" and token:
                return token
    raise NotAuthenticatedError(
        "no token: send metadata 'authorization: Bearer TOKEN' (kfac-dist takes "
        "$KFAC_DIST_TOKEN); an admin makes one with kfac-dist token create"
    )


def parse(kind: type[Message], data: bytes) -> Message:
    """Return the request in `data`.

    Raises:
        UsageError: it is no such message.
    """
    try:
        return kind.FromString(data)
    except (DecodeError, RecursionError) as error:
        raise UsageError(f"not a {kind.DESCRIPTOR.full_name}: {error}") from None


async def _fail(context: Context, error: Exception) -> NoReturn:
    """End the call with the error; this raises."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    told = error if isinstance(error, KfacDistError) else _internal(error)
    if isinstance(told, NotAllowedError):
        _log.warning("refused %s: %s", context.peer(), told.message)
    status = rpc_status.to_status(to_status(_shortened(told)))
    await context.abort(status.code, status.details, status.trailing_metadata)


def _internal(error: Exception) -> KfacDistError:
    mark = secrets.token_hex(4)
    _log.error("internal error %s", mark, exc_info=error)
    return KfacDistError(f"internal error; the server's log tells more under {mark}")


def _shortened(error: KfacDistError) -> KfacDistError:
    """Make a message one that passes as metadata: not too long, and text; the error stays."""
    text = error.message.encode(errors="replace")
    cut = text[:_MAX_DETAILS_BYTES].decode(errors="ignore")
    error.message = cut if len(text) <= _MAX_DETAILS_BYTES else f"{cut} ..."
    return error


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
