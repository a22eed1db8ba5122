"""How often a step reads numbers on the host: a fixed number of times, however many layers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from kfac_dist import KFAC, KFACPreconditioner
from tests.gpu.host_reads import host_reads
from tests.workers.whole_jobs.local_job import LocalJob, chain_spec

# docs/gpu.md lists them.
READS_A_STEP = 11
READS_A_MEASURE = 2
READS_OF_THE_PRECONDITIONER = 4
READS_A_REFRESHED_LAYER = {"block_diagonal": 2, "block_tridiagonal": 7, "ekfac": 2}
PERIOD = 4


def reads_of_steps(inverse: str, depth: int) -> list[Counter[str]]:
    torch.manual_seed(0)
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(8, 8), nn.Tanh())]
    optimizer = KFAC(
        nn.Sequential(*hidden, nn.Linear(8, 3)),
        distribution="categorical",
        inverse=inverse,
        inverse_update_period=PERIOD,
        damping={"initial": 1.0, "adapt_period": PERIOD},
        gamma={"adapt_period": None},
    )
    inputs, targets = torch.randn(200, 8), torch.randint(3, (200,))
    found = []
    for _ in range(3 * PERIOD):  # the first steps refresh, measure and check more
        with host_reads() as reads:
            optimizer.step(inputs, targets)
        found.append(reads)
    return found


@pytest.mark.parametrize("inverse", ["block_diagonal", "block_tridiagonal", "ekfac"])
def test_a_step_of_the_serial_optimizer_reads_no_number_for_each_layer(inverse):
    shallow, deep = reads_of_steps(inverse, 1), reads_of_steps(inverse, 5)
    plain = -PERIOD  # the step after the last that refreshes and measures
    assert shallow[plain] == deep[plain]
    assert deep[plain].total() <= READS_A_STEP
    refresh = -1
    assert deep[refresh].total() > deep[plain].total()
    each_layer = (deep[refresh].total() - shallow[refresh].total()) / 4
    assert each_layer <= READS_A_REFRESHED_LAYER[inverse]
    rest = deep[refresh].total() - 6 * READS_A_REFRESHED_LAYER[inverse]
    assert rest <= READS_A_STEP + READS_A_MEASURE


@pytest.mark.parametrize("depth", [1, 5])
def test_a_step_of_the_preconditioner_reads_four_numbers(depth):
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(8, 8), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Linear(8, 3))
    options = {"inverse_update_period": 1000, "norm_constraint": 1e-3, "lr": 0.1}
    preconditioner = KFACPreconditioner(model, distribution="categorical", **options)
    inputs, targets = torch.randn(200, 8), torch.randint(3, (200,))
    for _ in range(9):
        model.zero_grad()
        with host_reads() as reads:
            nn.functional.cross_entropy(model(inputs), targets).backward()
            preconditioner.step()
    assert reads.total() == READS_OF_THE_PRECONDITIONER


def test_the_counter_sees_every_kind_of_read():
    values = torch.tensor([1.0, 0.0])
    with host_reads() as reads:
        _ = values[0].item(), float(values[1]), bool(values[0]), values.tolist()
        _ = values.nonzero(), values[values > 0], values.cpu()
        _ = values + 1, values.sum(), values[:1]
    assert reads == {"elsewhere": 7}


def test_the_members_of_a_job_read_no_number_for_each_layer(tmp_path):
    assert member_reads(tmp_path, depth=2) == member_reads(tmp_path, depth=5)


def member_reads(folder: Path, depth: int) -> dict[str, Counter[str]]:
    """The reads of a step without a refresh, of a gradient worker and of the server."""
    job = LocalJob(chain_spec(folder, task_args={"depth": depth}), folder)
    found: dict[str, Counter[str]] = {}

    def counted(name, step):
        def counted_step(order):
            with host_reads() as found[name]:
                return step(order)

        return counted_step

    try:
        job.steps(5)
        job.workers[0].step = counted("gradient_worker", job.workers[0].step)
        job.server.step = counted("parameter_server", job.server.step)
        job.steps(1)
    finally:
        job.close()
    return found
