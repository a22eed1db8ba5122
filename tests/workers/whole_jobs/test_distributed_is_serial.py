"""Oracle 12: a synchronous distributed run equals the serial optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kfac_dist import KFAC
from kfac_dist.config import JobSpec, SGDSpec
from kfac_dist.coordination.steps.sampling import SamplerCursor, next_window
from kfac_dist.core.passes.noise import permutation
from kfac_dist.core.vector import flatten
from kfac_dist.data import fetch
from kfac_dist.optim.arithmetic import float32_precision
from kfac_dist.tasks import build_model, load_task, torch_dtype
from tests.workers.whole_jobs.local_job import LocalJob, chain_spec, small_spec


def serial_run(
    spec: JobSpec, folder: Path, num_steps: int, **more: object
) -> tuple[KFAC, list[object]]:
    """Run the serial optimizer on the same batches."""
    torch.set_num_threads(1)
    task = load_task(spec, folder, cache_dir=folder)
    data = task.train_data()
    model = build_model(task, spec.seed, torch_dtype(spec.dtype))
    options = spec.optimizer.model_dump(exclude={"name"})
    optimizer = KFAC(model, distribution=task.distribution, seed=spec.seed, **options, **more)
    cursor, results = SamplerCursor(epoch=0, offset=0), []
    for _ in range(num_steps):
        window, cursor = next_window(cursor, spec.batch_size, len(data))
        order = permutation(spec.seed, window.epoch, len(data))
        results.append(optimizer.step(*fetch(data, order[window.start : window.stop])))
    return optimizer, results


@pytest.fixture
def run(tmp_path: Path) -> Iterator[object]:
    jobs: list[LocalJob] = []

    def start(spec: JobSpec) -> LocalJob:
        jobs.append(LocalJob(spec, tmp_path))
        return jobs[-1]

    yield start
    for job in jobs:
        job.close()


RULES = {
    "adaptive": {"step_rule": "adaptive"},
    "norm_constraint": {"step_rule": "norm_constraint", "norm_constraint": 0.01},
    "no_search": {"gamma": {"adapt_period": None}},
    "schedules": {
        "step_rule": "norm_constraint",
        "lr": {"schedule": "cosine", "initial": 0.3, "final": 0.0, "steps": 15, "warmup_steps": 3},
        "damping": {
            "initial": {"schedule": "exponential", "initial": 30, "final": 3, "steps": 12},
            "adapt_period": None,
        },
    },
}
CHAIN = {"inverse": "block_tridiagonal"}
EIGEN = {"inverse": "ekfac"}
STRUCTURES = {
    "tridiagonal": CHAIN,
    "tridiagonal_constrained": {**CHAIN, **RULES["norm_constraint"]},
    "ekfac": EIGEN,
    "ekfac_seldom": {**EIGEN, "factor_update_period": 2, "inverse_update_period": 7},
    "ekfac_constrained": {**EIGEN, **RULES["norm_constraint"]},
    "ekfac_exact": {**EIGEN, "fisher_type": "exact"},
}


def assert_bitwise_serial(job: LocalJob, spec: JobSpec, folder: Path) -> None:
    reports = job.steps(20)
    serial, results = serial_run(spec, folder, 20)
    for report, result in zip(reports, results, strict=True):
        for name in (
            "loss",
            "objective",
            "damping",
            "gamma",
            "lr",
            "reduction_ratio",
            "update_norm",
        ):
            assert getattr(report, name) == getattr(result, name), (report.step, name)
    theta = flatten(serial._parameters)
    assert torch.equal(job.parameters, theta)
    assert torch.equal(flatten(job.workers[0]._parameters), theta)
    assert torch.equal(job.averaged, serial.averaged_parameters)


@pytest.mark.parametrize("rule", RULES)
def test_one_worker_equals_the_serial_optimizer_bit_for_bit(rule, run, tmp_path):
    spec = small_spec(optimizer=RULES[rule])
    assert_bitwise_serial(run(spec), spec, tmp_path)


@pytest.mark.parametrize(("num_workers", "exactly"), [(1, True), (2, False)])
def test_serial_and_distributed_agree_on_the_cases_for_the_fisher_products(
    num_workers, exactly, run, tmp_path
):
    spec = small_spec(
        data={"limit": 1000},
        batch_size=400,
        optimizer={"fisher_fraction": "auto"},
        workers={"gradient": num_workers},
    )
    job = run(spec)
    assert_same = assert_bitwise_serial if exactly else assert_serial_to_rounding
    assert_same(job, spec, tmp_path)
    assert job.server._decider._update.fisher_fraction(400, measure=False) < 1


@pytest.mark.parametrize("structure", STRUCTURES)
def test_two_inverse_workers_with_any_structure_equal_the_serial_optimizer_bit_for_bit(
    structure, run, tmp_path
):
    spec = chain_spec(tmp_path, optimizer=STRUCTURES[structure], workers={"inverse": 2})
    assert_bitwise_serial(run(spec), spec, tmp_path)


def test_products_in_bfloat16_equal_those_of_the_serial_optimizer(run, tmp_path):
    spec = small_spec(dtype="float32", optimizer={"precondition_dtype": "bfloat16"})
    job = run(spec)
    job.steps(8)
    serial, _ = serial_run(spec, tmp_path, 8)
    assert torch.equal(job.parameters, flatten(serial._parameters))


@pytest.mark.parametrize(("gradient", "inverse"), [(2, 1), (3, 2)])
def test_more_workers_equal_the_serial_optimizer_to_rounding(gradient, inverse, run, tmp_path):
    spec = small_spec(workers={"gradient": gradient, "inverse": inverse})
    assert_serial_to_rounding(run(spec), spec, tmp_path)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_more_workers_with_any_structure_equal_the_serial_optimizer_to_rounding(
    structure, run, tmp_path
):
    """The factors must have full rank: EKFAC's basis of a null space consists of rounding."""
    workers = {"gradient": 2, "inverse": 2}
    spec = chain_spec(tmp_path, optimizer=STRUCTURES[structure], workers=workers)
    assert_serial_to_rounding(run(spec), spec, tmp_path)


def assert_serial_to_rounding(job: LocalJob, spec: JobSpec, folder: Path) -> None:
    job.steps(20)
    serial, _ = serial_run(spec, folder, 20)
    theta = flatten(serial._parameters)
    assert torch.linalg.vector_norm(job.parameters - theta) <= 1e-9 * torch.linalg.vector_norm(
        theta
    )
    shards = tuple(built.shard.checksum() for built in job.shards)
    assert {worker.checksums() for worker in job.workers} == {shards}


def test_the_assignment_of_layers_does_not_matter(run):
    runs = [run(small_spec(workers={"inverse": count})) for count in (1, 2, 3)]
    for job in runs:
        job.steps(8)
    assert torch.equal(runs[0].parameters, runs[1].parameters)
    assert torch.equal(runs[0].parameters, runs[2].parameters)


@pytest.mark.parametrize("name", ["kfac", "sgd"])
def test_all_of_kfac_is_in_full_precision_and_all_else_as_the_user_set_it(
    name, run, tmp_path, monkeypatch
):
    spec = chain_spec(tmp_path, dtype="float32")
    if name == "sgd":
        spec = spec.model_copy(update={"optimizer": SGDSpec(name="sgd", lr=0.01)})
    job = run(spec)
    seen: set[str] = set()
    for called in ("cholesky_ex", "eigh"):
        monkeypatch.setattr(torch.linalg, called, watched(getattr(torch.linalg, called), seen))
    monkeypatch.setattr(torch, "dot", watched(torch.dot, seen))  # the server's numbers
    job.workers[0]._computer.model.register_forward_pre_hook(watched(lambda *_: None, seen))
    torch.set_float32_matmul_precision("medium")
    try:
        job.steps(2)
        assert float32_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == {"ieee" if name == "kfac" else "bf16"}


def watched(call, seen):
    """`call`, with a note of what float32 products are computed in when it is called."""

    def with_a_note(*args, **kwargs):
        seen.add(torch.backends.mkldnn.matmul.fp32_precision)
        return call(*args, **kwargs)

    return with_a_note
