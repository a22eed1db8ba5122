"""How long does the control plane take to list a thousand jobs, compared with an empty call?

Server and client are one process on one CPU, over loopback and with a token. The time of a call is
therefore the work of both: the query in SQLite, the records and the messages, there and back. The
calls are made in turns. The empty call is one to the health service.

    taskset -c 0 python benchmarks/service_calls.py --out benchmarks/results
    python benchmarks/service_calls.py --short
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from report import add_output_options, deliver, document, surroundings, table

from kfac_dist.service.access.tokens import Tokens
from kfac_dist.service.client import Client
from kfac_dist.service.job_records import Role
from kfac_dist.service.jobs import Jobs
from kfac_dist.service.server.serving import GrpcServer, ServerOptions
from kfac_dist.service.store import open_store

SPEC = {"name": "digits", "task": "autoencoder", "steps": 100, "batch_size": 100}
REPEATS = 30
SHORT_REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_output_options(parser)
    parser.add_argument("--jobs", type=int, default=1000)
    options = parser.parse_args()
    num_repeats = SHORT_REPEATS if options.short else REPEATS
    started = surroundings(("grpcio", "protobuf", "sqlalchemy"))
    with tempfile.TemporaryDirectory() as folder:
        seconds = asyncio.run(measure(Path(folder), options.jobs, num_repeats))
    result = {
        "question": "wall time of a call that lists jobs, compared with an empty call",
        **started,
        "num_jobs": options.jobs,
        "num_repeats": num_repeats,
        "calls": summary(seconds),
    }
    deliver("service_calls", result, markdown(result), options.out)


async def measure(home: Path, num_jobs: int, num_repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each repeat of each call to a server with `num_jobs` jobs."""
    store = open_store(f"sqlite:///{home}/store.db")
    jobs, tokens = Jobs(store, home), Tokens(store)
    for _ in range(num_jobs):
        jobs.create(SPEC, owner="ada")
    server = GrpcServer(jobs, tokens, ServerOptions(host="127.0.0.1", port=0))
    address = await server.start()
    _, token = tokens.create("ada", Role.VIEWER)
    try:
        return await asyncio.to_thread(time_calls, address, token, num_jobs, num_repeats)
    finally:
        await server.drain()
        store.close()


def time_calls(address: str, token: str, num_jobs: int, num_repeats: int) -> dict[str, list[float]]:
    with Client(address, token=token) as client, grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        calls: dict[str, Callable[[], object]] = {
            "empty call": lambda: health.Check(health_pb2.HealthCheckRequest()),
            "first page of 50 jobs": lambda: next(client.jobs(page_size=50)),
            f"{num_jobs} jobs in pages of 200": lambda: list(client.jobs()),
            f"{num_jobs} jobs in one answer": lambda: list(client.jobs(page_size=num_jobs)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(num_repeats + 1):
            for name, call in calls.items():
                started = time.perf_counter()
                call()
                if number:  # the first one warms up
                    seconds[name].append(time.perf_counter() - started)
    return seconds


def summary(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    (empty, *_) = (median(values) for values in seconds.values())
    return [
        {
            "call": name,
            "median_ms": round(1e3 * median(values), 2),
            "best_ms": round(1e3 * min(values), 2),
            "worst_ms": round(1e3 * max(values), 2),
            "over_empty_call": round(median(values) / empty, 1),
        }
        for name, values in seconds.items()
    ]


def markdown(result: dict[str, Any]) -> str:
    header = ["call", "median, ms", "best, ms", "worst, ms", "median over an empty call's"]
    versions = result["versions"]
    return document(
        "What a call to the control plane costs",
        "`taskset -c 0 python benchmarks/service_calls.py --out benchmarks/results`: a store of "
        f"{result['num_jobs']} jobs in SQLite, {result['num_repeats']} repeats, the calls in "
        "turns. Server and client are one process, on "
        f"{result['hardware']['cores_used']} of {result['hardware']['cores']} CPUs, so a time is "
        f"the work of both. gRPC {versions['grpcio']}, protobuf {versions['protobuf']}, "
        f"SQLAlchemy {versions['sqlalchemy']}, Python {versions['python']}, "
        f"{result['hardware']['model']}, load average {result['load_average'][0]} at the start.",
        table(header, [list(call.values()) for call in result["calls"]]),
    )


if __name__ == "__main__":
    main()
