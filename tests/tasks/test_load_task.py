"""The built-in tasks as a specification names them."""

import numpy as np
import pytest
import torch

from kfac_dist.data import fetch
from kfac_dist.errors import DataNotFoundError, InvalidSpecError
from kfac_dist.tasks import build_model, check_model, load_task
from tests.data.small_sets import write_cifar10
from tests.tasks.specs import spec


def load(tmp_path, **keys):
    return load_task(spec(**keys), tmp_path, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("data", "hidden"),
    [
        ("mnist", (1000, 500, 250, 30)),
        ("mnist-5k", (1000, 500, 250, 30)),
        ("curves", (400, 200, 100, 50, 25, 6)),
    ],
)
def test_the_papers_net_is_chosen_by_the_data(data, hidden, tmp_path):
    task = load(tmp_path, data={"name": data})

    assert task.hidden == hidden
    assert (task.activation, task.initialization) == ("tanh", "truncated_normal")
    assert task.distribution == "bernoulli"


def test_task_args_are_used(tmp_path):
    args = {
        "hidden": [12, 5],
        "activation": "relu",
        "initialization": "sparse",
        "distribution": "gaussian",
    }
    task = load(tmp_path, task_args=args)

    assert task.hidden == (12, 5)
    assert task.distribution == "gaussian"
    assert [name for name, _ in task.model().named_children()][1] == "encoder1_relu"


@pytest.mark.parametrize("task_name", ["autoencoder", "classifier"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_model_and_data_fit_together(task_name, dtype, tmp_path):
    task = load(
        tmp_path,
        task=task_name,
        task_args={"hidden": [10, 4]},
        data={"name": "mnist-5k", "limit": 50},
        dtype=dtype,
    )
    model = build_model(task, 0, getattr(torch, dtype))

    train, test = task.train_data(), task.test_data()

    assert (len(train), len(test)) == (50, 50)
    check_model(task, model, train)
    check_model(task, model, test)


def test_squared_error_is_a_sum_over_pixels_of_what_the_logits_mean(tmp_path):
    outputs, targets = torch.randn(3, 6, dtype=torch.float64), torch.rand(3, 6)

    bernoulli = load(tmp_path).metrics(outputs, targets)
    gaussian = load(tmp_path, task_args={"distribution": "gaussian"}).metrics(outputs, targets)

    expected = ((1 / (1 + (-outputs).exp()) - targets) ** 2).sum(1)
    torch.testing.assert_close(bernoulli["squared_error"], expected)
    torch.testing.assert_close(gaussian["squared_error"], ((outputs - targets) ** 2).sum(1))


def test_accuracy_is_one_where_the_likeliest_digit_is_right(tmp_path):
    task = load(tmp_path, task="classifier")
    outputs = torch.tensor([[0.1, 0.9, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 5.0]])

    accuracy = task.metrics(outputs, torch.tensor([1, 1, 2]))["accuracy"]

    assert accuracy.tolist() == [1.0, 0.0, 1.0]
    assert task.distribution == "categorical"


NETWORKS = [
    {"network": "mlp", "hidden": [10]},
    {"network": "convnet", "channels": [4, 8], "normalization": "none"},
    {"network": "convnet", "channels": [4, 8], "activation": "tanh"},
    {"network": "resnet20"},
    {"network": "resnet20", "normalization": "batch", "shortcut": "conv"},
]


@pytest.mark.parametrize("args", NETWORKS)
@pytest.mark.parametrize("data", ["mnist-5k", "cifar10", "npz"])
def test_each_network_classifies_each_kind_of_image(data, args, tmp_path):
    write_cifar10(tmp_path)
    images = np.zeros((5, 12, 12, 3), np.uint8)
    np.savez(tmp_path / "data.npz", x_train=images, y_train=np.arange(5), x_test=images[:2])
    job = spec("classifier", task_args=args, data={"name": data})

    task = load_task(job, tmp_path, data_dir=tmp_path, cache_dir=tmp_path)
    model = build_model(task, 0, torch.float32)

    check_model(task, model, task.train_data())
    inputs, _ = fetch(task.train_data(), torch.arange(2))
    assert model(inputs).shape == (2, 5 if data == "npz" else 10)


def test_a_cifar10_autoencoder_reconstructs_plain_pixels(tmp_path):
    write_cifar10(tmp_path)
    args = {"hidden": [6, 3], "distribution": "bernoulli"}
    job = spec(data={"name": "cifar10"}, task_args=args)

    task = load_task(job, tmp_path, data_dir=tmp_path, cache_dir=tmp_path)

    check_model(task, build_model(task, 0, torch.float32), task.train_data())


def test_the_faces_net_of_the_paper_takes_the_faces_that_are_there(tmp_path):
    np.savez(tmp_path / "faces.npz", faces=np.random.default_rng(0).normal(size=(40, 4096)))
    task = load_task(spec(data={"name": "faces"}), tmp_path, data_dir=tmp_path)
    model = build_model(task, 0, torch.float32)

    assert task.distribution == "gaussian"
    assert (model.encoder1.in_features, task.hidden) == (4096, (2000, 1000, 500, 30))
    check_model(task, model, task.train_data())


@pytest.mark.parametrize(
    ("args", "shape", "message"),
    [
        ({"network": "convnet"}, (4, 30), r"task_args\.network: convnet needs images, .* \(30,\)"),
        ({"network": "resnet20"}, (4, 30), "resnet20 needs images"),
        (
            {"network": "convnet"},
            (4, 5, 9),
            r"channels: each of the 3 .* only 5x9 pixels; use at most 2",
        ),
    ],
)
def test_a_network_that_does_not_fit_the_data(args, shape, message, tmp_path):
    np.savez(tmp_path / "data.npz", x_train=np.ones(shape), y_train=np.zeros(4, int))
    task = load_task(
        spec("classifier", task_args=args, data={"name": "npz"}), tmp_path, data_dir=tmp_path
    )

    with pytest.raises(InvalidSpecError, match=message):
        task.model()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"task": "autoencodr"}, r"no built-in task 'autoencodr'.*Did you mean autoencoder\?"),
        (
            {"task_args": {"hiden": [3]}},
            r"task_args\.hiden: task autoencoder has no such argument; it accepts hidden, "
            r"activation, initialization, distribution\. Did you mean hidden\?",
        ),
        ({"task_args": {"source": "x"}}, r"task_args\.source: .* no such argument"),
        ({"task_args": {"hidden": []}}, r"task_args\.hidden: \[\] is not a list of sizes"),
        ({"task_args": {"hidden": 30}}, r"task_args\.hidden: 30 is not a list"),
        ({"task_args": {"hidden": [30, 0]}}, "the size 0 is not a whole number above 0"),
        ({"task_args": {"hidden": [30, 2.5]}}, r"the size 2\.5 is not"),
        ({"task_args": {"hidden": [True]}}, "the size True is not"),
        (
            {"task_args": {"activation": "tanhh"}},
            r"task_args\.activation: 'tanhh' is not one of sigmoid, tanh, relu\. "
            r"Did you mean tanh\?",
        ),
        ({"task_args": {"initialization": 3}}, r"task_args\.initialization: 3 is not one of"),
        ({"task_args": {"distribution": "categorical"}}, r"task_args\.distribution: 'categ"),
        (
            {"task": "classifier", "task_args": {"code": 3}},
            "task classifier with network mlp has no such",
        ),
        (
            {"task": "classifier", "task_args": {"network": "convnet", "hidden": [3]}},
            r"task_args\.hidden: task classifier with network convnet has no such argument; "
            r"it accepts channels, activation, normalization",
        ),
        (
            {"task": "classifier", "task_args": {"network": "resnet"}},
            r"task_args\.network: 'resnet' is not one of mlp, convnet, resnet20\. Did you mean res",
        ),
        (
            {"task": "classifier", "task_args": {"network": "resnet20", "normalization": "layer"}},
            r"task_args\.normalization: 'layer' is not one of none, batch, group",
        ),
        (
            {"data": {"name": "cifar10"}},
            r"task_args\.hidden: is missing; the paper has nets only for .* for cifar10 give",
        ),
        ({"data": {"name": None}}, r"data\.name: null is not a data set"),
        ({"data": {"name": "text"}}, r"data\.name: text does not fit this task"),
    ],
)
def test_mistakes_in_the_specification(keys, message, tmp_path):
    with pytest.raises(InvalidSpecError, match=message):
        load(tmp_path, **keys)


def test_loading_a_task_reads_no_data(tmp_path):
    task = load_task(spec(data={"name": "mnist"}), tmp_path, data_dir=tmp_path / "absent")

    with pytest.raises(DataNotFoundError, match="absent"):
        task.train_data()


def test_data_in_the_dtype_of_the_job(tmp_path):
    task = load(tmp_path, data={"name": "curves", "limit": 3}, dtype="float64")

    assert fetch(task.train_data(), torch.arange(3))[0].dtype == torch.float64
