"""A user's mistakes: each gives an exit code and a message with what, where and the remedy."""

from __future__ import annotations

import pytest

from tests.end_to_end.command import SPEC, CommandLine

TASK = """\
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Broken:
    distribution = "gaussian"

    def model(self):
        return nn.Linear(3, 2)

    def train_data(self, data_dir):
        inputs = torch.zeros(50, 3)
        {change}
        return TensorDataset(inputs, torch.zeros(50, 2))

    def test_data(self, data_dir):
        return self.train_data(data_dir)
"""


def user_spec(change: str) -> tuple[str, str]:
    text = "name: broken\ntask: broken.py:Broken\nsteps: 3\nbatch_size: 10\ndata: {name: null}\n"
    return text, TASK.format(change=change)


def check(result, code: int, *words: str) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    for word in words:
        assert word in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("fisher_fraction", "fisher_fracton", ["fisher_fracton", "fisher_fraction"]),
        ("steps: 12", "steps: many", ["steps", "many"]),
        ("gradient: 1", "gradient: 64", ["64", "CPUs"]),
        ("hidden: [24, 8]", "hiden: [24, 8]", ["hiden", "hidden"]),
        ("limit: 300", "limit: 300000", ["300000"]),
        ("name: mnist-5k", "name: minst", ["minst", "mnist"]),
        ("initial: 30", "initial: -1", ["damping", "-1"]),
        ("max_steps: 8", "max_steps: 2", ["max_steps", "2"]),
    ],
)
def test_a_wrong_specification(command: CommandLine, old: str, new: str, words: list[str]) -> None:
    assert old in SPEC
    result = command.run("train", command.spec(SPEC.replace(old, new)))
    check(result, 3, *words)


def test_a_missing_specification(command: CommandLine) -> None:
    check(command.run("train", "nowhere.yaml"), 4, "nowhere.yaml")


def test_missing_data_names_the_three_ways(command: CommandLine) -> None:
    spec = command.spec(SPEC.replace("mnist-5k", "mnist"))
    check(command.run("train", spec), 4, "--data-dir", "KFAC_DIST_DATA", "download")


def test_nan_in_the_data(command: CommandLine) -> None:
    text, task = user_spec("inputs[17, 1] = float('nan')")
    command.spec(task, "broken.py")
    check(command.run("train", command.spec(text)), 1, "train", "17", "nan")


def test_a_task_that_raises(command: CommandLine) -> None:
    text, task = user_spec("raise KeyError('no such column')")
    command.spec(task, "broken.py")
    check(command.run("train", command.spec(text)), 1, "KeyError", "no such column", "broken.py")


def test_an_occupied_run_folder(command: CommandLine) -> None:
    spec = command.spec()
    assert command.train(spec, "--set", "steps=1").finish()[0] == 0
    result = command.run("train", spec, "--run-dir", command.folder / "run")
    check(result, 9, "--resume", "--run-dir", "SUCCEEDED")
