"""Two Ray nodes that share no folder: user code, data, logs and records travel over Ray alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kfac_dist.runs import RunFolder
from tests.nodes.namespaces import NodeCluster, namespaces, refusal
from tests.paths import ROOT
from tests.waiting import wait_until
from tests.workers.whole_jobs.jobs import TASK, line_spec

DRIVER = ROOT / "tests/nodes/driver.py"
CUT_SECONDS = 10.0

WANTED = "KFAC_DIST_TEST_NODES"
WHY_NOT = refusal() if WANTED in os.environ else "takes minutes; make test-nodes runs it"
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.timeout(300),
]

# The helper and the file beside it must travel; the address tells the nodes apart in the logs.
HELPER = """
from pathlib import Path
import socket, subprocess

def address():
    return subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.strip()

print("the words are", Path("words.txt").read_text(), "on", address(), flush=True)
"""


@pytest.fixture
def cluster() -> Iterator[NodeCluster]:
    with namespaces(2) as found:
        found.start(0, {"inverse": 0})
        found.start(1, {"inverse": 1})
        yield found


def job(**changes: Any) -> dict[str, Any]:
    return line_spec(workers={"gradient": 2, "inverse": 1}) | changes


def write_job(folder: Path, spec: dict[str, Any]) -> list[str]:
    code = folder / "code"
    code.mkdir(parents=True)
    (code / "line.py").write_text(f"import helper\n{TASK}")
    (code / "helper.py").write_text(HELPER)
    (code / "words.txt").write_text("both nodes read this")
    (folder / "spec.json").write_text(json.dumps(spec))
    return [str(folder / "spec.json"), str(code), str(folder / "run")]


def wait(driver: subprocess.Popen[bytes], log: Path) -> None:
    assert driver.wait(timeout=200) == 0, log.read_text(errors="replace")[-1500:]


def test_a_job_on_two_nodes_without_a_common_folder_equals_one_node(
    cluster: NodeCluster, tmp_path: Path
) -> None:
    here = cluster.nodes[0].folder / "driver"
    arguments = write_job(here, job())
    wait(
        cluster.python(DRIVER, *arguments, cluster.ray_address, name="driver"),
        cluster.log("driver"),
    )
    two = RunFolder.open(here / "run")
    assert two.read_job().state == "SUCCEEDED"
    addresses = set()
    for rank in range(2):
        assert '"joined"' in two.places.log("gradient_worker", rank).read_text()
        printed = two.places.printed("gradient_worker", rank).read_text()
        assert "the words are both nodes read this" in printed
        assert "building the model" in printed
        addresses.add(printed.partition(" on ")[2].splitlines()[0])
    assert addresses == {node.address for node in cluster.nodes}
    assert '"inverted"' in two.places.log("inverse_worker", 0).read_text()
    # Nothing of the job is left on the other node.
    assert not list((cluster.nodes[1].folder / "tmp").glob("kfac_dist-*"))
    alone = write_job(tmp_path / "alone", job())
    subprocess.run([sys.executable, str(DRIVER), *alone], check=True, timeout=200, cwd=tmp_path)
    one = RunFolder.open(tmp_path / "alone/run")
    pairs = zip(one.read_metrics(), two.read_metrics(), strict=True)
    assert all((a.loss, a.update_norm) == (b.loss, b.update_norm) for a, b in pairs)


def test_a_link_that_is_cut_for_ten_seconds(cluster: NodeCluster) -> None:
    """The other node is out of reach for 10 s in the middle of the job.

    Ray keeps a node that is silent for less than half a minute, and TCP sends again what was lost.
    So the job waits for the link and then goes on, without an error and without a lost log line.
    """
    here = cluster.nodes[0].folder / "driver"
    arguments = write_job(here, job(steps=400, checkpoint={"every_steps": None}))
    driver = cluster.python(DRIVER, *arguments, cluster.ray_address, name="driver")
    metrics = here / "run/metrics.jsonl"
    wait_until(lambda: metrics.exists() and num_lines(metrics) > 50, "the first steps", 120)
    cluster.nodes[1].cut()
    time.sleep(CUT_SECONDS)  # the length of the cut is what is tested
    before = num_lines(metrics)
    cluster.nodes[1].mend()
    wait_until(lambda: num_lines(metrics) > before + 1, "the next steps", 30)
    wait(driver, cluster.log("driver"))
    run = RunFolder.open(here / "run")
    assert run.read_job().state == "SUCCEEDED"
    assert [record.step for record in run.read_metrics()] == list(range(1, 401))
    slowest = max(record.step_seconds for record in run.read_metrics())
    assert slowest > CUT_SECONDS / 2  # the cut was felt


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")
