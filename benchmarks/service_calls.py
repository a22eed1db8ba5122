"""How long the control plane takes to list a thousand jobs, beside an empty call to it.

Server and client are in one process, on loopback, with a token; the store is SQLite's file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kfac_dist.service.access.tokens import Tokens
from kfac_dist.service.client import Client
from kfac_dist.service.jobs import Jobs
from kfac_dist.service.records import Role
from kfac_dist.service.server.serving import GrpcServer, ServerOptions
from kfac_dist.service.store import open_store

SPEC = {"name": "digits", "task": "autoencoder", "steps": 100, "batch_size": 100}
REPEATS = 30
SHORT_REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--short", action="store_true", help="fewer repeats")
    options = parser.parse_args()
    repeats = SHORT_REPEATS if options.short else REPEATS
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(asyncio.run(measure(Path(folder), options.jobs, repeats)), indent=2))


async def measure(home: Path, num_jobs: int, repeats: int) -> dict[str, Any]:
    store = open_store(f"sqlite:///{home}/store.db")
    jobs, tokens = Jobs(store, home), Tokens(store)
    for _ in range(num_jobs):
        jobs.create(SPEC, owner="ada")
    server = GrpcServer(jobs, tokens, ServerOptions(host="127.0.0.1", port=0))
    address = await server.start()
    _, token = tokens.create("ada", Role.VIEWER)
    try:
        return await asyncio.to_thread(time_calls, address, token, repeats) | {
            "num_jobs": num_jobs,
            "repeats": repeats,
        }
    finally:
        await server.drain()
        store.close()


def time_calls(address: str, token: str, repeats: int) -> dict[str, Any]:
    with Client(address, token=token) as client, grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        calls: dict[str, Callable[[], object]] = {
            "empty_call": lambda: health.Check(health_pb2.HealthCheckRequest()),
            "first_page_of_50": lambda: next(client.jobs(page_size=50)),
            "all_in_one_page": lambda: list(client.jobs(page_size=1000)),
        }
        for call in calls.values():
            call()
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):  # in turns, so that a slow moment is everybody's
            for name, call in calls.items():
                started = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "median_ms": {name: round(1000 * value, 2) for name, value in median.items()},
        "worst_ms": {name: round(1000 * max(values), 2) for name, values in seconds.items()},
        "times_an_empty_call": {
            name: round(value / median["empty_call"], 1) for name, value in median.items()
        },
    }


if __name__ == "__main__":
    main()
