"""The other structures of the inverse for `SlowKFAC`, with dense matrices throughout."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracles.truth import dense, dense_chain
from tests.oracles.truth.slow_kfac import SlowKFAC


def cross_input_factor(model, layers, inputs) -> Tensor:
    """Return the mean over cases of the mean over positions of abar abar'^T of two layers."""
    total = 0.0
    for n in range(len(inputs)):
        rows, next_rows = (dense.layer_input(model, layer, inputs[n : n + 1]) for layer in layers)
        pairs = list(zip(rows, next_rows, strict=True))
        total = total + sum(torch.outer(a, b) for a, b in pairs) / len(pairs)
    return total / len(inputs)


def cross_output_factor(name, model, layers, inputs) -> Tensor:
    """Return the exact-type cross factor: the mean of the sum over positions of J^T H J'."""
    total = 0.0
    for n in range(len(inputs)):
        case = inputs[n : n + 1]
        H = dense.output_fisher(name, model(case)[0].detach())
        J, next_J = (dense.layer_output_jacobian(model, layer, case) for layer in layers)
        for position in range(J.shape[1]):
            total = total + J[:, position].T @ H @ next_J[:, position]
    return total / len(inputs)


class SlowChainKFAC(SlowKFAC):
    """[4.3] The inverse of the dense covariance of the chain, `vec` by columns."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.crosses: list[tuple[Tensor, Tensor]] = []

    def update_factors(self, inputs: Tensor) -> None:
        super().update_factors(inputs)
        new = [
            (
                cross_input_factor(self.model, layers, inputs),
                cross_output_factor(self.name, self.model, layers, inputs),
            )
            for layers in zip(self.layers, self.layers[1:], strict=False)
        ]
        eps = min(1 - 1 / self.k, self.o.factor_decay)
        self.crosses = [
            tuple(eps * o + (1 - eps) * b for o, b in zip(old, batch, strict=True))
            for old, batch in zip(self.crosses or new, new, strict=True)
        ]

    def invert(self, gamma: float) -> Tensor:
        A, G = {}, {}
        for i, layer in enumerate(self.layers):
            A[i, i], G[i, i] = self.factors[layer]
        for i, (cross_A, cross_G) in enumerate(self.crosses):
            A[i, i + 1], G[i, i + 1] = cross_A, cross_G
        blocks = dense_chain.approximated_blocks(A, G, gamma, self.o.pi_norm)
        return torch.linalg.inv(dense_chain.chain_covariance(blocks, len(self.layers)))

    def precondition(self, grad: Tensor, inverses: Tensor) -> Tensor:
        at = [dense.layer_indices(self.model, layer, "columns") for layer in self.layers]
        result = torch.zeros_like(grad)
        result[torch.cat(at)] = inverses @ grad[torch.cat(at)]
        return result


@dataclass(frozen=True, kw_only=True)
class SlowEigen:
    """The inverse of a layer: a dense basis over `vec` by columns, and the moments in it."""

    basis: Tensor
    moments: Tensor
    num_updates: int
    gamma: float


class SlowEKFAC(SlowKFAC):
    """[George et al.] Moments of every batch in a basis that is refreshed with the inverses."""

    def update_factors(self, inputs: Tensor) -> None:
        super().update_factors(inputs)
        fisher = dense.fisher(self.name, self.model, inputs)
        updated = {}
        for layer, old in self.inverses.items():
            block = dense.layer_block(fisher, self.model, layer, "columns")
            batch = (old.basis.T @ block @ old.basis).diagonal()
            k = old.num_updates + 1
            eps = min(1 - 1 / k, self.o.factor_decay)
            moments = eps * old.moments + (1 - eps) * batch
            updated[layer] = SlowEigen(
                basis=old.basis, moments=moments, num_updates=k, gamma=old.gamma
            )
        self.inverses = updated

    def invert(self, gamma: float) -> dict[str, SlowEigen]:
        inverses = {}
        for layer in self.layers:
            A, G = self.factors[layer]
            basis = dense.kron(torch.linalg.eigh(A)[1], torch.linalg.eigh(G)[1])
            curvature, k = dense.kron(A, G), 1
            if layer in self.inverses:
                old = self.inverses[layer]
                curvature = old.basis @ torch.diag(old.moments) @ old.basis.T
                k = old.num_updates
            moments = (basis.T @ curvature @ basis).diagonal()
            inverses[layer] = SlowEigen(basis=basis, moments=moments, num_updates=k, gamma=gamma)
        return inverses

    def precondition(self, grad: Tensor, inverses: dict[str, SlowEigen]) -> Tensor:
        result = torch.zeros_like(grad)
        for layer, inverse in inverses.items():
            at = dense.layer_indices(self.model, layer, "columns")
            moments = torch.diag(inverse.moments + inverse.gamma**2)
            damped = inverse.basis @ moments @ inverse.basis.T
            result[at] = torch.linalg.solve(damped, grad[at])
        return result
