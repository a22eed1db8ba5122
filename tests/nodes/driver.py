"""A driver of a job, to be run on the head node: SPEC BASE_DIR RUN_DIR [RAY_ADDRESS]."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(spec: str, base_dir: str, run_dir: str, *ray_address: str) -> None:
    from kfac_dist.config import parse_spec
    from workers.driver.launch import run_job

    values: dict[str, Any] = json.loads(Path(spec).read_text())
    for address in ray_address:
        wait_for_nodes(address, num_cpus=values["workers"]["gradient"])
    run_job(
        parse_spec(values),
        base_dir=Path(base_dir),
        data_dir=values.pop("data_url", None),
        home=Path("~/.kfac_dist").expanduser(),
        run_dir=Path(run_dir),
        resume=False,
        ray_address=next(iter(ray_address), None),
    )


def wait_for_nodes(address: str, num_cpus: int) -> None:
    import ray

    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            if not ray.is_initialized():
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            if ray.cluster_resources().get("CPU", 0) >= num_cpus:
                ray.shutdown()
                return
        except ConnectionError:  # the head is not up yet
            pass
        time.sleep(0.2)
    raise TimeoutError(f"the cluster at {address} has no {num_cpus} CPUs")


if __name__ == "__main__":
    main(*sys.argv[1:])
