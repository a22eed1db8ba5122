import torch

from kfac_dist.core.step.choice import combine


def test_combine_turns_the_previous_update_into_the_new_one():
    previous = torch.ones(3, dtype=torch.float64)
    direction = torch.tensor([6.0, -8.0, 0.0], dtype=torch.float64)
    assert combine(direction, previous, 0.5, 2.0) is previous
    torch.testing.assert_close(previous, torch.tensor([-1.0, 6.0, 2.0], dtype=torch.float64))
    assert torch.equal(direction, torch.tensor([6.0, -8.0, 0.0], dtype=torch.float64))
