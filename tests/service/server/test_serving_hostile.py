"""Ten thousand requests that no honest client sends: each gets a code, and the server survives."""

from __future__ import annotations

import json
import random
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from kfac_dist.service.job_records import Role
from kfac_dist.service.wire.transport import MAX_MESSAGE_BYTES
from kfac_dist.v1 import job_service_pb2 as pb
from kfac_dist.v1 import report_service_pb2
from tests.service.requests import spec
from tests.service.serving import Serving, serving

NUM_REQUESTS = 10_000
AT_ONCE = 64
CANONICAL = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
}
METHODS = [
    f"/kfac_dist.v1.JobService/{method.name}"
    for method in pb.DESCRIPTOR.services_by_name["JobService"].methods
    if not method.server_streaming
] + ["/kfac_dist.v1.ReportService/Report"]
MESSAGES: list[Callable[[random.Random], Any]] = [
    lambda rng: pb.CreateJobRequest(spec_json=odd_json(rng), priority=rng.choice([0, 2**31 - 1])),
    lambda rng: pb.CreateJobRequest(spec_json=json.dumps(spec()), package=rng.randbytes(500)),
    lambda rng: pb.CreateJobRequest(spec_json=json.dumps(spec() | {odd_text(rng): 1})),
    lambda rng: pb.GetJobRequest(job_id=odd_text(rng)),
    lambda rng: pb.CancelJobRequest(job_id=odd_text(rng), now=True),
    lambda rng: pb.ListJobsRequest(page_size=rng.choice([-1, 2**31 - 1]), page_token=odd_text(rng)),
    lambda rng: pb.ListJobsRequest(states=[rng.choice([0, 99, -5])], owner=odd_text(rng)),
    lambda rng: pb.QueryMetricsRequest(job_id="x", names=[odd_text(rng)] * rng.choice([1, 500])),
    lambda rng: pb.ListEventsRequest(job_id=odd_text(rng), after=rng.choice([-1, 2**63 - 1])),
    lambda rng: report_service_pb2.ReportRequest(job_id=odd_text(rng), attempt=-1),
]


def odd_text(rng: random.Random) -> str:
    return rng.choice(
        [
            "",
            "../../etc/passwd",
            "x" * rng.choice([200, 100_000]),
            "a\x00b",
            "'; DROP TABLE jobs; --",
            "\U0001f600" * 50,
            "%s%n{0}",
            "no-such-job",
            "/" * 100,
        ]
    )


def odd_json(rng: random.Random) -> str:
    return rng.choice(
        [
            "",
            "null",
            "[]",
            "{",
            "[" * 100_000,
            '{"a":' * 5_000,
            "NaN",
            '{"steps": Infinity}',
            '{"name": 1e400}',
            '{"steps": ' + "9" * 5000 + "}",
            json.dumps(spec() | {"task": "../../x.py:T"}),
            json.dumps({"name": "../../../tmp/x", "task": "classifier"}),
            json.dumps({"name": "x", "task_args": {"hidden": [-1] * 1000}}),
            '{"name": "\\ud800"}',
            "x" * 300_000,
        ]
    )


def request(rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.3:
        return rng.randbytes(rng.choice([1, 10, 100, 5000]))
    message = rng.choice(MESSAGES)(rng).SerializeToString()
    if kind < 0.5:  # a whole message, cut or altered
        place = rng.randrange(len(message) + 1)
        return bytes(message[:place] + rng.randbytes(2) + message[place + 1 :])
    return bytes(message)


def metadata(rng: random.Random, server: Serving) -> list[tuple[str, str | bytes]]:
    good = f"Bearer {server.token('ada', Role.SUBMITTER)}"
    viewer = f"Bearer {server.token('looker', Role.VIEWER)}"
    authorization = rng.choice(
        [good, good, good, viewer, "", "Bearer", "Bearer ", "Basic abc", "Bearer " + "x" * 3000]
    )
    extra = rng.choice([[], [], [("x-odd-bin", rng.randbytes(30))], [("x-" + "y" * 40, "z" * 500)]])
    return [("authorization", authorization), *extra]


@pytest.mark.timeout(600)
def test_the_server_survives_hostile_requests(tmp_path: Path) -> None:
    rng = random.Random(0)
    with serving(tmp_path / "home") as server, grpc.insecure_channel(server.address) as channel:
        codes: Counter[grpc.StatusCode] = Counter()
        waiting: list[tuple[str, bytes, grpc.Future]] = []

        def settle(num_left: int) -> None:
            while len(waiting) > num_left:
                method, data, call = waiting.pop(0)
                code = call.code()  # waits for the answer
                assert code in CANONICAL, (method, data[:200], code, call.details())
                codes[code] += 1

        for _ in range(NUM_REQUESTS):
            method = rng.choice([*METHODS, "/kfac_dist.v1.JobService/NoSuch", "/nothing/At"])
            data = request(rng)
            timeout = rng.choice([None] * 9 + [1e-6])
            call = channel.unary_unary(method).future(
                data, metadata=metadata(rng, server), timeout=timeout
            )
            waiting.append((method, data, call))
            settle(AT_ONCE)
        settle(0)
        assert codes.total() == NUM_REQUESTS
        assert set(codes) >= {
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.UNAUTHENTICATED,
            grpc.StatusCode.PERMISSION_DENIED,
            grpc.StatusCode.NOT_FOUND,
            grpc.StatusCode.DEADLINE_EXCEEDED,
            grpc.StatusCode.UNIMPLEMENTED,
        }
        with server.client("ada") as client:
            assert list(client.jobs()) == []  # no request became a job
            job = client.submit(spec())
            assert client.get(job.id) == job


def test_a_message_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path / "home") as server, grpc.insecure_channel(server.address) as channel:
        token = server.token("ada", Role.SUBMITTER)
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(METHODS[0])(
                bytes(MAX_MESSAGE_BYTES + 1), metadata=[("authorization", f"Bearer {token}")]
            )
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with server.client("ada") as client:
            assert list(client.jobs()) == []


def test_the_server_survives_bytes_that_are_not_grpc(tmp_path: Path) -> None:
    rng = random.Random(1)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    with serving(tmp_path / "home") as server:
        host, _, port = server.address.rpartition(":")
        for _ in range(200):
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                start = rng.choice([b"", preface, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"])
                connection.sendall(start + rng.randbytes(rng.choice([0, 9, 4000])))
        with server.client() as client:
            assert list(client.jobs()) == []
