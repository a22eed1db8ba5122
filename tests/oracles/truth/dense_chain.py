"""The chain approximation written out densely in float64, apart from the library.

Matrices over all layers stack the layers' `vec` by columns, as the paper does. Products are
written with full matrices over elements, without using that they are Kronecker products.
"""

import torch
from torch import Tensor

from tests.oracles.truth import dense


def joint_factors(rows_per_layer: list[int], num_cases: int, seed: int) -> dict:
    """Return {(i, j): E[r_i r_j^T]} of correlated rows, for all i, j."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(num_cases, 6, generator=generator, dtype=torch.float64)
    rows = []
    for size in rows_per_layer:
        mixing = torch.randn(6, size, generator=generator, dtype=torch.float64)
        noise = torch.randn(num_cases, size, generator=generator, dtype=torch.float64)
        rows.append(shared @ mixing / 6**0.5 + 0.7 * noise)
    return {
        (i, j): left.T @ right / num_cases
        for i, left in enumerate(rows)
        for j, right in enumerate(rows)
    }


def approximated_blocks(A: dict, G: dict, gamma: float, norm: str = "trace") -> dict:
    """Return {(i, j): A_ij (x) G_ij} with damped diagonal factors and undamped cross factors."""
    blocks = {}
    for i, j in A:
        if i == j:
            blocks[i, i] = dense.damped_block(A[i, i], G[i, i], gamma, "columns", norm)
        else:
            blocks[i, j] = dense.kron(A[i, j], G[i, j])
    return blocks


def chain_covariance(blocks: dict, num_layers: int) -> Tensor:
    """Return Fhat, the covariance of the Markov chain with these tridiagonal blocks.

    Blocks further out follow from their neighbours: `F_ij = F_{i,i+1} F_{i+1,i+1}^-1 F_{i+1,j}`.
    """
    full = {}
    for i in range(num_layers):
        full[i, i] = blocks[i, i]
    for distance in range(1, num_layers):
        for i in range(num_layers - distance):
            j = i + distance
            if distance == 1:
                full[i, j] = blocks[i, j]
            else:
                step = blocks[i, i + 1] @ torch.linalg.inv(blocks[i + 1, i + 1])
                full[i, j] = step @ full[i + 1, j]
            full[j, i] = full[i, j].T
    rows = [torch.cat([full[i, j] for j in range(num_layers)], dim=1) for i in range(num_layers)]
    return torch.cat(rows)


def stack(matrices: list[Tensor]) -> Tensor:
    """Return the columns of all matrices as one vector."""
    return torch.cat([matrix.T.flatten() for matrix in matrices])


def unstack(vector: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """Return the matrices [rows, columns] that `stack` has put into a vector."""
    pieces, start = [], 0
    for rows, columns in shapes:
        piece = vector[start : start + rows * columns]
        pieces.append(piece.reshape(columns, rows).T)
        start += rows * columns
    return pieces
