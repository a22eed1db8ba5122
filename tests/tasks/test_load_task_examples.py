"""Each example's specification, task, model and data fit together."""

import pytest

from kfac_dist.config import load_spec
from kfac_dist.data import check_finite
from kfac_dist.tasks import build_model, check_model, load_task, torch_dtype
from tests.data.small_sets import write_cifar10, write_faces, write_text
from tests.paths import ROOT

EXAMPLES = ROOT / "examples"


def parts(name, *overrides, data_dir=None):
    spec = load_spec(EXAMPLES / name, overrides)
    task = load_task(spec, EXAMPLES, data_dir=data_dir)
    return spec, task, build_model(task, spec.seed, torch_dtype(spec.dtype))


@pytest.mark.parametrize(
    ("name", "overrides", "num_train"),
    [
        ("mnist_5k.yaml", [], 4500),
        ("curves_autoencoder.yaml", ["data.limit=40"], 40),
        ("custom_task.yaml", [], 2000),
    ],
)
def test_an_example_that_needs_no_files(name, overrides, num_train):
    _, task, model = parts(name, *overrides)
    train, test = task.train_data(), task.test_data()

    assert len(train) == num_train
    check_finite(train, "train")
    check_model(task, model, train)
    check_model(task, model, test)


@pytest.mark.parametrize(
    ("name", "write", "overrides"),
    [
        ("cifar10_convnet.yaml", write_cifar10, []),
        ("cifar10_resnet20.yaml", write_cifar10, []),
        ("faces_autoencoder.yaml", write_faces, ["task_args.hidden=[20,5]"]),
        ("char_transformer.yaml", write_text, []),
    ],
)
def test_an_example_with_files_of_the_right_kind(name, write, overrides, tmp_path):
    write(tmp_path)
    _, task, model = parts(name, *overrides, data_dir=tmp_path)

    check_model(task, model, task.train_data())
    check_model(task, model, task.test_data())


def test_the_mnist_classifier(mnist_dir):
    _, task, model = parts("mnist_classifier.yaml", data_dir=mnist_dir)

    check_model(task, model, task.train_data())


def test_the_classifier_of_the_real_cifar10(cifar10_dir):
    spec, task, model = parts("cifar10_convnet.yaml", data_dir=cifar10_dir)
    train = task.train_data()

    assert len(train) > spec.batch_size
    check_model(task, model, train)


def test_the_transformer_of_a_real_text(text_dir):
    spec, task, model = parts("char_transformer.yaml", data_dir=text_dir)
    train = task.train_data()

    assert len(train) > spec.batch_size
    check_model(task, model, train)


def test_the_papers_mnist_autoencoder(mnist_dir):
    spec, task, model = parts("mnist_autoencoder.yaml", data_dir=mnist_dir)
    train = task.train_data()

    assert (len(train), spec.batch_size, spec.steps) == (60_000, 1000, 500)
    assert task.hidden == (1000, 500, 250, 30)
    check_model(task, model, train)


def test_no_example_is_left_out():
    names = {path.name for path in EXAMPLES.glob("*.yaml")}

    assert names == {
        "mnist_5k.yaml",
        "mnist_autoencoder.yaml",
        "curves_autoencoder.yaml",
        "custom_task.yaml",
        "mnist_classifier.yaml",
        "cifar10_convnet.yaml",
        "cifar10_resnet20.yaml",
        "faces_autoencoder.yaml",
        "char_transformer.yaml",
    }
