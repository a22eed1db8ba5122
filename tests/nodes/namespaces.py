"""Ray nodes in network namespaces: machines with nothing in common but a network.

Each node has an address, a home and a temporary folder of its own, and cannot see those of the
others: an empty file system is mounted over them.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.paths import ROOT

PORT = 6379
START_SECONDS = 90.0
HIDE = 'for hidden in $HIDDEN; do mount -t tmpfs tmpfs "$hidden" || exit 1; done; exec "$@"'


def refusal() -> str | None:
    """Why namespaces cannot be made here; None if they can."""
    name = f"kf-probe-{secrets.token_hex(3)}"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "the commands ip and unshare are missing"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces cannot be made: {made.stderr.strip()}"
    ip("netns", "del", name)
    return None


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


@dataclass(frozen=True, kw_only=True)
class Node:
    """A namespace with a link to the bridge; `hidden` are the folders that it cannot see."""

    namespace: str
    link: str
    address: str
    folder: Path
    hidden: tuple[Path, ...]

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def environment(self) -> Mapping[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "TMPDIR": str(self.folder / "tmp"),
            "HIDDEN": " ".join(map(str, self.hidden)),
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "OMP_NUM_THREADS": "1",
        }

    def popen(self, *command: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a command on this node; what it prints goes to `log`."""
        inside = ["ip", "netns", "exec", self.namespace]
        private = ["unshare", "--mount", "--propagation", "private", "sh", "-c", HIDE, "sh"]
        with log.open("ab") as output:
            return subprocess.Popen(
                [*inside, *private, *command],
                cwd=self.folder,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def pids(self) -> list[int]:
        """The processes of this node."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True
        )
        return [int(pid) for pid in listed.stdout.split()]

    def cut(self) -> None:
        """Cut the link."""
        ip("link", "set", self.link, "down")

    def mend(self) -> None:
        ip("link", "set", self.link, "up")


@dataclass(frozen=True, kw_only=True)
class NodeCluster:
    """A Ray cluster whose first node is the head."""

    nodes: Sequence[Node]
    folder: Path
    rays: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def ray_address(self) -> str:
        return f"{self.nodes[0].address}:{PORT}"

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def start(self, number: int, resources: Mapping[str, float]) -> None:
        """Start Ray on a node, without waiting."""
        node = self.nodes[number]
        place = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        if number:
            place = [f"--address={self.ray_address}"]
        options = [
            "--block",
            "--num-cpus=1",
            f"--node-ip-address={node.address}",
            f"--resources={json.dumps(resources)}",
            f"--temp-dir={node.folder / 'ray'}",
            "--object-store-memory=100000000",
            "--disable-usage-stats",
        ]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start"]
        self.rays.append(node.popen(*ray, *place, *options, log=self.log(f"node-{number}")))

    def python(self, script: Path, *arguments: str, name: str) -> subprocess.Popen[bytes]:
        """Run a script on the head node."""
        log = self.log(name)
        return self.nodes[0].popen(sys.executable, str(script), *arguments, log=log)


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[NodeCluster]:
    """Make the namespaces and remove them after the block, with all that runs in them."""
    token = secrets.token_hex(3)
    subnet = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(250)}"
    folder = Path(tempfile.mkdtemp(prefix="kfn-", dir="/tmp"))  # Ray's sockets need a short path
    folders = [folder / str(number) for number in range(count)]
    nodes = [
        Node(
            namespace=f"kf{token}-{number}",
            link=f"kf{token}v{number}",
            address=f"{subnet}.{number + 1}",
            folder=folders[number],
            hidden=tuple(path for path in folders if path != folders[number]),
        )
        for number in range(count)
    ]
    cluster = NodeCluster(nodes=nodes, folder=folder)
    try:
        _make(nodes, f"kf{token}b")
        yield cluster
    finally:
        for node in reversed(nodes):
            _remove(node)
        for ray in cluster.rays:
            ray.wait(20)
        with contextlib.suppress(subprocess.CalledProcessError):  # it was never made
            ip("link", "del", f"kf{token}b")
        shutil.rmtree(folder, ignore_errors=True)


def _make(nodes: Sequence[Node], bridge: str) -> None:
    ip("link", "add", bridge, "type", "bridge")
    ip("link", "set", bridge, "up")
    for node in nodes:
        for path in (node.home, node.folder / "tmp"):
            path.mkdir(parents=True)
        ip("netns", "add", node.namespace)
        ip("link", "add", node.link, "type", "veth", "peer", "eth0", "netns", node.namespace)
        ip("link", "set", node.link, "master", bridge, "up")
        ip("-n", node.namespace, "address", "add", f"{node.address}/24", "dev", "eth0")
        for name in ("lo", "eth0"):
            ip("-n", node.namespace, "link", "set", name, "up")


def _remove(node: Node) -> None:
    with contextlib.suppress(subprocess.CalledProcessError):  # the namespace was never made
        deadline = time.monotonic() + 20
        while (pids := node.pids()) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        ip("netns", "del", node.namespace)
