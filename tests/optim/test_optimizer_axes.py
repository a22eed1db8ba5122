"""A batch as a user gives it: cases, classes and labels lie where K-FAC takes them, or not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_dist import KFAC, KFACPreconditioner
from kfac_dist.errors import InvalidSpecError


def data(*shape, classes=3):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(classes, shape[:-1], generator=generator)


def linear(inputs=5, outputs=3):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, dtype=torch.float64)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        ({"x": torch.zeros(8, 5)}, torch.zeros(8).long(), "the inputs are dict, not one tensor"),
        ([torch.zeros(8, 5)], torch.zeros(8).long(), "the inputs are list"),
        ((torch.zeros(8, 5),), torch.zeros(8).long(), "the inputs are tuple"),
        (torch.zeros(8, 5).numpy(), torch.zeros(8).long(), "the inputs are ndarray"),
        (torch.tensor(1.0), torch.zeros(8).long(), r"shape \(\), so they have no axis 0"),
        (torch.zeros(8, 5), [0] * 8, "the targets are list, not one tensor"),
        (torch.zeros(8, 5).double(), torch.zeros(7).long(), r"shape \(8, 3\), targets \(7,\)"),
        (torch.zeros(8, 5).double(), torch.full((8,), 3), "the target of case 0 is 3"),
    ],
)  # fmt: skip
def test_a_batch_that_does_not_fit_is_refused_and_does_not_count(inputs, targets, message):
    model = linear()
    optimizer = KFAC(model, distribution="categorical")
    before = weights(model)
    with pytest.raises(InvalidSpecError, match=message):
        optimizer.step(inputs, targets)
    assert optimizer.step_count == 0
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("distribution", ["gaussian", "bernoulli"])
def test_targets_that_would_broadcast_are_refused(distribution):
    optimizer = KFAC(linear(5, 1), distribution=distribution)
    with pytest.raises(InvalidSpecError, match=r"\(8, 1\), targets \(8,\).*unsqueeze\(-1\)"):
        optimizer.step(torch.zeros(8, 5).double(), torch.ones(8).double())


def test_a_label_out_of_range_is_refused_in_a_later_step_as_well():
    inputs, targets = data(8, 5)
    optimizer = KFAC(linear(), distribution="categorical")
    optimizer.step(inputs, targets)
    targets[5] = -1
    with pytest.raises(InvalidSpecError, match=r"case 5 is -1: .* from 0 to 2, or"):
        optimizer.step(inputs, targets)
    assert optimizer.step_count == 1


class Permuted(nn.Module):
    """A network of tokens or pixels that takes and returns other axes than [N, T, ...]."""

    def __init__(self, before, after):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.before, self.after = before, after
        self.double()

    def forward(self, x):
        return self.after(self.last(torch.tanh(self.norm(self.first(self.before(x))))))


def same(x):
    return x


def turned(x):
    return x.transpose(0, 1)


LAYOUTS = {
    "sequence first": (same, same, turned, turned, {"case_axis": 1}),
    "batch of sequences returned first": (turned, same, turned, same, {"case_axis": 1}),
    "flattened": (same, lambda z: z.flatten(0, 1), same, lambda y: y.flatten(), {}),
    "classes second": (same, lambda z: z.mT, same, same, {"class_axis": 1}),
    "sequence first, flattened": (
        same, lambda z: z.flatten(0, 1), turned, lambda y: y.T.flatten(), {"case_axis": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("inverse", ["block_diagonal", "ekfac"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_the_same_wherever_the_axes_are(layout, inverse):
    before, after, give, ask, options = LAYOUTS[layout]
    inputs, targets = data(8, 4, 5)
    targets[:, 3] = -100
    common = {"distribution": "categorical", "inverse": inverse, "fisher_type": "exact"}
    plain, other = Permuted(same, same), Permuted(before, after)
    expected = KFAC(plain, **common)
    optimizer = KFAC(other, **common, **options)
    for _ in range(3):
        want = expected.step(inputs, targets)
        got = optimizer.step(give(inputs), ask(targets))
        assert got.loss == pytest.approx(want.loss, rel=1e-9)
    torch.testing.assert_close(weights(other), weights(plain), rtol=1e-7, atol=1e-9)


def test_outputs_that_leave_the_axis_of_the_classes_open_are_refused():
    inputs, targets = data(8, 3, 5)
    with pytest.raises(InvalidSpecError, match="could lie along axis 1 or 2"):
        KFAC(linear(), distribution="categorical").step(inputs, targets)
    assert KFAC(linear(), distribution="categorical", class_axis=-1).step(inputs, targets).applied
    inputs, targets = data(8, 4, 5)
    with pytest.raises(InvalidSpecError, match="seem to lie along axis 1: say so by class_axis=1"):
        KFAC(Permuted(same, lambda z: z.mT), distribution="categorical").step(inputs, targets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"case_axis": -1}, "case_axis: -1 is not a whole number from 0"),
        ({"case_axis": "1"}, "case_axis: '1' is not"),
        ({"class_axis": 0}, "class_axis: 0 is the axis of the cases"),
    ],
)
@pytest.mark.parametrize("kind", [KFAC, KFACPreconditioner])
def test_axes_that_cannot_be(kind, options, message):
    with pytest.raises(InvalidSpecError, match=message):
        kind(linear(), distribution="categorical", **options)


def test_the_preconditioner_sees_no_targets_and_asks_for_the_axis_of_the_classes():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3, padding=1).double()
    inputs = torch.randn(6, 3, 5, 5, dtype=torch.float64)
    targets = torch.randint(4, (6, 5, 5))

    def step(**options):
        preconditioner = KFACPreconditioner(
            model,
            distribution="categorical",
            fisher_type="exact",
            statistics_fraction=1.0,
            **options,
        )
        model.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        preconditioner.step()
        return preconditioner._curvature.averages.pair("").G

    with pytest.raises(InvalidSpecError, match=r"shape \(6, 4, 5, 5\), and no targets are seen"):
        step()
    p = model(inputs).detach().movedim(1, -1).softmax(-1)
    expected = (torch.diag_embed(p) - p[..., None] * p[..., None, :]).sum((1, 2)).mean(0)
    torch.testing.assert_close(step(class_axis=1), expected)


def test_the_preconditioner_takes_sequence_first_models():
    inputs, targets = data(8, 4, 5)

    def direction(model, given, wanted, **options):
        preconditioner = KFACPreconditioner(
            model,
            distribution="categorical",
            fisher_type="exact",
            statistics_fraction=0.5,
            class_axis=-1,
            **options,
        )
        F.cross_entropy(model(given).flatten(0, 1), wanted.flatten()).backward()
        preconditioner.step()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = direction(Permuted(same, same), inputs, targets)
    got = direction(Permuted(same, same), turned(inputs), turned(targets), case_axis=1)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)
