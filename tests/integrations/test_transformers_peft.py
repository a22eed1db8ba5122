"""Adapters of peft: only their weights are trained, and have blocks."""

import pytest
import torch
from torch import nn

from kfac_dist import KFACPreconditioner
from kfac_dist.errors import InvalidSpecError

pytest.importorskip("peft", reason="needs the extra integrations")
pytest.importorskip("transformers", reason="needs the extra integrations")

import peft

from kfac_dist.integrations.transformers import preconditioner_for
from tests.integrations import tiny

# peft uses names that transformers is about to change.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CONFIG = {
    "r": 2,
    "target_modules": ["c_attn", "c_fc"],
    "fan_in_fan_out": True,
    "task_type": "CAUSAL_LM",
}


def adapted(**changes):
    torch.manual_seed(2)
    config = peft.LoraConfig(**CONFIG | {"init_lora_weights": False} | changes)
    return peft.get_peft_model(tiny.model().double(), config).train()


class OneTensor(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        where = torch.arange(tiny.LENGTH).expand(len(ids), -1)
        return self.model(input_ids=ids, position_ids=where).logits[:, :-1]


def test_lora_is_a_pair_of_linear_layers():
    batch = tiny.batch(tiny.data(padded=False))
    model, reference = adapted(), adapted()
    wrapped = OneTensor(reference)
    seen_by = preconditioner_for(model, **tiny.OPTIONS)
    expected_by = KFACPreconditioner(
        wrapped, distribution="categorical", class_axis=-1, **tiny.OPTIONS
    )
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    wrapped(batch["input_ids"]).sum().backward()
    reference.zero_grad()
    for each in (model, reference):  # the wrapper does not see calls of what is inside it
        each(**batch).loss.backward()
    expected_by.step()
    seen_by.step()
    trained = [row for row in seen_by.registration_report() if row.block != "frozen"]
    assert len(trained) == 4
    assert {row.block for row in trained} == {"kronecker"}
    for name, parameter in model.named_parameters():
        if "lora" in name:
            other = reference.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, other, msg=lambda m, n=name: f"{n}: {m}")
            assert other.abs().sum() > 0
        else:
            assert parameter.grad is None
            assert torch.equal(parameter, before[name])


def test_a_fresh_adapter_trains():
    model = adapted(init_lora_weights=True)  # B is zero, so the gradient of A is, too
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
    preconditioner = preconditioner_for(model, **tiny.OPTIONS)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(**tiny.batch(tiny.data())).loss
        loss.backward()
        preconditioner.step()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.02
    assert not preconditioner.numeric_events["bad_step"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: peft.LoraConfig(**CONFIG, use_dora=True), "adapter default .* uses DoRA"),
        (
            lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "adapter default .* adds positions",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_refused(config, message):
    model = peft.get_peft_model(tiny.model(), config())
    with pytest.raises(InvalidSpecError, match=message):
        preconditioner_for(model)
