import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from kfac_dist.errors import UserTaskError
from kfac_dist.tasks import build_model, check_model, load_task
from tests.tasks.specs import spec, write_task

X = torch.rand(4, 3)


class Sample:
    """A task as the checks see it; model and data are chosen by the test."""

    def __init__(self, distribution="gaussian", metrics=None):
        self.distribution = distribution
        self._metrics = metrics or {}

    def model(self):
        return nn.Linear(3, 2)

    def metrics(self, outputs, targets):
        return self._metrics


def parameters(model):
    return torch.cat([p.flatten() for p in model.parameters()])


def test_a_model_depends_only_on_its_seed(tmp_path):
    task = load_task(spec(task_args={"hidden": [8, 3]}), tmp_path, cache_dir=tmp_path)

    first = build_model(task, 5, torch.float32)
    torch.rand(10)
    again = build_model(task, 5, torch.float32)
    other = build_model(task, 6, torch.float32)

    assert torch.equal(parameters(first), parameters(again))
    assert not torch.equal(parameters(first), parameters(other))


def test_both_types_start_from_the_same_point():
    single = parameters(build_model(Sample(), 0, torch.float32))
    double = parameters(build_model(Sample(), 0, torch.float64))

    assert double.dtype == torch.float64
    assert torch.equal(single.double(), double)


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)

    torch.manual_seed(3)
    build_model(Sample(), 99, torch.float32)

    assert torch.equal(torch.rand(4), expected)


class Dictionary(nn.Linear):
    def forward(self, inputs):
        return {"x": super().forward(inputs)}


@pytest.mark.parametrize(
    ("distribution", "model", "targets", "message"),
    [
        ("gaussian", nn.Linear(3, 2), torch.rand(4), r"shape \(2, 2\), targets \(2,\)"),
        ("bernoulli", nn.Linear(3, 2), torch.rand(4, 1), "for bernoulli they must be the same"),
        ("bernoulli", nn.Linear(3, 2), torch.full((4, 2), 7.0), "is 7.0: for bernoulli it"),
        ("categorical", nn.Linear(3, 2), torch.zeros(4, 2).long(), "classes, .* and be indices"),
        ("categorical", nn.Linear(3, 2), torch.zeros(4), "must be integers, not torch.float32"),
        ("categorical", nn.Linear(3, 2), torch.full((4,), 2), "of case 0 is 2: for categorical"),
        ("gaussian", nn.Linear(5, 2), torch.rand(4, 2), r"shape \(2, 3\), raised RuntimeError"),
        ("gaussian", Dictionary(3, 2), torch.rand(4, 2), "the model returned dict"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together(distribution, model, targets, message):
    with pytest.raises(UserTaskError, match=message) as caught:
        check_model(Sample(distribution), model, TensorDataset(X, targets))
    assert caught.value.message.startswith("task Sample")


def test_the_split_is_named_and_the_allowed_targets_are_returned():
    right = TensorDataset(X, torch.tensor([0, 1, -100, 1]))
    allowed = check_model(Sample("categorical"), nn.Linear(3, 2), right)
    assert (allowed.lowest, allowed.highest, allowed.are_labels) == (0, 1, True)
    assert check_model(Sample(), nn.Linear(3, 2), TensorDataset(X, torch.rand(4, 2))) is None
    with pytest.raises(UserTaskError, match="task Sample, test data: outputs have shape"):
        check_model(Sample(), nn.Linear(3, 2), TensorDataset(X, torch.rand(4, 1)), "test")


SEGMENTS = """

class Segments:
    distribution = "categorical"

    def model(self):
        return nn.Conv2d(1, 3, 3, padding=1)

    def train_data(self, data_dir):
        return TensorDataset(torch.zeros(3, 1, 5, 4), torch.zeros(3, 5, 4).long())

    test_data = train_data
"""


def test_a_task_says_which_axis_has_its_classes(tmp_path):
    write_task(tmp_path, more=SEGMENTS)
    write_task(tmp_path, name="said.py", more=SEGMENTS + "    class_axis = 1\n")
    silent, said = (load_task(spec(f"{f}.py:Segments"), tmp_path) for f in ("mine", "said"))

    assert check_model(said, said.model(), said.train_data()).highest == 2
    with pytest.raises(UserTaskError, match="axis 1: say so by class_axis=1"):
        check_model(silent, silent.model(), silent.train_data())


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"error": torch.tensor(1.0)}, r"returned \(\) for 'error'; it must return one number a"),
        ({"error": 1.0}, "returned float for 'error'"),
        ([1, 2], r"metrics\(\) returned list"),
    ],
)
def test_metrics_are_one_number_a_case(metrics, message):
    with pytest.raises(UserTaskError, match=message):
        check_model(Sample(metrics=metrics), nn.Linear(3, 2), TensorDataset(X, torch.rand(4, 2)))


def test_the_check_changes_nothing_of_the_model():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    check_model(Sample(), model, TensorDataset(X, torch.rand(4, 2)))

    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
