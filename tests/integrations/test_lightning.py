"""The callback in a Lightning `Trainer` does what a loop by hand does."""

import pytest
import torch
from torch import nn

from kfac_dist import KFACPreconditioner
from kfac_dist.errors import InvalidSpecError

pytest.importorskip("lightning", reason="needs the extra integrations")

import lightning.pytorch as pl

from kfac_dist.integrations.lightning import KFACCallback

pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS = {"distribution": "categorical", "damping": 0.1, "statistics_fraction": 1.0}
INPUTS = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(16) % 3


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


class Module(pl.LightningModule):
    def __init__(self, num_optimizers=1):
        super().__init__()
        self.net = network()
        self.num_optimizers = num_optimizers
        self.automatic_optimization = num_optimizers == 1

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, index):
        inputs, targets = batch
        return nn.functional.cross_entropy(self(inputs), targets)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(self.num_optimizers)]


def trainer(folder, callback, steps=4, **arguments):
    return pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **arguments,
    )


def loader(size=16):
    data = torch.utils.data.TensorDataset(INPUTS, TARGETS)
    return torch.utils.data.DataLoader(data, batch_size=size)


def by_hand(steps=4, **options):
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    preconditioner = KFACPreconditioner(net, **OPTIONS | options)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(INPUTS), TARGETS).backward()
        preconditioner.step()
        optimizer.step()
    return net


def assert_same(net, other):
    for parameter, expected in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)


@pytest.mark.parametrize("model", [None, "net"])
def test_a_trainer_equals_a_loop_by_hand(tmp_path, model):
    module = Module()
    callback = KFACCallback(model, **OPTIONS, norm_constraint=1e-3)
    trainer(tmp_path, callback, enable_checkpointing=False).fit(module, loader())
    assert_same(module.net, by_hand(norm_constraint=1e-3, lr=0.1))
    assert callback.preconditioner.step_count == 4
    network = module if model is None else module.net
    assert not network._forward_pre_hooks, "the model is not observed after its training"


def test_micro_batches_are_one_batch(tmp_path):
    module = Module()
    run = trainer(
        tmp_path, KFACCallback(**OPTIONS), accumulate_grad_batches=4, enable_checkpointing=False
    )
    run.fit(module, loader(4))
    assert_same(module.net, by_hand())


def test_a_checkpoint_has_the_factors(tmp_path):
    module, path = Module(), tmp_path / "half.ckpt"
    half = trainer(tmp_path, KFACCallback(**OPTIONS), steps=2)
    half.fit(module, loader())
    half.save_checkpoint(path)
    again, callback = Module(), KFACCallback(**OPTIONS)
    trainer(tmp_path, callback).fit(again, loader(), ckpt_path=path, weights_only=True)
    assert callback.preconditioner.step_count == 4
    assert_same(again.net, by_hand())


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (lambda folder: KFACCallback(lr=0.1), "no option lr"),
        (
            lambda folder: trainer(folder, KFACCallback("body", **OPTIONS)).fit(Module(), loader()),
            "Module has no module body",
        ),
        (
            lambda folder: trainer(folder, KFACCallback(**OPTIONS)).fit(Module(2), loader()),
            "has 2 optimizers",
        ),
    ],
)
def test_mistakes_are_reported(tmp_path, fit, message):
    with pytest.raises(InvalidSpecError, match=message):
        fit(tmp_path)
