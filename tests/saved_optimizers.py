"""Saving a `KFAC` to a file and continuing from it, next to one that was never saved."""

import io

import torch

from kfac_dist import KFAC
from tests.oracles.truth import dense


def assert_same_next_steps(case, optimizer_of, saved_after) -> tuple[KFAC, KFAC]:
    """Assert that a loaded optimizer takes the steps of the saved one, bit for bit.

    Returns:
        The saved optimizer and the loaded one, seven steps later.
    """
    inputs, targets = case.data()
    model = case.model()
    optimizer = optimizer_of(model)
    for _ in range(saved_after):
        optimizer.step(inputs, targets)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    for _ in range(7):
        expected = optimizer.step(inputs, targets)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other_model = case.model()
    other_model.load_state_dict(saved["model"])
    other = optimizer_of(other_model)
    other.load_state_dict(saved["optimizer"])
    for _ in range(7):
        result = other.step(inputs, targets)
    assert result == expected
    assert torch.equal(dense.parameter_vector(other_model), dense.parameter_vector(model))
    return optimizer, other
