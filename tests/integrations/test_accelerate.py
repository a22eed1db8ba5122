"""A loop of Accelerate does what a plain loop does."""

import pytest
import torch

from kfac_dist.errors import InvalidSpecError

pytest.importorskip("accelerate", reason="needs the extra integrations")
pytest.importorskip("transformers", reason="needs the extra integrations")

from types import SimpleNamespace

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from kfac_dist.integrations.accelerate import AcceleratedPreconditioner
from kfac_dist.integrations.transformers import preconditioner_for
from tests.integrations import tiny

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def no_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(num_micro_batches=1, steps=4, **options):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=num_micro_batches, **options)
    model = tiny.model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    preconditioner = AcceleratedPreconditioner(
        accelerator, preconditioner_for(prepared, **tiny.OPTIONS), optimizer
    )
    cases, size = tiny.data(), tiny.CASES // num_micro_batches
    for _ in range(steps):
        for start in range(0, tiny.CASES, size):
            with accelerator.accumulate(prepared):
                loss = prepared(**tiny.batch(cases[start : start + size])).loss
                accelerator.backward(loss)
                preconditioner.step()
                optimizer.step()
                optimizer.zero_grad()
    return model, preconditioner.preconditioner


def test_a_prepared_model_equals_a_plain_one():
    model, _ = trained()
    reference, losses = tiny.by_hand(4, 0.1, preconditioner_for)
    torch.testing.assert_close(tiny.vector(model), tiny.vector(reference))
    assert losses[-1] < losses[0]


def test_micro_batches_make_one_step():
    _, preconditioner = trained(num_micro_batches=4)
    assert preconditioner.step_count == 4


def test_bfloat16_leaves_the_statistics_in_float32():
    _, mixed = trained(steps=1, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    _, exact = trained(steps=1)
    assert mixed.step_count == 1
    torch.testing.assert_close(mixed.state_dict()["factors"], exact.state_dict()["factors"])


def test_a_divided_model_is_refused():
    divided = SimpleNamespace(distributed_type=SimpleNamespace(value="FSDP"))
    with pytest.raises(InvalidSpecError, match="runs as FSDP, which divides the model"):
        AcceleratedPreconditioner(divided, None, None)
