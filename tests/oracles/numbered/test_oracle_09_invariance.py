"""Oracle 9 (Theorem 1 of the paper): undamped steps do not depend on the parametrisation.

The net N has `s_i = W_i abar_{i-1}`, `abar_i = phibar(s_i)`. The net N+ has
`abar+_i = Omega_i phibar(Phi_i s+_i)` and weights `W+_i = Phi_i^-1 W_i Omega_{i-1}^-1`, which
compute the same function. Its steps must map to those of N: `U_i = Phi_i U+_i Omega_{i-1}`.
"""

from itertools import pairwise

import pytest
import torch
from torch import nn

from kfac_dist.core.blocks.registration import register
from kfac_dist.core.factors import FactorAverages
from kfac_dist.core.inverse.structure import structure_for
from kfac_dist.optim.optimizer import kfac_settings
from tests.oracles.truth import dense
from tests.oracles.truth.cases import layer_names
from tests.oracles.truth.library import computer_for

WIDTHS = (3, 4, 3, 2)
NUM_CASES = 60


class Between(nn.Module):
    """The function between two weight matrices, `Omega [phi(Phi s); 1]`."""

    def __init__(self, Phi, Omega, phi=torch.tanh):
        super().__init__()
        self.Phi, self.Omega, self.phi = Phi, Omega, phi

    def forward(self, s):
        activity = self.phi(s @ self.Phi.T)
        homogeneous = torch.cat([activity, torch.ones_like(activity[:, :1])], dim=1)
        return homogeneous @ self.Omega.T


class Readout(nn.Module):
    def __init__(self, Phi):
        super().__init__()
        self.Phi = Phi

    def forward(self, s):
        return s @ self.Phi.T


def invertible(size, generator):
    """Return a matrix that is far from orthogonal but not badly conditioned."""
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    scales = torch.linspace(0.3, 2.0, size, dtype=torch.float64)
    return torch.linalg.qr(noise)[0] * scales + 0.1 * noise


def net(weights, Phis, Omegas):
    """Layers without biases: the homogeneous coordinate belongs to the function between them."""
    first = Between(torch.eye(WIDTHS[0], dtype=torch.float64), Omegas[0], phi=lambda s: s)
    modules = [first]
    for i, W in enumerate(weights):
        layer = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(W)
        last = i + 1 == len(weights)
        modules += [layer, Readout(Phis[i]) if last else Between(Phis[i], Omegas[i + 1])]
    return nn.Sequential(*modules)


def two_nets(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = list(pairwise(WIDTHS))
    weights = [
        torch.randn(o, i + 1, generator=generator, dtype=torch.float64) / (i + 1) ** 0.5
        for i, o in sizes
    ]
    Phis = [invertible(o, generator) for _, o in sizes]
    Omegas = [invertible(i + 1, generator) for i, _ in sizes]
    transformed = [
        torch.linalg.solve(Phi, W) @ torch.linalg.inv(Omega)
        for W, Phi, Omega in zip(weights, Phis, Omegas, strict=True)
    ]
    plain = net(
        weights,
        [torch.eye(len(Phi), dtype=torch.float64) for Phi in Phis],
        [torch.eye(len(Omega), dtype=torch.float64) for Omega in Omegas],
    )
    return plain, net(transformed, Phis, Omegas), Phis, Omegas


def undamped_step(model, distribution, inputs, targets, inverse, gamma=0.0):
    """Return the direction of every layer, from exact-type factors of the whole batch."""
    registration = register(model, kfac_settings({}))
    names = registration.names
    structure = structure_for(kfac_settings({"inverse": inverse}), names, registration.links)
    computer = computer_for(distribution, model, "exact")
    statistics = computer.statistics(inputs, targets, step=1, links=structure.links)
    averages = FactorAverages(names, 0.95, structure.links)
    averages.update(1, statistics.factors, len(inputs), statistics.crosses)
    inverses = {}
    for name in names:
        (prepared,) = structure.invert_at_gammas(averages.snapshot(name), [gamma])
        assert prepared.rungs == ()
        inverses[name] = prepared.inverse
    gradient = dense.per_case_gradients(distribution, model, inputs, targets).mean(dim=0)
    matrices = {name: dense.homogeneous_matrix(gradient, model, name) for name in names}
    solved, fallen = structure.precondition(matrices, inverses, 1.0)
    assert fallen == ()
    return [solved[name] for name in layer_names(model)]


def data(distribution, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(NUM_CASES, WIDTHS[0], generator=generator, dtype=torch.float64)
    targets = torch.randn(NUM_CASES, WIDTHS[-1], generator=generator, dtype=torch.float64)
    return inputs, (targets > 0).double() if distribution == "bernoulli" else targets


def largest_mismatch(distribution, inverse, seed, gamma=0.0):
    plain, transformed, Phis, Omegas = two_nets(seed)
    inputs, targets = data(distribution, seed)
    torch.testing.assert_close(plain(inputs), transformed(inputs), rtol=1e-9, atol=1e-9)
    steps = undamped_step(plain, distribution, inputs, targets, inverse, gamma)
    others = undamped_step(transformed, distribution, inputs, targets, inverse, gamma)
    return max(
        ((U - Phi @ other @ Omega).norm() / U.norm()).item()
        for U, other, Phi, Omega in zip(steps, others, Phis, Omegas, strict=True)
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("distribution", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("inverse", ["block_diagonal", "block_tridiagonal"])
def test_undamped_steps_coincide_through_the_linear_map(inverse, distribution, seed):
    assert largest_mismatch(distribution, inverse, seed) < 1e-7


@pytest.mark.parametrize("inverse", ["block_diagonal", "block_tridiagonal"])
def test_damping_breaks_the_invariance(inverse):
    """The test above has teeth: it fails as soon as factors are damped."""
    assert largest_mismatch("gaussian", inverse, 0, gamma=0.5) > 1e-2


def test_the_two_inverses_differ():
    plain, _, _, _ = two_nets(0)
    inputs, targets = data("gaussian", 0)
    one, other = (
        undamped_step(plain, "gaussian", inputs, targets, inverse)
        for inverse in ("block_diagonal", "block_tridiagonal")
    )
    assert (one[0] - other[0]).norm() > 1e-2 * one[0].norm()
