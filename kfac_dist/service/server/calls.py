"""Turns the bytes of a gRPC call into a function call and back.

The `Gate` checks the token, the role and the deadline, parses the request, and turns exceptions
into gRPC status codes. Each method is one row: type of the request, role, function. Functions with
a single answer are synchronous and run in a thread; streams are asynchronous iterators.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
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

# gRPC's default allows 8 KiB of metadata in all and above that refuses at random. A message is sent
# up to three times: as the status's text, in the rich status, and as the violation of a field.
_MAX_DETAILS_BYTES = 2000
_RECHECK_SECONDS = 30.0  # a stream whose token was revoked ends within this time

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:  # at run time these classes take no type arguments
    Interceptor = grpc.aio.ServerInterceptor


Authenticate = Callable[[str], Caller]
"""Returns who holds a token. Synchronous; raises NotAuthenticatedError."""


@dataclass(frozen=True, kw_only=True)
class Unary:
    """A method with one answer. Without a `role`, its function checks the bearer token itself."""

    request: type[Message]
    role: Role | None
    function: Callable[[Any, Any], Message]
    """Called with the request and the Caller; without a `role`, with the bearer token instead."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A method with a stream of answers."""

    request: type[Message]
    role: Role
    function: Callable[[Any], AsyncIterator[Message]]


class Gate:
    """Passes permitted calls on to their functions."""

    def __init__(self, authenticate: Authenticate, limits: ServerLimits) -> None:
        self._authenticate = authenticate
        self._limits = limits
        self._streams = StreamCounter(limits.streams_a_user)

    def handlers(
        self, service: str, methods: Mapping[str, Unary | Stream]
    ) -> grpc.GenericRpcHandler[Any, Any]:
        """Return the handler with which a server serves `methods`, by their names."""
        made = {
            name: self._stream(name, method)
            if isinstance(method, Stream)
            else self._unary(name, method)
            for name, method in methods.items()
        }
        return grpc.method_handlers_generic_handler(service, made)

    async def caller(self, context: Context) -> Caller:
        """Return who makes a call.

        Raises:
            NotAuthenticatedError: the token is missing or not valid.
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
            except Exception as error:  # noqa: BLE001 - it goes to the caller and into the log
                await _fail(context, error)

        return grpc.unary_unary_rpc_method_handler(handle, None, _serialize)

    def _stream(self, name: str, method: Stream) -> grpc.RpcMethodHandler[Any, Any]:
        async def answers(data: bytes, context: Context) -> AsyncIterator[Message]:
            caller = await self.caller(context)
            caller.require(method.role, name)
            request = parse(method.request, data)
            loop = asyncio.get_running_loop()
            checked = loop.time()
            with self._streams.counted(caller.name):
                # The first message may take long to come; this tells the client that it is open.
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
            except Exception as error:  # noqa: BLE001 - it goes to the caller and into the log
                await _fail(context, error)

        return grpc.unary_stream_rpc_method_handler(handle, None, _serialize)

    def _seconds_left(self, context: Context) -> float:
        left = context.time_remaining()  # None: the client sets no deadline
        limit = self._limits.call_seconds
        return limit if left is None else min(left, limit)


class TokenForReflection(Interceptor):
    """Requires a token for reflection, so that callers without one cannot list the API.

    gRPC's reflection servicer is not made by the `Gate`, which checks the project's own services.
    """

    def __init__(self, gate: Gate, prefix: str) -> None:
        self._gate = gate
        self._prefix = prefix

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Add the check to streams of services whose path begins with the prefix."""
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
        NotAuthenticatedError: the call has no token.
    """
    for key, value in context.invocation_metadata() or ():
        if key == "authorization" and isinstance(value, str):
            scheme, _, token = value.partition(" ")
            if scheme.lower() == "bearer" and token:
                return token
    raise NotAuthenticatedError(
        "no token: send the metadata 'authorization: Bearer TOKEN' (kfac-dist sends "
        "$KFAC_DIST_TOKEN); an admin creates tokens with kfac-dist token create"
    )


def parse(kind: type[Message], data: bytes) -> Message:
    """Return the request in `data`.

    Raises:
        UsageError: `data` is not a message of this kind.
    """
    try:
        return kind.FromString(data)
    except (DecodeError, RecursionError) as error:
        raise UsageError(f"not a {kind.DESCRIPTOR.full_name}: {error}") from None


async def _fail(context: Context, error: Exception) -> NoReturn:
    """End the call with the error's status code and message. Always raises."""
    if isinstance(error, grpc.aio.AbortError):  # the call has ended already
        raise error
    shown = error if isinstance(error, KfacDistError) else _internal(error)
    if isinstance(shown, NotAllowedError):
        _log.warning("refused %s: %s", context.peer(), shown.message)
    status = rpc_status.to_status(to_status(_shortened(shown)))
    await context.abort(status.code, status.details, status.trailing_metadata)


def _internal(error: Exception) -> KfacDistError:
    """Log a bug and return what the caller may know of it: where to look in the log."""
    mark = secrets.token_hex(4)
    _log.error("internal error %s", mark, exc_info=error)
    return KfacDistError(f"internal error; look for {mark} in the server's log")


def _shortened(error: KfacDistError) -> KfacDistError:
    """Cut the error's message to what fits into metadata, and replace what is not text."""
    text = error.message.encode(errors="replace").decode()
    sent = accumulate(_sent_bytes(character) for character in text)
    kept = sum(size <= _MAX_DETAILS_BYTES for size in sent)
    error.message = text if kept == len(text) else f"{text[:kept]} ..."
    return error


def _sent_bytes(character: str) -> int:
    """Return the bytes of a character in a status's text: %XX for all but printable ASCII."""
    return 1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode())


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
