import math

import pytest
import torch

from kfac_dist.core.passes.distributions import get_distribution
from kfac_dist.core.passes.noise import keyed_noise
from tests.oracles.truth import dense
from tests.oracles.truth.cases import DISTRIBUTIONS

TOLERANCE = 1e-12
# Five standard errors of a mean of DRAWS draws of variance at most 1.
DRAWS = 20_000
MC_TOLERANCE = 5 / math.sqrt(DRAWS)


def outputs_of(shape, scale=2.0):
    return scale * torch.randn(
        shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


def targets_for(name, outputs):
    generator = torch.Generator().manual_seed(1)
    if name == "categorical":
        return torch.randint(outputs.shape[-1], outputs.shape[:-1], generator=generator)
    noise = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
    return (noise > 0).double() if name == "bernoulli" else noise


def sampled(name, outputs, seed=0):
    distribution = get_distribution(name)
    noise = keyed_noise(
        distribution.noise,
        seed=seed,
        step=1,
        rows=range(len(outputs)),
        shape=distribution.noise_shape(outputs),
        like=outputs,
    )
    return distribution.sample(outputs, noise)


@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3), (2, 2, 2, 3)], ids=str)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_loss_of_each_case_is_torchs(name, shape):
    outputs = outputs_of(shape)
    targets = targets_for(name, outputs)
    losses = get_distribution(name).loss(outputs, targets)
    assert losses.shape == (shape[0],)
    for n in range(shape[0]):
        expected = dense.reference_loss(name, outputs[n : n + 1], targets[n : n + 1])
        torch.testing.assert_close(losses[n], expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("logit", [-800.0, 800.0])
@pytest.mark.parametrize("name", ["bernoulli", "categorical"])
def test_extreme_logits_give_finite_losses_and_roots(name, logit):
    outputs = torch.tensor([[logit, 0.0]], dtype=torch.float64)
    targets = targets_for(name, outputs)
    distribution = get_distribution(name)
    assert torch.isfinite(distribution.loss(outputs, targets)).all()
    for product in (distribution.root_product, distribution.root_transpose_product):
        assert torch.isfinite(product(outputs, torch.ones_like(outputs))).all()


def dense_root(product, outputs):
    """Build the matrix of a root from its products with the unit vectors of one case."""
    columns = []
    for index in range(outputs.numel()):
        unit = torch.zeros(outputs.numel(), dtype=outputs.dtype)
        unit[index] = 1.0
        columns.append(product(outputs, unit.reshape(outputs.shape)).flatten())
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("shape", [(1, 4), (1, 2, 3), (1, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_root_times_its_transpose_is_the_output_fisher(name, shape):
    outputs = outputs_of(shape)
    distribution = get_distribution(name)
    B = dense_root(distribution.root_product, outputs)
    B_transposed = dense_root(distribution.root_transpose_product, outputs)
    torch.testing.assert_close(B_transposed, B.T, rtol=TOLERANCE, atol=TOLERANCE)
    expected = dense.output_fisher(name, outputs[0])
    torch.testing.assert_close(B @ B.T, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_sampled_targets_have_the_mean_of_the_distribution(name):
    logits = torch.tensor([-1.5, 0.2, 1.0], dtype=torch.float64)
    draws = sampled(name, logits.expand(DRAWS, 3))
    if name == "bernoulli":
        mean, expected = draws.mean(dim=0), torch.sigmoid(logits)
        assert set(draws.unique().tolist()) == {0.0, 1.0}
    elif name == "categorical":
        assert draws.shape == (DRAWS,)
        mean, expected = torch.bincount(draws, minlength=3) / DRAWS, torch.softmax(logits, dim=0)
    else:
        mean, expected = draws.mean(dim=0), logits
    torch.testing.assert_close(mean.double(), expected, rtol=0, atol=MC_TOLERANCE)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_score_of_sampled_targets_has_the_output_fisher(name):
    """The covariance of dL/dz over sampled targets is B B^T, and its mean is 0."""
    logits = torch.tensor([[-0.5, 0.3], [0.8, -1.0]], dtype=torch.float64)
    outputs = logits.expand(DRAWS, 2, 2).clone().requires_grad_()
    targets = sampled(name, outputs.detach())
    (score,) = torch.autograd.grad(get_distribution(name).loss(outputs, targets).sum(), outputs)
    score = score.flatten(1)
    expected = dense.output_fisher(name, logits)
    torch.testing.assert_close(
        score.mean(dim=0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=MC_TOLERANCE
    )
    # The variance of a product of two unit normal scores is at most 2.
    torch.testing.assert_close(
        score.T @ score / DRAWS, expected, rtol=0, atol=2**0.5 * MC_TOLERANCE
    )


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-53])
def test_categorical_sample_is_a_class_at_the_edges_of_the_noise(edge):
    distribution = get_distribution("categorical")
    for dtype in (torch.float32, torch.float64):
        outputs = outputs_of((3, 7)).to(dtype)
        noise = torch.full((3,), edge, dtype=dtype)
        draws = distribution.sample(outputs, noise)
        assert draws.min() >= 0
        assert draws.max() <= 6


def test_unknown_distribution_is_refused():
    with pytest.raises(ValueError, match="poisson"):
        get_distribution("poisson")
