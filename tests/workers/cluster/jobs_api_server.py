"""A Jobs API that answers as Ray 2.60 does, without a cluster behind it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import ray

CLUSTER_ID = "6b88e4fd"


class JobsApi:
    """What the API answers; the nodes are rows of Ray's table, which keeps the dead ones."""

    def __init__(self) -> None:
        self.url = ""
        self.status = 200
        self.version: dict[str, Any] = {"version": "4", "ray_version": ray.__version__}
        self.nodes: list[dict[str, Any]] = []
        self.command: list[str] = []
        self.submitted: list[dict[str, Any]] = []

    def answer(self, path: str, query: str) -> tuple[int, Any]:
        if self.status != 200:
            return self.status, "refused"
        if path == "/api/version":
            return 200, self.version
        if path == "/cluster_id":
            return 200, {"result": True, "msg": "", "data": {"clusterId": CLUSTER_ID}}
        if path == "/nodes":
            head = {"raylet": {"isHeadNode": True}, "cmdline": self.command}
            return 200, {"data": {"summary": [{"raylet": {"isHeadNode": False}}, head]}}
        if path == "/api/v0/nodes":
            return 200, {"result": True, "msg": "", "data": {"result": self._listed(query)}}
        return 404, "no such job does not exist"

    def _listed(self, query: str) -> dict[str, Any]:
        """Count the rows that a filter leaves out as missing, as Ray does."""
        rows = [row for row in self.nodes if "filter" not in query or row["state"] == "ALIVE"]
        return {
            "result": rows,
            "total": len(self.nodes),
            "num_after_truncation": len(rows),
            "num_filtered": len(rows),
        }


@contextmanager
def jobs_api() -> Iterator[JobsApi]:
    """Answer inside the block."""
    api = JobsApi()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            self.reply(*api.answer(parts.path, parts.query))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            api.submitted.append(json.loads(body))
            self.reply(200, {"job_id": "x", "submission_id": "x"})

        def reply(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode() if not isinstance(body, str) else body.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    api.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
