"""How much memory does each role need, and do factors depend on the size of the data set?

Jobs with nets of several sizes run on the project's workers. The private memory of each process is
sampled: its anonymous pages, without what it maps from the object store. The peak above that of the
same role with a minimal net is explained as

    num_vectors * 4 P + num_factors * 4 F + num_largest * 4 L      (+ 4 B in a gradient worker)

with P the parameters, F the elements of all factors, unpacked, L those of the largest factor, which
a temporary needs, and B the elements of the activations of a batch. The three numbers are fitted
over the nets, none below 0, and the result is compared with the peak of each net. Some nets are
trained with split factors as well, which changes F and L but not P and so separates the three. In
the second part a net is trained on the first 1,000, 10,000 and 60,000 cases.

    python benchmarks/memory.py --data-dir ../shared/data --out benchmarks/results
    python benchmarks/memory.py --short
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from processes import cpu_seconds_by_role, descendants, private_bytes, role_of
from race import ROOT, conditions
from report import add_output_options, deliver, document, surroundings, table
from scipy.optimize import nnls
from torch import nn
from turns import WITHOUT_EXTRAS, Turns, run_turns

from kfac_dist.config import JobSpec, KFACSpec, load_spec
from kfac_dist.core.blocks.registration import register
from kfac_dist.tasks import build_model, load_task, torch_dtype
from workers.cluster.cluster import ray_cluster

ROLES = ("gradient_worker", "inverse_worker", "parameter_server")
LIMITS = (1_000, 10_000, 60_000)
SHORT_LIMITS = (200, 1_000)
STEPS = 22  # with a refresh and a search for gamma in step 20
BATCH_SIZE = 200
SAMPLE_SECONDS = 0.01
SAMPLES_A_SEARCH = 50  # samples between two searches for new processes
MEBIBYTE = 2**20
COUNTS = ("num_vectors", "num_factors", "num_largest")


class Net(NamedTuple):
    """An autoencoder: its hidden layers, and the order above which its factors are split."""

    hidden: tuple[int, ...]
    max_factor_dim: int | None = None

    @property
    def name(self) -> str:
        """Its name in tables."""
        cut = "" if self.max_factor_dim is None else f", cut at {self.max_factor_dim}"
        return "-".join(map(str, self.hidden)) + cut


IDLE = Net((2,))
NETS = (
    Net((1600, 800, 30)),
    Net((1600, 800, 30), 600),
    Net((2400, 1200, 30), 600),
    Net((2000, 100, 30)),
    Net((1000, 1000, 30)),
    Net((1200, 500, 30)),
)
SHORT_NETS = (Net((50, 20)), Net((100, 50)), Net((100, 50), 40))


class Peaks:
    """Samples the private memory of each role inside the block; keeps the largest values."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Peaks:
        """Start sampling."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop sampling."""
        self._end.set()
        self._thread.join()

    def _sample(self) -> None:
        sample = 0
        while not self._end.wait(SAMPLE_SECONDS):
            if sample % SAMPLES_A_SEARCH == 0:
                roles = {pid: role_of(pid) for pid in descendants()}
            sample += 1
            for pid, role in roles.items():
                if role in ROLES:
                    self.bytes[role] = max(self.bytes.get(role, 0), private_bytes(pid))


class Size(NamedTuple):
    """Numbers of parameters and of elements: of factors, of the largest, of activations."""

    num_parameters: int
    factor_elements: int
    largest_elements: int
    activation_elements: int


class Run(NamedTuple):
    """The measurements of one job."""

    size: Size
    peak_bytes: Mapping[str, int]
    refresh_seconds: float
    inverse_cpu_seconds: float


def job(path: Path, net: Net, extra: Sequence[str] = ()) -> JobSpec:
    overrides = [
        f"task_args.hidden={list(net.hidden)}",
        f"optimizer.max_factor_dim={net.max_factor_dim or 'null'}",
        "workers.gradient=1",
        f"batch_size={BATCH_SIZE}",
        f"steps={STEPS}",
        *WITHOUT_EXTRAS,
        *extra,
    ]
    return load_spec(path, overrides=overrides)


def size_of(spec: JobSpec, data_dir: Path | None) -> Size:
    assert isinstance(spec.optimizer, KFACSpec)
    task = load_task(spec, ROOT / "examples", data_dir=data_dir)
    model = build_model(task, spec.seed, torch_dtype(spec.dtype))
    registration = register(model, spec.optimizer)
    squares = [order**2 for block in registration.blocks for order in block.orders]
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return Size(
        num_parameters=registration.num_parameters,
        factor_elements=sum(squares),
        largest_elements=max(squares),
        # Inputs and outputs of linear modules; the activation function keeps its outputs, too.
        activation_elements=BATCH_SIZE * sum(m.in_features + 2 * m.out_features for m in linear),
    )


def run(spec: JobSpec, data_dir: Path | None) -> Run:
    turns = Turns(first=1, steps_a_turn=STEPS)
    assert not cpu_seconds_by_role()["inverse_worker"], "actors of an earlier job"
    with Peaks() as peaks:
        run_turns(spec, data_dir, turns)
    by_step = [
        sum(inversion.seconds for inversion in record.inversions)
        for record in turns.records
        if record.inversions
    ]
    size = size_of(spec, data_dir)
    print(size, spec.data.limit, peaks.bytes, file=sys.stderr)
    return Run(
        size=size,
        peak_bytes={role: peaks.bytes[role] for role in ROLES},
        refresh_seconds=median(by_step),
        inverse_cpu_seconds=turns.cpu_seconds["inverse_worker"],
    )


def explain(idle: Run, runs: Sequence[Run], role: str) -> dict[str, Any]:
    """Fit the peaks of a role above that of an idle one, and compare them net by net."""
    own = np.array([run.peak_bytes[role] - idle.peak_bytes[role] for run in runs], dtype=float)
    sizes = [run.size for run in runs]
    known = np.zeros(len(runs))
    if role == "gradient_worker":
        known = np.array([4.0 * size.activation_elements for size in sizes])
    matrix = 4.0 * np.array(
        [(size.num_parameters, size.factor_elements, size.largest_elements) for size in sizes]
    )
    # Weighted, so that relative residuals are minimised.
    weights = 1 / own
    found, _ = nnls(matrix * weights[:, None], (own - known) * weights)
    explained = matrix @ found + known
    return {
        "idle_mib": round(idle.peak_bytes[role] / MEBIBYTE, 1),
        **dict(zip(COUNTS, found.round(2).tolist(), strict=True)),
        "own_mib": [round(value / MEBIBYTE, 1) for value in own],
        "explained_over_own": [round(value, 3) for value in explained / own],
    }


def by_limit(runs: Mapping[int, Run]) -> list[dict[str, Any]]:
    first = next(iter(runs.values()))
    return [
        {
            "cases": limit,
            "factor_elements": measured.size.factor_elements,
            "inverse_worker_mib": round(measured.peak_bytes["inverse_worker"] / MEBIBYTE, 1),
            "inverse_worker_mib_over_first": round(
                measured.peak_bytes["inverse_worker"] / first.peak_bytes["inverse_worker"], 3
            ),
            "parameter_server_mib": round(measured.peak_bytes["parameter_server"] / MEBIBYTE, 1),
            "gradient_worker_mib": round(measured.peak_bytes["gradient_worker"] / MEBIBYTE, 1),
            "inverse_cpu_seconds_over_first": round(
                measured.inverse_cpu_seconds / first.inverse_cpu_seconds, 3
            ),
        }
        for limit, measured in runs.items()
    ]


def markdown(result: dict[str, Any]) -> str:
    nets = result["nets"]
    rows = [
        [
            role,
            found["idle_mib"],
            *(found[count] for count in COUNTS),
            *(
                f"{own} ({explained})"
                for own, explained in zip(
                    found["own_mib"], found["explained_over_own"], strict=True
                )
            ),
        ]
        for role, found in result["roles"].items()
    ]
    limits = [list(row.values()) for row in result["limits"]]
    return document(
        "Memory by role",
        "`python benchmarks/memory.py --data-dir DIR --out benchmarks/results`: autoencoders on "
        f"MNIST, batch {result['batch_size']}, {STEPS} steps with a refresh for three gammas, one "
        f"gradient worker, one inverse worker; torch {result['versions']['torch']}, Ray "
        f"{result['versions']['ray']}.",
        f"Peak of private memory (anonymous pages, sampled every {1e3 * SAMPLE_SECONDS:g} ms) in "
        "MiB, above that of the same role with a minimal net. In brackets, the share of it that "
        "`vectors * 4 P + factors * 4 F + largest * 4 L` explains, with P the parameters, F the "
        "elements of all factors and L those of the largest; for a gradient worker the activations "
        "of its batch are added. The three numbers of a role are fitted over all nets.",
        table(["role", "idle, MiB", "vectors", "factors", "largest", *nets], rows),
        f"The number of cases, net {nets[0]}. Factors and their inversion do not depend on it; a "
        "gradient worker holds the data set.",
        table([name.replace("_", " ") for name in result["limits"][0]], limits),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_output_options(parser)
    arguments = parser.parse_args()
    path = ROOT / f"examples/{'mnist_5k' if arguments.short else 'mnist_autoencoder'}.yaml"
    nets = SHORT_NETS if arguments.short else NETS
    limits = SHORT_LIMITS if arguments.short else LIMITS
    data_dir: Path | None = arguments.data_dir
    started = surroundings()
    spec = job(path, nets[0])
    with ray_cluster(None):
        idle = run(job(path, IDLE), data_dir)
        runs = [run(job(path, net), data_dir) for net in nets]
        limited = {
            limit: run(job(path, nets[0], [f"data.limit={limit}"]), data_dir) for limit in limits
        }
    result = {
        "question": "peak memory by role and net, and cost of the factors by number of cases",
        **conditions(spec),
        **started,
        "seed": spec.seed,
        "nets": [net.name for net in nets],
        "sizes": [measured.size._asdict() for measured in runs],
        "roles": {role: explain(idle, runs, role) for role in ROLES},
        "limits": by_limit(limited),
    }
    deliver("memory", result, markdown(result), arguments.out)


if __name__ == "__main__":
    main()
