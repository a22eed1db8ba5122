"""Oracle 10: on a fixed quadratic, the (alpha, mu) iterates are preconditioned conjugate gradients.

First the 2x2 system alone, with any preconditioner. Then the whole optimizer on one linear layer
with squared error: this is a quadratic whose exact-type factors, and with them the preconditioner,
do not change.
"""

import pytest
import torch

from kfac_dist import KFAC
from kfac_dist.core.step.plane_model import PlaneModel
from tests.oracles.truth import dense
from tests.oracles.truth.cases import Case

TOLERANCE = 1e-7


def random_spd(size, seed, ridge):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2 * size, size, generator=generator, dtype=torch.float64)
    return rows.T @ rows / size + ridge * torch.eye(size, dtype=torch.float64)


def plane_model(fisher, gradient, Delta, previous):
    return PlaneModel(
        slopes=((gradient @ Delta).item(), (gradient @ previous).item()),
        squares=(
            (Delta @ Delta).item(),
            (Delta @ previous).item(),
            (previous @ previous).item(),
        ),
        fisher=(
            (Delta @ fisher @ Delta).item(),
            (Delta @ fisher @ previous).item(),
            (previous @ fisher @ previous).item(),
        ),
    )


@pytest.mark.parametrize("ridge", [0.0, 0.5, 10.0])
@pytest.mark.parametrize("size", [2, 5, 12])
def test_the_plane_solution_is_a_conjugate_gradient_step(size, ridge):
    fisher, preconditioner = random_spd(size, 1, 0.1), random_spd(size, 2, 0.3)
    matrix = fisher + ridge * torch.eye(size, dtype=torch.float64)
    right_side = torch.linspace(1.0, 2.0, size, dtype=torch.float64)
    theta = torch.zeros(size, dtype=torch.float64)
    truth = dense.preconditioned_cg(
        matrix, right_side, theta, lambda v: torch.linalg.solve(preconditioner, v), size
    )
    previous = torch.zeros_like(theta)
    for expected in truth:
        gradient = matrix @ theta - right_side
        Delta = -torch.linalg.solve(preconditioner, gradient)
        model = plane_model(fisher, gradient, Delta, previous)
        alpha, mu = model.minimum(ridge)
        previous = alpha * Delta + mu * previous
        theta = theta + previous
        torch.testing.assert_close(theta, expected, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(theta, torch.linalg.solve(matrix, right_side))


@pytest.mark.parametrize("gamma", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("bias", [True, False])
def test_the_optimizer_on_a_linear_layer_is_preconditioned_cg(gamma, bias):
    l2 = 0.01
    case = Case(
        widths=(6, 2),
        activation="linear",
        distribution="gaussian",
        bias=bias,
        num_cases=15,
        seed=3,
    )
    model, (inputs, targets) = case.model(), case.data()
    start = dense.parameter_vector(model)
    matrix = dense.fisher("gaussian", model, inputs)
    matrix = matrix + l2 * torch.eye(len(start), dtype=torch.float64)
    gradient = dense.per_case_gradients("gaussian", model, inputs, targets).mean(dim=0) + l2 * start
    order = dense.layer_indices(model, "0", "rows")
    A = dense.input_factor(model, "0", inputs)
    block = dense.damped_block(A, torch.eye(2, dtype=torch.float64), gamma, "rows")

    def solve(vector):
        solution = torch.empty_like(vector)
        solution[order] = torch.linalg.solve(block, vector[order])
        return solution

    truth = dense.preconditioned_cg(matrix, matrix @ start - gradient, start, solve, 6)
    optimizer = KFAC(
        model,
        distribution="gaussian",
        fisher_type="exact",
        damping={"initial": 1e-30, "adapt_period": None, "min": 1e-30},
        gamma={"initial": gamma, "adapt_period": None},
        l2=l2,
        statistics_fraction=1.0,
        fisher_fraction=1.0,
    )
    for expected in truth:
        optimizer.step(inputs, targets)
        torch.testing.assert_close(
            dense.parameter_vector(model), expected, rtol=TOLERANCE, atol=TOLERANCE
        )
