"""Which targets a distribution takes: shapes, the axis of the classes, labels that are left out."""

import pytest
import torch
import torch.nn.functional as F

from kfac_dist.core.passes.distributions import get_distribution
from kfac_dist.core.passes.target_range import LEFT_OUT
from kfac_dist.errors import InvalidSpecError
from tests.core.passes.test_distributions import outputs_of, sampled

TOLERANCE = 1e-12


@pytest.mark.parametrize("name", ["bernoulli", "gaussian"])
@pytest.mark.parametrize(
    ("outputs", "targets"), [((4, 1), (4,)), ((4,), (4, 1)), ((4, 1), (4, 3)), ((4, 3), (1, 3))]
)
def test_shapes_that_would_broadcast_are_refused(name, outputs, targets):
    with pytest.raises(InvalidSpecError) as caught:
        get_distribution(name).loss(torch.zeros(outputs), torch.zeros(targets))
    message = str(caught.value)
    assert f"outputs have shape {outputs}, targets {targets}: for {name}" in message
    assert ("squeeze(-1)" in message) == (len(outputs) != len(targets))


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        ((4, 3), (4, 1), r"without the classes, \(4,\); use targets.squeeze"),
        ((4, 3), (3,), r"outputs have shape \(4, 3\), targets \(3,\)"),
        ((4, 3), (4, 3), "indices of classes, not probabilities or one-hot"),
        ((4, 3, 5, 6), (4, 5, 6), "seem to lie along axis 1: say so by class_axis=1"),
        ((4, 3, 3), (4, 3), "could lie along axis 1 or 2: give class_axis=1"),
        ((4,), (4,), "need at least two"),
    ],
)
def test_classes_that_are_not_where_they_should_be(outputs, targets, message):
    with pytest.raises(InvalidSpecError, match=message):
        get_distribution("categorical", None).loss(
            torch.zeros(outputs), torch.zeros(targets).long()
        )


@pytest.mark.parametrize(
    ("name", "axis", "message"),
    [
        ("categorical", 0, "axis of the cases"),
        ("categorical", 2.0, "not a whole number"),
        ("gaussian", 1, "only for categorical"),
    ],
)
def test_a_class_axis_that_cannot_be(name, axis, message):
    with pytest.raises(InvalidSpecError, match=message):
        get_distribution(name, axis)


@pytest.mark.parametrize("axis", [2, -2])
def test_a_class_axis_beyond_the_outputs(axis):
    with pytest.raises(InvalidSpecError, match=r"class_axis: -?2 is not possible"):
        get_distribution("categorical", axis).check_outputs(torch.zeros(4, 3))


@pytest.mark.parametrize("axis", [1, -3])
def test_classes_along_another_axis_are_the_same_distribution(axis):
    """With the classes in axis 1, loss, roots and samples are those of the last axis, moved."""
    last = outputs_of((5, 4, 6, 3))
    first = last.movedim(-1, 1)
    targets = torch.arange(5 * 4 * 6).reshape(5, 4, 6) % 3
    moved, plain = get_distribution("categorical", axis), get_distribution("categorical")
    z = outputs_of((5, 4, 6, 3)).cos()
    expected = F.cross_entropy(first, targets, reduction="none").flatten(1).sum(1)
    torch.testing.assert_close(moved.loss(first, targets), expected, rtol=TOLERANCE, atol=0)
    for name in ("root_product", "root_transpose_product"):
        mine = getattr(moved, name)(first, z.movedim(-1, 1)).movedim(1, -1)
        torch.testing.assert_close(
            mine, getattr(plain, name)(last, z), rtol=TOLERANCE, atol=TOLERANCE
        )
    noise = torch.rand(5, *moved.noise_shape(first), dtype=torch.float64)
    assert torch.equal(moved.sample(first, noise), plain.sample(last, noise))
    assert moved.target_range(first).highest == 2


def test_left_out_positions_have_no_loss_and_do_not_count():
    outputs = outputs_of((2, 3, 4))
    targets = torch.tensor([[1, LEFT_OUT, 3], [LEFT_OUT, LEFT_OUT, 0]])
    distribution = get_distribution("categorical")
    expected = F.cross_entropy(outputs.mT, targets, reduction="none").sum(1)
    torch.testing.assert_close(distribution.loss(outputs, targets), expected)
    kept = distribution.kept(outputs, targets)
    assert kept.squeeze(-1).tolist() == [[1, 0, 1], [0, 0, 1]]
    assert distribution.kept(outputs, targets.clamp(min=0)) is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_of_every_integer_type_are_the_same(dtype):
    outputs, labels = outputs_of((3, 4)), torch.tensor([0, 3, 1])
    distribution = get_distribution("categorical")
    assert torch.equal(
        distribution.loss(outputs, labels.to(dtype)), distribution.loss(outputs, labels)
    )


@pytest.mark.parametrize(
    ("name", "shape", "targets", "message"),
    [
        ("categorical", (3, 4), [0, 4, 1], "of case 1 is 4: .* class from 0 to 3, or -100"),
        ("categorical", (3, 4), [0, -100, -1], "of case 2 is -1"),
        ("categorical", (1, 3, 4), [[0, 1, 9]], "of case 0 at position 2 is 9"),
        ("bernoulli", (2, 2), [[0.0, 1.0], [-1.0, 1.0]], r"of case 1 at position 0 is -1\.0"),
    ],
)
def test_values_that_are_not_possible(name, shape, targets, message):
    with pytest.raises(InvalidSpecError, match=message):
        get_distribution(name).check_values(torch.zeros(shape), torch.tensor(targets))


def test_possible_values_pass():
    get_distribution("categorical").check_values(torch.zeros(3, 4), torch.tensor([0, -100, 3]))
    get_distribution("bernoulli").check_values(torch.zeros(2), torch.tensor([True, False]))
    get_distribution("gaussian").check_values(torch.zeros(2), torch.tensor([-9.0, 1e9]))


def test_samples_are_targets():
    outputs = outputs_of((4, 2, 3))
    for name in ("bernoulli", "categorical", "gaussian"):
        get_distribution(name).check_values(outputs, sampled(name, outputs))
