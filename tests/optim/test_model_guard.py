"""Models that the optimizers refuse at the start, and models that change later."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kfac_dist import KFAC, KFACPreconditioner
from kfac_dist.errors import InvalidSpecError

INPUTS, TARGETS = torch.randn(16, 6), torch.randint(3, (16,))
OPTIMIZERS = (KFAC, KFACPreconditioner)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def make(optimizer, model):
    return optimizer(model, distribution="categorical")


def step(optimizer, model):
    if isinstance(optimizer, KFAC):
        optimizer.step(INPUTS, TARGETS)
        return
    model.zero_grad()
    nn.functional.cross_entropy(model(INPUTS), TARGETS).backward()
    optimizer.step()


def half_of_a_network():
    model = network()
    model[2].double()
    return model


REFUSED = {
    "bfloat16": (lambda: network().bfloat16(), "0.weight is torch.bfloat16; parameters must be"),
    "float16": (lambda: network().half(), "0.weight is torch.float16; parameters must be"),
    "mixed": (half_of_a_network, "0.weight is torch.float32 on cpu, but 2.weight is torch.float64"),
    "empty": (lambda: nn.Linear(6, 0), r"weight has the shape \(0, 6\) and so no elements"),
    "lazy": (lambda: nn.LazyLinear(3), "weight has no shape yet. Call the model once"),
    "meta": (lambda: network().to("meta"), "0.weight is on the device meta"),
    "parameters": (lambda: list(network().parameters()), "model is list; it must be a torch.nn"),
    "DataParallel": (lambda: nn.DataParallel(network()), "the model is DataParallel. Its replicas"),
    "a part": (
        lambda: nn.Sequential(nn.DataParallel(nn.Linear(6, 3))),
        "the module '0' is DataParallel",
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:Initializing zero-element")
def test_models_that_cannot_be_observed_are_refused(kind, optimizer):
    build, message = REFUSED[kind]
    with pytest.raises(InvalidSpecError, match=f"{optimizer.__name__}: .*{message}"):
        make(optimizer, build())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_scripted_models_are_refused(optimizer):
    for model in (torch.jit.script(network()), torch.jit.trace(network(), INPUTS)):
        with pytest.raises(InvalidSpecError, match="scripted and traced models cannot be observed"):
            make(optimizer, model)


@pytest.fixture
def process_group(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_kfac_refuses_wrappers_whose_processes_would_drift_apart():
    wrapped = nn.parallel.DistributedDataParallel(network())
    with pytest.raises(InvalidSpecError, match=r"drift apart\. Submit a job.*KFACPreconditioner"):
        make(KFAC, wrapped)
    step(make(KFACPreconditioner, wrapped), wrapped)
    with pytest.raises(InvalidSpecError, match="Only the whole model may be wrapped"):
        make(KFACPreconditioner, nn.Sequential(wrapped))


class Sharded(nn.Linear):
    """Stands in for FullyShardedDataParallel, or its weight for a DTensor."""


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sharded_models_are_refused(optimizer, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "torch.distributed.fsdp", SimpleNamespace(FullyShardedDataParallel=Sharded)
    )
    with pytest.raises(InvalidSpecError, match=r"is Sharded\. It shards the parameters"):
        make(optimizer, Sharded(6, 3))
    monkeypatch.setitem(
        sys.modules, "torch.distributed.tensor", SimpleNamespace(DTensor=nn.Parameter)
    )
    with pytest.raises(InvalidSpecError, match=r"0.weight is a DTensor.*DistributedDataParallel"):
        make(optimizer, network())


CHANGES = {
    "frozen": (lambda model: model[0].requires_grad_(False), "frozen: 0.weight, 0.bias"),
    "unfrozen": (lambda model: model[2].requires_grad_(True), "new or unfrozen: 2.bias"),
    "added": (lambda model: model.append(nn.Linear(3, 3)), "new or unfrozen: 3.weight, 3.bias"),
    "replaced": (lambda model: model.__setitem__(0, nn.Linear(6, 4)), "replaced: 0.weight, 0.bias"),
    "removed": (lambda model: model.__setitem__(0, nn.Identity()), "removed: 0.weight, 0.bias"),
    "converted": (lambda model: model.double(), r"0.weight was \[4, 6\] torch.float32 on cpu and"),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", CHANGES)
def test_a_model_that_changes_later_is_refused_by_what_changed(kind, optimizer):
    model = network()
    model[2].bias.requires_grad_(False)
    made = make(optimizer, model)
    step(made, model)
    change, message = CHANGES[kind]
    change(model)
    with pytest.raises(InvalidSpecError, match=f"changed since .* was made: .*{message}"):
        made.step(INPUTS, TARGETS) if isinstance(made, KFAC) else made.step()
    assert made.step_count == 1


def test_after_unfreezing_a_new_preconditioner_goes_on_with_the_old_state():
    model = network()
    model[0].requires_grad_(False)
    old = make(KFACPreconditioner, model)
    step(old, model)
    state = old.state_dict()
    model.requires_grad_(True)
    new = make(KFACPreconditioner, model)
    new.load_state_dict(copy.deepcopy(state))
    step(new, model)
    assert new.step_count == 2
