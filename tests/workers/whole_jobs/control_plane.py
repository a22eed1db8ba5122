"""A whole control plane in a process that can be killed: server, store, controller, Ray.

It prints a line when it is ready. The cluster belongs to the home folder and outlives it.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from kfac_dist.service.access.local import LocalServer, write_server
from kfac_dist.service.control.controller import Controller
from tests.service.serving import serving
from workers.cluster.head import ensure_head
from workers.cluster.head_runner import HeadJobRunner


def main(home: Path) -> None:
    ensure_head(home)
    runner = HeadJobRunner(home)
    with serving(home) as server:
        write_server(home, LocalServer(address=server.address, pid=os.getpid(), tls_ca=None))
        Controller(server.jobs, runner).start()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        threading.Event().wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
