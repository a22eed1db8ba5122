"""Cases from processes of their own are those that the worker itself would read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from kfac_dist.config import parse_spec
from kfac_dist.errors import UserTaskError, WorkerDiedError
from kfac_dist.tasks import load_task
from tests.waiting import wait_until
from workers.exchange.messages import JobContext
from workers.gradient_worker.data_processes import ProcessReader
from workers.gradient_worker.reading import CaseRange

TASK = """\
import os
import random
import signal
from pathlib import Path

import numpy as np
import torch
from torch import nn


class Noisy:
    distribution = "gaussian"

    def model(self):
        return nn.Linear(2, 1)

    def train_data(self, data_dir):
        return Items(40)

    def test_data(self, data_dir):
        return Items(10)


class Items:
    def __init__(self, count):
        self.count = count
        self.words = Path("words.txt").read_text()  # in the folder of the specification

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index == 35:
            raise LookupError("no such picture")
        if index == 36:
            os.kill(os.getpid(), signal.SIGKILL)
        noise = [random.random(), np.random.random()]
        return torch.tensor([float(index), *noise]), torch.rand(1)
"""


def job(folder: Path, num_workers: int) -> JobContext:
    (folder / "noisy.py").write_text(TASK)
    (folder / "words.txt").write_text("words")
    values = {"name": "noisy", "task": "noisy.py:Noisy", "steps": 1, "batch_size": 4}
    spec = parse_spec(values | {"data": {"num_workers": num_workers}})
    return JobContext(
        job="noisy",
        attempt=1,
        spec=spec,
        base_dir=folder,
        data_dir=None,
        cache_dir=folder,
        run_dir=folder,
    )


def reader(folder: Path, num_workers: int) -> ProcessReader:
    context = job(folder, num_workers)
    task = load_task(context.spec, folder)
    data = {"train": task.train_data(), "test": task.test_data()}
    return ProcessReader(context, data, rank=1)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessReader]:
    """A reader with two processes, which takes seconds to start."""
    folder, path, before = tmp_path_factory.mktemp("noisy"), list(sys.path), Path.cwd()
    os.chdir(folder)
    yield reader(folder, 2)
    os.chdir(before)
    sys.path[:] = path
    sys.modules.pop("noisy", None)


def training(start: int, stop: int, epoch: int = 0) -> CaseRange:
    return CaseRange(split="train", epoch=epoch, start=start, stop=stop)


def evaluation(start: int, stop: int) -> CaseRange:
    return CaseRange(split="train", epoch=None, start=start, stop=stop)


def test_cases_and_their_noise_do_not_depend_on_the_process_that_reads_them(own):
    before = torch.default_generator.get_state()
    whole = CaseRange(split="test", epoch=None, start=0, stop=9)
    order = own._order.indices(training(0, 40)).tolist()
    usable = min(order.index(35), order.index(36)) // 3
    asked = [training(3 * i, 3 * i + 3) for i in range(usable)]
    asked = [*asked[:2], whole, *asked[2:], evaluation(0, 5), training(0, 3), whole]
    pairs = [own.read(cases, asked[place + 1 : place + 3]) for place, cases in enumerate(asked)]
    assert torch.equal(torch.default_generator.get_state(), before)
    for cases, pair in zip(asked, pairs, strict=True):
        indices = own._order.indices(cases)
        dataset = own._data[cases.split]
        with torch.random.fork_rng():
            expected = dataset.read(indices, cases.epoch, own._job.spec.seed)
        assert pair[0][:, 0].tolist() == indices.tolist()
        assert all(torch.equal(a, b) for a, b in zip(pair, expected, strict=True))
    later = own.read(CaseRange(split="train", epoch=1, start=0, stop=1))[0]
    assert not torch.equal(later[:, 1:], pairs[0][0][:1, 1:])


def test_an_error_names_the_case_and_the_line(own):
    """Case 35 raises."""
    message = (
        r"reading case 35 of the train data raised LookupError: no such picture \(noisy.*:34\)"
    )
    with pytest.raises(UserTaskError, match=message):
        own.read(evaluation(34, 36))
    assert own.read(evaluation(0, 4))[0][:, 0].tolist() == [0, 1, 2, 3]


def test_a_process_that_is_killed_is_named_and_the_others_end(own):
    """Case 36 kills the process that reads it."""
    with pytest.raises(WorkerDiedError) as caught:
        own.read(evaluation(36, 37), [evaluation(37, 38)])
    pids = {process.pid for process in own._processes}
    (dead,) = {
        pid for pid in pids if f"data process {pid} was killed by signal 9" in str(caught.value)
    }
    assert "while gradient worker 1 waited for train data" in str(caught.value)
    own.close()
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), f"the end of {pids - {dead}}")


PARENT = """
import sys
from pathlib import Path
from tests.workers.gradient_worker.test_data_processes import CaseRange, reader

if __name__ == "__main__":
    own = reader(Path(sys.argv[1]), 1)
    own.read(CaseRange(split="test", epoch=None, start=0, stop=2))
    print(own._processes[0].pid, flush=True)
    sys.stdin.read()
"""


def test_a_data_process_ends_with_its_gradient_worker_even_if_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert parent.stdout is not None
    try:
        (tmp_path / "words.txt").write_text("words")
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
    finally:
        parent.kill()
        parent.communicate()
    wait_until(lambda: not psutil.pid_exists(pid), f"the end of process {pid}")
