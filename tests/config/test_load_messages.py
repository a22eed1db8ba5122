"""What is said about a wrong specification: source, path, value, and what would be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kfac_dist.config import load_spec, parse_spec
from kfac_dist.errors import InvalidSpecError

SMALL: dict[str, Any] = {"name": "a", "task": "autoencoder", "steps": 3, "batch_size": 10}


COSINE: dict[str, Any] = {"schedule": "cosine", "initial": 2, "final": 0, "steps": 9}


def _messages(values: dict[str, Any], *overrides: str) -> list[str]:
    with pytest.raises(InvalidSpecError) as caught:
        parse_spec(SMALL | values, overrides=overrides, label="job.yaml")
    return caught.value.message.splitlines()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stpes": 1}, "stpes: unknown key. Did you mean steps?"),
        (
            {"optimizer": {"dampin": {}}},
            "optimizer.dampin: unknown key. Did you mean optimizer.damping?",
        ),
        (
            {"storage": "runs/copies"},
            "storage: 'runs/copies' must be a URL such as s3://BUCKET/FOLDER, gs://BUCKET/FOLDER "
            "or file:///FOLDER",
        ),
        (
            {"storage": "s3://me:pw@bucket/x"},
            "storage: 's3://bucket/x' must have no user, password, query or fragment; credentials "
            "belong into the environment or the configuration of the storage's library",
        ),
        ({"damping": {}}, "damping: unknown key here. Did you mean optimizer.damping?"),
        (
            {"every_steps": 5},
            "every_steps: unknown key here. "
            "Did you mean evaluation.every_steps or checkpoint.every_steps?",
        ),
        (
            {"staleness": {"qqq": 1}},
            "staleness.qqq: unknown key. "
            "The keys here are max_steps, at_bound, refresh_policy, warmup_steps",
        ),
        (
            {"optimizer": {"name": "sgd", "damping": {}}},
            "optimizer.damping: unknown key. "
            "The keys here are name, lr, momentum, nesterov, l2, averaging",
        ),
        (
            {"optimizer": {"name": "kfca"}},
            'optimizer.name: "kfca" is not one of kfac, sgd, adam. Did you mean kfac?',
        ),
        (
            {"optimizer": {"step_rule": "adaptve"}},
            'optimizer.step_rule: "adaptve" is not one of adaptive, norm_constraint. '
            "Did you mean adaptive?",
        ),
        (
            {"optimizer": {"inverse": "ekfca"}},
            'optimizer.inverse: "ekfca" is not one of block_diagonal, block_tridiagonal, ekfac. '
            "Did you mean ekfac?",
        ),
        (
            {"dtype": "float64", "optimizer": {"precondition_dtype": "bfloat16"}},
            "optimizer.precondition_dtype: bfloat16 rounds float32, and dtype is float64; use "
            "float32 or auto, which then apply inverses in float64",
        ),
        ({"dtype": 32}, "dtype: 32 is not one of float32, float64"),
        ({"steps": 0}, "steps: 0 is not a whole number of at least 1"),
        ({"steps": True}, "steps: true is not a whole number of at least 1"),
        ({"steps": 3.0}, "steps: 3.0 is not a whole number of at least 1"),
        ({"steps": None}, "steps: null is not a whole number of at least 1"),
        (
            {"steps": "3"},
            'steps: "3" is not a whole number of at least 1; the quotes make it text',
        ),
        ({"name": 3}, "name: 3 is not text of letters, digits, '.', '_' and '-', starting with"),
        ({"name": "../up"}, 'name: "../up" is not text of letters'),
        ({"task": 3}, "task: 3 is not text"),
        ({"task_args": [1]}, "task_args: [1] is not a mapping of names to values"),
        ({"data": {"limit": -1}}, "data.limit: -1 is not a whole number of at least 1 or null"),
        ({"data": "mnist"}, 'data: "mnist" is not a mapping with keys among name, limit'),
        ({"workers": {"gradient": [2]}}, "workers.gradient: [2] is not a whole number"),
        (
            {"workers": {"parameter_server": 0}},
            "workers.parameter_server: 0 is not a whole number of at least 1 or auto",
        ),
        (
            {"optimizer": {"factor_decay": 1}},
            "optimizer.factor_decay: 1 is not a number of at least 0 and below 1",
        ),
        (
            {"optimizer": {"fisher_fraction": 1.5}},
            "optimizer.fisher_fraction: 1.5 is not a number above 0 and at most 1",
        ),
        (
            {"optimizer": {"fisher_fraction": "all"}},
            'optimizer.fisher_fraction: "all" is not a number above 0 and at most 1 or auto',
        ),
        (
            {"optimizer": {"l2": float("nan")}},
            "optimizer.l2: NaN is not a number of at least 0",
        ),
        (
            {"optimizer": {"damping": {"initial": 5, "min": 10}}},
            "optimizer.damping.initial: 5 is not between min 10 and max 1e+08",
        ),
        (
            {"optimizer": {"damping": {"rho_includes_damping": "yes"}}},
            'optimizer.damping.rho_includes_damping: "yes" is not true or false',
        ),
        ({"optimizer": {"diagonal": 3}}, "optimizer.diagonal: 3 is not a list of text"),
        ({"optimizer": {"diagonal": [3]}}, "optimizer.diagonal.0: 3 is not text"),
        (
            {"optimizer": {"fused_outputs": {"qkv": 0}}},
            "optimizer.fused_outputs.qkv: 0 is not a whole number of at least 1",
        ),
        (
            {"optimizer": {"name": "adam", "betas": [0.9, 1.0]}},
            "optimizer.betas.1: 1.0 is not a number of at least 0 and below 1",
        ),
        (
            {"optimizer": {"name": "adam", "betas": [0.9]}},
            "optimizer.betas.1: is missing; it must be a number of at least 0 and below 1",
        ),
        (
            {"batch_size": {"schedule": "exponential", "initial": 3, "full_at": 1}},
            "batch_size.full_at: 1 is not a whole number of at least 2",
        ),
        (
            {"batch_size": {"schedule": "linear", "initial": 3, "full_at": 9}},
            'batch_size.schedule: "linear" is not one of exponential, cosine',
        ),
        (
            {"optimizer": {"lr": {"schedule": "cosine", "initial": 0, "final": 0, "steps": 9}}},
            "optimizer.lr.initial: 0 is not a number above 0",
        ),
        (
            {"optimizer": {"name": "sgd", "lr": {"schedule": "cosine", "initial": 1, "steps": 9}}},
            "optimizer.lr.final: is missing; the schedule cosine needs it",
        ),
        (
            {
                "optimizer": {
                    "name": "adam",
                    "lr": {"schedule": "constant", "initial": 1, "final": 2},
                }
            },
            "optimizer.lr.final: 2 has no meaning for a constant schedule; leave it out",
        ),
        (
            {"optimizer": {"lr": {**COSINE, "schedule": "exponential"}}},
            "optimizer.lr.final: 0 is not above 0, and an exponential schedule never reaches 0",
        ),
        (
            {"optimizer": {"lr": COSINE | {"warmup_steps": 9}}},
            "optimizer.lr.warmup_steps: 9 is not below steps, 9",
        ),
        (
            {"optimizer": {"lr": COSINE | {"warmup": 3}}},
            "optimizer.lr.warmup: unknown key. Did you mean optimizer.lr.warmup_steps?",
        ),
        (
            {"optimizer": {"lr": "high"}},
            'optimizer.lr: "high" is not a number above 0',
        ),
        (
            {"optimizer": {"damping": {"initial": COSINE | {"final": 1}}}},
            "optimizer.damping.adapt_period: 5 adapts lambda, but the schedule in initial sets "
            "it in each step; use null",
        ),
        (
            {"optimizer": {"damping": {"initial": COSINE, "adapt_period": None}}},
            "optimizer.damping.initial.final: 0 is not between min 1e-08 and max 1e+08",
        ),
        ({"batch_size": "many"}, 'batch_size: "many" is not a whole number of at least 1'),
        (
            {"staleness": {"max_steps": 10}},
            "staleness.max_steps: 10 is below optimizer.inverse_update_period, 20, so every "
            "inverse would be too old; use 0 (synchronous) or at least 20",
        ),
        (
            {"faults": {"min_gradient_workers": 2}},
            "faults.min_gradient_workers: 2 is above workers.gradient, 1; use at most 1",
        ),
    ],
)
def test_one_problem_is_one_line(values: dict[str, Any], message: str) -> None:
    (line,) = _messages(values)
    assert line.startswith(f"job.yaml: {message}")


def test_all_problems_are_told_at_once() -> None:
    lines = _messages({"steps": 0, "seed": -1, "optimizer": {"l2": "x", "lr": 0}})
    assert len(lines) == 4
    related = {
        "staleness": {"max_steps": 3},
        "dtype": "float64",
        "optimizer": {"precondition_dtype": "bfloat16"},
    }
    assert len(_messages(related)) == 2


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InvalidSpecError) as caught:
        parse_spec({"name": "a"})
    assert caught.value.message.splitlines() == [
        "specification: task: is missing; it must be text",
        "specification: steps: is missing; it must be a whole number of at least 1",
        "specification: batch_size: is missing; it must be a whole number of at least 1 or "
        "a mapping with keys among schedule, initial, full_at",
    ]


def test_the_line_in_the_file_or_the_override_is_named(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: a\ntask: b\n\nbatch_size: 10\noptimizer:\n  damping:\n    initial: -1\n")
    with pytest.raises(InvalidSpecError) as caught:
        load_spec(path, ["steps=x", "optimizer.gamma={initial: 0}"])
    assert caught.value.message.splitlines() == [
        '--set steps=x: steps: "x" is not a whole number of at least 1',
        "--set optimizer.gamma={initial: 0}: optimizer.gamma.initial: 0 is not a number above 0 "
        "or null",
        "job.yaml:7: optimizer.damping.initial: -1 is not a number above 0",
    ]


def test_long_values_are_shortened() -> None:
    (line,) = _messages({"steps": "x" * 500})
    assert len(line) < 150


def test_synchronous_and_baselines_have_no_staleness_to_check() -> None:
    parse_spec(SMALL | {"staleness": {"max_steps": 0}})
    parse_spec(SMALL | {"staleness": {"max_steps": 1}, "optimizer": {"name": "sgd"}})
