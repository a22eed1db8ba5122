"""Tasks of the user's own: found, checked, and blamed with their file and line."""

import pickle
import sys

import pytest
import torch

from kfac_dist.data import check_finite, fetch
from kfac_dist.errors import DataError, InvalidSpecError, UserTaskError
from kfac_dist.tasks import build_model, check_model, load_task, user_code
from tests.tasks.specs import spec, write_task


@pytest.fixture(autouse=True)
def _restore_imports():
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith(("kfac_dist_task_", "their_")):
            del sys.modules[name]


def load(folder, task="mine.py:Line", **keys):
    return load_task(spec(task=task, **keys), folder)


def use_all(folder):
    task = load(folder)
    task.model()
    task.train_data()


def test_a_class_in_a_file_beside_the_specification(tmp_path):
    write_task(tmp_path)
    task = load(tmp_path, task_args={"num_cases": 5, "slope": 3.0}, dtype="float64")

    inputs, targets = fetch(task.train_data(), torch.tensor([4, 0]))

    assert (inputs.dtype, targets.tolist()) == (torch.float64, [[3.0], [0.0]])
    assert task.distribution == "gaussian"
    assert task.metrics(inputs, targets) == {}
    check_model(task, build_model(task, 0, torch.float64), task.test_data())
    check_finite(task.train_data(), "train")


def test_a_class_in_a_package_beside_the_specification(tmp_path):
    write_task(tmp_path, name="their_package/tasks.py")

    task = load(tmp_path, "their_package.tasks:Line")

    assert len(task.train_data()) == 12


def test_a_file_may_import_its_neighbours(tmp_path):
    write_task(tmp_path, ("import torch\n", "import torch\nfrom their_sizes import SIZE\n"))
    (tmp_path / "their_sizes.py").write_text("SIZE = 3\n")

    assert load(tmp_path).distribution == "gaussian"


def test_a_file_in_a_subfolder_and_by_its_absolute_path(tmp_path):
    write_task(tmp_path, name="sub/mine.py")

    assert len(load(tmp_path, "sub/mine.py:Line").train_data()) == 12
    assert len(load(tmp_path, f"{tmp_path}/sub/mine.py:Line").train_data()) == 12


def test_the_data_methods_are_told_where_data_may_be(tmp_path):
    write_task(tmp_path, ("x = torch.linspace(0, 1, self.num_cases)[:, None]",
                          "x = torch.zeros(len(list(data_dir.iterdir())), 1)"))  # fmt: skip
    for name in "abc":
        (tmp_path / "data" / name).mkdir(parents=True)

    task = load_task(spec(task="mine.py:Line"), tmp_path, data_dir=tmp_path / "data")

    assert (len(task.train_data()), len(task.test_data())) == (3, 3)


def test_limit_keeps_the_first_cases(tmp_path):
    write_task(tmp_path)

    assert len(load(tmp_path, data={"limit": 7}).train_data()) == 7
    with pytest.raises(InvalidSpecError, match=r"more than the 12 training cases of task mine"):
        load(tmp_path, data={"limit": 13}).train_data()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("absent.py:Line", r"task: the file .*absent\.py does not exist"),
        ("mine.py:Lin", r"Lin does not exist; classes in the module: Line\. Did you mean Line\?"),
        ("mine.py:torch", "torch is not a class; classes in the module: Line"),
        ("mine.py", r"'mine\.py' must have the form file\.py:Class"),
        ("mine.py:", "must have the form"),
        (":Line", "must have the form"),
        ("their_absent:Line", "there is no module 'their_absent'"),
        ("their_package.absent:Line", r"there is no module 'their_package\.absent'"),
        ("sys:Line", "there is no module 'sys'"),
    ],
)
def test_a_class_that_is_not_there(task, message, tmp_path):
    write_task(tmp_path)
    write_task(tmp_path, name="their_package/tasks.py")

    with pytest.raises(InvalidSpecError, match=message) as caught:
        load(tmp_path, task)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("changes", "args", "message"),
    [
        ([], {"slop": 1}, r"task_args\.slop: task mine\.py:Line has no such argument; it accepts "
                          r"num_cases, slope\. Did you mean slope\?"),
        ([("num_cases=12, slope=2.0", "num_cases, slope")], {},
         r"task_args\.num_cases: is missing; task .* needs it"),
        ([("def model(self)", "def net(self)")], {}, r"Line has no method model\(\)"),
        ([("def test_data(self, data_dir)", "def test_data(self)")], {},
         r"Line\.test_data must be callable as test_data\(data_dir\): too many positional"),
        ([("def model(self):", "model = 3\n\n    def net(self):")], {}, r"Line\.model is not a me"),
        ([('"gaussian"', '"gausian"')], {}, r"distribution is 'gausian'; it must be one of bern"),
        ([('distribution = "gaussian"', "")], {}, r"Line\.distribution is missing"),
        ([('distribution = "gaussian"', "distribution = []")], {}, r"distribution is \[\]"),
    ],
)  # fmt: skip
def test_a_class_that_is_no_task(changes, args, message, tmp_path):
    write_task(tmp_path, *changes)

    with pytest.raises(InvalidSpecError, match=message):
        load(tmp_path, task_args=args)


def test_a_class_without_a_constructor(tmp_path):
    (tmp_path / "mine.py").write_text("class Empty:\n    pass\n")

    with pytest.raises(InvalidSpecError, match=r"task_args\.a: .* it accepts no arguments"):
        load(tmp_path, "mine.py:Empty", task_args={"a": 1})


@pytest.mark.parametrize(
    ("changes", "doing", "line"),
    [
        ([("class Line:", "1 / 0\n\nclass Line:")], "loading the module", 7),
        ([("self.num_cases = num_cases", "1 / 0")], r"Line\(\)", 11),
        ([("return nn.Linear(1, 1)", "1 / 0")], r"model\(\)", 15),
        ([("return TensorDataset", "1 / 0; return TensorDataset")], r"train_data\(\)", 19),
    ],
)
def test_what_the_user_raises_names_the_line(changes, doing, line, tmp_path):
    write_task(tmp_path, *changes)

    with pytest.raises(UserTaskError) as caught:
        use_all(tmp_path)

    assert caught.match(
        rf"^task mine\.py:Line: {doing} raised ZeroDivisionError: division by zero "
        rf"\(mine\.py:{line}\)$"
    )
    assert (caught.value.reason, caught.value.exit_code) == ("user_task", 1)
    assert pickle.loads(pickle.dumps(caught.value)).message == caught.value.message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def broken(:\n", r"raised SyntaxError: .* \(mine\.py:1\)"),
        ("import their_missing\n", r"raised ModuleNotFoundError: No module .* \(mine\.py:1\)"),
        ("x = 1\nraise SystemExit(4)\n", r"raised SystemExit: 4 \(mine\.py:2\)"),
    ],
)
def test_a_module_that_cannot_be_run(source, message, tmp_path):
    (tmp_path / "mine.py").write_text(source)

    with pytest.raises(UserTaskError, match=message):
        load(tmp_path)


def test_a_package_that_misses_something_is_the_packages_fault(tmp_path):
    (tmp_path / "their_module.py").write_text("import numpy\nimport their_missing\n")

    with pytest.raises(UserTaskError, match=r"No module named 'their_missing' \(their_module.py:2"):
        load(tmp_path, "their_module:Line")


def test_the_line_is_the_users_even_when_torch_raises(tmp_path):
    write_task(tmp_path, ("return nn.Linear(1, 1)", "return nn.Linear(1, 1).to('nowhere')"))

    with pytest.raises(UserTaskError, match=r"raised RuntimeError: .*\(mine\.py:15\)"):
        load(tmp_path).model()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("return nn.Linear(1, 1)", "return 3"), r"model\(\) returned int; it must return a torch"),
        (("return TensorDataset(x, self.slope * x)", "return 3"), r"train_data\(\): returned int"),
    ],
)
def test_results_of_the_wrong_kind(change, message, tmp_path):
    write_task(tmp_path, change)

    with pytest.raises(UserTaskError, match=message):
        use_all(tmp_path)


def test_a_data_set_without_cases(tmp_path):
    write_task(tmp_path)

    with pytest.raises(DataError, match=r"train_data\(\): returned a data set without cases"):
        load(tmp_path, task_args={"num_cases": 0}).train_data()


ITEMS = """

class Items:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        {}
"""


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        (
            "1 / 0",
            UserTaskError,
            r"reading case 0 of the train data raised ZeroDivis.*mine\.py:30",
        ),
        ("return 3", DataError, r"mine\.py:Line: reading the train data: a case must be a pair"),
    ],
)
def test_a_data_set_that_fails_when_it_is_read(item, error, message, tmp_path):
    change = ("return TensorDataset(x, self.slope * x)", "return Items()")
    write_task(tmp_path, change, more=ITEMS.format(item))
    dataset = load(tmp_path).train_data()

    with pytest.raises(error, match=message):
        fetch(dataset, torch.arange(2))


NET = """

class Net(nn.Linear):
    def forward(self, x):
        return super().forward(x.T)
"""


def test_user_code_blames_only_what_came_through_the_users_files(tmp_path):
    write_task(tmp_path, ("return nn.Linear(1, 1)", "return Net(1, 1)"), more=NET)
    task = load(tmp_path)
    model = task.model()

    with (
        pytest.raises(UserTaskError, match=r"the forward pass raised RuntimeError: .*mine\.py:27"),
        user_code(task, "the forward pass"),
    ):
        model(torch.zeros(3, 1))
    with pytest.raises(KeyError, match="ours"), user_code(task, "the forward pass"):
        raise KeyError("ours")


@pytest.mark.parametrize("error", ["AcceleratorError", "OutOfMemoryError"])
def test_user_code_is_not_blamed_for_errors_of_a_gpu_which_may_come_from_elsewhere(tmp_path, error):
    raising = NET.replace("return super().forward(x.T)", f"raise torch.{error}('CUDA error')")
    write_task(tmp_path, ("return nn.Linear(1, 1)", "return Net(1, 1)"), more=raising)
    task = load(tmp_path)
    model = task.model()
    with pytest.raises(getattr(torch, error)), user_code(task, "the forward pass"):
        model(torch.zeros(3, 1))


def test_user_code_leaves_built_in_tasks_alone(tmp_path):
    task = load_task(spec(), tmp_path)

    with pytest.raises(ZeroDivisionError), user_code(task, "the forward pass"):
        1 / 0  # noqa: B018


def test_loading_twice_runs_the_file_as_it_is_now(tmp_path):
    write_task(tmp_path)
    assert len(load(tmp_path).train_data()) == 12

    write_task(tmp_path, ("num_cases=12", "num_cases=1234"))
    assert len(load(tmp_path).train_data()) == 1234
