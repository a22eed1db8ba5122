import pytest
import torch

from kfac_dist.core.step.averaging import ParameterAverage


def vector(step):
    return torch.tensor([float(step), float(step) ** 2], dtype=torch.float64)


@pytest.mark.parametrize("decay", [0.5, 0.99])
@pytest.mark.parametrize("start", [1, 4])
def test_average_follows_the_rule(decay, start):
    average, expected = ParameterAverage(decay, start), None
    for step in range(1, 30):
        average.update(step, vector(step))
        j = step - start + 1
        if j == 1:
            expected = vector(step)
        elif j > 1:
            xi = min(1 - 1 / j, decay)
            expected = xi * expected + (1 - xi) * vector(step)
        if expected is None:
            assert average.value is None
        else:
            torch.testing.assert_close(average.value, expected, rtol=1e-12, atol=1e-12)


def test_the_parameters_are_not_kept():
    average, parameters = ParameterAverage(0.9, 1), vector(3)
    average.update(1, parameters)
    parameters.zero_()
    assert torch.equal(average.value, vector(3))


@pytest.mark.parametrize("saved_after", [0, 2, 6])
def test_a_restored_average_continues_bitwise(saved_after):
    average, other = ParameterAverage(0.9, 4), ParameterAverage(0.9, 4)
    for step in range(1, saved_after + 1):
        average.update(step, vector(step))
    other.load_state_dict(average.state_dict())
    for step in range(saved_after + 1, 12):
        for each in (average, other):
            each.update(step, vector(step))
    assert torch.equal(average.value, other.value)
