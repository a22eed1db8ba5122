"""Iterable data sets of the user: read in order, blamed with case and line, refused if unusable."""

import sys

import pytest
import torch

from kfac_dist.data import fetch
from kfac_dist.errors import DataError, InvalidSpecError, UserTaskError
from kfac_dist.tasks import load_task
from tests.tasks.specs import spec, write_task

STREAM = """

from torch.utils.data import IterableDataset


class Lines(IterableDataset):
    def __len__(self):
        return 8

    def __iter__(self):
        for number in range(8):
            {}
            yield torch.tensor([float(number)]), 2.0 * number
"""


@pytest.fixture(autouse=True)
def _restore_imports():
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("kfac_dist_task_"):
            del sys.modules[name]


def stream(folder, *, made="Lines()", inside="pass", more=STREAM, **keys):
    change = ("return TensorDataset(x, self.slope * x)", f"return {made}")
    write_task(folder, change, more=more.format(inside))
    return load_task(spec(task="mine.py:Line", **keys), folder).train_data()


def test_cases_are_known_by_their_position_and_cast_to_the_dtype_of_the_job(tmp_path):
    dataset = stream(tmp_path, dtype="float64")
    assert (len(dataset), dataset.is_stream) == (8, True)
    inputs, targets = fetch(dataset, torch.tensor([1, 2, 5, 3]))
    assert inputs.dtype == targets.dtype == torch.float64
    assert inputs.tolist() == [[1.0], [2.0], [5.0], [3.0]]
    assert targets.tolist() == [2.0, 4.0, 10.0, 6.0]


def test_the_limit_keeps_the_first_cases(tmp_path):
    assert len(stream(tmp_path, data={"limit": 3})) == 3


def test_any_object_with_iter_and_len_will_do(tmp_path):
    plain = STREAM.replace("(IterableDataset)", "")
    assert fetch(stream(tmp_path, more=plain), torch.arange(2))[1].tolist() == [0.0, 2.0]


def test_an_error_names_the_case_and_the_line(tmp_path):
    dataset = stream(tmp_path, inside="1 / (number - 5)")
    fetch(dataset, torch.arange(3))
    message = r"reading case 5 of the train data raised ZeroDivisionError: .* \(mine\.py:\d+\)"
    with pytest.raises(UserTaskError, match=message):
        fetch(dataset, torch.arange(3, 7))


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        ("iter([(x, x)])", UserTaskError, r"list_iterator; it must return a data set with __len__"),
        ("Once()", UserTaskError, r"Once, an iterator, which can be read only once; return an obj"),
        ("Short()", DataError, r"train_data\(\) ended after 8 cases, but its __len__ says 9"),
        ("Endless()", UserTaskError, r"Endless; it must return a data set with __len__, and __get"),
    ],
)
def test_what_is_no_data_set_is_refused(made, error, message, tmp_path):
    more = (
        STREAM
        + """

class Once(Lines):
    def __next__(self):
        raise StopIteration


class Short(Lines):
    def __len__(self):
        return 9


class Endless:
    def __iter__(self):
        return self
"""
    )
    with pytest.raises(error, match=message):
        fetch(stream(tmp_path, made=made, more=more), torch.arange(9))


def test_more_processes_than_one_would_each_read_all_of_a_stream(tmp_path):
    from workers.driver.preparation import prepare

    stream(tmp_path, more=STREAM.replace("2.0 * number", "torch.zeros(1)"))
    job = spec(task="mine.py:Line", data={"num_workers": 2})
    with pytest.raises(InvalidSpecError, match=r"data\.num_workers: 2 processes would each"):
        prepare(job, base_dir=tmp_path, data_dir=None, cache_dir=tmp_path)
