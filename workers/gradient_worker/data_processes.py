"""Reads cases in processes of their own (`data.num_workers`), through torch's DataLoader.

A data process loads the task itself, so that nothing of the user's needs to be pickled. The
DataLoader gets its work from an endless sequence of requests, and always has the same number of
them on their way; where nothing is wanted, a request is empty and costs some microseconds.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from kfac_dist.data import MapDataset, Split
from kfac_dist.errors import KfacDistError, WorkerDiedError
from kfac_dist.tasks import enter_working_folder, load_task
from workers.exchange.messages import JobContext
from workers.gradient_worker.reading import CaseRange, CaseReader, Pair, read_cases, unwanted

_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal when the parent ends

Request = tuple[CaseRange, NDArray[np.int64]] | None
"""Cases and their indices; None where there is nothing to read."""
Answer = Pair | KfacDistError | None
"""The cases, or what was wrong with one of them; None for an empty request."""


class TaskCases(Dataset[Answer]):
    """Answers requests in a data process, from the task that it loads there when first asked."""

    def __init__(self, job: JobContext) -> None:
        self._job = job
        self._data: dict[Split, MapDataset] | None = None

    def __getitem__(self, request: Request) -> Answer:
        """Return the cases; errors are returned, because a DataLoader would change their text."""
        if request is None:
            return None
        cases, indices = request
        job = self._job
        try:
            dataset = self._load()[cases.split]
            chosen = torch.from_numpy(indices)
            return read_cases(dataset, cases, chosen, job.allowed_targets, job.spec.seed)
        except KfacDistError as error:
            return error

    def _load(self) -> dict[Split, MapDataset]:
        if self._data is None:
            job = self._job
            enter_working_folder(job.base_dir, otherwise=job.run_dir)
            task = load_task(job.spec, job.base_dir, data_dir=job.data_dir, cache_dir=job.cache_dir)
            self._data = {"train": task.train_data(), "test": task.test_data()}
        return self._data


class _Requests:
    """What the DataLoader takes its work from, without end.

    `pending` will be handed over next. `on_the_way` was handed over, None for empty requests;
    answers come in the same order.
    """

    def __init__(self, indices: Any) -> None:
        self._indices = indices
        self.pending: deque[CaseRange] = deque()
        self.on_the_way: deque[CaseRange | None] = deque()

    def __iter__(self) -> Iterator[Request]:
        while True:
            cases = self.pending.popleft() if self.pending else None
            self.on_the_way.append(cases)
            yield None if cases is None else (cases, self._indices(cases).numpy())


class ProcessReader(CaseReader):
    """Reads in the data processes of a gradient worker.

    Every range is shared by all processes. They end with this process, even if it is killed.

    Args:
        job: has the task, and the number of processes and of batches to read ahead.
        data: the two data sets of this process, for their lengths; their cases are not read.
        rank: of the gradient worker, for messages.
    """

    def __init__(self, job: JobContext, data: Mapping[Split, MapDataset], rank: int) -> None:
        seed, allowed = job.spec.seed, job.allowed_targets
        super().__init__(data, seed=seed, allowed=allowed, folder=job.cache_dir)
        self._job = job
        self._rank = rank
        self._num_processes = job.spec.data.num_workers
        # The kernel takes the thread that starts a process for its parent, and DataLoader has a
        # signal handler that raises in the main thread, wherever that is. This thread avoids both.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._requests = _Requests(self._order.indices)
        self._wanted: list[CaseRange] = []
        self._arrived: dict[CaseRange, Answer] = {}
        self._answers: Iterator[Answer] | None = None
        self._processes: list[BaseProcess] = []

    def read(self, cases: CaseRange, coming: Sequence[CaseRange] = ()) -> Pair:
        """Return the cases, and let the processes continue with those to come.

        Raises:
            WorkerDiedError: a data process has died.
        """
        return self._thread.submit(self._read, cases, coming).result()

    def close(self) -> None:
        """End the data processes."""
        self._thread.submit(self._stop).result()
        self._thread.shutdown()

    def _read(self, cases: CaseRange, coming: Sequence[CaseRange]) -> Pair:
        pieces = cases.pieces(self._num_processes)
        self._want([*pieces, *(p for each in coming for p in each.pieces(self._num_processes))])
        if self._answers is None:
            self._answers = self._start()
        while not all(piece in self._arrived for piece in pieces):
            self._receive(self._answers, cases.split)
        self._wanted = [each for each in self._wanted if each not in pieces]
        return _joined([self._arrived.pop(piece) for piece in pieces])

    def _want(self, wanted: list[CaseRange]) -> None:
        """Let what has not been requested yet be next, and forget what is not wanted any more."""
        dropped = unwanted(self._wanted, wanted)
        self._wanted = list(dict.fromkeys([*wanted, *self._wanted]))
        self._wanted = [each for each in self._wanted if each not in dropped]
        self._arrived = {c: answer for c, answer in self._arrived.items() if c in self._wanted}
        requested = {*self._arrived, *self._requests.on_the_way}
        self._requests.pending = deque(each for each in self._wanted if each not in requested)

    def _receive(self, answers: Iterator[Answer], split: Split) -> None:
        try:
            answer = next(answers)
        except (RuntimeError, OSError, EOFError) as error:
            dead = [each for each in self._processes if each.exitcode is not None]
            if not dead:
                raise
            raise WorkerDiedError(
                f"{_ending(dead[0])} while gradient worker {self._rank} waited for {split} data; "
                "often the machine has too little memory, and fewer data.num_workers need less"
            ) from error
        cases = self._requests.on_the_way.popleft()
        if cases in self._wanted:
            self._arrived[cases] = answer

    def _start(self) -> Iterator[Answer]:
        options = self._job.spec.data
        loader = DataLoader(
            TaskCases(self._job),
            batch_size=None,
            sampler=self._requests,
            collate_fn=_as_it_is,
            num_workers=options.num_workers,
            prefetch_factor=max(1, options.prefetch_batches),
            worker_init_fn=_end_with_parent,
            # Forking would copy the locks of Ray's threads, some of them taken.
            multiprocessing_context="spawn",
            generator=torch.Generator(),  # else it would draw from the global one, as models do
        )
        before = set(multiprocessing.active_children())
        answers: Iterator[Answer] = iter(loader)
        self._processes = [p for p in multiprocessing.active_children() if p not in before]
        return answers

    def _stop(self) -> None:
        self._answers = None  # the end of the iterator ends the processes
        for process in self._processes:
            process.kill()  # but an exception may still hold the iterator
            process.join()


def _as_it_is(answer: Any) -> Any:
    return answer


def _end_with_parent(_rank: int) -> None:
    """Have the kernel kill this data process when its gradient worker ends, however it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:
        os._exit(1)  # it has ended before the kernel knew


def _ending(process: BaseProcess) -> str:
    code = process.exitcode or 0
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"data process {process.pid} {how}"


def _joined(answers: list[Answer]) -> Pair:
    pairs: list[Pair] = []
    for answer in answers:
        assert answer is not None, "only empty requests have empty answers"
        if isinstance(answer, KfacDistError):
            raise answer
        pairs.append(answer)
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([inputs for inputs, _ in pairs]), torch.cat([targets for _, targets in pairs])
