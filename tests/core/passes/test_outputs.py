"""Models that do not return one tensor are refused with what they returned."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kfac_dist import KFAC, KFACPreconditioner
from kfac_dist.errors import InvalidSpecError

INPUTS, TARGETS = torch.randn(8, 6), torch.randint(3, (8,))


class Returning(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.wrap = wrap

    def forward(self, inputs):
        return self.wrap(self.linear(inputs))


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda logits: (logits, 1), "returned a tuple of 2 elements; it must return one tensor"),
        (lambda logits: {"logits": logits}, "returned a dict with the keys logits"),
        (lambda logits: SimpleNamespace(logits=logits), "returned a SimpleNamespace; it must"),
    ],
)
def test_outputs_that_are_not_a_tensor_are_refused(wrap, message):
    model = Returning(wrap)
    with pytest.raises(InvalidSpecError, match=f"Returning {message}"):
        KFAC(model, distribution="categorical").step(INPUTS, TARGETS)
    with (
        KFACPreconditioner(model, distribution="categorical"),
        pytest.raises(InvalidSpecError, match=f"KFACPreconditioner: Returning {message}"),
    ):
        model(INPUTS)
