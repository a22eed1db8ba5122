"""Calls of a model, divided into cases, and what its results are."""

import pytest
import torch
from torch import nn

from kfac_dist import KFACPreconditioner, ModelCalls
from kfac_dist.errors import InvalidSpecError

CASES = 6
X, Y = torch.randn(2, CASES, 4, generator=torch.Generator().manual_seed(0))
SCALE = torch.tensor([[0.5, 1.0, 1.5, 2.0]])
OPTIONS = {"distribution": "categorical", "class_axis": -1, "damping": 0.1, "fisher_type": "exact"}


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(4, 5)
        self.shift = nn.Parameter(torch.zeros(5))  # diagonal: by passes over single cases
        self.last = nn.Linear(5, 3)

    def forward(self, inputs):
        return self.last(torch.tanh(self.first(inputs) + self.shift))


class Result(dict):
    @property
    def logits(self):
        return self["logits"]


class Nested(Plain):
    """Inputs in every kind of place, outputs in an object, and a loss of its own."""

    def forward(self, pair, *, scale, names=None, labels=None, cache=None):
        left, (right,) = pair["left"], pair["right"]
        logits = super().forward((left + right) * scale)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return Result(logits=logits, loss=loss)


def direction(model, call, fraction=0.5, **options):
    preconditioner = KFACPreconditioner(model, statistics_fraction=fraction, **OPTIONS | options)
    returned(call(model)).sum().backward()
    torch.manual_seed(2)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    preconditioner.step()
    return torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])


def returned(result):
    """The tensor that a loss is made of."""
    return result if isinstance(result, torch.Tensor) else result["logits"]


def logits(result):
    return result.logits


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_nested_arguments_are_divided_and_results_named(fraction):
    labels = torch.zeros(CASES, dtype=torch.int64)
    pair = {"left": X, "right": (Y,)}
    expected = direction(Plain(), lambda model: model((X + Y) * SCALE), fraction)
    calls = ModelCalls(outputs=logits, left_out=["labels", "cache"])
    seen = direction(
        Nested(),
        lambda model: model(pair, scale=SCALE, names="all", labels=labels, cache=object()),
        fraction,
        calls=calls,
    )
    assert torch.equal(seen, expected)


class Positions(Plain):
    def forward(self, inputs, where, labels=None, offset=0.0):
        assert where.shape == (4,), "not the cases"
        assert labels is None
        return super().forward(inputs * (1 + where) + offset)


def test_an_argument_without_cases_is_shared_and_one_in_the_middle_left_out():
    where, labels = torch.arange(4), torch.zeros(CASES)
    calls = ModelCalls(shared=["where"], left_out=["labels"])
    expected = direction(Plain(), lambda model: model(X * (1 + where) + 0.5))

    class Twice(Positions):
        def forward(self, inputs, where, labels=None, offset=0.0):
            return super().forward(inputs, where, None, offset)

    model = Twice()
    seen = direction(model, lambda model: model(X, where, labels, 0.5), calls=calls)
    assert torch.equal(seen, expected)


def test_a_layer_called_by_keyword_is_a_model():
    one, other = nn.Linear(4, 3), nn.Linear(4, 3)
    other.load_state_dict(one.state_dict())
    seen = direction(one, lambda model: model(input=X))
    assert torch.equal(seen, direction(other, lambda model: model(X)))


class Ragged(Plain):
    """The mean over the positions that a mask shows."""

    def forward(self, inputs, mask):
        rows = super().forward(inputs) * mask.unsqueeze(-1)
        return rows.sum(dim=1) / mask.sum(dim=1, keepdim=True)


def test_cases_are_computed_without_their_padding():
    lengths = [3, 1, 3, 2, 1, 3]
    mask = (torch.arange(3) < torch.tensor(lengths).unsqueeze(1)).float()
    inputs = torch.stack([X, Y, X + Y], dim=1)
    calls = ModelCalls(padded={"mask": ["inputs"]})

    def one_by_one(model):
        return torch.cat(
            [
                model(inputs[case : case + 1, :length], torch.ones(1, length))
                for case, length in enumerate(lengths)
            ]
        )

    seen = direction(Ragged(), lambda model: model(inputs, mask), 1.0, calls=calls)
    torch.testing.assert_close(seen, direction(Ragged(), one_by_one, 1.0))
    whole = direction(Ragged(), lambda model: model(inputs, mask), 1.0)
    assert not torch.allclose(seen, whole), "padding must matter in this example"


class Sequence(Plain):
    """Rows of a case as positions of its outputs."""


def test_batch_normalisation_needs_one_length():
    class Normalised(Ragged):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, inputs, mask):
            return super().forward(self.norm(inputs.mT).mT, mask)

    inputs, mask = torch.stack([X, Y], dim=1), torch.ones(CASES, 2)
    calls = ModelCalls(padded={"mask": ["inputs"]})
    first_step(Normalised(), inputs, mask, calls=calls)
    mask[1, 1] = 0
    with pytest.raises(InvalidSpecError, match=r"batch normalisation.*2 different lengths"):
        first_step(Normalised(), inputs, mask, calls=calls)


def test_outputs_that_the_loss_does_not_count_have_no_derivative():
    inputs = torch.stack([X, Y], dim=1)
    counted = torch.tensor([True, False]).expand(CASES, -1)
    calls = ModelCalls(counted=lambda arguments: counted[: len(arguments["inputs"])])

    class First(Sequence):
        def forward(self, inputs):
            return super().forward(inputs)[:, :1]

    seen = direction(Sequence(), lambda model: model(inputs), calls=calls)
    torch.testing.assert_close(seen, direction(First(), lambda model: model(inputs)))


def first_step(model, *args, calls=None, **kwargs):
    preconditioner = KFACPreconditioner(model, calls=calls, statistics_fraction=1.0, **OPTIONS)
    returned(model(*args, **kwargs)).sum().backward()
    preconditioner.step()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            lambda: first_step(Positions(), X, torch.arange(4)),
            r"inputs has 6, where has 4.*shared",
        ),
        (
            lambda: first_step(Positions(), X[:1], torch.arange(4)),
            r"inputs has 1, where has 4.*shared",
        ),
        (
            lambda: first_step(Nested(), {"left": X, "right": (Y,)}, scale=SCALE),
            r"Nested returned a Result with the keys logits, loss.*ModelCalls\(outputs",
        ),
        (
            lambda: first_step(Nested(), {"left": X, "right": [Y]}, scale=SCALE, cache=object()),
            r"called with cache of type object.*left_out",
        ),
        (
            lambda: first_step(Plain(), X, calls=ModelCalls(outputs=lambda r: r[:1].sum())),
            r"shape \(\) for 2 cases.*no axis of cases",
        ),
        (
            lambda: first_step(Plain(), X, calls=ModelCalls(outputs=lambda r: r[:1])),
            r"shape \(1, 3\) for 2 cases.*no axis of cases",
        ),
        (
            lambda: first_step(
                Plain(), X, calls=ModelCalls(counted=lambda arguments: torch.ones(2) > 0)
            ),
            r"counted returns \[2\] for outputs \[\d, 3\]",
        ),
        (
            lambda: first_step(
                Ragged(),
                X.unsqueeze(1),
                X[:, :1] * 0,
                calls=ModelCalls(padded={"mask": ["inputs"]}),
            ),
            r"in mask of Ragged, case 0 is",
        ),
    ],
)
def test_calls_that_cannot_be_divided_are_refused(step, message):
    with pytest.raises(InvalidSpecError, match=message):
        step()


def test_names_are_needed_where_options_name_arguments():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Plain()

        def forward(self, *args):
            return self.inner(*args)

    calls = ModelCalls(left_out=["labels"])
    with pytest.raises(InvalidSpecError, match="call it with keywords"):
        first_step(Wrapper(), X, calls=calls)
    first_step(Wrapper(), X)


class Overwriting(nn.Module):
    """Sets positions of a layer's outputs to zero, in place or not."""

    def __init__(self, in_place):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.in_place = in_place

    def forward(self, inputs):
        hidden = self.first(inputs)
        hole = torch.zeros(hidden.shape[:2], dtype=torch.bool)
        hole[:, 0] = True
        if self.in_place:
            hidden[hole] = 0  # the output of a linear layer is a view here
        else:
            hidden = hidden.masked_fill(hole.unsqueeze(-1), 0)
        return self.last(torch.tanh(hidden))


def test_outputs_of_a_layer_may_be_overwritten_in_place():
    inputs = torch.stack([X, Y], dim=1)
    seen, expected = (
        direction(Overwriting(in_place), lambda model: model(inputs)) for in_place in (True, False)
    )
    torch.testing.assert_close(seen, expected)


class SumOfTwo(Plain):
    """Takes [T, N, ...] if turned, as sequence-first models do, and a vector for all cases."""

    def __init__(self, turned):
        super().__init__()
        self.turned = turned

    def forward(self, left, shift, *, right):
        assert shift.shape == (4,)
        assert left.shape[0] == 2 if self.turned else left.shape[1] == 2
        return super().forward(left + right + shift)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_the_cases_of_all_tensors_lie_along_the_given_axis(fraction):
    left, right, shift = torch.stack([X, Y], dim=1), torch.stack([Y, X * Y], dim=1), SCALE[0]
    expected = direction(
        SumOfTwo(turned=False),
        lambda model: model(left, shift, right=right),
        fraction,
        calls=ModelCalls(shared=["shift"]),
    )
    seen = direction(
        SumOfTwo(turned=True),
        lambda model: model(left.transpose(0, 1), shift, right=right.transpose(0, 1)),
        fraction,
        case_axis=1,
    )
    torch.testing.assert_close(seen, expected)


def test_all_tensors_are_copied_so_that_a_loop_may_refill_them():
    pair = {"left": X.clone(), "right": (Y.clone(),)}
    shown = SCALE.clone()

    def call(model):
        result = model(pair, scale=shown)
        for tensor in (pair["left"], *pair["right"], shown):
            tensor.data.fill_(1000.0)  # unnoticed by the backward pass
        return result

    expected = direction(Plain(), lambda model: model((X + Y) * SCALE))
    assert torch.equal(direction(Nested(), call, calls=ModelCalls(outputs=logits)), expected)


@pytest.mark.parametrize("which", ["left", "right", "scale"])
def test_a_model_that_changes_any_tensor_of_its_call_is_refused(which):
    class Changing(Nested):
        def forward(self, pair, *, scale):
            {"left": pair["left"], "right": pair["right"][0], "scale": scale}[which].mul_(2)
            return super().forward(pair, scale=scale)

    pair = {"left": X.clone(), "right": (Y.clone(),)}
    with pytest.raises(InvalidSpecError, match="Changing changed its input in place"):
        first_step(Changing(), pair, scale=SCALE.clone(), calls=ModelCalls(outputs=logits))


@pytest.mark.parametrize("part", ["logits", "loss"])
def test_a_pass_counts_whichever_tensor_of_its_result_the_loss_is_made_of(part):
    labels = torch.zeros(CASES, dtype=torch.int64)
    model = Nested()
    # A slice is not in the graph of a loss of the whole result.
    calls = ModelCalls(outputs=lambda result: result.logits[:, :2], left_out=["labels"])
    preconditioner = KFACPreconditioner(model, calls=calls, **OPTIONS)
    result = model({"left": X, "right": (Y,)}, scale=SCALE, labels=labels)
    result[part].sum().backward()
    preconditioner.step()
    assert preconditioner.step_count == 1
