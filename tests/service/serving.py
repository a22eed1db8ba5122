"""A real server for one test: on loopback, in a thread, with its own store."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kfac_dist.service.access.tokens import Tokens
from kfac_dist.service.client import Client
from kfac_dist.service.job_records import Role
from kfac_dist.service.jobs import Jobs
from kfac_dist.service.server.serving import GrpcServer, ServerOptions
from kfac_dist.service.store import open_store


@dataclass(kw_only=True)
class Serving:
    """A server that answers at `address`."""

    jobs: Jobs
    tokens: Tokens
    address: str
    secrets: dict[str, str] = field(default_factory=dict)

    def token(self, name: str, role: Role) -> str:
        """The token with this name, created on first use."""
        if name not in self.secrets:
            self.secrets[name] = self.tokens.create(name, role)[1]
        return self.secrets[name]

    def client(self, name: str = "ada", role: Role = Role.SUBMITTER, **options: Any) -> Client:
        return Client(self.address, token=self.token(name, role), **options)


@contextmanager
def serving(home: Path, options: ServerOptions | None = None) -> Iterator[Serving]:
    """Serve the store in `home` inside the block, then drain."""
    home.mkdir(parents=True, exist_ok=True)
    store = open_store(f"sqlite:///{home}/store.db")
    jobs, tokens = Jobs(store, home), Tokens(store)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[GrpcServer, str]:
        server = GrpcServer(jobs, tokens, options or ServerOptions(host="127.0.0.1", port=0))
        return server, await server.start()

    try:
        server, address = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
        try:
            yield Serving(jobs=jobs, tokens=tokens, address=address)
        finally:
            asyncio.run_coroutine_threadsafe(server.drain(), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        store.close()
