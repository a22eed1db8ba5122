"""K-FAC in plain steps with dense matrices, to compare the library's optimizer with.

The Fisher of the whole model is a dense matrix, and so is every layer's damped Kronecker block and
its inverse. The statistics are exact-type, so that sampling adds no noise. Numbers in brackets are
sections of the paper, arXiv:1503.05671.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.oracles.truth import dense
from tests.oracles.truth.cases import layer_names


@dataclass(kw_only=True)
class SlowOptions:
    step_rule: str = "adaptive"
    l2: float = 1e-3
    damping: float = 1.0
    damping_period: int | None = 2
    rho_includes_damping: bool = False
    gamma: float | None = None
    gamma_period: int | None = 4
    inverse_period: int = 5
    factor_decay: float = 0.95
    statistics_fraction: float = 1.0
    fisher_fraction: float = 1.0
    pi_norm: str = "trace"
    lr: float = 0.3
    momentum: float = 0.9
    norm_constraint: float = 0.01
    averaging_decay: float = 0.9
    averaging_start: int = 5


@dataclass(kw_only=True)
class SlowResult:
    loss: float
    alpha: float
    mu: float
    damping: float
    gamma: float
    predicted_change: float
    reduction_ratio: float | None
    parameters: Tensor
    averaged: Tensor | None


class SlowKFAC:
    def __init__(self, distribution: str, model: nn.Sequential, options: SlowOptions) -> None:
        self.name, self.model, self.o = distribution, model, options
        self.layers = layer_names(model)
        self.k = 0
        self.damping = options.damping
        self.gamma = options.gamma or math.sqrt(options.damping + options.l2)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.inverses: dict[str, Tensor] = {}
        self.previous = torch.zeros(dense.num_parameters(model), dtype=torch.float64)
        self.averaged: Tensor | None = None

    def step(self, inputs: Tensor, targets: Tensor) -> SlowResult:
        o = self.o
        self.k += 1
        theta = dense.parameter_vector(self.model)
        loss_before = dense.objective(self.name, self.model, inputs, targets, 0.0)
        h_before = dense.objective(self.name, self.model, inputs, targets, o.l2)
        cases = dense.per_case_gradients(self.name, self.model, inputs, targets)
        grad = cases.mean(dim=0) + o.l2 * theta
        self.update_factors(some_rows(inputs, o.statistics_fraction))
        fisher = dense.fisher(self.name, self.model, some_rows(inputs, o.fisher_fraction))

        best = None
        for gamma, inverses in self.candidates():
            delta, alpha, mu = self.propose(grad, fisher, inverses)
            value = self.model_change(grad, fisher, delta, self.damping + o.l2)
            if best is None or value < best[0]:
                best = (value, delta, alpha, mu, gamma, inverses)
        value, delta, alpha, mu, self.gamma, self.inverses = best

        write_parameters(self.model, theta + delta)
        self.previous = delta
        rho = None
        if o.damping_period and self.k % o.damping_period == 0:
            h_after = dense.objective(self.name, self.model, inputs, targets, o.l2)
            ridge = o.l2 + self.damping if o.rho_includes_damping else o.l2
            predicted = self.model_change(grad, fisher, delta, ridge)
            # There is no ratio if the model itself predicts a rise, as fixed momentum can cause.
            rho = (h_after - h_before) / predicted if predicted < 0 else None
            rose = not h_after < h_before
            self.adapt_damping(-1.0 if rho is None or rose else rho)
        self.average(theta + delta)
        return SlowResult(
            loss=loss_before,
            alpha=alpha,
            mu=mu,
            damping=self.damping,
            gamma=self.gamma,
            predicted_change=value,
            reduction_ratio=rho,
            parameters=theta + delta,
            averaged=self.averaged,
        )

    def update_factors(self, inputs: Tensor) -> None:
        """[5] Running averages of A and G, eps = min(1 - 1/k, factor_decay)."""
        epsilon = min(1 - 1 / self.k, self.o.factor_decay)
        for layer in self.layers:
            A = dense.input_factor(self.model, layer, inputs)
            G = dense.exact_output_factor(self.name, self.model, layer, inputs)
            if self.k > 1:
                old_A, old_G = self.factors[layer]
                A = epsilon * old_A + (1 - epsilon) * A
                G = epsilon * old_G + (1 - epsilon) * G
            self.factors[layer] = (A, G)

    def candidates(self) -> list[tuple[float, dict[str, Tensor]]]:
        """[6.6, 8] The inverses in use, or new ones, or new ones at three values of gamma."""
        o, k = self.o, self.k
        search = bool(o.step_rule == "adaptive" and o.gamma_period and k % o.gamma_period == 0)
        if not (search or k <= 3 or k % o.inverse_period == 0):
            return [(self.gamma, self.inverses)]
        gammas = [self.gamma]
        if search:
            w2 = math.sqrt(19 / 20) ** o.gamma_period
            gammas += [w2 * self.gamma, self.gamma / w2]
        return [(gamma, self.invert(gamma)) for gamma in gammas]

    def invert(self, gamma: float) -> dict[str, Tensor]:
        """[4.2, 6.3] The dense inverse of each layer's damped block, `vec` by rows."""
        blocks = {}
        for layer in self.layers:
            A, G = self.factors[layer]
            block = dense.damped_block(A, G, gamma, "rows", self.o.pi_norm)
            blocks[layer] = torch.linalg.inv(block)
        return blocks

    def propose(
        self, grad: Tensor, fisher: Tensor, inverses: dict[str, Tensor]
    ) -> tuple[Tensor, float, float]:
        """[6.4, 7] The update along the preconditioned gradient and the previous update."""
        Delta = -self.precondition(grad, inverses)
        if self.o.step_rule == "norm_constraint":
            slope = -(Delta @ grad).item()
            alpha = min(self.o.lr, math.sqrt(self.o.norm_constraint / slope))
            mu = self.o.momentum
        else:
            alpha, mu = self.solve_plane(grad, fisher, Delta)
        return alpha * Delta + mu * self.previous, alpha, mu

    def precondition(self, grad: Tensor, inverses: dict[str, Tensor]) -> Tensor:
        result = torch.zeros_like(grad)
        for layer in self.layers:
            at = dense.layer_indices(self.model, layer, "rows")
            result[at] = inverses[layer] @ grad[at]
        return result

    def solve_plane(self, grad: Tensor, fisher: Tensor, Delta: Tensor) -> tuple[float, float]:
        matrix = fisher + (self.damping + self.o.l2) * torch.eye(len(grad), dtype=grad.dtype)
        if self.k == 1:
            return (-(grad @ Delta) / (Delta @ matrix @ Delta)).item(), 0.0
        plane = torch.stack([Delta, self.previous], dim=1)
        solution = torch.linalg.solve(plane.T @ matrix @ plane, -plane.T @ grad)
        return solution[0].item(), solution[1].item()

    def model_change(self, grad: Tensor, fisher: Tensor, delta: Tensor, ridge: float) -> float:
        """M(delta) - M(0)."""
        quadratic = delta @ fisher @ delta + ridge * (delta @ delta)
        return (grad @ delta + 0.5 * quadratic).item()

    def adapt_damping(self, rho: float) -> None:
        """[6.5] The Levenberg-Marquardt rule; gamma follows if it is not searched for."""
        w1 = (19 / 20) ** self.o.damping_period
        if rho > 3 / 4:
            self.damping *= w1
        elif rho < 1 / 4:
            self.damping /= w1
        if self.o.step_rule == "norm_constraint" or self.o.gamma_period is None:
            self.gamma = math.sqrt(self.damping + self.o.l2)

    def average(self, theta: Tensor) -> None:
        """[13] Iterate averaging, from a given step on."""
        j = self.k - self.o.averaging_start + 1
        if j == 1:
            self.averaged = theta
        elif j > 1:
            xi = min(1 - 1 / j, self.o.averaging_decay)
            self.averaged = xi * self.averaged + (1 - xi) * theta


def some_rows(values: Tensor, fraction: float) -> Tensor:
    """Return ceil(fraction N) rows, spread evenly."""
    count = math.ceil(fraction * len(values))
    return torch.stack([values[j * len(values) // count] for j in range(count)])


def write_parameters(model: nn.Module, vector: Tensor) -> None:
    start = 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(vector[start : start + parameter.numel()].reshape(parameter.shape))
            start += parameter.numel()
