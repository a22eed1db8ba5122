"""gRPC options that both ends of a connection must agree on: pings and sizes."""

from __future__ import annotations

from kfac_dist.runs.transfer.package import MAX_PACKED_BYTES

DEFAULT_PORT = 7341
"""Outside 10002 to 19999, the range of ports that Ray uses for its workers."""

MAX_SPEC_BYTES = 256 * 1024
MAX_MESSAGE_BYTES = MAX_PACKED_BYTES + 2 * MAX_SPEC_BYTES
_MAX_METADATA_BYTES = 64 * 1024  # errors travel as metadata, and one may list many problems

# A client pings after 30 s of silence. A server closes connections that ping more often than every
# 20 s, so the client's period must be longer than that.
_CLIENT_PING_MS = 30_000
_LEAST_PING_MS = 20_000
_SERVER_PING_MS = 60_000
_PONG_MS = 10_000

Options = list[tuple[str, int | str]]

_BOTH: Options = [
    ("grpc.keepalive_timeout_ms", _PONG_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", 2 * _MAX_METADATA_BYTES),
]
SERVER_OPTIONS: Options = [
    *_BOTH,
    ("grpc.keepalive_time_ms", _SERVER_PING_MS),
    ("grpc.http2.min_ping_interval_without_data_ms", _LEAST_PING_MS),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a second server on the port must fail, not get half of the calls
]
CLIENT_OPTIONS: Options = [
    *_BOTH,
    ("grpc.keepalive_time_ms", _CLIENT_PING_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 16 * 2**20),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 3_000),
]
