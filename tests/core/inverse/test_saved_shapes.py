"""A state of another width is refused, whatever the structure of the inverse."""

import pytest
import torch
from torch import nn

from kfac_dist import KFAC, KFACPreconditioner
from kfac_dist.errors import InvalidSpecError

INPUTS, TARGETS = torch.randn(32, 10), torch.randint(3, (32,))


def chain(width, last):
    """A chain whose number of parameters, 124, is the same for (8, 4) and (4, 16)."""
    return nn.Sequential(nn.Linear(10, width), nn.Linear(width, last))


class Mixed(nn.Module):
    def __init__(self, *, norm, embedding):
        super().__init__()
        self.embedding = nn.Embedding(embedding, 4)
        self.norm = nn.LayerNorm(norm)
        self.scale = nn.Parameter(torch.ones(norm))
        self.hidden = nn.Linear(norm, 6)
        self.linear = nn.Linear(6, 3)

    def forward(self, inputs):
        hidden = self.embedding(inputs).flatten(1)
        return self.linear(self.hidden(self.norm(hidden) * self.scale))


def stepped(optimizer, model, inputs=INPUTS):
    made = optimizer(model, distribution="categorical", inverse=stepped.inverse)
    if isinstance(made, KFAC):
        made.step(inputs, TARGETS)
    else:
        nn.functional.cross_entropy(model(inputs), TARGETS).backward()
        made.step()
    return made


@pytest.mark.parametrize("optimizer", [KFAC, KFACPreconditioner])
@pytest.mark.parametrize("inverse", ["block_diagonal", "block_tridiagonal", "ekfac"])
def test_a_state_of_another_width_is_refused(inverse, optimizer):
    stepped.inverse = inverse
    state = stepped(optimizer, chain(8, 4)).state_dict()
    other = stepped(optimizer, chain(4, 16))
    before = other.state_dict()
    message = r"G of layer '0' has the shape \[8, 8\], but the matrix of this layer is \[4, 11\]"
    with pytest.raises(InvalidSpecError, match=message):
        other.load_state_dict(state)
    assert other.state_dict()["step_count"] == before["step_count"]
    other.load_state_dict(before)


@pytest.mark.parametrize("inverse", ["block_diagonal", "block_tridiagonal", "ekfac"])
def test_each_tensor_of_a_state_is_checked(inverse):
    stepped.inverse = inverse
    model = Mixed(norm=8, embedding=5)
    made = stepped(KFACPreconditioner, model, torch.randint(5, (32, 2)))
    state = made.state_dict()
    made.load_state_dict(state)
    checked = 0
    for part in ("factors", "inverses"):
        for key, value in state[part].items():
            if value.dim() == 0:
                continue
            grown = value.new_zeros([size + 100 for size in value.shape])
            with pytest.raises(InvalidSpecError, match=f"in its {part}, .* has the shape"):
                made.load_state_dict(state | {part: state[part] | {key: grown}})
            checked += 1
    assert checked >= 14


def test_a_state_gets_the_type_of_the_parameters():
    stepped.inverse = "ekfac"
    model = chain(8, 4)
    state = stepped(KFAC, model).state_dict()
    other = KFAC(chain(8, 4).double(), distribution="categorical", inverse="ekfac")
    other.load_state_dict(state)
    assert other.factors["0"].A.dtype == torch.float64
    assert other.step(INPUTS.double(), TARGETS).step == 2


@pytest.mark.parametrize("optimizer", [KFAC, KFACPreconditioner])
def test_a_state_of_something_else_is_refused(optimizer):
    stepped.inverse = "block_diagonal"
    made = stepped(optimizer, chain(8, 4))
    with pytest.raises(InvalidSpecError, match="not the state of a K-FAC optimizer: it lacks step"):
        made.load_state_dict(torch.optim.SGD(chain(8, 4).parameters()).state_dict())
    other = KFACPreconditioner if optimizer is KFAC else KFAC
    with pytest.raises(InvalidSpecError, match=f"a state of {other.__name__}, not of"):
        made.load_state_dict(stepped(other, chain(8, 4)).state_dict())
